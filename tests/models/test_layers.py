"""Convolutions and pooling as each platform likes them: values and gradients are JAX's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.models import layers
from ssl_jax.models.layers import conv_general_dilated, max_pool

NHWC = ("NHWC", "HWIO", "NHWC")


def by_jax(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)


@pytest.mark.parametrize("padding", ["SAME", ((1, 1), (1, 1)), ((0, 2), (1, 0))])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
def test_value_and_gradients_are_jaxs(padding, kernel, stride, size):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, *size, 4)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(kernel, kernel, 4, 5)), jnp.float32)
    args = ((stride, stride), padding)
    expected, pull = jax.vjp(lambda x, w: by_jax(x, w, *args), x, w)
    actual, ours = jax.vjp(lambda x, w: conv_general_dilated(x, w, *args), x, w)
    np.testing.assert_array_equal(actual, expected)
    g = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    for mine, jaxs in zip(ours(g), pull(g), strict=True):
        np.testing.assert_allclose(mine, jaxs, rtol=1e-4, atol=1e-4)


def gradients(conv):
    def total(x, w):
        return conv(jax.nn.relu(conv(x, w, (1, 1), "SAME")), w, (2, 2), "SAME").sum()

    return jax.jit(jax.grad(total, (0, 1)))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_elsewhere_the_convolutions_are_jaxs(platform):
    x, w = jnp.zeros((2, 8, 8, 4)), jnp.zeros((3, 3, 4, 4))
    kinds = []
    for conv in (conv_general_dilated, by_jax):
        lowered = gradients(conv).trace(x, w).lower(lowering_platforms=(platform,))
        lines = lowered.as_text().splitlines()
        written = [line.split("dim_numbers")[1] for line in lines if "convolution(" in line]
        kinds.append(sorted(written))
    # Two for the value, of which the gradient needs one, and two for each gradient.
    assert kinds[0] == kinds[1] and len(kinds[0]) == 5


def test_the_choice_of_platform_costs_nothing_in_the_program():
    x, w = jnp.zeros((2, 8, 8, 4)), jnp.zeros((3, 3, 4, 4))
    assert "conditional(" not in gradients(conv_general_dilated).lower(x, w).compile().as_text()


@pytest.mark.parametrize("options", [{"kernel_dilation": 2}, {"feature_group_count": 2}])
def test_other_convolutions_are_refused(options):
    conv = nn.Conv(4, (3, 3), conv_general_dilated=conv_general_dilated, **options)
    with pytest.raises(NotImplementedError, match="dilation or groups"):
        conv.init(jax.random.key(0), jnp.zeros((1, 8, 8, 4)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (9, 10), (7, 13)])
@pytest.mark.parametrize(
    ("kernel", "pads"), [(7, ((3, 3), (3, 3))), (7, ((2, 3), (2, 3))), (3, ((1, 1), (0, 1)))]
)
def test_a_stem_of_squares_has_the_sums_of_the_strided_one(channels, size, kernel, pads):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *size, channels)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(kernel, kernel, channels, 5)), jnp.float32)
    expected, pull = jax.vjp(lambda x, w: by_jax(x, w, (2, 2), pads), x, w)
    actual, ours = jax.vjp(lambda x, w: layers._stem_conv(x, w, (2, 2), pads), x, w)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    g = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    for mine, jaxs in zip(ours(g), pull(g), strict=True):
        np.testing.assert_allclose(mine, jaxs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("platform", "channels"), [("cpu", 3), ("tpu", 3), ("cuda", 16)])
def test_only_a_gpu_has_the_stem_of_squares(platform, channels):
    x, w = jnp.zeros((2, 16, 16, 3)), jnp.zeros((7, 7, 3, 8))
    conv = jax.jit(lambda x, w: conv_general_dilated(x, w, (2, 2), "SAME"))
    text = conv.trace(x, w).lower(lowering_platforms=(platform,)).as_text()
    (line,) = [line for line in text.splitlines() if "convolution(" in line]
    assert f"x{channels}x8xf32" in line  # the kernel's channels


@pytest.mark.parametrize("pads", [((1, 1), (1, 1)), ((0, 1), (0, 1))])
@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
def test_pooling_has_jaxs_gradient_where_values_tie_too(size, pads):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-2, 2, (3, *size, 5)), jnp.float32)
    expected, pull = jax.vjp(lambda x: nn.max_pool(x, (3, 3), (2, 2), list(pads)), x)
    actual, ours = jax.vjp(lambda x: max_pool(x, pads), x)
    np.testing.assert_array_equal(actual, expected)
    g = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    np.testing.assert_allclose(ours(g)[0], pull(g)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("platform", "scattered"), [("cpu", 0), ("cuda", 0), ("tpu", 1)])
def test_only_a_tpu_scatters_the_gradient_of_pooling(platform, scattered):
    grad = jax.jit(jax.grad(lambda x: max_pool(x, ((1, 1), (1, 1))).sum()))
    lowered = grad.trace(jnp.zeros((2, 8, 8, 3))).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count("select_and_scatter") == scattered
