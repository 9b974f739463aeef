"""What encoders and heads share: the methods' weight initialisers and their BatchNorm."""

import functools
from typing import Any

import flax.linen as nn
from flax.linen.initializers import Initializer

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
