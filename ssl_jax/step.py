"""The train step of every method: forward, loss, gradient, optimizer, method update."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt32
from ml_collections import ConfigDict

from ssl_jax.config import Schedule, flat_views, view_shape
from ssl_jax.data.index import stream_key, views_stream
from ssl_jax.data.pipeline import make_augment_fn
from ssl_jax.data.values import is_float
from ssl_jax.diagnostics import embedding_std
from ssl_jax.errors import UserError
from ssl_jax.evals import probe
from ssl_jax.methods import make_method
from ssl_jax.methods.base import Batch, Method, Pytree
from ssl_jax.optim import (
    learning_rate_schedule,
    make_optimizer,
    peak_learning_rate,
    weight_decay_schedule,
)
from ssl_jax.run.nonfinite import COUNT, STEP
from ssl_jax.spmd import AXIS, Spmd, device_groups

# (batch from the host, data kept on the device, key of the step) -> batch with views
AugmentFn = Callable[[dict[str, Any], dict[str, Array], Array], Batch]


class TrainState(flax.struct.PyTreeNode):
    """Everything needed to resume a run: saved in checkpoints, replicated, donated to each step.

    Attributes:
      step: optimizer steps done, which is also the data position; int32 scalar.
      params: the trained parameters, by network.
      method_state: batch statistics, targets, queues.
      opt_state: the optimizer's state, including the step counts of its schedules.
      key: the run's random key as raw data; every random stream folds in its name and the step.
      probe: the online linear classifier's state, from `probe.init`; {} without a probe.
      nonfinite: the number of steps with a non-finite loss, gradient or parameter, and the newest
        such step, counted from 1.
    """

    step: Int[Array, ""]
    params: Pytree
    method_state: Pytree
    opt_state: Pytree
    key: UInt32[Array, "2"]
    probe: Pytree
    nonfinite: Int[Array, "2"]


class LossAndGradients(NamedTuple):
    """A step's results before the optimizer, on one device.

    Attributes:
      loss: the global batch's loss.
      gradients: the loss's gradients with respect to the parameters; equal on all devices.
      outputs: the outputs of the method's forward pass, with this device's examples on axis 0.
      stats: new batch statistics, averaged over devices.
      logs: scalars to log.
    """

    loss: Float[Array, ""]
    gradients: Pytree
    outputs: dict[str, Array]
    stats: Pytree
    logs: dict[str, Array]


def assemble(
    config: ConfigDict,
    schedule: Schedule,
    axis_name: str | None = None,
    groups: tuple[tuple[int, ...], ...] | None = None,
) -> tuple[Method, optax.GradientTransformation, optax.Schedule]:
    """Builds the parts of a config's train step.

    Args:
      config: the run's config.
      schedule: the run's length.
      axis_name: mapped axis of the devices; None on a single device.
      groups: groups of devices that share BatchNorm statistics; None for a single group.

    Returns:
      The method, the optimizer of its parameter groups, and the learning-rate schedule.
    """
    method = make_method(config, schedule, axis_name, groups)
    learning_rate = learning_rate_schedule(config.optim, config.batch_size, schedule)
    peak = peak_learning_rate(config.optim, config.batch_size)
    decay = weight_decay_schedule(config.optim, schedule)
    optimizer = make_optimizer(config.optim, method.param_groups, learning_rate, peak, decay)
    return method, optimizer, learning_rate


def init_state(
    method: Method,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    sharding: jax.sharding.Sharding | None = None,
) -> TrainState:
    """Initializes the train state where it belongs, in memory once per device.

    Args:
      method: the method whose parameters to initialize.
      optimizer: built from `method.param_groups`.
      config: the run's config, for its seed and the shapes of its views.
      sharding: of all arrays, the replicated one of a mesh, whose processes all call this; None for
        the default device.

    Returns:
      The state; no two of its arrays share memory, so it may be donated.
    """

    def init(key_data: UInt32[Array, "2"]) -> TrainState:
        key = jax.random.wrap_key_data(key_data)
        params, method_state = method.init(stream_key(key, "init", 0), example_batch(config))
        step, classes = jnp.zeros((), jnp.int32), config.data.num_classes
        # A method that trains a classifier needs no probe.
        probed = config.eval.probe and classes > 0 and not method.classifies
        probe_state = probe.init(method.num_features, classes) if probed else {}
        none = jnp.zeros(2, jnp.int32)
        return TrainState(
            step, params, method_state, optimizer.init(params), key_data, probe_state, none
        )

    # On the host, as an array of one device can't be replicated to those of other processes.
    with jax.ensure_compile_time_eval():  # this function may be traced for shapes
        key_data = np.asarray(jax.random.key_data(jax.random.key(config.seed)))
    return jax.jit(init, out_shardings=sharding)(key_data)


def batch_shapes(
    config: ConfigDict, n: int, labeled: bool = True, cropped: bool = True
) -> dict[str, Any]:
    """Shapes of the batch that a source yields for a step.

    Args:
      config: the run's config.
      n: number of images.
      labeled: whether they have labels.
      cropped: whether the source yields cropped views, as host sources do.

    Returns:
      A `jax.ShapeDtypeStruct` for "id" and, if present, for "label" and each of "views".
    """
    raw: dict[str, Any] = {"id": jax.ShapeDtypeStruct((n,), jnp.int32)}
    if labeled:
        several = config.method == "supervised" and config.supervised.sigmoid
        raw["label"] = (
            jax.ShapeDtypeStruct((n, config.data.num_classes), jnp.int8)
            if several
            else jax.ShapeDtypeStruct((n,), jnp.int32)
        )
    if cropped:
        dtype = jnp.float32 if is_float(config.data.bits, config.data.range) else jnp.uint8
        shapes = [view_shape(config, view) for view in flat_views(config)]
        raw["views"] = tuple(jax.ShapeDtypeStruct((n, *shape), dtype) for shape in shapes)
    return raw


def example_batch(config: ConfigDict) -> Batch:
    """A batch of two blank examples with the shapes used in training."""
    views = tuple(jnp.zeros((2, *view_shape(config, v))) for v in flat_views(config))
    ids = jnp.zeros((2,), jnp.int32)
    return {"views": views, "id": ids, "label": ids}


def loss_and_gradients(method: Method, state: TrainState, batch: Batch) -> LossAndGradients:
    """Computes the loss and the parameters' gradients; per device.

    Args:
      method: built with the axis name under which this function is mapped.
      state: the train state, replicated.
      batch: this device's share of the batch, with views ready for the encoder.
    """
    rng = stream_key(jax.random.wrap_key_data(state.key), "forward", state.step)

    def loss_of(params: Pytree) -> tuple[Array, tuple[dict[str, Array], Pytree, dict[str, Array]]]:
        with jax.named_scope("forward"):
            outputs, stats = method.forward(params, state.method_state, batch, rng)
        with jax.named_scope("loss"):
            loss, logs = method.loss(params, outputs, state.method_state, batch, state.step)
        return loss, (outputs, stats, logs)

    (loss, (outputs, stats, logs)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
        state.params
    )
    gradients, stats = _averaged(method, state, gradients, stats)
    return LossAndGradients(loss, gradients, outputs, stats, logs)


def cached_loss_and_gradients(
    method: Method,
    state: TrainState,
    raw: dict[str, Any],
    augment_fn: Callable[[dict[str, Any]], Batch],
    microbatches: int,
) -> LossAndGradients:
    """Computes `loss_and_gradients` with one microbatch in memory at a time; per device.

    Embedding caching (Gao et al., 2021, arXiv:2101.06983): microbatches are encoded one at a time
    and only their outputs are kept. The loss of the whole global batch and its gradient with
    respect to the outputs are computed once. Then each microbatch is encoded again from the same
    pixels, and the parameters' gradient is accumulated. The result is exactly the large batch's
    gradient, except that BatchNorm sees one microbatch at a time. Outputs that don't depend on the
    parameters (keys, targets) are computed once.

    A microbatch has every `microbatches`-th example, the same set on any number of devices. Each
    microbatch updates the old batch statistics, and the results are averaged over microbatches.

    Args:
      method: built with the axis name under which this function is mapped.
      state: the train state, replicated.
      raw: this device's share of the source's batch, with examples on axis 0 of every leaf.
      augment_fn: makes the views of a microbatch of `raw`; must be deterministic.
      microbatches: number of microbatches; divides the number of this device's examples.
    """
    rng = stream_key(jax.random.wrap_key_data(state.key), "forward", state.step)

    def forward(params: Pytree, index: Array) -> tuple[dict[str, Array], Pytree]:
        with jax.named_scope("forward"):
            microbatch = augment_fn(_take(raw, index, microbatches))
            return method.forward(params, state.method_state, microbatch, rng)

    def encode(total: Pytree, index: Array) -> tuple[Pytree, dict[str, Array]]:
        outputs, stats = forward(state.params, index)
        return jax.tree.map(jnp.add, total, stats), outputs

    def pull_back(total: Pytree, index: Array) -> tuple[Pytree, None]:
        _, pull = jax.vjp(lambda params: forward(params, index)[0], state.params)
        (gradients,) = pull(_take(cotangents, index, microbatches))
        return jax.tree.map(jnp.add, total, gradients), None

    indices = jnp.arange(microbatches)
    zeros = jax.tree.map(jnp.zeros_like, state.method_state["batch_stats"])
    stats, outputs = jax.lax.scan(encode, zeros, indices)
    stats = jax.tree.map(lambda total: total / microbatches, stats)
    outputs = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), outputs)
    kept: Batch = {name: raw[name] for name in ("id", "label") if name in raw}

    def loss_of(params: Pytree, outputs: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        with jax.named_scope("loss"):
            return method.loss(params, outputs, state.method_state, kept, state.step)

    (loss, logs), (gradients, cotangents) = jax.value_and_grad(loss_of, (0, 1), has_aux=True)(
        state.params, outputs
    )
    gradients, _ = jax.lax.scan(pull_back, gradients, indices)
    gradients, stats = _averaged(method, state, gradients, stats)
    return LossAndGradients(loss, gradients, outputs, stats, logs)


def _averaged(
    method: Method, state: TrainState, gradients: Pytree, stats: Pytree
) -> tuple[Pytree, Pytree]:
    """Averages over devices; keeps a frozen network's statistics, which a mean would round."""
    # A per-device BatchNorm's statistics differ by device; the mean keeps the state replicated.
    gradients, stats = jax.tree.map(method.mean, (gradients, stats))
    return gradients, {
        name: state.method_state["batch_stats"][name] if name in method.frozen else new
        for name, new in stats.items()
    }


