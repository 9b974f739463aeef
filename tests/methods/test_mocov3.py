"""MoCo v3: the loss of its algorithm 1, the target's schedule, the frozen patch projection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import leaves, method_config, with_whole_images

from ssl_jax.config import Schedule
from ssl_jax.methods import make_method
from ssl_jax.spmd import AXIS, make_spmd
from ssl_jax.step import example_batch

VIT = {"width": 8, "depth": 1, "heads": 2, "patch": 4, "image_size": 8}


def mocov3(axis_name=None, **options):
    config = with_whole_images(method_config("mocov3"))
    config.mocov3.update(options)
    return make_method(config, Schedule(1, 10), axis_name)


@pytest.mark.parametrize("devices", [1, 8])
def test_loss_equals_the_papers_algorithm(devices):
    method, rng = mocov3(AXIS, temperature=0.5), np.random.default_rng(0)
    query, key = rng.normal(size=(2, 32, 2, 8)).astype(np.float32)
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    spmd = make_spmd(devices=jax.devices()[:devices])
    mapped = spmd.map(
        lambda outputs: method.loss({}, outputs, {}, {}, jnp.int32(0)), ("sharded",), "replicated"
    )
    loss, logs = mapped(spmd.place_batch({"query": query, "key": key}))
    expected, correct = 0.0, []
    for view, other in ((0, 1), (1, 0)):
        q = np.float64(query[:, view])
        logits = q / np.linalg.norm(q, axis=1, keepdims=True) @ key[:, other].T / 0.5
        cross = np.log(np.exp(logits).sum(1)) - np.diagonal(logits)
        expected += 2 * 0.5 * cross.mean()
        correct.append(logits.argmax(1) == np.arange(32))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(logs["contrastive_accuracy"]) == pytest.approx(np.mean(correct), abs=1e-6)


def test_target_starts_as_a_copy_and_follows_with_the_next_steps_decay():
    """The official code moves it before the keys of a step, by that step's place in the run."""
    method = mocov3(ema_decay=0.9)
    params, state = jax.jit(method.init)(jax.random.key(0), example_batch(method.config))
    assert state["target"].keys() == {"encoder", "projector"}
    before = leaves(state["target"])
    for name, leaf in leaves({k: params[k] for k in state["target"]}).items():
        np.testing.assert_array_equal(leaf, before[name])
    moved = jax.tree.map(lambda p: p + 1, params)
    for step in (0, 6, 9):
        decay = 1 - 0.5 * (1 + np.cos(np.pi * (step + 1) / 10)) * (1 - 0.9)
        assert float(method.ema_decay(jnp.int32(step))) == pytest.approx(decay)
        _, after = method.update(moved, {}, state, jnp.int32(step))
        for name, leaf in leaves(after["target"]).items():
            np.testing.assert_allclose(leaf, before[name] + 1 - decay, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("freeze", [True, False])
def test_patch_projection_is_frozen_and_nothing_else(freeze):
    config = method_config("mocov3")
    config.mocov3.freeze_patches = freeze
    found = {}
    for name in ("vit", "resnet"):
        config.model.name = name
        config.model.vit.update(VIT)
        method = make_method(config, Schedule(1, 10))
        params, _ = jax.eval_shape(method.init, jax.random.key(0), example_batch(config))
        labels = leaves(method.param_groups(params))
        found[name] = sorted(path for path, label in labels.items() if label == "frozen")
    of_patches = [f"['encoder']['patch_embed']['{leaf}']" for leaf in ("bias", "kernel")]
    assert found == {"vit": of_patches if freeze else [], "resnet": []}


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, ("dense1 bn1 dense2", "dense1 bn1 dense2")),
        ({"layers": 3}, ("dense1 bn1 dense2 bn2 dense3", "dense1 bn1 dense2")),
    ],
)
def test_heads_have_the_official_layers(options, layers):
    """Without biases; a BatchNorm without parameters ends the projector, and a ViT's predictor."""
    method = mocov3(**options, predictor_bn=bool(options))
    params, state = jax.eval_shape(method.init, jax.random.key(0), example_batch(method.config))
    for name, expected in zip(("projector", "predictor"), layers, strict=True):
        assert sorted(params[name]) == sorted(expected.split())
        assert all(
            set(params[name][layer]) == ({"kernel"} if "dense" in layer else {"scale", "bias"})
            for layer in expected.split()
        )
    last = {"projector": f"bn{method.config.mocov3.layers}", "predictor": "bn2"}
    stats = state["batch_stats"]
    assert last["projector"] in stats["projector"]
    assert (last["predictor"] in stats["predictor"]) == bool(options)
