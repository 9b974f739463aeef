"""`config.init_from.state="all"`: a run that starts from another run's whole state."""

import contextlib

import jax
import numpy as np
import pytest
from tiny import (
    leaves,
    method_config,
    random_source,
    share_steps,
    shared,
    tiny_config,
    with_whole_images,
)

from ssl_jax.config import Schedule
from ssl_jax.errors import UserError
from ssl_jax.interop import initial_weights
from ssl_jax.interop.initial_weights import load_initial_weights, resolve_initial_weights
from ssl_jax.run.folder import write_config
from ssl_jax.run.log import read_metrics
from ssl_jax.step import assemble, init_state
from ssl_jax.train import pretrain

START_AGAIN = ("step", "key", "probe", "nonfinite")


def state_of(config, value):
    """A train state with arrays of one value; nothing is compiled."""

    def make():
        method, optimizer, _ = assemble(config, Schedule(1, 1))
        return jax.eval_shape(lambda: init_state(method, optimizer, config))

    shapes = shared(make, config, "shapes")
    return jax.tree.map(lambda x: np.full(x.shape, value, x.dtype), shapes)


def from_run(config, path="runs/a"):
    config.init_from.update(path=str(path), state="all")
    return config


@pytest.mark.parametrize(
    ("method", "optimizer"), [("moco", "adam"), ("swav", "larc"), ("dino", "adamw")]
)
def test_everything_but_steps_key_and_probe_is_loaded(monkeypatch, method, optimizer):
    config = from_run(method_config(method))
    config.optim.name = optimizer
    initial, source = state_of(config, 0), state_of(config, 7)
    monkeypatch.setattr(initial_weights, "restore_state", lambda path, step: source)
    loaded = leaves(load_initial_weights(initial, config))
    again = {name for name, leaf in loaded.items() if (leaf == 0).all() and leaf.size}
    assert all((leaf == 7).all() for name, leaf in loaded.items() if name not in again)
    top = {name for name in again if name[1:].startswith(START_AGAIN)}
    assert {name.partition("[")[0] for name in top} == {f".{name}" for name in START_AGAIN}
    # What is left are the optimizer's step counts, and the weight decay of the step.
    counts = {"count", "step", "hyperparams['weight_decay']"}
    assert {name.rpartition(".")[2] for name in again - top} <= counts
    assert all(name.startswith(".opt_state") for name in again - top) and again - top
    # Adam's moments are averages over its own count.
    assert optimizer.startswith("adam") == any(
        name.endswith(".count") for name in loaded.keys() - again
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moco.queue": 256}, r"has method_state/queue.* of shape .*config.moco of that run"),
        ({"optim.name": "adam"}, "of shape none and this run|of shape .* and this run none"),
    ],
)
def test_state_of_other_shapes_is_refused(monkeypatch, changes, words):
    config = method_config("moco")
    config.optim.name = "sgd"
    source = state_of(config, 1)
    config.update_from_flattened_dict(changes)
    monkeypatch.setattr(initial_weights, "restore_state", lambda path, step: source)
    with pytest.raises(UserError, match=words):
        load_initial_weights(state_of(config, 0), from_run(config))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("params", r"params/projector/\S+/kernel"),
        ("method_state", r"method_state/\S+"),
        ("opt_state", r"opt_state/\S+"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_state_that_is_not_finite_is_refused_by_name(monkeypatch, part, name, value):
    config = from_run(method_config("moco"))
    source = state_of(config, 1)
    tree = getattr(source, part)
    floats = [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype.kind == "f" and leaf.ndim]
    wrong = jax.tree.map(lambda x: np.full_like(x, value) if x is floats[-1] else x, tree)
    source = source.replace(**{part: wrong})
    monkeypatch.setattr(initial_weights, "restore_state", lambda path, step: source)
    with pytest.raises(UserError, match=f"runs/a has .* NaN or infinite values in {name} of its"):
        load_initial_weights(state_of(config, 0), config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "byol"}, "is a run with method=moco, not byol: set config.method=moco, or"),
        ({"optim.name": "sgd"}, "with optim.name=lars, not sgd: set config.optim.name=lars"),
        ({"init_from.path": ""}, "but config.init_from.path is empty"),
    ],
)
def test_state_of_another_method_or_optimizer_is_refused(tmp_path, changes, words):
    config = method_config("moco")
    write_config(tmp_path, config, "")
    resolve_initial_weights(from_run(config, tmp_path))
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words):
        resolve_initial_weights(config)


def test_any_initial_layer_scale_takes_loaded_scales_but_none_does_not(tmp_path):
    config = method_config("moco")
    config.model.name = "vit"
    config.model.vit.update(width=8, depth=1, heads=1, patch=4, image_size=8, layer_scale=1e-5)
    write_config(tmp_path, config, "")
    config.init_from.path = str(tmp_path)
    for scale in (0.1, 0.0):
        config.model.vit.layer_scale = scale
        refused = pytest.raises(UserError, match="set config.model.vit.layer_scale=1e-05")
        with contextlib.nullcontext() if scale else refused:
            resolve_initial_weights(config)
    assert config.model.vit.layer_scale == 0.0


@pytest.mark.long
def test_run_from_a_whole_state_starts_its_own_schedule_at_step_0(tmp_path, monkeypatch):
    share_steps(monkeypatch)
    data = random_source(64)
    np.savez(
        tmp_path / "images.npz", images=data.images, labels=data.labels, class_names=list("abcd")
    )
    config = with_whole_images(tiny_config(epochs=2.0, method="moco"))
    config.data.update(name="packed", dir=str(tmp_path / "images.npz"))
    config.moco.update(queue=64, out=8)
    first = pretrain(config, tmp_path / "first")
    second = pretrain(from_run(config, tmp_path / "first"), tmp_path / "second")
    assert int(second.state.step) == 4
    rates = [
        [r["learning_rate"] for r in read_metrics(run / "metrics.jsonl") if "learning_rate" in r]
        for run in (tmp_path / "first", tmp_path / "second")
    ]
    assert rates[0] == rates[1] and rates[0][0] == 0  # its own warmup
    losses = [run.metrics["loss"] for run in (first, second)]
    assert losses[0] != losses[1]
    pointer = [name for name in leaves(second.state) if "count" in name]
    assert pointer and all(leaves(second.state)[name] == 4 for name in pointer)
