"""MLP heads on top of an encoder: projectors and predictors of all methods."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jaxtyping import Array, Float

from ssl_jax.errors import UserError, require_choice
from ssl_jax.models.layers import KERNEL_INITS, Groups, batch_norm

# Affine parameters of the last BatchNorm.
OUT_BN: dict[str, dict[str, bool]] = {
    "none": {},
    "full": {"use_scale": True, "use_bias": True},
    "scale": {"use_scale": True, "use_bias": False},
    "no_affine": {"use_scale": False, "use_bias": False},
}
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "gelu": functools.partial(nn.gelu, approximate=False),
}


class MLPHead(nn.Module):
    """`layers` linear layers, `dense1` to `denseL`, with an activation after all but the last.

    Each may be followed by a BatchNorm (`bn1` to `bnL`). The heads in the official code::

                                     layers  hidden_bias  hidden_bn  out_bias  out_bn    kernel_init
      SimCLR v1, v2                  2, 3    no           yes        no        scale     normal_0.01
      MoCo v1                        1                               yes       none      torch
      MoCo v2                        2       yes          no         yes       none      torch
      SwAV                           2       yes          yes        yes       none      torch
      BYOL, projector and predictor  2       yes          yes        no        none      haiku
      SimSiam, projector             3       no           yes        yes       no_affine torch
      SimSiam, predictor             2       no           yes        yes       none      torch
      DINO, with GELU                3       yes          no         yes       none      normal_0.02
      MoCo v3, projector             2, 3    no           yes        no        no_affine torch
      MoCo v3, predictor, ResNet     2       no           yes        no        none      torch
      MoCo v3, predictor, ViT        2       no           yes        no        no_affine torch
      SupCon                         2       yes          no         yes       none      torch
      Barlow Twins                   3       no           yes        no        none      torch
      VICReg                         3       yes          yes        no        none      torch

    lightly's and solo-learn's, all initialized as "torch"::

                                     layers  hidden_bias  hidden_bn  out_bias  out_bn
      SimCLR, lightly                2       no           yes        no        full
      SimCLR, solo-learn             2       yes          no         yes       none
      MoCo, both                     2       yes          no         yes       none
      BYOL, SwAV, lightly            2       no           yes        yes       none
      BYOL, SwAV, solo-learn         2       yes          yes        yes       none
      SimSiam, projector, lightly    2       no           yes        no        full
      DINO, lightly                  2       no           yes        yes       none
      Barlow Twins, lightly          2       no           yes        yes       none
      Barlow, VICReg, solo-learn     3       yes          yes        yes       none

    Attributes:
      hidden: units per layer except the last; unused with one layer.
      out: units of the last layer.
      layers: number of layers; 0 makes the head the identity.
      kept: number of hidden layers to keep, without the output layer; None keeps the whole head.
      hidden_bias: whether the layers before the last have a bias (before their BatchNorm).
      hidden_bn: whether a BatchNorm follows them.
      out_bias: whether the last layer has a bias.
      out_bn: BatchNorm after the last layer: "none", "full", "scale" (γ, no β) or "no_affine".
      activation: "relu", or exact "gelu"; after the BatchNorm of a hidden layer.
      kernel_init: a key of `layers.KERNEL_INITS`. Biases start at 0, or with "torch" uniform in
        ±1/sqrt(fan in) like the kernel.
      dtype: of the linear layers, "float32" or "bfloat16"; all else is float32.
      axis_name: mapped axis of the devices that share BatchNorm statistics, None for a single one.
      axis_index_groups: groups of device positions that share statistics, None for all.
      bn_splits: parts of a device's examples with statistics of their own; see
        `layers.batch_norm`.
      bn_unbiased: average running variances as PyTorch does; see `layers.batch_norm`.

    Raises:
      UserError: on construction, for a value that is not listed above.
    """

    hidden: int
    out: int
    layers: int = 2
    kept: int | None = None
    hidden_bias: bool = False
    hidden_bn: bool = True
    out_bias: bool = False
    out_bn: str = "none"
    activation: str = "relu"
    kernel_init: str = "torch"
    dtype: Any = "float32"
    axis_name: str | None = None
    axis_index_groups: Groups | None = None
    bn_splits: int = 1
    bn_unbiased: bool = False

    def __post_init__(self) -> None:
        require_choice("The head's out_bn", self.out_bn, OUT_BN)
        require_choice("The head's kernel_init", self.kernel_init, KERNEL_INITS)
        require_choice("The head's activation", self.activation, ACTIVATIONS)
        sizes = {"layers": (self.layers, 0)}
        if self.layers:
            sizes["out"] = (self.out, 1)
        if self.layers > 1:
            sizes["hidden"] = (self.hidden, 1)
        for name, (value, least) in sizes.items():
            if value < least:
                raise UserError(f"The head's {name} is {value}: use at least {least}.")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "n d"], train: bool, return_hidden: int | None = None
    ) -> Float[Array, "n out"]:
        """Projects features.

        Args:
          x: features.
          train: normalize by the batch statistics and update `batch_stats`, which must be mutable;
            if False, normalize by the running ones.
          return_hidden: return the output of this hidden layer, counted from 1, after BatchNorm and
            activation, or for 0 the features themselves (SimCLR v2's `ft_proj_selector`).

        Returns:
          float32 [n, `out`], or [n, `hidden`] for a hidden layer.

        Raises:
          UserError: the head has no such hidden layer.
        """
        if return_hidden is None:
            return_hidden = self.kept
        last = max(self.layers - 1, 0)
        if return_hidden is not None and not 0 <= return_hidden <= last:
            raise UserError(f"The head has no hidden layer {return_hidden}: use 0 to {last}.")
        # BatchNorm in float32 with the exact variance (two passes, a collective each) is cheap for
        # vectors, and necessary: features of different images are nearly equal at first.
        norm = batch_norm(
            train,
            self.axis_name,
            self.axis_index_groups,
            self.bn_splits,
            unbiased=self.bn_unbiased,
            dtype=jnp.float32,
            use_fast_variance=False,
        )
        x = x.astype(jnp.float32)
        for i in range(1, self.layers if return_hidden is None else return_hidden + 1):
            x = self._dense(self.hidden, self.hidden_bias, x, name=f"dense{i}")
            if self.hidden_bn:
                x = norm(name=f"bn{i}")(x)
            x = ACTIVATIONS[self.activation](x)
        if return_hidden is not None or not self.layers:
            return x
        x = self._dense(self.out, self.out_bias, x, name=f"dense{self.layers}")
        if self.out_bn != "none":
            x = norm(name=f"bn{self.layers}", **OUT_BN[self.out_bn])(x)
        return x

    def _dense(self, features: int, use_bias: bool, x: Array, name: str) -> Array:
        dense = nn.Dense(
            features,
            use_bias=use_bias,
            kernel_init=KERNEL_INITS[self.kernel_init],
            bias_init=_torch_bias(x.shape[-1])
            if self.kernel_init == "torch"
            else nn.initializers.zeros,
            dtype=jnp.dtype(self.dtype),
            name=name,
        )
        return dense(x).astype(jnp.float32)


def _torch_bias(fan_in: int) -> Initializer:
    def init(key: Array, shape: Any, dtype: Any = jnp.float32) -> Array:
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
