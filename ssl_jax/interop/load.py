"""`ssl_jax.load`, and the weights and configs of runs and files that it reads."""

import contextlib
import dataclasses
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from ssl_jax.config import Schedule
from ssl_jax.data.pipeline import prepare_eval
from ssl_jax.errors import UserError
from ssl_jax.files import local_path, reading
from ssl_jax.interop.import_weights import (
    is_weights_file,
    read_network,
    read_weights,
    read_weights_config,
)
from ssl_jax.interop.infer_architecture import require_finite
from ssl_jax.interop.weights import Weights
from ssl_jax.methods import Method, make_method
from ssl_jax.run.checkpoint import Checkpoints, fingerprint, steps_in
from ssl_jax.run.folder import read_config
from ssl_jax.step import TrainState, assemble, init_state

Pytree = Any


@dataclasses.dataclass(frozen=True, repr=False)
class Encoder:
    """A pretrained encoder for use outside training.

    Attributes:
      config: the run's.
      params: the encoder's parameters.
      batch_stats: its BatchNorm statistics.
      step: of the checkpoint.
      projector_layer: the projector's hidden layer whose output `apply` returns; 0 for the
        encoder's.
      projector: "params" and "batch_stats" of the projector, None if `projector_layer` is 0.
      source: the path it was loaded from.
      network: "online" or "target", which of the run's networks it is; "" if there is only one.
    """

    config: ConfigDict
    params: Pytree
    batch_stats: Pytree
    step: int
    projector_layer: int = 0
    projector: Pytree = None
    source: str = ""
    network: str = ""

    def __repr__(self) -> str:
        """One line, without the weights."""
        layer = f" of projector layer {self.projector_layer}" if self.projector_layer else ""
        count = sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"]))
        step = f"step {self.step} of " if self.step else ""
        network = f" ({self.network} network)" if self.network else ""
        return (
            f"Encoder({self.config.method}{network}, {self._method.encoder_name}, "
            f"{self.num_features} features{layer}, {count:,} parameters, {step}{self.source!r})"
        )

    @property
    def num_features(self) -> int:
        """The number of features that `apply` returns per image."""
        if self.projector_layer:
            layer = self.projector["params"][f"dense{self.projector_layer}"]
            return int(layer["kernel"].shape[-1])
        return self._method.num_features

    def apply(self, images: Array) -> Float[Array, "n d"]:
        """Computes features in evaluation mode.

        Args:
          images: [n, H, W, C], uint8, uint16, or floats in [0, 1], with the run's number of
            channels; prepared like the images of every evaluation: scaled by `config.data.range`
            if they are integers, the center cropped unless they have the run's size, resized,
            normalized.

        Returns:
          float32 [n, D].

        Raises:
          UserError: the images have another shape or dtype, or are floats from 0 to 255.
        """
        given = getattr(images, "dtype", "")  # JAX turns int64 into int32
        if isinstance(images, np.ndarray):  # JAX takes no other byte order than the machine's
            images = images.astype(images.dtype.newbyteorder("="), copy=False)
        images = jnp.asarray(images)
        channels = self.config.data.channels
        if images.ndim != 4 or images.shape[-1] != channels:
            gray = ", or repeat the channel of gray images three times" if channels == 3 else ""
            raise UserError(
                f"The images have the shape {list(images.shape)}, not [n, H, W, {channels}], with "
                "the channels that the encoder was trained on: add a batch axis with "
                f"images[None]{gray}."
            )
        floats = jnp.issubdtype(images.dtype, jnp.floating)
        if images.dtype not in (jnp.uint8, jnp.uint16) and not floats:
            raise UserError(
                f"The images are {given or images.dtype}, not uint8, uint16 or floats in [0, 1]: "
                "convert them with images.astype(np.uint8)."
            )
        limits = self.config.data.range
        if limits and images.dtype == jnp.uint8 and limits[1] > 255:
            raise UserError(
                f"The images are uint8, but the encoder was trained with config.data.range={limits}"
                ": give the stored values as uint16, or floats in [0, 1]."
            )
        # Bicubic resizing may overshoot 1 slightly.
        if floats and images.size and float(images.max()) > 2.0:
            raise UserError(
                f"Float images must be in [0, 1], but the maximum is {float(images.max()):g}: "
                "divide them by 255, or convert them with images.astype(np.uint8); if white "
                "isn't 255, divide by its value (16 in scikit-learn's digits)."
            )
        return self._apply(self.variables, images)

    @property
    def variables(self) -> Pytree:
        """Variables of the networks that `apply` runs: "params" and "batch_stats", by network."""
        variables = {
            "params": {"encoder": self.params},
            "batch_stats": {"encoder": self.batch_stats},
        }
        if self.projector_layer:
            for kind, networks in variables.items():
                networks["projector"] = self.projector[kind]
        return variables

    @cached_property
    def _method(self) -> Method:
        return make_method(self.config, Schedule(1, 1))

    @cached_property
    def _apply(self) -> Any:
        method = self._method

        def apply(variables: Pytree, images: Array) -> Array:
            return method.features(
                variables["params"],
                variables["batch_stats"],
                prepare_eval(images, self.config),
                projector_layer=self.projector_layer,
            )

        return jax.jit(apply)


