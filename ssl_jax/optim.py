"""Optimizers, their masks by parameter path, and learning-rate schedules, composed from Optax.

Notation: w is a parameter tensor, g its gradient, v its momentum buffer, m the momentum, wd the
weight decay, η the trust coefficient. The optimizer's state holds all that changes, including step
counts, so a restored state continues its schedules exactly.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from ssl_jax.config import Schedule
from ssl_jax.errors import UserError, did_you_mean, require_choice

Pytree = Any
# True or False for all, a pytree of bools, or a function from a params tree to one.
Mask = bool | Pytree | Callable[[Pytree], Pytree]

OPTIMIZERS = ("lars", "lars_byol", "lars_clipped", "larc", "sgd", "adam", "adamw")
SCHEDULES = ("cosine", "step", "constant")
LR_SCALINGS = ("linear", "sqrt", "none")
LABELS = ("weight", "norm_bias", "constant_lr", "frozen", "frozen_until")


def role_labels(params: Pytree) -> Pytree:
    """Labels each parameter, by its path, as a weight or as a bias or normalization parameter.

    Args:
      params: any tree with Flax names: nested or flattened dicts, boxed leaves, nnx states.

    Returns:
      The same tree with "norm_bias" at every leaf named `bias` or `scale`, "weight" elsewhere.
    """

    def role(path: tuple[Any, ...], _: Any) -> str:
        words = re.findall(r"\w+", jax.tree_util.keystr(path))
        if len(words) > 1 and words[-1] == "value":  # inside the box of an nnx or partitioned leaf
            words.pop()
        return "norm_bias" if words and words[-1] in ("bias", "scale") else "weight"

    return jax.tree_util.tree_map_with_path(role, params)


def weight_mask(params: Pytree) -> Pytree:
    """Returns True at every leaf that `role_labels` labels "weight", False elsewhere."""
    return jax.tree.map(lambda role: role == "weight", role_labels(params))


def lars(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 0.001,
    mask: Mask = weight_mask,
) -> optax.GradientTransformation:
    """LARS in SimCLR's form, with the learning rate inside the momentum.

    v ← m·v + lr·trust·(g + wd·w); w ← w - v; trust = η‖w‖/‖g + wd·w‖, or 1 where either norm is 0
    (You et al., 2017, arXiv:1708.03888; SimCLR's official code). Tensors whose mask is False get
    neither decay nor trust. With wd = 0, trust still applies.

    Args:
      learning_rate: scalar, or a function of the step.
      momentum: m.
      weight_decay: wd.
      trust_coefficient: η.
      mask: tensors to adapt and decay; by default all but biases and normalization parameters.

    Returns:
      The gradient transformation; its update needs the params.
    """
    return optax.lars(
        learning_rate,
        weight_decay=weight_decay,
        weight_decay_mask=mask,
        trust_coefficient=trust_coefficient,
        trust_ratio_mask=mask,
        momentum=momentum,
    )


def lars_byol(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 0.001,
    mask: Mask = weight_mask,
) -> optax.GradientTransformation:
    """LARS in BYOL's form, with the learning rate outside the momentum.

    v ← m·v + trust·(g + wd·w); w ← w - lr·v; trust as in `lars` (BYOL's official code).

    Args:
      learning_rate: scalar, or a function of the step.
      momentum: m.
      weight_decay: wd.
      trust_coefficient: η.
      mask: tensors to adapt and decay; by default all but biases and normalization parameters.

    Returns:
      The gradient transformation; its update needs the params.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient), mask),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def larc(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 0.001,
) -> optax.GradientTransformation:
    """LARC without clipping, on every tensor, as used by SwAV and SimSiam's linear evaluation.

    v ← m·v + trust·(g + wd·w); w ← w - lr·v; trust = η‖w‖/(‖g‖ + wd‖w‖ + 1e-8). If either norm is
    0, there is neither trust nor decay (NVIDIA apex's LARC around PyTorch's SGD).

    Args:
      learning_rate: scalar, or a function of the step.
      momentum: m.
      weight_decay: wd.
      trust_coefficient: η.

    Returns:
      The gradient transformation; its update needs the params.
    """

    def adapt(gradient: Array, weight: Array) -> Array:
        return _larc_adapt(gradient, weight, weight_decay, trust_coefficient)

    return optax.chain(
        optax.stateless_with_tree_map(adapt),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def lars_clipped(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 0.02,
    mask: Mask = weight_mask,
) -> optax.GradientTransformation:
    """LARS in solo-learn's form: LARC's trust, clipped so that no tensor's rate exceeds lr.

    v ← m·v + min(trust/lr, 1)·(g + wd·w); w ← w - lr·v; trust as in `larc`. If either norm is 0
    or the mask is False, there is neither trust nor decay.

    Args:
      learning_rate: scalar, or a function of the step.
      momentum: m.
      weight_decay: wd.
      trust_coefficient: η.
      mask: tensors to adapt and decay; by default all but biases and normalization parameters.

    Returns:
      The gradient transformation; its update needs the params.
    """

    def init(params: Pytree) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(
        updates: Pytree, state: optax.ScaleByScheduleState, params: Pytree
    ) -> tuple[Pytree, optax.ScaleByScheduleState]:
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def adapt(gradient: Array, weight: Array) -> Array:
            return _larc_adapt(gradient, weight, weight_decay, trust_coefficient, limit=rate)

        count = optax.safe_increment(state.count)
        return jax.tree.map(adapt, updates, params), optax.ScaleByScheduleState(count=count)

    return optax.chain(
        optax.masked(optax.GradientTransformation(init, update), mask),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    mask: Mask = True,
) -> optax.GradientTransformation:
    """PyTorch's SGD: v ← m·v + g + wd·w; w ← w - lr·v.

    With Nesterov momentum, w ← w - lr·(g + wd·w + m·v) with the new v.

    Args:
      learning_rate: scalar, or a function of the step.
      momentum: m.
      nesterov: whether to use Nesterov momentum.
      weight_decay: wd.
      mask: tensors to decay.

    Returns:
      The gradient transformation; its update needs the params.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask),
        optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
    )


def adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    mask: Mask = True,
) -> optax.GradientTransformation:
    """PyTorch's Adam, with the weight decay added to the gradient: u = g + wd·w.

    v ← m·v + (1 - m)·u; s ← .999·s + .001·u²; w ← w - lr·v̂/(√ŝ + 1e-8), where v̂ and ŝ are v and s
    without the bias of their start at 0 (Kingma & Ba, 2014, arXiv:1412.6980). AdamW would subtract
    lr·wd·w instead.

    Args:
      learning_rate: scalar, or a function of the step.
      momentum: m, also known as β1.
      weight_decay: wd.
      mask: tensors to decay.

    Returns:
      The gradient transformation; its update needs the params.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask), optax.adam(learning_rate, b1=momentum)
    )


