"""What encoders and heads share: the methods' weight initialisers and their BatchNorm."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.initializers import Initializer
from jax import lax
from jaxtyping import Array, Float, Int

from ssl_jax.errors import UserError

Groups = tuple[tuple[int, ...], ...]  # devices, by position, that share BatchNorm statistics

_variance = nn.initializers.variance_scaling
KERNEL_INITS: dict[str, Initializer] = {
    # Keras: the standard deviation after truncation is 1/sqrt(fan in). SimCLR's convolutions.
    "truncated_fan_in": _variance(1.0, "fan_in", "truncated_normal"),
    # Haiku: it is 1/sqrt(fan in) before truncation at two of them, .8796 of that after. BYOL.
    "haiku": _variance(0.87962566103423978**2, "fan_in", "truncated_normal"),
    # torchvision's ResNet (He et al., 2015, arXiv:1502.01852). MoCo's and SwAV's convolutions.
    "fan_out_normal": _variance(2.0, "fan_out", "normal"),
    # PyTorch's default of Conv2d and Linear: uniform in ±1/sqrt(fan in).
    "torch": _variance(1 / 3, "fan_in", "uniform"),
    # SimCLR's head.
    "normal_0.01": nn.initializers.normal(0.01),
}


def check_choice(key: str, value: Any, choices: Any) -> None:
    """Refuses a value that is none of the choices, by the name of its key."""
    if value not in choices:
        raise UserError(f"{key} is {value!r}: it may be {', '.join(map(str, choices))}.")


def batch_norm(
    train: bool, axis_name: str | None, axis_index_groups: Groups | None, **options: Any
) -> functools.partial[nn.BatchNorm]:
    """BatchNorm as all methods have it: decay 0.9, epsilon 1e-5, statistics in float32.

    The running variance is that of the batch as it stands (biased), which is what TensorFlow and
    Haiku keep; PyTorch keeps n/(n - 1) times that and normalises by the biased one, as here.

    Args:
      train: normalise by the batch's statistics, and move the running ones; else use those.
      axis_name: mapped axis of the devices that share statistics, None for this device alone.
      axis_index_groups: groups of them that share, None for all.
      **options: of `flax.linen.BatchNorm`.

    Returns:
      A constructor of the module, to be given its name and further options.
    """
    return functools.partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        **options,
    )


_lax_conv = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
Pads = tuple[tuple[int, int], ...]
# Sizes before and after a layer differ; the underscores leave them unchecked.
Images = Float[Array, "n _h _w _c"]
Positions = Int[Array, "n _h _w _c"]  # of the largest of nine, 0 to 8
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
    """A convolution for `flax.linen.Conv`, whose backward pass is fast in loops on a CPU too.

    XLA's CPU backend brings the gradients' convolutions into the layout of its library's only
    outside of loops, and computes others about ten times as slowly (jaxlib 0.10): here they are
    written in that layout. On other devices they are JAX's own.

    Args:
      x: images.
      kernel: the weights.
      strides: vertical and horizontal, pixels.
      padding: "SAME", or pixels before and after in each direction.
      lhs_dilation: none.
      rhs_dilation: none.
      feature_group_count: 1.
      **unused: what else `Conv` passes, at its defaults.

    Returns:
      The channels of each position, in the dtype of `x`.

    Raises:
      NotImplementedError: dilated or grouped convolutions, which no network here has.
    """
    if {*lhs_dilation, *rhs_dilation, feature_group_count} != {1}:
        raise NotImplementedError("Convolutions with dilation or groups need flax's own.")
    if isinstance(padding, str):
        padding = tuple(lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding))
    return _conv(x, kernel, tuple(strides), tuple(map(tuple, padding)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: Images, kernel: Kernel, strides: tuple[int, ...], pads: Pads) -> Images:
    if not _is_stem(x, strides):
        return _lax_conv(x, kernel, strides, pads)
    result: Images = lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: _lax_conv(x, kernel, strides, pads),
        tpu=lambda x, kernel: _lax_conv(x, kernel, strides, pads),
        default=lambda x, kernel: _stem_conv(x, kernel, strides, pads),
    )
    return result


def _is_stem(x: Images, strides: tuple[int, ...]) -> bool:
    return x.shape[-1] < 4 and strides == (2, 2)


def _stem_conv(x: Images, kernel: Kernel, strides: tuple[int, ...], pads: Pads) -> Images:
    """The convolution of three channels with stride 2 as one of sixteen channels without stride.

    A GPU's matrix units take channels by eight and leave most of themselves idle at three: here the
    four pixels of a square, and a fourth channel of zeros, become channels (as MLPerf's ResNets
    do). The sums are the same, of the same products. A TPU's compiler does as well by itself.
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


