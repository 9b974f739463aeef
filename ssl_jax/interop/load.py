"""A pretrained encoder for use outside training."""

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from ssl_jax.config import Schedule
from ssl_jax.data.pipeline import prepare_clean
from ssl_jax.errors import UserError
from ssl_jax.interop.import_weights import is_elsewhere, read_weights, weights_config
from ssl_jax.interop.weights import Weights
from ssl_jax.methods import make_method
from ssl_jax.methods.base import make_encoder
from ssl_jax.models.resnet import resnet_name
from ssl_jax.run.checkpoint import Checkpoints
from ssl_jax.run.folder import read_config
from ssl_jax.spmd import make_spmd
from ssl_jax.step import TrainState, assemble, init_state

Pytree = Any


@dataclasses.dataclass(frozen=True, repr=False)
class Encoder:
    """The evaluated network of a run.

    Attributes:
      config: of the run.
      params: of the encoder.
      batch_stats: its BatchNorm statistics.
      step: of the checkpoint.
      projector_layer: 0; or which hidden layer of the projector `apply` goes on to.
      projector: "params" and "batch_stats" of the projector, where a layer of it is asked for.
      source: the path that it was loaded from.
    """

    config: ConfigDict
    params: Pytree
    batch_stats: Pytree
    step: int
    projector_layer: int = 0
    projector: Pytree = None
    source: str = ""

    def __repr__(self) -> str:
        """In a line: the weights themselves are in `params`."""
        layer = f" of projector layer {self.projector_layer}" if self.projector_layer else ""
        count = sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"]))
        step = f"step {self.step} of " if self.step else ""
        return (
            f"Encoder({self.config.method}, {resnet_name(self.config.model)}, "
            f"{self.num_features} features{layer}, {count:,} parameters, {step}{self.source!r})"
        )

    @property
    def num_features(self) -> int:
        """How many features `apply` gives of an image."""
        if self.projector_layer:
            layer = self.projector["params"][f"dense{self.projector_layer}"]
            return int(layer["kernel"].shape[-1])
        return int(make_encoder(self.config).num_features)

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
        return self._apply(self.variables, images)

    @property
    def variables(self) -> Pytree:
        """What `apply` runs: "params" and "batch_stats", each by the network's name."""
        variables = {
            "params": {"encoder": self.params},
            "batch_stats": {"encoder": self.batch_stats},
        }
        if self.projector_layer:
            for kind, networks in variables.items():
                networks["projector"] = self.projector[kind]
        return variables

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
    """Loads an encoder that a run has trained, or that is in a file.

    Args:
      path: the run's workdir; or a file of weights: of `ssl-jax export` or `ssl-jax import`, or of
        another code as `ssl_jax.interop.import_weights.read_weights` takes it.
      step: of the run's checkpoint, default the newest.
      projector_layer: go on to this hidden layer of the projector, after its ReLU (SimCLR v2's
        fine-tuning takes 1); 0 stays at the encoder; default `config.eval.projector_layer`.

    Returns:
      The encoder, on the default device.

    Raises:
      UserError: no run there, no checkpoint yet, none of that step, no such layer, or a file that
        holds no encoder.
    """
    weights = weights_at(path, step) if is_elsewhere(path) else None
    config = weights.config if weights else read_config(Path(path))
    layer = config.eval.projector_layer if projector_layer is None else projector_layer
    make_method(config, Schedule(1, 1)).check_projector_layer(layer)
    weights = weights or run_weights(path, step)
    projector = None
    if layer:
        projector = {
            "params": weights.params["projector"],
            "batch_stats": weights.batch_stats["projector"],
        }
    params, stats = jax.tree.map(
        jnp.asarray, (weights.params["encoder"], weights.batch_stats["encoder"])
    )
    return Encoder(config, params, stats, weights.step, layer, projector, str(path))


def run_weights(path: str | Path, step: int | None = None) -> Weights:
    """The networks of a run's checkpoint, on the default device; not targets, nor queues.

    Args:
      path: the run's workdir.
      step: of the checkpoint, default the newest.

    Raises:
      UserError: no run there, no checkpoint yet, or none of that step.
    """
    state = restore_state(path, step)
    stats = {k: v for k, v in state.method_state["batch_stats"].items() if k in state.params}
    return Weights(read_config(Path(path)), state.params, stats, int(state.step))


def weights_at(path: str | Path, step: int | None = None) -> Weights:
    """The networks of a run, or of a file of weights, which has no steps.

    Raises:
      UserError: nothing there that can be read, or no checkpoint of that step.
    """
    if not is_elsewhere(path):
        return run_weights(path, step)
    if step:
        raise UserError(f"{path} is a file of weights, which has no steps: leave --step out.")
    return read_weights(path)


def config_at(path: str | Path) -> ConfigDict:
    """The config of a run, or of a file of weights.

    Raises:
      UserError: nothing there that can be read.
    """
    if not Path(path).expanduser().exists() and not is_elsewhere(path):
        raise UserError(f"There is no run, nor a file of weights, {path}.")
    return weights_config(path) if is_elsewhere(path) else read_config(Path(path))


def results_folder(path: str | Path) -> Path:
    """Where what is measured on a run is kept, its workdir; of a file, a folder beside it."""
    path = Path(path).expanduser()
    return path.with_name(f"{path.name}_evals") if is_elsewhere(path) else path


def newest_step(path: str | Path) -> int:
    """Of a run's checkpoints; 0 for a file of weights.

    Raises:
      UserError: no run there, or no checkpoint yet.
    """
    if is_elsewhere(path):
        return 0
    read_config(Path(path))
    checkpoints = Checkpoints(Path(path) / "checkpoints", read_only=True)
    try:
        if not checkpoints.steps:
            raise UserError(f"{path} has no checkpoint yet: let the run go on until it has one.")
        return int(checkpoints.steps[-1])
    finally:
        checkpoints.close()


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
        # Several processes read together, and each has all of it.
        several = jax.process_count() > 1
        device: Any = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        device = make_spmd().sharding("replicated") if several else device
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
            jax.eval_shape(lambda: init_state(method, optimizer, config)),
        )
        state: TrainState = checkpoints.restore(step, like)
        return state
    finally:
        checkpoints.close()