def make_optimizer(
    config: ConfigDict,
    labels: Pytree | Callable[[Pytree], Pytree],
    schedule: optax.Schedule,
    peak: float | None = None,
    weight_decay: optax.Schedule | None = None,
) -> optax.GradientTransformation:
    """Builds a run's optimizer from its parameter groups.

    Labels: "weight" gets weight decay and trust; "norm_bias" gets neither (unless
    `decay_norm_bias` is set, or with LARC, which treats all tensors alike); "constant_lr" keeps the
    learning rate at `peak`; "frozen" never changes and has no state; "frozen_until" neither changes
    nor accumulates momentum during the first `frozen_steps` steps. Within the last three, weights
    and biases are distinguished by path.

    With `clip_norm_per_tensor`, each optimizer gets the gradients of `clip_each_norm`. With
    `norm_bias_lr`, all biases and normalization parameters, by path, whatever their label, have
    `norm_bias_lr` / `lr` times their learning rate (Barlow Twins' official code).

    Args:
      config: `config.optim`; `momentum` is Adam's and AdamW's β1. With `clip_norm_per_tensor`,
        gradients go through `clip_each_norm` first.
      labels: a label for each leaf of the params, or for a prefix of their tree; or a function
        that gives them for params, such as `Method.param_groups`; `init` checks these.
      schedule: learning rate by step, see `learning_rate_schedule`.
      peak: learning rate of "constant_lr", see `peak_learning_rate`.
      weight_decay: weight decay by step, see `weight_decay_schedule`; None for the config's.

    Returns:
      The gradient transformation; its update needs the params.

    Raises:
      UserError: an unknown optimizer or label, or an option that this optimizer doesn't have.
      ValueError: a "constant_lr" label without `peak`.
    """
    _check_options(config)

    def partitioned(labels: Pytree) -> optax.GradientTransformationExtraArgs:
        used = sorted(set(jax.tree.leaves(labels)))
        made = {
            label: _labeled_optimizer(label, config, schedule, peak, weight_decay) for label in used
        }
        optimizer = optax.partition(made, labels)
        if config.norm_bias_lr:
            optimizer = optax.chain(optimizer, _scale_norm_bias(config.norm_bias_lr / config.lr))
        return optimizer

    if not callable(labels):
        return partitioned(labels)
    # By the params at hand, so that nobody has to trace the networks for their labels alone.
    return optax.GradientTransformationExtraArgs(
        lambda params: partitioned(labels(params)).init(params),
        lambda updates, state, params=None, **extra: partitioned(labels(params)).update(
            updates, state, params, **extra
        ),
    )