def _forward(
    x: Images, kernel: Kernel, strides: tuple[int, ...], pads: Pads
) -> tuple[Images, tuple[Images, Kernel]]:
    return _conv(x, kernel, strides, pads), (x, kernel)


def _backward(
    strides: tuple[int, ...], pads: Pads, residuals: tuple[Images, Kernel], g: Images
) -> tuple[Images, Kernel]:
    def gradients_of(conv: Any, x: Images, kernel: Kernel, g: Images) -> tuple[Images, Kernel]:
        (dx,) = jax.linear_transpose(lambda x: conv(x, kernel, strides, pads), x)(g)
        (dkernel,) = jax.linear_transpose(lambda k: conv(x, k, strides, pads), kernel)(g)
        return dx, dkernel

    def transposed(x: Images, kernel: Kernel, g: Images) -> tuple[Images, Kernel]:
        of_x, of_kernel = [], []
        shapes = (x.shape[1:3], kernel.shape[:2], g.shape[1:3], strides, pads)
        for n, k, m, stride, (before, _) in zip(*shapes, strict=True):
            extent = (m - 1) * stride + 1
            of_x.append((k - 1 - before, n + before - extent))
            of_kernel.append((before, extent - n + k - 1 - before))
        flipped = kernel[::-1, ::-1].swapaxes(2, 3)
        dx = _lax_conv(g, flipped, (1, 1), of_x, lhs_dilation=strides)
        as_images, as_kernel = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
        dkernel = _lax_conv(as_images, as_kernel, (1, 1), of_kernel, rhs_dilation=strides)
        return dx, dkernel.transpose(1, 2, 0, 3)

    conv = _stem_conv if _is_stem(residuals[0], strides) else _lax_conv
    gradients: tuple[Images, Kernel] = lax.platform_dependent(
        *residuals,
        g,
        cpu=transposed,
        tpu=functools.partial(gradients_of, _lax_conv),
        default=functools.partial(gradients_of, conv),
    )
    return gradients


_conv.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x: Images, pads: Pads) -> Images:
    """The largest of 3×3 with stride 2; where several are largest, the first has the gradient.

    XLA's own gradient takes a CPU and a GPU five times as long; a TPU has it.

    Args:
      x: images.
      pads: pixels before and after, vertically and horizontally.

    Returns:
      [n, h / 2, w / 2, c].
    """
    return _lax_pool(x, pads)


def _lax_pool(x: Images, pads: Pads) -> Images:
    windows = (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), *pads, (0, 0))
    return lax.reduce_window(x, np.array(-np.inf, x.dtype), lax.max, *windows)


_WINDOW = tuple((row, column) for row in range(3) for column in range(3))


def _pool_forward(x: Images, pads: Pads) -> tuple[Images, tuple[Images, Positions]]:
    """With it which of the nine was the first largest, and x: a back end uses either."""
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

    def by_number(x: Images, first: Positions, g: Images) -> Images:
        dx = jnp.zeros_like(x)
        for number, at in enumerate(_WINDOW):
            chosen = jnp.where(first == number, g, 0)
            sides = []
            for n, m, offset, (before, _) in zip(x.shape[1:3], g.shape[1:3], at, pads, strict=True):
                low = offset - before
                sides.append((low, n - low - (2 * m - 1), 1))
            dx += lax.pad(chosen, jnp.zeros((), g.dtype), [(0, 0, 0), *sides, (0, 0, 0)])
        return dx

    return (lax.platform_dependent(*saved, g, tpu=by_jax, default=by_number),)


max_pool.defvjp(_pool_forward, _pool_backward)
