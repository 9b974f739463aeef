"""Every method through the one train step: its conventions, and devices agree."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import ONE, gradients_on
from tiny import (
    METHODS,
    assert_trees_close,
    leaves,
    method_config,
    random_source,
    ready_views,
)

from ssl_jax import losses
from ssl_jax.config import Schedule, load_config, view
from ssl_jax.errors import UserError
from ssl_jax.methods import make_method
from ssl_jax.methods.base import apply_networks
from ssl_jax.step import example_batch

CONFIGS = Path(__file__).parents[2] / "configs"


@functools.cache
def on_one_device(method):
    return gradients_on(method_config(method), random_source(), "shard_map", ONE)


@pytest.mark.parametrize(
    ("method", "mode"),
    [
        pytest.param(method, mode, marks=[pytest.mark.long] * (mode == "pmap" and method != "moco"))
        for method in METHODS
        for mode in ("shard_map", "pmap")
    ],
)
def test_gradients_agree_between_1_and_8_devices(method, mode):
    source = random_source()
    expected = on_one_device(method)
    actual = gradients_on(method_config(method), source, mode, jax.devices())
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    # A bias before BatchNorm has no gradient but rounding.
    assert_trees_close(actual, expected, rtol=1e-3, atol=1e-5)
    assert max(np.abs(g).max() for g in jax.tree.leaves(expected[1])) > 1e-4


@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_eight_splits_on_one_device_equal_eight_devices(method):
    """Loss, gradients and statistics; SimCLR's splits have both views of their images."""
    config, source = method_config(method), random_source()
    config.moco.shuffle = False
    config.model.bn_group_size = 1
    expected = gradients_on(config, source, "shard_map", jax.devices())
    config.model.bn_splits = 8
    actual = gradients_on(config, source, "shard_map", ONE)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    assert_trees_close(actual, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_methods_follow_the_protocol_conventions(method):
    """By shapes: nothing is computed."""
    config = method_config(method)
    made = make_method(config, Schedule(1, 10))
    batch, key = example_batch(config), jax.random.key(0)
    params, state = jax.eval_shape(made.init, key, batch)
    outputs, stats = jax.eval_shape(made.forward, params, state, batch, key)
    for name, leaf in outputs.items():
        assert leaf.shape[0] == 2, name
    assert outputs["embedding"].shape == (2, made.encoder.num_features)
    assert jax.tree.structure(stats) == jax.tree.structure(state["batch_stats"])
    loss, _ = jax.eval_shape(made.loss, params, outputs, state, batch, jnp.int32(0))
    assert loss.shape == () and loss.dtype == jnp.float32
    assert jax.tree.structure(made.param_groups(params)) == jax.tree.structure(params)
    assert "encoder" in params and "encoder" in state["batch_stats"]
    evaluated, own = made.evaluated(params, state)
    assert "encoder" in evaluated and "encoder" in own
    for name in made.target_networks:
        assert name in state["target"] and name in state["batch_stats"]["target"]


@pytest.mark.parametrize("method", ["simclr", "swav"])
def test_separate_views_are_encoded_one_after_the_other(method):
    config = method_config(method)
    config[method].separate_views = True
    made = make_method(config, Schedule(1, 10))
    batch = {"views": ready_views(config, np.arange(4))}
    params, state = jax.jit(made.init)(jax.random.key(0), batch)
    apply = jax.jit(functools.partial(apply_networks, made.networks))
    (outputs, stats), expected = jax.jit(made.forward)(params, state, batch, jax.random.key(1)), []
    running = state["batch_stats"]
    for images in batch["views"]:
        (_, z), running = apply(params, running, images)
        expected.append(z)
    z = jnp.stack(expected, axis=1)
    z = losses.normalize(z) if method == "swav" else z
    np.testing.assert_allclose(outputs["projection"], z, rtol=1e-4, atol=1e-5)
    assert_trees_close(stats, running)


# The layers of the heads of `recipes.lightly_cifar10_config` and `solo_cifar10_config`.
HEADS = {
    "simclr:lightly": ("projector", "dense1 bn1 dense2 bn2"),
    "simclr:solo": ("projector", "dense1-bias dense2-bias"),
    "moco:lightly": ("projector", "dense1-bias dense2-bias"),
    "byol:lightly": ("predictor", "dense1 bn1 dense2-bias"),
    "byol:solo": ("predictor", "dense1-bias bn1 dense2-bias"),
    "simsiam:lightly": ("projector", "dense1 bn1 dense2 bn2"),
    "simsiam:solo": ("projector", "dense1 bn1 dense2 bn2 dense3-bias"),
    "dino:lightly": ("projector", "dense1 bn1 dense2-bias"),
    "dino:solo": ("projector", "dense1-bias dense2-bias dense3-bias"),
    "barlow:lightly": ("projector", "dense1 bn1 dense2-bias"),
    "barlow:solo": ("projector", "dense1-bias bn1 dense2-bias bn2 dense3-bias"),
    "vicreg:solo": ("projector", "dense1-bias bn1 dense2-bias bn2 dense3-bias"),
    "swav:lightly": ("projector", "dense1 bn1 dense2-bias"),
    "swav:solo": ("projector", "dense1-bias bn1 dense2-bias"),
    "mocov3:solo": ("predictor", "dense1 bn1 dense2"),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_lightly_and_solo_learn(name):
    method, variant = name.split(":")
    config = load_config(f"{CONFIGS}/{method}_cifar10.py:{variant}")
    made = make_method(config, Schedule(195, 195))
    params, _ = jax.eval_shape(made.init, jax.random.key(0), example_batch(config))
    network, layers = HEADS[name]
    expected = dict(each.partition("-")[::2] for each in layers.split())
    assert params[network].keys() == expected.keys()
    for layer, bias in expected.items():
        if layer.startswith("dense"):
            assert ("bias" in params[network][layer]) == bool(bias)
        else:
            assert params[network][layer].keys() == {"scale", "bias"}


@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_heads_start_as_torchs_linear_layers_if_configured(name):
    config = method_config(name)
    config.model.head_init = "torch"
    config.byol.out_bias = True
    params, _ = jax.jit(make_method(config, Schedule(1, 10)).init)(
        jax.random.key(0), example_batch(config)
    )
    for layer, leaf in (("dense1", "kernel"), ("dense2", "kernel"), ("dense2", "bias")):
        if leaf not in params["projector"][layer]:
            continue
        bound = params["projector"][layer]["kernel"].shape[0] ** -0.5
        largest = np.abs(params["projector"][layer][leaf]).max()
        assert 0.7 * bound < largest <= bound


def test_byols_target_starts_as_a_copy_if_configured():
    config = method_config("byol")
    for init, equal in (("copy", True), ("independent", False)):
        config.byol.target_init = init
        made = make_method(config, Schedule(1, 10))
        params, state = jax.jit(made.init)(jax.random.key(0), example_batch(config))
        for network in state["target"]:
            kernels = [t[network] for t in (params, state["target"])]
            first, second = (jax.tree.leaves(t)[-1] for t in kernels)
            assert np.array_equal(first, second) == equal


def test_simclr_without_projector_uses_the_features():
    config = method_config("simclr_memory")
    config.simclr.layers = 0
    made = make_method(config, Schedule(1, 10))
    batch = example_batch(config)
    params, state = made.init(jax.random.key(0), batch)
    outputs, _ = made.forward(params, state, batch, jax.random.key(1))
    np.testing.assert_array_equal(outputs["projection"][:, 0], outputs["embedding"])
    assert not jax.tree.leaves(params["projector"])
    _, updated = made.update(params, outputs, state, jnp.int32(0))
    assert updated["queue"].shape == (config.simclr.memory_bank, made.encoder.num_features)


def test_unknown_method_is_refused_with_a_suggestion():
    config = method_config("simclr")
    config.method = "mocoo"
    with pytest.raises(UserError, match="'mocoo'. Did you mean 'moco'"):
        make_method(config, Schedule(1, 10))


def test_batch_stats_keep_the_target_leaves():
    # A method that returned other leaves would silently lose statistics from the checkpoint.
    config = method_config("byol")
    made = make_method(config, Schedule(1, 10))
    _, state = made.init(jax.random.key(0), example_batch(config))
    assert any("target" in name for name in leaves(state["batch_stats"]))


@pytest.mark.parametrize(
    "method", ["simclr", "moco", "byol", "simsiam", "mocov3", "barlow", "vicreg", "supcon"]
)
@pytest.mark.parametrize("sizes", [(8,), (8, 8, 8), (8, 6)])
def test_two_view_methods_refuse_other_view_configs(method, sizes):
    config = method_config(method)
    config.views = {f"view{i}": view(size=size) for i, size in enumerate(sizes)}
    with pytest.raises(UserError, match="pairs two of one size"):
        make_method(config, Schedule(1, 10))