def load(
    path: str | Path,
    step: int | None = None,
    *,
    projector_layer: int | None = None,
    network: str = "default",
) -> Encoder:
    """Loads an encoder from a run or a file.

    Args:
      path: the run's workdir, or a file of weights: of `ssl-jax export` or `ssl-jax import`, or any
        other that `ssl_jax.interop.import_weights.read_weights` reads.
      step: of the run's checkpoint, the newest by default.
      projector_layer: return the output of this hidden layer of the projector, after its ReLU
        (SimCLR v2 fine-tunes from 1); 0 for the encoder's; default `config.eval.projector_layer`.
      network: "online" or "target", of a run of a method with a target network; default
        `config.eval.network`.

    Returns:
      The encoder, on the default device.

    Raises:
      UserError: there is no run, checkpoint, step, layer or network as requested, or the file
        contains no encoder.
    """
    config = config_at(path)
    layer = config.eval.projector_layer if projector_layer is None else projector_layer
    make_method(config, Schedule(1, 1)).check_projector_layer(layer)
    weights = weights_at(path, step, network)
    projector = None
    if layer:
        stats = weights.batch_stats.get("projector", {})
        projector = {"params": weights.params["projector"], "batch_stats": stats}
        projector = jax.tree.map(jnp.asarray, projector)
    params, stats = jax.tree.map(
        jnp.asarray, (weights.params["encoder"], weights.batch_stats.get("encoder", {}))
    )
    about = (weights.step, layer, projector, str(path), weights.network)
    return Encoder(config, params, stats, *about)


def weights_at(path: str | Path, step: int | None = None, network: str = "default") -> Weights:
    """Reads the networks of a run, without its queues, or of a file of weights.

    Args:
      path: the run's workdir, or the file.
      step: of the run's checkpoint, the newest by default; a file has no steps.
      network: "online", "target", or "default" for that of the run's evaluations; see
        `Method.evaluated`. A file has one of them.

    Returns:
      The weights, on the host.

    Raises:
      UserError: the path can't be read, it has no such step or network, or a weight is NaN or
        infinite.
    """
    if is_weights_file(path):
        if step:
            raise UserError(f"{path} is a file of weights, which has no steps: omit --step.")
        weights = read_weights(path)
        network_at(path, network)  # refuses another one
        return weights
    name = network_at(path, network)
    config = read_config(local_path(path))
    method = make_method(config, Schedule(1, 1))
    state = restore_state(path, step)
    params, stats = method.evaluated(state.params, state.method_state, name)
    taken = name if method.target_networks else ""
    weights = Weights(config, params, stats, int(state.step), network=taken)
    require_finite(weights, path)
    return weights


def network_at(
    path: str | Path, chosen: str = "default", what: str = "The network to evaluate"
) -> str:
    """Resolves which network of a run or a file is taken; weights are not read.

    Args:
      path: the run's workdir, or the file.
      chosen: "online", "target", or "default" for that of the run's evaluations or of the file.
      what: names the choice in errors, such as its key.

    Returns:
      "online" or "target".

    Raises:
      UserError: the path can't be read, or it has no such network.
    """
    if not is_weights_file(path):
        return make_method(read_config(local_path(path)), Schedule(1, 1)).network_name(chosen, what)
    found = read_network(path)
    if chosen not in ("default", found):
        raise UserError(
            f"{what} is '{chosen}', but {path} is a file of weights and has the {found} network "
            "only. Use the workdir of the run."
        )
    return found