def _take(tree: Pytree, index: Array, microbatches: int) -> Pytree:
    """Takes every `microbatches`-th example, starting with `index`."""

    def take(x: Array) -> Array:
        rows = x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:])
        return jax.lax.dynamic_index_in_dim(rows, index, axis=1, keepdims=False)

    return jax.tree.map(take, tree)


def batchnorm_images(config: ConfigDict, devices: int) -> int:
    """Counts the images that share BatchNorm statistics in training.

    Args:
      config: the run's config.
      devices: number of devices in the mesh.

    Returns:
      The number of images per BatchNorm group; each image may have several views.
    """
    group = config.model.bn_group_size or devices
    together = (config.microbatch or config.batch_size) * group // devices
    return together // config.model.bn_splits


def batchnorm_advice(config: ConfigDict, devices: int) -> str:
    """The settings that make more images share BatchNorm statistics, as an order without period.

    Args:
      config: the run's config.
      devices: number of devices in the mesh.
    """
    part, keys = config.microbatch, ["config.batch_size", "config.microbatch"]
    larger = keys[1:] if 0 < part < config.batch_size else keys if part else keys[:1]
    shared = ""
    if config.model.bn_splits > 1:
        shared = ", or set config.model.bn_splits=1"
    elif 0 < config.model.bn_group_size < devices:
        shared = ", or set config.model.bn_group_size=0"
    return f"increase {' and '.join(larger)}{shared}"


