"""Convolution and max pooling with gradients that are fast on every platform.

Values and gradients are those of `jax.lax`; only the way in which they are computed depends on the
platform.

Convolution with kernel k, stride s and p pixels of padding before (shown in one dimension, with
input channel c and output channel o)::

    y[n, i, o] = Σ_j Σ_c x[n, s·i + j - p, c] k[j, c, o]

has two gradients for an output gradient g, each a convolution itself::

    dx[n, m, c] = Σ_j Σ_o k[j, c, o] g[n, (m + p - j) / s, o]    over whole (m + p - j) / s
    dk[j, c, o] = Σ_i Σ_n x[n, s·i + j - p, c] g[n, i, o]

The first convolves g, with s - 1 zeros between its pixels (`lhs_dilation`), with the flipped
kernel. The second convolves x with g as a kernel whose taps lie s pixels apart (`rhs_dilation`):
examples act as input channels and input channels as examples.

XLA's CPU backend computes a convolution whose kernel has more pixels than the image, as in the last
stages of a ResNet on 32×32 pixels, in plain loops, over ten times as slow as others. For such an x,
y is a product of matrices: all pixels that an output sees, next to each other, times k. For such a
g, dx is the transpose of this product.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

_lax_conv = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
Pads = tuple[tuple[int, int], ...]
# Sizes before and after a layer differ; the underscores leave them unchecked.
Images = Float[Array, "n _h _w _c"]
Positions = Int[Array, "n _h _w _c"]  # of the largest value in a 3×3 window, 0 to 8
Kernel = Float[Array, "_kh _kw _c _out"]


def conv_general_dilated(
    x: Images,
    kernel: Kernel,
    strides: tuple[int, ...],
    padding: str | Pads,
    *,
    lhs_dilation: tuple[int, ...] = (1, 1),
    rhs_dilation: tuple[int, ...] = (1, 1),
    feature_group_count: int = 1,
    **unused: Any,
) -> Images:
    """A convolution for `flax.linen.Conv` that is fast on a CPU for small images and in loops, too.

    XLA's CPU backend (jaxlib 0.10) converts the gradients' convolutions to the layout of its fast
    library only outside of loops, and is about ten times as slow inside. On a CPU they are
    therefore written in that layout; on other platforms they are JAX's own.

    Args:
      x: images.
      kernel: the weights.
      strides: vertical and horizontal, pixels.
      padding: "SAME", or pixels before and after in each direction.
      lhs_dilation: must be 1.
      rhs_dilation: must be 1.
      feature_group_count: must be 1.
      **unused: other arguments of `Conv`, at their defaults.

    Returns:
      The output channels at each position, in the dtype of `x`.

    Raises:
      NotImplementedError: the convolution is dilated or grouped, which no network here needs.
    """
    if {*lhs_dilation, *rhs_dilation, feature_group_count} != {1}:
        raise NotImplementedError("Convolutions with dilation or groups need Flax's own.")
    pads = _explicit(padding, x.shape[1:3], kernel.shape[:2], strides)
    return _conv(x, kernel, tuple(strides), pads)


def _explicit(
    padding: str | Pads, sizes: tuple[int, ...], window: tuple[int, ...], strides: tuple[int, ...]
) -> Pads:
    """Padding in pixels, with "SAME" resolved for images of these sizes."""
    if isinstance(padding, str):
        padding = tuple(lax.padtype_to_pads(sizes, window, strides, padding))
    return tuple((before, after) for before, after in padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: Images, kernel: Kernel, strides: tuple[int, ...], pads: Pads) -> Images:
    cpu = _patches_conv if _is_small(x, kernel) else _lax_conv
    default = _stem_conv if _is_stem(x, strides) else _lax_conv
    if cpu is default:
        return _lax_conv(x, kernel, strides, pads)
    result: Images = lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: cpu(x, kernel, strides, pads),
        tpu=lambda x, kernel: _lax_conv(x, kernel, strides, pads),
        default=lambda x, kernel: default(x, kernel, strides, pads),
    )
    return result


def _is_small(x: Images, kernel: Kernel) -> bool:
    return math.prod(x.shape[1:3]) < math.prod(kernel.shape[:2])


def _patches_conv(x: Images, kernel: Kernel, strides: tuple[int, ...], pads: Pads) -> Images:
    """A convolution as one product of matrices."""
    patches, weights = _as_product(x, kernel, strides, pads)
    result: Images = patches(x) @ weights
    return result


def _patches_gradient(
    x: Images, kernel: Kernel, strides: tuple[int, ...], pads: Pads, g: Images
) -> Images:
    """Computes dx as the transpose of `_patches_conv`."""
    patches, weights = _as_product(x, kernel, strides, pads)
    # A pixel's terms are added before they are rounded to the dtype of x.
    exact = jnp.promote_types(x.dtype, jnp.float32)
    terms = jnp.matmul(g, weights.T, preferred_element_type=exact)
    pull = jax.linear_transpose(patches, jax.ShapeDtypeStruct(x.shape, exact))
    dx: Images = pull(terms)[0].astype(x.dtype)
    return dx


def _as_product(
    x: Images, kernel: Kernel, strides: tuple[int, ...], pads: Pads
) -> tuple[Callable[[Images], Images], Float[Array, "_seen _out"]]:
    """The factors of `_patches_conv`: what an output sees, as channels, and the kernel's weights.

    Rows and columns of the kernel that meet only padding are left out.
    """
    taps, spans = [], []  # of the kernel; from the first window to the last
    shapes = (x.shape[1:3], kernel.shape[:2], strides, pads)
    for n, k, stride, (before, after) in zip(*shapes, strict=True):
        span = (before + n + after - k) // stride * stride
        first = min(max(0, before - span), k - 1)
        taps.append(slice(first, max(min(k, before + n), first + 1)))
        spans.append(span)
    rows, columns = (range(part.start, part.stop) for part in taps)

    def patches(x: Images) -> Images:
        edges = [(0, 0, 0), *((*p, 0) for p in pads), (0, 0, 0)]
        padded = lax.pad(x, jnp.zeros((), x.dtype), edges)
        seen = [
            padded[:, i : i + spans[0] + 1 : strides[0], j : j + spans[1] + 1 : strides[1]]
            for i in rows
            for j in columns
        ]
        return jnp.concatenate(seen, -1)

    return patches, kernel[taps[0], taps[1]].reshape(-1, kernel.shape[-1])


def _is_stem(x: Images, strides: tuple[int, ...]) -> bool:
    return x.shape[-1] < 4 and strides == (2, 2)


def _stem_conv(x: Images, kernel: Kernel, strides: tuple[int, ...], pads: Pads) -> Images:
    """Computes a stride-2 convolution of up to three channels as a stride-1 one of sixteen.

    A GPU's matrix units process channels in groups of eight and mostly idle at three. Here the four
    pixels of each 2×2 square and a fourth channel of zeros become channels (space-to-depth, as in
    MLPerf's ResNets): the same products, summed. A TPU's compiler does this on its own.
    """
    (top, bottom), (left, right) = pads
    height, width, channels = x.shape[1:]
    kh, kw = kernel.shape[:2]
    rows = (height + top + bottom - kh) // 2 + (kh + 1) // 2  # squares
    columns = (width + left + right - kw) // 2 + (kw + 1) // 2
    more = 4 - channels
    below, beside = 2 * rows - height - top, 2 * columns - width - left
    x = lax.pad(
        x, jnp.zeros((), x.dtype), [(0, 0, 0), (top, below, 0), (left, beside, 0), (0, more, 0)]
    )
    kernel = jnp.pad(kernel, [(0, kh % 2), (0, kw % 2), (0, more), (0, 0)])
    kh, kw = (kh + 1) // 2, (kw + 1) // 2
    x = x.reshape(-1, rows, 2, columns, 2, 4).swapaxes(2, 3).reshape(-1, rows, columns, 16)
    kernel = kernel.reshape(kh, 2, kw, 2, 4, -1).swapaxes(1, 2).reshape(kh, kw, 16, -1)
    return _lax_conv(x, kernel, (1, 1), "VALID")


def _conv_forward(
    x: Images, kernel: Kernel, strides: tuple[int, ...], pads: Pads
) -> tuple[Images, tuple[Images, Kernel]]:
    return _conv(x, kernel, strides, pads), (x, kernel)


def _conv_backward(
    strides: tuple[int, ...], pads: Pads, residuals: tuple[Images, Kernel], g: Images
) -> tuple[Images, Kernel]:
    def by_jax(conv: Any, x: Images, kernel: Kernel, g: Images) -> tuple[Images, Kernel]:
        (dx,) = jax.linear_transpose(lambda x: conv(x, kernel, strides, pads), x)(g)
        (dkernel,) = jax.linear_transpose(lambda k: conv(x, k, strides, pads), kernel)(g)
        return dx, dkernel

    conv = _stem_conv if _is_stem(residuals[0], strides) else _lax_conv
    gradients: tuple[Images, Kernel] = lax.platform_dependent(
        *residuals,
        g,
        cpu=functools.partial(_conv_gradients, strides, pads),
        tpu=functools.partial(by_jax, _lax_conv),
        default=functools.partial(by_jax, conv),
    )
    return gradients


def _conv_gradients(
    strides: tuple[int, ...], pads: Pads, x: Images, kernel: Kernel, g: Images
) -> tuple[Images, Kernel]:
    """Computes dx and dk, see the module's docstring, in the layout of the forward pass."""
    pads_x, pads_kernel = [], []
    shapes = (x.shape[1:3], kernel.shape[:2], g.shape[1:3], strides, pads)
    for n, k, m, stride, (before, _) in zip(*shapes, strict=True):
        extent = (m - 1) * stride + 1  # of g, dilated
        pads_x.append((k - 1 - before, n + before - extent))
        pads_kernel.append((before, extent - n + k - 1 - before))
    if _is_small(g, kernel):
        dx = _patches_gradient(x, kernel, strides, pads, g)
    else:
        flipped = kernel[::-1, ::-1].swapaxes(2, 3)
        dx = _lax_conv(g, flipped, (1, 1), pads_x, lhs_dilation=strides)
    as_images, as_kernel = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
    dkernel = _lax_conv(as_images, as_kernel, (1, 1), pads_kernel, rhs_dilation=strides)
    return dx, dkernel.transpose(1, 2, 0, 3)


_conv.defvjp(_conv_forward, _conv_backward)


def max_pool(x: Images, padding: str | Pads) -> Images:
    """The maximum of each 3×3 window, with stride 2.

    The gradient goes to the first largest value of a window, in row order::

        dx[m] = Σ g[i]    over the windows i whose first maximum is at m

    XLA's own gradient is five times as slow on a CPU and a GPU; a TPU uses it.

    Args:
      x: images.
      padding: "SAME", or pixels before and after in each direction.

    Returns:
      [n, h / 2, w / 2, c].
    """
    return _max_pool(x, _explicit(padding, x.shape[1:3], (3, 3), (2, 2)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x: Images, pads: Pads) -> Images:
    return _lax_pool(x, pads)


def _lax_pool(x: Images, pads: Pads) -> Images:
    windows = (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), *pads, (0, 0))
    return lax.reduce_window(x, np.array(-np.inf, x.dtype), lax.max, *windows)


_WINDOW = tuple((row, column) for row in range(3) for column in range(3))


def _pool_forward(x: Images, pads: Pads) -> tuple[Images, tuple[Images, Positions]]:
    """Saves x and the position of each window's first maximum; each platform needs one of them."""
    y = _lax_pool(x, pads)
    lowest = jnp.array(-jnp.inf, x.dtype)
    padded = lax.pad(x, lowest, [(0, 0, 0), *((*p, 0) for p in pads), (0, 0, 0)])
    first = jnp.full(y.shape, len(_WINDOW), jnp.int8)
    for number, (row, column) in reversed(list(enumerate(_WINDOW))):
        ends = (row + 2 * y.shape[1] - 1, column + 2 * y.shape[2] - 1)
        seen = lax.slice(padded, (0, row, column, 0), (len(x), *ends, x.shape[3]), (1, 2, 2, 1))
        first = jnp.where(seen == y, jnp.int8(number), first)
    return y, (x, first)


def _pool_backward(pads: Pads, saved: tuple[Images, Positions], g: Images) -> tuple[Images]:
    def by_jax(x: Images, first: Positions, g: Images) -> Images:
        _, pull = jax.vjp(lambda x: _lax_pool(x, pads), x)
        return pull(g)[0]

    def by_position(x: Images, first: Positions, g: Images) -> Images:
        # Nine shifted copies of g: the one at (row, column) keeps the windows with that maximum.
        dx = jnp.zeros_like(x)
        for number, at in enumerate(_WINDOW):
            chosen = jnp.where(first == number, g, 0)
            sides = []
            for n, m, offset, (before, _) in zip(x.shape[1:3], g.shape[1:3], at, pads, strict=True):
                low = offset - before
                sides.append((low, n - low - (2 * m - 1), 1))
            dx += lax.pad(chosen, jnp.zeros((), g.dtype), [(0, 0, 0), *sides, (0, 0, 0)])
        return dx

    return (lax.platform_dependent(*saved, g, tpu=by_jax, default=by_position),)


_max_pool.defvjp(_pool_forward, _pool_backward)