def config_at(path: str | Path) -> ConfigDict:
    """Reads the config of a run or a file of weights.

    Raises:
      UserError: the path can't be read.
    """
    if is_weights_file(path):
        return read_weights_config(path)
    if not local_path(path).exists():
        raise UserError(f"There is no run and no file of weights at {path}.")
    return read_config(local_path(path))


def results_folder(path: str | Path) -> Path:
    """The folder for evaluation results: a run's workdir, or a folder next to a file of weights."""
    path = local_path(path)
    return path.with_name(f"{path.name}_evals") if is_weights_file(path) else path


def newest_step(path: str | Path) -> int:
    """The step of a run's newest checkpoint; 0 for a file of weights.

    Raises:
      UserError: there is no run, or no checkpoint yet.
    """
    if is_weights_file(path):
        return 0
    read_config(local_path(path))  # refuses a folder without a run
    steps = steps_in(local_path(path) / "checkpoints")
    if not steps:
        raise _no_checkpoint(path)
    return steps[-1]


def weights_fingerprint(path: str | Path, step: int | None = None) -> dict[str, Any]:
    """Identifies the weights of a run or a file, wherever it lies.

    Args:
      path: the run's workdir, or the file.
      step: of the run's checkpoint, the newest by default.

    Returns:
      "step" of the checkpoint, 0 for a file, and "checksum": of the checkpoint's files, or of the
      arrays in a file, which writes the same arrays in any order. Runs are not read for it, so a
      run and its export differ.

    Raises:
      UserError: there is no such run, file or checkpoint, or it can't be read.
    """
    if is_weights_file(path):
        return {"step": 0, "checksum": _checksum(read_weights(path))}
    step = step or newest_step(path)
    folder = local_path(path) / "checkpoints" / str(step)
    with reading(folder):
        if not folder.is_dir():
            raise UserError(f"{path} has no checkpoint of step {step}.")
        return {"step": step, "checksum": fingerprint(folder)}


def _checksum(weights: Weights) -> str:
    """A checksum of the names, dtypes, shapes and values of all arrays, in the order of names."""
    checksum = 0
    trees = {"params": weights.params, "batch_stats": weights.batch_stats}
    for name, leaf in sorted(flatten_dict(trees, sep="/").items()):
        array = np.ascontiguousarray(leaf)
        checksum = zlib.crc32(f"{name} {array.dtype} {np.shape(leaf)} ".encode(), checksum)
        checksum = zlib.crc32(array.tobytes(), checksum)
    return f"{checksum:08x}"


def restore_state(path: str | Path, step: int | None = None) -> TrainState:
    """Restores the whole train state of a checkpoint on the host, as a run may fill the devices.

    Args:
      path: the run's workdir.
      step: of the checkpoint, the newest by default.

    Returns:
      The state, in NumPy arrays; each process reads the whole of it.

    Raises:
      UserError: there is no run, no checkpoint yet, or none of that step.
    """
    with _checkpoints(path) as checkpoints:
        steps = checkpoints.steps
        step = steps[-1] if step is None else step
        if step not in steps:
            raise UserError(f"{path} has no checkpoint of step {step}: use one of {steps}.")
        config = read_config(local_path(path))
        # Lengths only affect schedules, which are not used here.
        method, optimizer, _ = assemble(config, Schedule(1, 1))
        # Orbax restores to where the arrays of `like` are; these take no memory.
        like = jax.tree.map(
            lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape),
            jax.eval_shape(lambda: init_state(method, optimizer, config)),
        )
        state: TrainState = checkpoints.restore(step, like)
        return state


@contextlib.contextmanager
def _checkpoints(path: str | Path) -> Iterator[Checkpoints]:
    """Opens the checkpoints of a run, which has at least one."""
    read_config(local_path(path))  # refuses a folder without a run
    checkpoints = Checkpoints(local_path(path) / "checkpoints", read_only=True)
    try:
        if not checkpoints.steps:
            raise _no_checkpoint(path)
        yield checkpoints
    finally:
        checkpoints.close()


def _no_checkpoint(path: str | Path) -> UserError:
    return UserError(f"{path} has no checkpoint yet: wait until the run has written one.")