def _require_batchnorm(config: ConfigDict, devices: int) -> int:
    """Returns `batchnorm_images`; raises a UserError if they can't be split or are too few."""
    share, splits = (config.microbatch or config.batch_size) // devices, config.model.bn_splits
    if share % splits:
        raise UserError(
            f"config.model.bn_splits is {splits}, which does not divide the {share} images that a "
            f"device encodes at a time. Use a divisor of {share}, such as "
            f"{math.gcd(share, splits)}."
        )
    images = batchnorm_images(config, devices)
    if images < 2:
        raise UserError(
            f"BatchNorm would see one image at a time: {batchnorm_advice(config, devices)}."
        )
    return images


def make_train_step(
    method: Method,
    optimizer: optax.GradientTransformation,
    augment_fn: AugmentFn,
    learning_rate: optax.Schedule,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Builds the per-device train step, with microbatches if configured, for `Spmd.map`.

    Args:
      method: built with the axis name of the mesh.
      optimizer: built from `method.param_groups`.
      augment_fn: makes the views on the device, keyed by the step and the sample ids.
      learning_rate: the schedule to log; the optimizer has its own copy.

    Returns:
      A function (state, batch from the host, device data) -> (state, metrics); metrics are
      float32 scalars, equal on all devices.
    """
    config = method.config
    microbatches = config.batch_size // (config.microbatch or config.batch_size)

    def train_step(
        state: TrainState, raw: dict[str, Any], device_data: dict[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        key = views_stream(jax.random.wrap_key_data(state.key), state.step)

        def views_of(part: dict[str, Any]) -> Batch:
            with jax.named_scope("augment"):
                return augment_fn(part, device_data, key)

        if microbatches == 1:
            computed = loss_and_gradients(method, state, views_of(raw))
        else:
            computed = cached_loss_and_gradients(method, state, raw, views_of, microbatches)
        loss, gradients, outputs, stats, logs = computed
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        method_state = {**state.method_state, "batch_stats": stats}
        embedding, label = outputs["embedding"], raw.get("label")
        probe_state, probed = _probe_step(method, state.probe, embedding, label)
        with jax.named_scope("update"):
            params, method_state = method.update(params, outputs, method_state, state.step)
        metrics = {
            "loss": loss,
            "learning_rate": learning_rate(state.step),
            "gradient_norm": optax.tree.norm(gradients),
            "embedding_std": embedding_std(embedding, method.mean),
        }
        metrics |= {**logs, **probed}
        new_state = state.replace(
            params=params, method_state=method_state, opt_state=opt_state, probe=probe_state
        )
        sizes = [loss, metrics["gradient_norm"]]
        new_state = _counted(state, new_state, sizes, config.max_nonfinite_steps)
        metrics |= {COUNT: new_state.nonfinite[0], STEP: new_state.nonfinite[1]}
        return new_state, {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}

    return train_step


def _counted(state: TrainState, after: TrainState, sizes: list[Array], allowed: int) -> TrainState:
    """Counts the step; counts a non-finite step separately and undoes it if skipping is allowed."""
    # The new parameters are checked too: an update may overflow where gradients don't.
    finite = jnp.isfinite(jnp.stack([*sizes, optax.tree.norm(after.params)])).all()
    if allowed:
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
    counted = jnp.stack([state.nonfinite[0] + 1, state.step + 1])
    # Counting stops at the first step over the limit, the one to report: it causes the later ones.
    over = state.nonfinite[0] > allowed
    counted = jnp.where(finite | over, state.nonfinite, counted)
    return after.replace(step=state.step + 1, nonfinite=counted)


def _probe_step(
    method: Method, probe_state: Pytree, features: Array, label: Array | None
) -> tuple[Pytree, dict[str, Array]]:
    """Updates the online probe; returns its state and scalars to log; per device."""
    if not probe_state or label is None:
        return probe_state, {}
    with jax.named_scope("probe"):
        (loss, correct), gradients = jax.value_and_grad(probe.loss, has_aux=True)(
            probe_state["params"], features, label, method.label_weights(label)
        )
        probe_state = probe.update(probe_state, jax.tree.map(method.mean, gradients))
    return probe_state, {
        "probe_loss": method.mean(loss),
        "probe_train_accuracy": method.mean(correct),
    }


class Program:
    """The train step of a config on a mesh, for training and for ahead-of-time plans.

    Attributes:
      method, optimizer: the config's method and optimizer.
      step: mapped over the mesh: (state (donated), batch from a source, device data) -> (state,
        metrics).
    """

    def __init__(self, config: ConfigDict, schedule: Schedule, spmd: Spmd) -> None:
        """Builds the step; compiles nothing.

        Args:
          config: the run's config.
          schedule: the run's length.
          spmd: the mesh.

        Raises:
          UserError: the config can't be run on these devices.
        """
        groups = device_groups(spmd.size, config.model.bn_group_size)
        self.batchnorm_images = _require_batchnorm(config, spmd.size)
        self.config, self.spmd = config, spmd
        self.method, self.optimizer, learning_rate = assemble(config, schedule, AXIS, groups)
        self.step = spmd.map(
            make_train_step(self.method, self.optimizer, make_augment_fn(config), learning_rate),
            inputs=("replicated", "sharded", "replicated"),
            outputs=("replicated", "replicated"),
            donate=(0,),
        )

    def lower(self, *shapes: Any) -> Any:
        """Returns the step's `jax.stages.Lowered` for arguments of these shapes; not under pmap."""
        return self.step.lower(*shapes)  # type: ignore[attr-defined]

    def init(self) -> TrainState:
        """Initializes the state, replicated over the mesh; all processes call it together."""
        replicated = self.spmd.sharding("replicated")
        return init_state(self.method, self.optimizer, self.config, replicated)

    @functools.cached_property
    def state_shapes(self) -> TrainState:
        """Shapes and dtypes of the state, without computing it."""
        shapes: TrainState = jax.eval_shape(self.init)
        return shapes

    def shapes(
        self, device_data: dict[str, Any] | None = None, labeled: bool = True
    ) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
        """Returns shapes and shardings of the arguments of `step`, for `lower(*shapes)`.

        Args:
          device_data: arrays or shapes that a source keeps on the devices; None or {} if its
            batches contain their views.
          labeled: whether the batches have labels.

        Returns:
          State, batch and device data.
        """
        replicated = self.spmd.sharding("replicated")
        sharded = self.spmd.sharding("sharded")

        def placed(tree: Pytree, sharding: Any) -> Pytree:
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
            )

        raw = batch_shapes(self.config, self.config.batch_size, labeled, cropped=not device_data)
        state = placed(self.state_shapes, replicated)
        return state, placed(raw, sharded), placed(device_data or {}, replicated)
