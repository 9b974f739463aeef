import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_trees_close, make_step, method_config, random_source, ready_views

from ssl_jax.checkpoint import Checkpoints
from ssl_jax.data.index import Index
from ssl_jax.errors import UserError
from ssl_jax.spmd import make_spmd


def state_of(value):
    return {"step": jnp.int32(value), "w": jnp.full((4,), value, jnp.float32), "extra": {}}


def test_a_state_comes_back_bit_for_bit_with_its_placement(tmp_path):
    spmd = make_spmd()
    state = spmd.replicate({"w": np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)})
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(7, state)
    checkpoints.close()
    again = Checkpoints(tmp_path / "c")
    assert again.latest_step == 7
    like = jax.tree.map(jnp.zeros_like, state)
    like = spmd.replicate(like)
    restored = again.restore(7, like)
    np.testing.assert_array_equal(restored["w"], state["w"])
    assert restored["w"].sharding == like["w"].sharding
    again.close()


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step, knn in [(1, 0.5), (2, 0.9), (3, 0.6), (4, None), (5, 0.7), (6, 0.1)]:
        checkpoints.save(step, state_of(step), knn)
    checkpoints.wait()
    assert checkpoints.steps == [2, 5, 6]
    checkpoints.close()


def test_no_checkpoint_is_no_step(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.latest_step is None and checkpoints.steps == []
    checkpoints.close()


def test_a_checkpoint_of_other_shapes_is_refused_in_one_sentence(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, state_of(1))
    checkpoints.wait()
    with pytest.raises(UserError, match="checkpoint of step 1 .* can't be read") as caught:
        checkpoints.restore(1, {"step": jnp.int32(0), "other": jnp.zeros(3)})
    assert "\n" not in str(caught.value)
    checkpoints.close()


@pytest.mark.parametrize("method", ["moco", "swav"])
def test_a_run_goes_on_with_fewer_devices_and_with_more(method, tmp_path):
    """Two steps on each number of devices, from checkpoint to checkpoint; queues are in use."""
    config, source = method_config(method), random_source(256)
    config.model.bn_group = 0
    config.optim.update(warmup_epochs=0.0, frozen_steps=0, lr=0.1)
    config.swav.queue_from_epoch = 0.0
    index = Index(source.num_examples, config.batch_size, config.seed)
    made = {}

    def on(devices):
        if devices not in made:
            spmd = make_spmd(devices=jax.devices()[:devices])
            step, like = make_step(config, spmd, source, lambda raw, resident, key: raw)[1:3]
            made[devices] = spmd, step, like
        return made[devices]

    def steps(devices, state, numbers):
        spmd, step, _ = on(devices)
        losses = []
        for number in numbers:
            ids = index.ids(number)
            batch = {"id": ids, "label": source.labels[ids], "views": ready_views(config, ids)}
            state, metrics = step(state, spmd.place_batch(batch), {})
            losses.append(float(metrics["loss"]))
        return state, losses

    def copied(devices):
        return jax.tree.map(jnp.copy, on(devices)[2])

    whole, expected = steps(8, copied(8), range(10))
    state, losses = steps(8, copied(8), range(2))
    for number, devices in enumerate((4, 2, 1, 8), start=1):
        folder = tmp_path / str(number)
        for read_only in (False, True):
            checkpoints = Checkpoints(folder, read_only=read_only)
            if not read_only:
                checkpoints.save(2 * number, state)
            else:
                state = checkpoints.restore(2 * number, on(devices)[2])
            checkpoints.close()
        state, more = steps(devices, state, range(2 * number, 2 * number + 2))
        losses += more
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    queues = [{k: v for k, v in s.extra.items() if "queue" in k} for s in (state, whole)]
    assert queues[0]
    assert_trees_close(*queues, rtol=1e-2, atol=1e-3)
