"""Weight initializers and BatchNorm, shared by encoders and heads."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jaxtyping import Array

Groups = tuple[tuple[int, ...], ...]  # device positions that share BatchNorm statistics

_variance = nn.initializers.variance_scaling
KERNEL_INITS: dict[str, Initializer] = {
    # Keras: standard deviation 1/sqrt(fan in) after truncation. SimCLR's convolutions.
    "truncated_fan_in": _variance(1.0, "fan_in", "truncated_normal"),
    # Haiku: 1/sqrt(fan in) before truncation at two standard deviations, 0.8796 of it after. BYOL.
    "haiku": _variance(0.87962566103423978**2, "fan_in", "truncated_normal"),
    # torchvision's ResNet (He et al., 2015, arXiv:1502.01852). MoCo's and SwAV's convolutions.
    "fan_out_normal": _variance(2.0, "fan_out", "normal"),
    # PyTorch's default for Conv2d and Linear: uniform in ±1/sqrt(fan in).
    "torch": _variance(1 / 3, "fan_in", "uniform"),
    # SimCLR's head.
    "normal_0.01": nn.initializers.normal(0.01),
    # DINO's head. Its code truncates at ±2, a hundred standard deviations away.
    "normal_0.02": nn.initializers.normal(0.02),
}


def batch_norm(
    train: bool,
    axis_name: str | None,
    axis_index_groups: Groups | None,
    splits: int = 1,
    **options: Any,
) -> Callable[..., Any]:
    """BatchNorm with the settings of all methods: decay 0.9, epsilon 1e-5, float32 statistics.

    The running variance averages the biased batch variance, as in TensorFlow and Haiku. PyTorch
    keeps n/(n - 1) times that, and normalizes by the biased one as well.

    Args:
      train: normalize by the batch statistics and update the running ones; if False, normalize by
        the running ones.
      axis_name: mapped axis of the devices that share statistics, None for a single device.
      axis_index_groups: groups of device positions that share statistics, None for all.
      splits: equal, contiguous parts of this device's examples with statistics of their own, as if
        each part were on a device; the running statistics are averaged over them.
      **options: for `flax.linen.BatchNorm`.

    Returns:
      A constructor of the module, which takes its name and further options.
    """
    return functools.partial(
        functools.partial(_split_norm, splits) if train and splits > 1 else nn.BatchNorm,
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        **options,
    )


def _split_norm(splits: int, **options: Any) -> Callable[[Array], Array]:
    """A BatchNorm that is mapped over the parts of its input, with the same variables."""
    mapped = nn.vmap(
        nn.BatchNorm, variable_axes={"params": None, "batch_stats": 0}, split_rngs={"params": False}
    )
    averaged = nn.map_variables(
        mapped,
        "batch_stats",
        trans_in_fn=lambda stats: jax.tree.map(lambda x: jnp.stack([x] * splits), stats),
        trans_out_fn=lambda stats: jax.tree.map(lambda x: x.mean(0), stats),
        mutable=True,
    )
    norm = averaged(**options)

    def apply(x: Array) -> Array:
        parts = x.reshape(splits, x.shape[0] // splits, *x.shape[1:])
        return jnp.asarray(norm(parts)).reshape(x.shape)

    return apply
