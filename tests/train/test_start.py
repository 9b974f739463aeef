"""The train state is in each device's memory once, however a run starts."""

import jax
import numpy as np
import pytest
from tiny import (
    assert_replicated,
    leaves,
    method_config,
    random_source,
    share_steps,
    with_whole_images,
)

import ssl_jax.memory
from ssl_jax.errors import UserError
from ssl_jax.evals.evaluator import Evaluator
from ssl_jax.interop import initial_weights
from ssl_jax.run.checkpoint import Checkpoints
from ssl_jax.run.folder import write_config
from ssl_jax.run.log import Progress
from ssl_jax.spmd import Spmd
from ssl_jax.train import start
from ssl_jax.train.setup import Setup


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class Memory:
    """Bytes of JAX arrays per device, above those when it was made, and the peak when looked at."""

    def __init__(self):
        self.before, self.seen = self.held(), []

    def held(self):
        held = dict.fromkeys(jax.devices(), 0)
        for array in jax.live_arrays():
            shard = int(np.prod(array.sharding.shard_shape(array.shape))) * array.dtype.itemsize
            for device in array.sharding.addressable_devices:
                held[device] += shard
        return held

    def look(self):
        """Records and returns the bytes on the device that holds most."""
        more = max(held - self.before[device] for device, held in self.held().items())
        self.seen.append(more)
        return more

    def watch(self, monkeypatch, owner, name):
        """Looks before and after each call of a function; returns what was seen before."""
        plain, entered = getattr(owner, name), []

        def watched(*args, **options):
            entered.append(self.look())
            result = plain(*args, **options)
            self.look()
            return result

        monkeypatch.setattr(owner, name, watched)
        return entered


@pytest.fixture
def setup_of(monkeypatch):
    """Makes a run's setup: BYOL with Adam, so that a state is five times the parameters."""
    blank = np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr(
        Evaluator, "view_grid", lambda *args: blank
    )  # whose program isn't looked at
    share_steps(monkeypatch)

    def make(**changes):
        config = with_whole_images(method_config("byol"))
        config.optim.name = "adam"
        config.byol.update(hidden=256, out=32)  # 0.4 MB, much more than the constants of tracing
        config.update_from_flattened_dict(changes)
        return Setup(config, train=random_source(64))

    return make


def started(setup, workdir):
    workdir.mkdir(exist_ok=True)
    if not (workdir / "config.json").exists():
        write_config(workdir, setup.config, "")
    run, state = start.start_run(setup, workdir, Progress(verbosity="quiet"))
    with run.closing():
        return run, state


def saved(setup, workdir, step, value):
    """Writes a checkpoint of a state whose arrays have one value, from the host."""
    workdir.mkdir(exist_ok=True)
    write_config(workdir, setup.config, "")
    shapes = jax.eval_shape(setup.program.init)
    state = jax.tree.map(lambda x: np.full(x.shape, value, x.dtype), shapes)
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(step, state)
    checkpoints.close()
    return state


def test_new_state_is_initialized_on_all_devices_at_once(setup_of, tmp_path, monkeypatch):
    setup = setup_of()
    memory = Memory()
    monkeypatch.setattr(Spmd, "replicate", lambda self, tree: {})  # the data; the state needs none
    memory.watch(monkeypatch, start, "load_initial_weights")
    run, state = started(setup, tmp_path)
    memory.look()
    assert 2**18 < nbytes(state) <= max(memory.seen) < 1.05 * nbytes(state)
    assert_replicated(state)
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.size]
    assert {leaf.sharding for leaf in arrays} == {setup.spmd.sharding("replicated")}
    for device in range(2):  # so that the state can be donated
        shards = (leaf.addressable_shards[device].data for leaf in arrays)
        assert len({shard.unsafe_buffer_pointer() for shard in shards}) == len(arrays)
    encoder = leaves(run.untrained["params"]["encoder"])
    own = leaves(state.params["encoder"])
    assert encoder.keys() == own.keys() and all((encoder[k] == own[k]).all() for k in own)


def test_initial_state_is_freed_before_a_checkpoint_is_restored(setup_of, tmp_path, monkeypatch):
    setup = setup_of()
    written = saved(setup, tmp_path, 1, 3)
    data = nbytes(setup.train.device_data())
    memory = Memory()
    entered = memory.watch(monkeypatch, Checkpoints, "restore")
    run, state = started(setup, tmp_path)
    memory.look()
    assert run.start == 1 and all((leaf == 3).all() for leaf in leaves(state).values())
    assert_replicated(state)
    size = nbytes(written)
    assert entered[0] < data + 0.02 * size
    assert max(memory.seen) < data + 1.05 * size
    # The baseline of the final evaluation outlives the initial state.
    kernels = [v for k, v in leaves(run.untrained["params"]).items() if "kernel" in k]
    assert kernels and all(0 < np.abs(kernel).mean() < 1 for kernel in kernels)


@pytest.mark.parametrize("kind", ["weights", "all"])
def test_loaded_weights_take_the_place_of_the_initial_ones(setup_of, tmp_path, monkeypatch, kind):
    first = setup_of()
    saved(first, tmp_path / "first", 1, 3)
    path = {"init_from.path": str(tmp_path / "first"), "init_from.state": kind}
    setup = setup_of(**path, **{"init_from.heads": True})
    data = nbytes(setup.train.device_data())
    memory = Memory()
    memory.watch(monkeypatch, initial_weights, "restore_state")
    memory.watch(monkeypatch, jax, "make_array_from_callback")
    _, state = started(setup, tmp_path / "second")
    memory.look()
    assert len(memory.seen) > 10 and max(memory.seen) < data + 1.05 * nbytes(state)
    for tree in (state.params, state.method_state["target"]):
        assert all((leaf == 3).all() for leaf in leaves(tree).values())
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert_replicated(state)


def test_what_cannot_fit_in_the_devices_memory_is_refused_before_it_is_made(
    setup_of, tmp_path, monkeypatch
):
    largest = r"largest array is \['state'\].params\['predictor'\]\['dense1'\]\['kernel'\] \[32, "
    with pytest.raises(UserError, match=rf"TiB on each, which has .*{largest}2000000000\]"):
        started(setup_of(**{"byol.hidden": 2_000_000_000}), tmp_path / "large")
    setup = setup_of()
    size = nbytes(jax.eval_shape(setup.program.init)) + nbytes(setup.train.device_data())
    size *= len(jax.devices())
    monkeypatch.setattr(ssl_jax.memory, "host_memory", lambda: size)
    started(setup, tmp_path / "fits")
    monkeypatch.setattr(ssl_jax.memory, "host_memory", lambda: size - 1)
    with pytest.raises(UserError, match=rf"KiB on each, which has .*{largest}256\]"):
        started(setup_of(), tmp_path / "small")
