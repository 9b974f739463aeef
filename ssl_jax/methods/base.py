"""The protocol of a method, and what all of them share.

A method is five pure functions over pytrees, written for one device's share of the batch; one train
step serves all. Conventions that the rest of the package relies on:

* `params["encoder"]` and `extra["batch_stats"]["encoder"]` are the network that is evaluated.
* every leaf of `outputs` has this device's examples on axis 0, and `outputs["embedding"]` [n, D]
  holds the encoder's features of the first view.
* `stats` is the new `extra["batch_stats"]` and nothing else; nothing else in `extra` changes before
  `update`.
* `loss` returns the mean over the global batch on every device (the pmean of local means); its
  gradient is this device's share, and the step averages parameters' gradients once.
* state is replicated: what `update` returns must be equal on all devices. Queues are kept in the
  order of the global batch.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from ssl_jax.models import MLPHead, ResNet
from ssl_jax.optim import role_labels

Pytree = Any
Batch = dict[str, Any]  # views: tuple of [n, H, W, 3] float32; id [n]; label [n] where there is one


class Method:
    """Base of the methods: holds the config and builds the encoder.

    Attributes:
      config: of the run.
      total_steps: its length in steps.
      axis_name: mapped axis of the devices, None on a single one.
      groups: of devices that share BatchNorm statistics, None for all.
      encoder: the Flax module of the evaluated network.
    """

    def __init__(
        self,
        config: ConfigDict,
        total_steps: int,
        axis_name: str | None = None,
        groups: tuple[tuple[int, ...], ...] | None = None,
    ) -> None:
        self.config = config
        self.total_steps = total_steps
        self.axis_name = axis_name
        self.groups = groups
        self.encoder = make_encoder(config, axis_name, groups)

    def init(self, rng: Array, batch: Batch) -> tuple[Pytree, Pytree]:
        """Initial parameters and extra state.

        Args:
          rng: a key, the same on every device.
          batch: any batch with the shapes of training, on one device.

        Returns:
          `params`, `extra`; `extra["batch_stats"]` mirrors the modules of `params`.
        """
        raise NotImplementedError

    def forward(
        self, params: Pytree, extra: Pytree, batch: Batch, rng: Array
    ) -> tuple[dict[str, Array], Pytree]:
        """Encodes this device's (or microbatch's) examples; returns `outputs`, `stats`."""
        raise NotImplementedError

    def loss(
        self, params: Pytree, outputs: dict[str, Array], extra: Pytree, batch: Batch, step: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The global loss, sees all devices through `axis_name`; returns it and scalars to log."""
        raise NotImplementedError

    def update(
        self, params: Pytree, outputs: dict[str, Array], extra: Pytree, step: Array
    ) -> tuple[Pytree, Pytree]:
        """After the optimiser: moves targets, fills queues. Returns `params`, `extra`."""
        return params, extra

    def param_groups(self, params: Pytree) -> Pytree:
        """The optimiser's label of each leaf of `params`; see `optim.make_optimizer`."""
        return role_labels(params)

    def head(self, **options: Any) -> MLPHead:
        """An MLP head with this run's precision and BatchNorm groups."""
        return MLPHead(
            dtype=self.config.dtype,
            axis_name=self.axis_name,
            axis_index_groups=self.groups,
            **options,
        )

    def mean(self, x: Array) -> Array:
        """The mean over devices of a local mean."""
        return x if self.axis_name is None else jax.lax.pmean(x, self.axis_name)

    def gather(self, x: Float[Array, "n ..."]) -> Float[Array, "batch ..."]:
        """The examples of all devices, in the order of the global batch."""
        if self.axis_name is None:
            return x
        return jax.lax.all_gather(x, self.axis_name, axis=0, tiled=True)


def make_encoder(
    config: ConfigDict,
    axis_name: str | None = None,
    groups: tuple[tuple[int, ...], ...] | None = None,
) -> ResNet:
    """The encoder that a config describes; `axis_name=None` for use outside the train step."""
    model = config.model
    return ResNet(
        depth=model.depth,
        width=model.width,
        sk=model.sk,
        stem=model.stem,
        padding=model.padding,
        conv_init=model.conv_init,
        zero_init_residual=model.zero_init_residual,
        dtype=config.dtype,
        axis_name=axis_name,
        axis_index_groups=groups,
    )


def train_apply(
    module: nn.Module, name: str, params: Pytree, stats: Pytree, x: Array
) -> tuple[Array, Pytree]:
    """Applies a module in train mode.

    Args:
      module: called as `module(x, train=True)`.
      name: its entry in `params` and `stats`.
      params: of the method.
      stats: the method's `extra["batch_stats"]`.
      x: its input.

    Returns:
      The output, and the module's new batch statistics ({} if it has none).
    """
    variables = {"params": params[name], "batch_stats": stats[name]}
    out, changed = module.apply(variables, x, train=True, mutable=["batch_stats"])
    return out, changed.get("batch_stats", {})


def init_module(module: nn.Module, rng: Array, x: Array) -> tuple[Pytree, Pytree]:
    """Initial parameters and batch statistics ({} if none) of one module."""
    variables = module.init(rng, x, train=False)
    return variables["params"], variables.get("batch_stats", {})


def encode_together(
    method: Method, params: Pytree, stats: Pytree, views: tuple[Array, ...]
) -> tuple[list[Array], Pytree]:
    """Encodes views of one size in one forward, so that they share BatchNorm statistics.

    Args:
      method: whose encoder to use.
      params: of the method.
      stats: the method's `extra["batch_stats"]`.
      views: V arrays [n, H, W, 3] of equal shape.

    Returns:
      V features [n, D], and the encoder's new batch statistics.
    """
    images = jnp.concatenate(views)
    features, new_stats = train_apply(method.encoder, "encoder", params, stats, images)
    return jnp.split(features, len(views)), new_stats
