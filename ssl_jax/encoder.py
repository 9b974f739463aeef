"""A pretrained encoder for use outside training."""

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from ssl_jax.checkpoint import Checkpoints
from ssl_jax.config import Schedule
from ssl_jax.data.pipeline import prepare_clean
from ssl_jax.errors import UserError
from ssl_jax.methods import make_method
from ssl_jax.step import TrainState, assemble, init_state
from ssl_jax.workdir import read_config

Pytree = Any


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The evaluated network of a run.

    Attributes:
      config: of the run.
      params: of the encoder.
      batch_stats: its BatchNorm statistics.
      step: of the checkpoint.
      projector_layer: 0; or which hidden layer of the projector `apply` goes on to.
      projector: "params" and "batch_stats" of the projector, where a layer of it is asked for.
    """

    config: ConfigDict
    params: Pytree
    batch_stats: Pytree
    step: int
    projector_layer: int = 0
    projector: Pytree = None

    def apply(self, images: Array) -> Float[Array, "n d"]:
        """Features of images, in evaluation mode.

        Args:
          images: [n, H, W, 3], uint8 or floats in [0, 1]; resized to the run's size and normalised
            as in training.

        Returns:
          float32 [n, D].

        Raises:
          UserError: another shape or dtype, or floats that look like 0 … 255.
        """
        images = jnp.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3:
            raise UserError(
                f"An encoder takes images [n, H, W, 3], not {list(images.shape)}: add the axis of "
                "examples with images[None], repeat the channel of gray images three times."
            )
        if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                f"An encoder takes uint8 images or floats in [0, 1], not {images.dtype}: convert "
                "them with images.astype(np.uint8)."
            )
        # Bicubic resizing may overshoot 1 a little.
        if images.dtype != jnp.uint8 and images.size and float(images.max()) > 2.0:
            raise UserError(
                f"An encoder takes floats in [0, 1], but these go up to {float(images.max()):g}: "
                "divide them by 255, or convert them with images.astype(np.uint8)."
            )
        variables = {
            "params": {"encoder": self.params},
            "batch_stats": {"encoder": self.batch_stats},
        }
        if self.projector_layer:
            for kind, networks in variables.items():
                networks["projector"] = self.projector[kind]
        return self._apply(variables, images)

    @cached_property
    def _apply(self) -> Any:
        method = make_method(self.config, Schedule(1, 1))

        def apply(variables: Pytree, images: Array) -> Array:
            return method.features(
                variables["params"],
                variables["batch_stats"],
                prepare_clean(images, self.config),
                projector_layer=self.projector_layer,
            )

        return jax.jit(apply)


def load(
    path: str | Path, step: int | None = None, *, projector_layer: int | None = None
) -> Encoder:
    """Loads the encoder that a run has trained.

    Args:
      path: the run's workdir.
      step: of the checkpoint, default the newest.
      projector_layer: go on to this hidden layer of the projector, after its ReLU (SimCLR v2's
        fine-tuning takes 1); 0 stays at the encoder; default `config.eval.projector_layer`.

    Returns:
      The encoder, on the default device.

    Raises:
      UserError: no run there, no checkpoint yet, none of that step, or no such layer.
    """
    config = read_config(Path(path))
    layer = config.eval.projector_layer if projector_layer is None else projector_layer
    make_method(config, Schedule(1, 1)).check_projector_layer(layer)
    state = restore_state(path, step)
    stats = state.extra["batch_stats"]
    projector = None
    if layer:
        projector = {"params": state.params["projector"], "batch_stats": stats["projector"]}
    return Encoder(
        config, state.params["encoder"], stats["encoder"], int(state.step), layer, projector
    )


def restore_state(path: str | Path, step: int | None = None) -> TrainState:
    """The whole train state of a checkpoint, on the default device.

    Args:
      path: the run's workdir.
      step: of the checkpoint, default the newest.

    Returns:
      The state.

    Raises:
      UserError: no run there, no checkpoint yet, or none of that step.
    """
    workdir = Path(path)
    config = read_config(workdir)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    try:
        steps = checkpoints.steps
        if not steps:
            raise UserError(f"{workdir} has no checkpoint yet: let the run go on until it has one.")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise UserError(f"{workdir} has no checkpoint of step {step}: it has {steps}.")
        # The lengths only matter to schedules, which are not used here.
        method, optimizer, _ = assemble(config, Schedule(1, 1))
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
            jax.eval_shape(lambda: init_state(method, optimizer, config)),
        )
        state: TrainState = checkpoints.restore(step, like)
        return state
    finally:
        checkpoints.close()
