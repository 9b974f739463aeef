"""Moving averages against their definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import ema


def networks(dtype=jnp.float32, online_dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def network(dtype):
        return {
            "conv": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 2, 4)), dtype)},
            "bn": {"scale": jnp.asarray(rng.normal(size=4), dtype)},
        }

    return network(dtype), network(online_dtype)


def mean64(target, online, decay):
    def leaf(t, o):
        return decay * np.asarray(t, np.float64) + (1 - decay) * np.asarray(o, np.float64)

    return jax.tree.map(leaf, target, online)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.996, 0.99999, 1.0])
@pytest.mark.parametrize("traced", [False, True])
def test_update_equals_the_weighted_mean(decay, traced):
    target, online = networks()
    if traced:
        moved = jax.jit(ema.update)(target, online, jnp.float32(decay))
    else:
        moved = ema.update(target, online, decay)
    expected = mean64(target, online, decay)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-7), moved, expected)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_update_is_exact_for_decay_0_and_1(decay):
    target, online = networks()
    expected = target if decay == 1 else online
    moved = ema.update(target, online, decay)
    jax.tree.map(np.testing.assert_array_equal, moved, expected)


def test_update_keeps_small_steps_in_float32():
    # If the decay were rounded to float32 first, 1 - decay would have a relative error of 1e-3.
    target, online = {"w": jnp.zeros(3)}, {"w": jnp.ones(3)}
    moved = ema.update(target, online, 0.99999)
    np.testing.assert_allclose(moved["w"], 1e-5, rtol=1e-6)


@pytest.mark.parametrize("online_dtype", [jnp.bfloat16, jnp.float32])
def test_bfloat16_targets_are_averaged_in_float32(online_dtype):
    target, online = networks(jnp.bfloat16, online_dtype)
    online = jax.tree.map(lambda x: 50 * x, online)
    moved = ema.update(target, online, 0.999)
    rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), mean64(target, online, 0.999))
    jax.tree.map(np.testing.assert_array_equal, moved, rounded)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("online_dtype", [jnp.bfloat16, jnp.float32])
def test_target_keeps_its_dtype(dtype, online_dtype):
    target, online = networks(dtype, online_dtype)
    moved = ema.update(target, online, jnp.float32(0.9))
    assert {x.dtype for x in jax.tree.leaves(moved)} == {jnp.dtype(dtype)}
    assert jax.tree.structure(moved) == jax.tree.structure(target)


@pytest.mark.parametrize("base", [0.97, 0.99, 0.996])
@pytest.mark.parametrize("step", [0, 1, 250, 500, 999, 1000])
def test_cosine_decay_equals_byols_schedule(base, step):
    expected = 1 - (1 - base) * (np.cos(np.pi * step / 1000) + 1) / 2
    np.testing.assert_allclose(ema.cosine_decay(base, step, 1000), expected, atol=1e-7)
    traced = jax.jit(ema.cosine_decay, static_argnums=(0, 2))(base, jnp.int32(step), 1000)
    np.testing.assert_allclose(traced, expected, atol=1e-7)


def test_cosine_decay_stays_at_one_after_the_end():
    assert ema.cosine_decay(0.99, 1000, 1000) == 1
    assert ema.cosine_decay(0.99, 1500, 1000) == 1
    np.testing.assert_allclose(ema.cosine_decay(0.99, 500, 1000), 0.995, atol=1e-7)
    # From a base of 1 the decay stays 1.
    assert ema.cosine_decay(1.0, 3, 1000) == 1