def clip_each_norm(limit: float) -> optax.GradientTransformation:
    """Scales the gradient of each parameter tensor by itself to at most a norm of `limit`.

    g ← g·min(1, limit/(‖g‖ + 1e-6)), as in DINO's official code; not the norm of all gradients.

    Args:
      limit: the largest norm, positive.

    Returns:
      The gradient transformation, without state.
    """

    def clip(gradient: Array, _: Any) -> Array:
        return gradient * jnp.minimum(1.0, limit / (jnp.linalg.norm(gradient) + 1e-6))

    return optax.stateless_with_tree_map(clip)


def weight_decay_schedule(config: ConfigDict, length: Schedule) -> optax.Schedule | None:
    """Builds the weight decay by step: a cosine from `weight_decay` to `weight_decay_end`.

    end + (start - end)·(1 + cos(π·step/total))/2, without a warmup (DINO's official code).

    Args:
      config: `config.optim`.
      length: the run's length.

    Returns:
      A function from the number of completed steps to the next step's weight decay; None if it is
      constant.
    """
    start, end = config.weight_decay, config.weight_decay_end
    if end in (0.0, start):
        return None

    def schedule(step: Any) -> Array:
        progress = jnp.minimum(step / length.total_steps, 1.0)
        return end + (start - end) * (1 + jnp.cos(jnp.pi * progress)) / 2

    return schedule


def peak_learning_rate(config: ConfigDict, batch_size: int) -> float:
    """Computes the learning rate after warmup: `lr` scaled by the batch size.

    Args:
      config: `config.optim`. `lr_scaling` is "linear" (lr·B/256), "sqrt" (lr·√B) or "none".
      batch_size: global batch B, in images.

    Returns:
      The scaled learning rate.

    Raises:
      UserError: an unknown `lr_scaling`.
    """
    require_choice("config.optim.lr_scaling", config.lr_scaling, LR_SCALINGS)
    factors = {"linear": batch_size / 256, "sqrt": math.sqrt(batch_size), "none": 1.0}
    return config.lr * factors[config.lr_scaling]


