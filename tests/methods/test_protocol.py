"""Every method through the one train step: devices agree, and the state stays one."""

import jax
import numpy as np
import pytest
import sketches
from test_step import ONE, gradients_on
from tiny import assert_replicated, assert_trees_close, make_step, random_source, tiny_config

from ssl_jax.config import view
from ssl_jax.spmd import make_spmd

METHODS = ("simclr", "moco_sketch", "swav_sketch")


def config_of(method):
    config = tiny_config(method=method)
    if method == "swav_sketch":
        small = view(
            size=6,
            count=2,
            crop={"sampler": "torchvision", "area": (0.1, 0.3), "interpolation": "bilinear"},
            blur={"prob": 0.0},
            gray=0.0,
        )
        first = config.views.view1
        config.views = {"a_large": first, "b_large": first, "c_small": small}
        config.optim.update(name="larc", frozen_steps=2, warmup_epochs=0.0)
    if method == "moco_sketch":
        config.batch_size = 64  # each of 8 devices sends an image to each
    return config


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_agree_between_1_and_8_devices(method, mode):
    source = random_source()
    expected = gradients_on(config_of(method), source, "shard_map", ONE)
    actual = gradients_on(config_of(method), source, mode, jax.devices())
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    assert_trees_close(actual, expected, rtol=5e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_state_stays_the_same_on_all_devices(method):
    source, spmd = random_source(), make_spmd()
    config = config_of(method)
    if method == "moco_sketch":
        config.model.bn_group = 1  # per-device statistics are what would diverge
    _, step, state, resident = make_step(config, spmd, source)
    before = jax.device_get(state)
    for number in range(3):
        ids = np.roll(np.arange(config.batch_size, dtype=np.int32), number)
        batch = spmd.place_batch({"id": ids, "label": source.labels[ids]})
        state, metrics = step(state, batch, resident)
        assert_replicated(state)
        if method == "swav_sketch":
            kernel = np.asarray(state.params["prototypes"]["kernel"])
            np.testing.assert_allclose(np.linalg.norm(kernel, axis=1), 1, rtol=1e-5)
            frozen = np.allclose(kernel, before.params["prototypes"]["kernel"], atol=1e-6)
            assert frozen == (number < 2)
    assert np.isfinite(float(metrics["loss"]))


def test_shuffling_keys_is_undone():
    spmd = make_spmd()
    config = config_of("moco_sketch")
    method = sketches.MoCoSketch(config, 10, "devices", None)

    def per_device(x, rng):
        shuffled, unshuffle = method.shuffle(x, jax.random.wrap_key_data(rng))
        return shuffled, unshuffle(shuffled)

    mapped = spmd.map(per_device, ("sharded", "replicated"), ("sharded", "sharded"))
    x = np.arange(64, dtype=np.float32)
    key = spmd.replicate(jax.random.key_data(jax.random.key(0)))
    shuffled, back = jax.device_get(mapped(spmd.place_batch(x), key))
    np.testing.assert_array_equal(back, x)
    assert sorted(shuffled) == x.tolist()
    # Every device's share now comes from all devices.
    assert all(len(np.unique(part // 8)) == 8 for part in shuffled.reshape(8, 8))
