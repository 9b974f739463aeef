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
    unbiased: bool = False,
    **options: Any,
) -> Callable[..., Any]:
    """BatchNorm with the settings of all methods: decay 0.9, epsilon 1e-5, float32 statistics.

    Args:
      train: normalize by the batch statistics and update the running ones; if False, normalize by
        the running ones.
      axis_name: mapped axis of the devices that share statistics, None for a single device.
      axis_index_groups: groups of device positions that share statistics, None for all.
      splits: equal, contiguous parts of this device's examples with statistics of their own, as if
        each part were on a device; the running statistics are averaged over them.
      unbiased: the running variance averages n/(n - 1) times the variance of a batch of n values,
        as in PyTorch, instead of that variance itself, as in Haiku and SimCLR's code. Batches are
        normalized by their biased variance in any case.
      **options: for `flax.linen.BatchNorm`.

    Returns:
      A constructor of the module, which takes its name and further options. Give each module a
      name: with splits, Flax's own differ between training and evaluation.
    """
    return functools.partial(
        functools.partial(_split_norm, splits) if train and splits > 1 else BatchNorm,
        unbiased=unbiased,
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        **options,
    )


class BatchNorm(nn.BatchNorm):
    """Flax's BatchNorm over all axes but the last; its running variance may be PyTorch's.

    Attributes:
      unbiased: see `batch_norm`.
    """

    unbiased: bool = False

    @nn.compact
    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Normalizes a batch, and in training updates the running statistics."""
        before: Any = self.get_variable("batch_stats", "var")
        y = super().__call__(x, use_running_average, mask=mask)
        evaluation = self.use_running_average or use_running_average
        if self.unbiased and not (evaluation or self.is_initializing()):
            after: Any = self.get_variable("batch_stats", "var")
            devices = 1
            if self.axis_name is not None:
                groups = self.axis_index_groups
                devices = len(groups[0]) if groups else jax.lax.axis_size(self.axis_name)
            n = devices * x.size // x.shape[-1]
            # Flax's update, of the batch's biased variance, grows by 1/(n - 1).
            unbiased = after + (after - self.momentum * before) / max(n - 1, 1)
            self.put_variable("batch_stats", "var", unbiased)
        return y


def _split_norm(splits: int, **options: Any) -> Callable[[Array], Array]:
    """A BatchNorm that is mapped over the parts of its input, with the same variables."""
    mapped = nn.vmap(
        BatchNorm, variable_axes={"params": None, "batch_stats": 0}, split_rngs={"params": False}
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