def learning_rate_schedule(config: ConfigDict, batch_size: int, length: Schedule) -> optax.Schedule:
    """Builds the learning-rate schedule: a linear warmup, then cosine, step or constant.

    During the W warmup steps the rate is warmup_start + (peak - warmup_start)·step/W, or with
    `warmup_inclusive` step/(W - 1). Then "cosine" falls to `final_lr` over the remaining steps and
    stays there; "step" multiplies the peak by `step_gamma` at each of `step_epochs`, counted from
    the run's start; "constant" stays at the peak. `warmup_start` and `final_lr` are learning rates,
    not scaled by the batch. Rates are accurate to a few units in the last place of float32, also
    where they are near 0.

    Args:
      config: `config.optim`. With `per_epoch` every step uses the rate of its epoch's first step.
      batch_size: global batch, in images.
      length: the run's length, which may be shorter than the warmup, and its count of epochs.

    Returns:
      A function from the number of completed steps, or an array of them, to the next step's
      learning rate.

    Raises:
      UserError: an unknown `schedule` or `lr_scaling`, or a first epoch whose rate would be 0.
    """
    require_choice("config.optim.schedule", config.schedule, SCHEDULES)
    peak = peak_learning_rate(config, batch_size)
    warmup = length.steps(config.warmup_epochs)
    if config.per_epoch and warmup and config.warmup_start == 0:
        raise UserError(
            "config.optim.per_epoch with a warmup from 0 gives the whole first epoch a learning "
            "rate of 0. Set config.optim.warmup_start, or config.optim.warmup_epochs to 0."
        )
    after = _after_warmup(config, peak, warmup, length)
    # optax's linear and cosine schedules subtract numbers near 1, which loses the small rates.
    rises = max(warmup - config.warmup_inclusive, 1)

    def schedule(step: Any) -> Array:
        rise = config.warmup_start + (peak - config.warmup_start) * (step / rises)
        return jnp.where(step < warmup, rise, after(step - warmup))

    if config.per_epoch:
        per_epoch = length.steps_per_epoch
        return lambda step: schedule(step // per_epoch * per_epoch)
    return schedule


def _after_warmup(config: ConfigDict, peak: float, warmup: int, length: Schedule) -> optax.Schedule:
    """Builds the schedule as a function of the steps since the end of the warmup."""
    if config.schedule == "cosine":
        steps = max(length.total_steps - warmup, 1)

        def cosine(step: Any) -> Array:
            left = jnp.clip(steps - step, 0, steps) / steps
            # (1 + cos(π·(1 - left)))/2
            fraction = jnp.sin(jnp.pi / 2 * left) ** 2
            return config.final_lr + (peak - config.final_lr) * fraction

        return cosine
    if config.schedule == "step":
        drops = {length.steps(epoch) - warmup: config.step_gamma for epoch in config.step_epochs}
        return optax.piecewise_constant_schedule(peak, drops)
    return optax.constant_schedule(peak)


def _group_optimizer(
    config: ConfigDict,
    rate: optax.ScalarOrSchedule,
    mask: Mask,
    weight_decay: optax.Schedule | None,
) -> optax.GradientTransformation:
    """Builds the optimizer of a group of parameters, with clipping and a schedule of the decay."""

    def decayed(weight_decay: Any) -> optax.GradientTransformation:
        return _base_optimizer(config, rate, mask, weight_decay)

    optimizer = decayed(config.weight_decay)
    if weight_decay is not None:
        optimizer = optax.inject_hyperparams(decayed)(weight_decay=weight_decay)
    if config.clip_norm_per_tensor:
        optimizer = optax.chain(clip_each_norm(config.clip_norm_per_tensor), optimizer)
    return optimizer


def _labeled_optimizer(
    label: str,
    config: ConfigDict,
    schedule: optax.Schedule,
    peak: float | None,
    weight_decay: optax.Schedule | None,
) -> optax.GradientTransformation:
    if label not in LABELS:
        raise UserError(f"param_groups gives the label '{label}'.{did_you_mean(label, LABELS)}")
    mask = _mask_of_label(label, config.decay_norm_bias)
    if label == "frozen":
        return optax.set_to_zero()
    if label == "constant_lr":
        if peak is None:
            raise ValueError("Parameters labeled 'constant_lr' need `peak`.")
        return _group_optimizer(config, peak, mask, weight_decay)
    if label == "frozen_until":
        return _frozen_until(config, schedule, mask, weight_decay)
    return _group_optimizer(config, schedule, mask, weight_decay)


def _scale_norm_bias(factor: float) -> optax.GradientTransformation:
    """Scales the updates of biases and normalization parameters: a learning rate of their own."""

    def scale(updates: Pytree, _: Pytree | None) -> Pytree:
        def scaled(role: str, update: Array) -> Array:
            return factor * update if role == "norm_bias" else update

        return jax.tree.map(scaled, role_labels(updates), updates)

    return optax.stateless(scale)


def _frozen_until(
    config: ConfigDict, rate: optax.Schedule, mask: Mask, weight_decay: optax.Schedule | None
) -> optax.GradientTransformation:
    """Freezes a group's parameters for the first steps, in which momentum doesn't start either."""
    steps = config.frozen_steps

    # The inner count starts when the freeze ends; schedules count from the run's start.
    def later(schedule: optax.Schedule) -> optax.Schedule:
        return lambda count: schedule(count + steps)

    decay = weight_decay and later(weight_decay)
    inner = _group_optimizer(config, later(rate), mask, decay)
    return optax.conditionally_mask(inner, lambda step: step >= steps)


def _base_optimizer(
    config: ConfigDict, learning_rate: optax.ScalarOrSchedule, mask: Mask, weight_decay: Any
) -> optax.GradientTransformation:
    """Builds the config's optimizer; the mask selects the tensors to decay (and adapt)."""
    if config.name == "adamw":
        return optax.adamw(learning_rate, b1=config.momentum, weight_decay=weight_decay, mask=mask)
    options = {"momentum": config.momentum, "weight_decay": weight_decay}
    if config.name == "sgd":
        return sgd(learning_rate, nesterov=config.nesterov, mask=mask, **options)
    if config.name == "adam":
        return adam(learning_rate, mask=mask, **options)
    options["trust_coefficient"] = config.trust_coefficient
    if config.name == "larc":
        return larc(learning_rate, **options)
    form = {"lars": lars, "lars_byol": lars_byol, "lars_clipped": lars_clipped}[config.name]
    return form(learning_rate, mask=mask, **options)


def _mask_of_label(label: str, decay_norm_bias: bool) -> Mask:
    if label == "weight" or decay_norm_bias:
        return True
    return False if label == "norm_bias" else weight_mask


def _check_options(config: ConfigDict) -> None:
    require_choice("config.optim.name", config.name, OPTIMIZERS)
    if config.nesterov and config.name != "sgd":
        raise UserError(
            f"config.optim.nesterov needs sgd, but config.optim.name is '{config.name}'. Turn "
            "it off."
        )
    if config.norm_bias_lr and not config.lr:
        raise UserError(
            f"config.optim.norm_bias_lr is {config.norm_bias_lr}, but config.optim.lr is 0, whose "
            "schedule it follows. Set config.optim.lr, or config.optim.norm_bias_lr to 0."
        )
    if config.decay_norm_bias and config.name.startswith("lars"):
        raise UserError(
            f"config.optim.decay_norm_bias doesn't apply to '{config.name}', which excludes biases "
            "and normalization parameters. Turn it off, or use larc, sgd, adam or adamw."
        )


def _larc_adapt(
    gradient: Float[Array, "..."],
    weight: Float[Array, "..."],
    weight_decay: float,
    eta: float,
    limit: float | Float[Array, ""] | None = None,
) -> Float[Array, "..."]:
    """Scales and decays a gradient as LARC does; with a limit, by min(trust/limit, 1)."""
    weight_norm, gradient_norm = jnp.linalg.norm(weight), jnp.linalg.norm(gradient)
    trust = eta * weight_norm / (gradient_norm + weight_decay * weight_norm + 1e-8)
    if limit is not None:
        # Compared before dividing: the learning rate is 0 at the first step of a warmup.
        trust = jnp.where(trust < limit, trust / limit, 1.0)
    nonzero = (weight_norm > 0) & (gradient_norm > 0)
    return jnp.where(nonzero, trust * (gradient + weight_decay * weight), gradient)
