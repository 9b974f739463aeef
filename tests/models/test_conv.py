"""Convolution and pooling per platform: values and gradients equal those of JAX."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.models.conv import _stem_conv, conv_general_dilated, max_pool

NHWC = ("NHWC", "HWIO", "NHWC")


def by_jax(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)


def value_and_gradients(function, noise, *args):
    value, pull = jax.vjp(function, *args)
    return value, pull(noise[: value.size].reshape(value.shape))


def assert_alike(cases, value_rtol=0.0, rtol=1e-4):
    """Asserts that pairs of functions have the same values and gradients.

    Args:
      cases: by name, both functions and their arguments; one program computes them all, as
        compiling one each would take longer than all other tests here.
      value_rtol: tolerance of the values, 0 for bitwise equality.
      rtol: tolerance of the gradients.
    """

    @jax.jit
    def compute(noise, args):
        return {
            name: [value_and_gradients(function, noise, *args[name]) for function in pair]
            for name, (*pair, _) in cases.items()
        }

    noise = np.random.default_rng(1).normal(size=10_000).astype(np.float32)
    computed = compute(noise, {name: args for name, (*_, args) in cases.items()})
    assert computed.keys() == cases.keys()
    for name, ((value, ours), (expected, jaxs)) in computed.items():
        np.testing.assert_allclose(value, expected, value_rtol, value_rtol, err_msg=name)
        for mine, theirs in zip(ours, jaxs, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=rtol, err_msg=name)


def random_arrays(*shapes):
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def convolutions(ours, strides, pads, x, w):
    """A case of `assert_alike`."""
    functions = (lambda x, w: ours(x, w, strides, pads), lambda x, w: by_jax(x, w, strides, pads))
    return *functions, random_arrays(x, w)


def test_convolution_has_values_and_gradients_of_jax():
    paddings = ["SAME", ((1, 1), (1, 1)), ((0, 2), (1, 0))]
    kernels = [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)]
    assert_alike(
        {
            f"{size}, kernel {k}, stride {stride}, {pads}": convolutions(
                conv_general_dilated, (stride, stride), pads, (3, *size, 4), (k, k, 4, 5)
            )
            for size in [(8, 8), (9, 7)]
            for k, stride in kernels
            for pads in paddings
        }
    )


def test_images_smaller_than_the_kernel_have_values_and_gradients_of_jax():
    kernels = [(3, 1, ((1, 1), (1, 1))), (3, 2, ((1, 1), (1, 1))), (3, 2, "SAME")]
    kernels += [(7, 2, ((3, 3), (3, 3))), (5, 1, ((1, 3), (4, 2)))]
    kernels += [(3, 4, ((5, 0), (5, 0)))]  # of 1×1 pixels, only padding is seen
    assert_alike(
        {
            f"{size}, kernel {k}, stride {stride}, {pads}": convolutions(
                conv_general_dilated, (stride, stride), pads, (3, *size, 4), (k, k, 4, 5)
            )
            for size in [(1, 1), (2, 2), (4, 4), (2, 5), (5, 3), (6, 6)]
            for k, stride, pads in kernels
        },
        value_rtol=1e-5,
    )


@pytest.mark.parametrize(("platform", "multiplied"), [("cpu", 2), ("tpu", 0), ("cuda", 0)])
def test_images_smaller_than_the_kernel_are_multiplied_on_cpu_only(platform, multiplied):
    def passes(x, w):
        y, pull = jax.vjp(lambda x, w: conv_general_dilated(x, w, (1, 1), "SAME"), x, w)
        return pull(y)

    traced = jax.jit(passes).trace(jnp.zeros((2, 2, 2, 4)), jnp.zeros((3, 3, 4, 8)))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("convolution(") == 3 - multiplied  # y, dx; the kernel's gradient is none
    assert text.count("dot_general") == multiplied


def test_gradient_of_small_images_in_bfloat16_is_rounded_once():
    x, w, g = random_arrays((8, 2, 2, 64), (3, 3, 64, 16), (8, 2, 2, 16))

    @functools.partial(jax.jit, static_argnums=0)
    def dx(dtype):
        arrays = [jnp.asarray(a, jnp.bfloat16).astype(dtype) for a in (x, w, g)]
        conv = functools.partial(conv_general_dilated, strides=(1, 1), padding="SAME")
        return jax.vjp(lambda x: conv(x, arrays[1]), arrays[0])[1](arrays[2])[0]

    assert np.mean(dx("bfloat16") == dx("float32").astype("bfloat16")) > 0.99


def test_image_smaller_than_an_unpadded_kernel_gives_no_pixels():
    assert conv_general_dilated(
        jnp.zeros((2, 1, 1, 3)), jnp.zeros((3, 3, 3, 4)), (1, 1), ((0, 0), (0, 0))
    ).shape == (2, 0, 0, 4)


def gradients(conv):
    def total(x, w):
        return conv(jax.nn.relu(conv(x, w, (1, 1), "SAME")), w, (2, 2), "SAME").sum()

    return jax.jit(jax.grad(total, (0, 1)))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_convolution_gradients_are_lowered_by_jax_on_tpu_and_gpu(platform):
    x, w = jnp.zeros((2, 8, 8, 4)), jnp.zeros((3, 3, 4, 4))
    kinds = []
    for conv in (conv_general_dilated, by_jax):
        lowered = gradients(conv).trace(x, w).lower(lowering_platforms=(platform,))
        lines = lowered.as_text().splitlines()
        written = [line.split("dim_numbers")[1] for line in lines if "convolution(" in line]
        kinds.append(sorted(written))
    # The gradient needs one of two forward convolutions, and two backward ones for each.
    assert kinds[0] == kinds[1] and len(kinds[0]) == 5


def test_platform_choice_leaves_no_conditional_in_the_program():
    x, w = jnp.zeros((2, 8, 8, 4)), jnp.zeros((3, 3, 4, 4))
    assert "conditional(" not in gradients(conv_general_dilated).lower(x, w).compile().as_text()


@pytest.mark.parametrize("options", [{"kernel_dilation": 2}, {"feature_group_count": 2}])
def test_dilated_and_grouped_convolutions_are_refused(options):
    conv = nn.Conv(4, (3, 3), conv_general_dilated=conv_general_dilated, **options)
    with pytest.raises(NotImplementedError, match="dilation or groups"):
        conv.init(jax.random.key(0), jnp.zeros((1, 8, 8, 4)))


def test_space_to_depth_stem_equals_the_strided_convolution():
    kernels = [(7, ((3, 3), (3, 3))), (7, ((2, 3), (2, 3))), (3, ((1, 1), (0, 1)))]
    assert_alike(
        {
            f"{size}, {channels} channels, kernel {k}, {pads}": convolutions(
                _stem_conv, (2, 2), pads, (2, *size, channels), (k, k, channels, 5)
            )
            for size in [(32, 32), (9, 10), (7, 13)]
            for channels in (1, 3)
            for k, pads in kernels
        },
        value_rtol=1e-4,
    )


@pytest.mark.parametrize(("platform", "channels"), [("cpu", 3), ("tpu", 3), ("cuda", 16)])
def test_space_to_depth_stem_is_used_on_gpu_only(platform, channels):
    x, w = jnp.zeros((2, 16, 16, 3)), jnp.zeros((7, 7, 3, 8))
    conv = jax.jit(lambda x, w: conv_general_dilated(x, w, (2, 2), "SAME"))
    text = conv.trace(x, w).lower(lowering_platforms=(platform,)).as_text()
    (line,) = [line for line in text.splitlines() if "convolution(" in line]
    assert f"x{channels}x8xf32" in line  # input channels of the kernel


def pools(pads, size):
    """A case of `assert_alike`, with many ties."""
    x = np.random.default_rng(0).integers(-2, 2, (3, *size, 5)).astype(np.float32)
    flax = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding=list(pads))
    return (lambda x: max_pool(x, pads)), flax, (x,)


def test_pooling_has_the_gradient_of_jax_including_ties():
    assert_alike(
        {
            f"{size}, {pads}": pools(pads, size)
            for size in [(8, 8), (9, 7)]
            for pads in [((1, 1), (1, 1)), ((0, 1), (0, 1))]
        },
        rtol=1e-5,
    )


@pytest.mark.parametrize(("platform", "scattered"), [("cpu", 0), ("cuda", 0), ("tpu", 1)])
def test_pooling_gradient_uses_select_and_scatter_on_tpu_only(platform, scattered):
    grad = jax.jit(jax.grad(lambda x: max_pool(x, ((1, 1), (1, 1))).sum()))
    lowered = grad.trace(jnp.zeros((2, 8, 8, 3))).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count("select_and_scatter") == scattered
