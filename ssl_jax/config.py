"""The schema of a run: every key with its default, validation, and values derived from it.

A config file is a Python file with `get_config()`, or `get_config(variant)`, that starts from
`default_config()` and changes what its experiment needs. The schema is locked, so a misspelt key is
an error, and typed, so a value of another type is too.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import runpy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ssl_jax.errors import UserError

_CHOICES = {
    "spmd": ("shard_map", "pmap"),
    "dtype": ("float32", "bfloat16"),
    "count_steps": ("epochs", "images"),
    "data.on_bad_image": ("fatal", "skip"),
}
_BOUNDS = {
    "seed": (0, 2**32 - 1),  # what JAX's keys hold
    "steps": (0, math.inf),
    "microbatch": (0, math.inf),
    "max_nonfinite_steps": (0, math.inf),
    "epochs": (0, 1e9),
    "heartbeat_timeout_s": (1, 1e6),
    "optim.lr": (0, 1e9),
    "optim.momentum": (0, 1),
    "optim.weight_decay": (0, 1e9),
    "optim.warmup_epochs": (0, 1e9),
    "optim.frozen_steps": (0, math.inf),
    "model.bn_group_size": (0, math.inf),
    "eval.crop_fraction": (1e-3, 1),
    "eval.knn_every_epochs": (0, 1e9),
    "eval.projector_layer": (0, math.inf),
    "checkpoint.every_epochs": (0, 1e9),
    "data.threads": (0, math.inf),
    "data.timeout_s": (0, 1e9),
    "data.num_classes": (0, math.inf),
    "data.subset_seed": (0, 2**32 - 1),
    "data.validation": (0, 0.9),
    "supervised.classifier_init": (0, 1e9),
    "supervised.projector_layer": (0, math.inf),
    "supervised.projector_hidden": (0, math.inf),
    "distill.labels": (0, 1),
    "init_from.step": (0, math.inf),
    "distill.step": (0, math.inf),
    "moco.queue": (1, math.inf),
    "moco.hidden": (0, math.inf),
    "swav.prototypes": (1, math.inf),
    "swav.iterations": (1, math.inf),
    "swav.queue": (0, math.inf),
    "swav.queue_from_epoch": (0, 1e9),
    "simclr.memory_bank": (0, math.inf),
    "simclr.block_size": (0, math.inf),
    "simclr.layers": (0, math.inf),
    "moco.layers": (1, math.inf),
    "simsiam.layers": (1, math.inf),
    "simclr.hidden": (0, math.inf),
    "simsiam.hidden": (0, math.inf),
    "moco.ema_decay": (0, 1),
    "moco.ema_decay_end": (0, 1),
    "byol.ema_decay": (0, 1),
    "byol.ema_decay_end": (0, 1),
    "simclr.ema_decay": (0, 1),
}
_VIEW_CHOICES = {
    "crop.sampler": ("torchvision", "tf", "byol", "none"),
    "crop.interpolation": ("bicubic", "bilinear"),
    "jitter.style": ("tf", "torchvision"),
    "jitter.brightness_mode": ("multiply", "add"),
}


_DATA = {
    # "digits", "folder" (image files), "packed" (one file), "records" (of `ssl-jax data
    # convert`) or "tfds" (a data set that TFDS has prepared).
    "name": "digits",
    "dir": "",  # of the images; "packed": the file; "tfds": its data_dir, "": its own
    "test_dir": "",  # as dir, of the held-out images
    "dataset": "",  # TFDS: the data set
    "split": "train",  # TFDS: of the training images; slices too: "train[:10%]"
    "test_split": "",  # TFDS: of the held-out images
    "image_key": "image",  # TFDS: the feature that holds the image
    "label_key": "label",  # "": none
    "on_bad_image": "fatal",  # "fatal" stops at an image that can't be read, "skip" takes another
    "num_classes": 0,  # 0: as many as the labels show
    "test_fraction": 0.25,  # held out where a source has no test split of its own
    "threads": 0,  # of the host pipeline; 0: one per core
    "timeout_s": 900.0,  # seconds without a batch after which the run stops; 0: it waits for ever
    # The share of the training images that is used, as many of each class; 1: all of them.
    "subset": 1.0,
    "subset_seed": 0,  # of the draw of that share
    # The share of the training images, before any subset, that is held out and measured on instead
    # of the test split, to choose settings by; the same for every subset_seed. 0: none.
    "validation": 0.0,
}
_MODEL = {
    "depth": 50,  # of the ResNet: 18, 34, 50, 101, 152, 200
    "width": 1.0,  # times the standard channels
    "sk": False,  # selective kernels (SimCLR v2)
    # "imagenet", "cifar", or another code's: "cifar_pad2" (solo-learn), "cifar_no_relu" (lightly).
    "stem": "imagenet",
    # "symmetric" (PyTorch), "same" (TensorFlow), "simclr" (in the pool alone).
    "padding": "symmetric",
    "conv_init": "truncated_fan_in",  # first weights of convolutions
    "zero_init_residual": True,  # the last BatchNorm of a block starts at γ = 0
    # Devices that share BatchNorm statistics: 0 all, 1 each its own, n groups of n.
    "bn_group_size": 0,
}
_SIMCLR = {
    "temperature": 0.1,  # of NT-Xent
    "hidden": 0,  # 0: as wide as the encoder's features
    "out": 128,  # width of the projections
    "layers": 2,  # of the projector; 0: the loss is of the features themselves
    "loss_scale": 1.0,  # 2 is what the official code trains on
    "block_size": 0,  # 0: chosen
    # SimCLR v2's memory: projections of an averaged network as further negatives; 0: none.
    "memory_bank": 0,
    "ema_decay": 0.999,  # decay of the averaged network
}
_MOCO = {
    "queue": 65536,  # keys in it, a multiple of the batch
    "ema_decay": 0.999,  # decay of the key encoder
    "ema_decay_end": 0.999,  # reached by a cosine over the run; the same: constant
    "temperature": 0.2,  # v1: 0.07
    "hidden": 0,  # 0: as wide as the encoder's features
    "out": 128,  # width of queries and keys
    "layers": 2,  # of the projector; v1: 1
    "symmetric": False,  # each view asks for the other (lightly, solo-learn)
    # Key images change devices before they are encoded. Without that, BatchNorm per device
    # (model.bn_group_size=1) lets the network tell a key by the statistics of its batch.
    "shuffle": True,
}
_SWAV = {
    "prototypes": 3000,  # number of them
    "hidden": 2048,  # width of the projector's hidden layer
    "out": 128,  # width of the embeddings
    "temperature": 0.1,  # of the prediction's softmax
    "epsilon": 0.05,  # of Sinkhorn-Knopp; smaller is sharper
    "iterations": 3,  # of Sinkhorn-Knopp
    "queue": 0,  # embeddings for each assigned crop
    "queue_from_epoch": 15.0,  # when the queue begins to fill
}
_BYOL = {
    "hidden": 4096,  # width of the heads' hidden layers
    "out": 256,  # width of predictions and targets
    "ema_decay": 0.996,  # at the first step
    "ema_decay_end": 1.0,  # reached by a cosine over the run; the same: constant
    "head_bn": True,  # BatchNorm in the heads
    "loss_scale": 1.0,  # factor of the loss; lightly's is 0.25
}
_SIMSIAM = {
    "hidden": 0,  # 0: as wide as the encoder's features
    "out": 2048,  # width of projections and predictions
    "layers": 3,  # of the projector
    "predictor_hidden": 512,  # width of the predictor's hidden layer
    "predictor_constant_lr": True,  # the predictor's rate doesn't decay
    "stop_gradient": True,  # off: the collapse, to be looked at
}
# A run goes on with other values of these: how it waits, reads and measures, and on how many
# devices the same number of images shares BatchNorm (it says so where that number is another).
_FREE = (
    "heartbeat_timeout_s",
    "max_nonfinite_steps",
    "data.threads",
    "data.timeout_s",
    "eval.batch_size",
    "model.bn_group_size",
    "wandb",
)
# Keys that came later, with the value that says what runs without them did: so a config that was
# saved before is read as it was meant. `views.*.KEY` is of every view.
_ADDED = {
    "data.timeout_s": 900.0,
    "wandb": "",
}
# Groups of keys of methods that a file outside the package has registered.
_REGISTERED: dict[str, dict[str, Any]] = {}
_SUPERVISED = {
    "freeze": False,  # train the classifier alone, on features of an encoder that stays as it is
    "classifier_init": 0.0,  # standard deviation of the classifier's first weights
    # Hidden layers of a SimCLR projector below the classifier, and their width (0: the features').
    "projector_layer": 0,
    "projector_hidden": 0,  # width of those layers; 0: the features'
}
_DISTILL = {
    "teacher": "",  # the workdir of a supervised run
    "step": 0,  # of its checkpoint; 0: the newest
    "temperature": 1.0,  # of teacher and student
    "labels": 0.0,  # share of the labels' cross-entropy in the loss
    # The teacher's networks, filled in from its run.
    "depth": 0,
    "width": 1.0,  # of the teacher, filled in
    "sk": False,  # of the teacher, filled in
    "stem": "",  # of the teacher, filled in
    "padding": "",  # of the teacher, filled in
    "projector_layer": 0,  # of the teacher, filled in
    "projector_hidden": 0,  # of the teacher, filled in
}
# Where the encoder's first weights come from: a run's workdir; "": drawn. Of other networks only
# the part of a projector that `supervised.projector_layer` keeps comes along.
_INIT_FROM = {
    "path": "",  # a run's workdir, or a file of weights that `ssl_jax.load` takes
    "step": 0,  # of the run's checkpoint; 0: the newest
    "heads": False,  # all networks are taken, of the same method
}
_OPTIM = {
    # "sgd", "adamw", "lars" (SimCLR's), "lars_byol", "lars_clipped" (solo-learn's) or "larc".
    "name": "lars",
    "lr": 0.3,  # the rate, before lr_scaling
    # "linear": times batch / 256; "sqrt": times the square root of the batch; "none".
    "lr_scaling": "linear",
    "momentum": 0.9,  # of SGD, LARS and LARC
    "nesterov": False,  # Nesterov's momentum
    "weight_decay": 1e-6,  # of weights; see decay_norm_bias
    "trust_coefficient": 0.001,  # η of LARS and LARC
    "decay_norm_bias": False,  # weight decay of biases and normalisation, too
    "schedule": "cosine",  # after the warmup: "cosine", "step", "constant"
    "warmup_epochs": 10.0,  # of a linear warmup
    "warmup_start": 0.0,  # the rate it starts from
    "final_lr": 0.0,  # the rate that cosine ends at
    "step_epochs": (),  # "step": where the rate falls
    "step_gamma": 0.1,  # "step": by which factor
    "per_epoch": False,  # the schedule moves once an epoch, as in MoCo's code
    "frozen_steps": 0,  # SwAV: steps for which prototypes stay
}
_EVAL = {
    "knn_every_epochs": 10.0,  # 0: never during training
    "probe": True,  # a linear classifier is trained along, where there are labels
    "knn_k": 200,  # neighbours that vote
    "knn_temperature": 0.1,  # of their votes
    "crop_fraction": 0.875,  # centre crop of the evaluated image; 1: whole
    "interpolation": "bicubic",  # of the evaluated image's resizing
    "batch_size": 256,  # images encoded at a time
    "labels_per_class": (1, 5, 10),  # of the evaluations with few labels
    "trials": 20,  # of few labels, over which accuracies are averaged
    # Whether a run ends with classifiers of frozen features, beside raw pixels' and random ones.
    "at_end": True,
    # Training images at most that the linear probe of all labels is fitted to.
    "linear_images": 50_000,
    # What is evaluated: 0 the encoder's features, l those of the projector's hidden
    # layer l after its ReLU (SimCLR v2's selector).
    "projector_layer": 0,
}


def view(**changes: Any) -> ConfigDict:
    """One kind of view of an image, as data; the defaults are SimCLR's ImageNet view.

    Args:
      **changes: keys to change, nested ones as dicts: `view(size=32, jitter=dict(prob=0.5))`.

    Returns:
      A locked ConfigDict. Sizes are in pixels, areas and shifts in fractions of the image, angles
      in degrees, probabilities, blur sigmas in pixels of the view.
    """
    defaults = ConfigDict(
        {
            "size": 224,  # side, pixels
            "count": 1,  # views of this kind
            "crop": {
                "sampler": "tf",  # whose boxes: "tf" (SimCLR), "torchvision", "byol", "none"
                "area": (0.08, 1.0),  # of the box, share of the image
                "aspect": (3 / 4, 4 / 3),  # width / height of the box
                "interpolation": "bicubic",  # "bicubic" or "bilinear"
            },
            "affine": {
                "degrees": 0.0,  # rotation, at most
                "shear": 0.0,  # degrees, at most
                "translate": 0.0,  # share of the side, at most
            },
            "flip": 0.5,  # probability, left to right
            "jitter": {
                "prob": 0.8,  # of the four below together
                "brightness": 0.8,  # strength
                "contrast": 0.8,  # strength
                "saturation": 0.8,  # strength
                "hue": 0.2,  # strength, share of the circle
                "style": "tf",  # whose definitions: "tf" or "torchvision"; of the blur, too
                "brightness_mode": "multiply",  # "multiply", or "add" (BYOL)
                "random_order": True,  # of the four, for each image
            },
            "gray": 0.2,  # probability
            "gray_first": False,  # before the jitter (MoCo v1)
            "blur": {
                "prob": 0.5,  # probability
                "sigma": (0.1, 2.0),  # pixels, from to
                "kernel_size": 0,  # taps; 0: a tenth of the side
            },
            "solarize": {
                "prob": 0.0,  # probability
                "threshold": 0.5,  # from where pixels are inverted
            },
            "noise": 0.0,  # standard deviation of Gaussian noise
            "mean": (),  # subtracted from each channel; empty: nothing
            "std": (),  # by which each channel is divided
        }
    )
    _update(defaults, changes, "view")
    return defaults.lock()


def default_config() -> ConfigDict:
    """The whole schema with its defaults: SimCLR v1 on ImageNet is a few changes away.

    Returns:
      A locked ConfigDict; assign to its keys, replace `views` by a dict of `view(...)`.
    """
    config = ConfigDict(
        {
            "seed": 0,  # of everything random
            # "simclr", "moco", "swav", "byol", "simsiam", "supervised", "distill", or one of your
            # own.
            "method": "simclr",
            "batch_size": 256,  # images in a step, over all devices
            # Of them, images in memory at a time, over all devices; 0: all. The loss still sees the
            # whole batch, BatchNorm a microbatch. See docs/large_batches.md.
            "microbatch": 0,
            "remat": False,  # keep only the blocks' inputs for the backward pass
            "epochs": 100.0,  # of training
            "steps": 0,  # 0: from epochs
            # How epochs become steps: "epochs" counts the whole batches of each epoch (MoCo, SwAV,
            # SimSiam); "images" is SimCLR's N * epochs // B + 1.
            "count_steps": "epochs",
            # Steps that may be skipped because their loss or gradients are not finite, over the
            # whole run; the next such step stops it. They change nothing but the step's number.
            "max_nonfinite_steps": 0,
            # How the step is mapped over devices: "shard_map" or "pmap", the same numbers.
            "spmd": "shard_map",
            "dtype": "float32",  # of the computation; parameters, statistics, losses stay float32
            "log_every": 10,  # steps between lines of metrics
            "wandb": "",  # a project of Weights & Biases that gets the metrics too; "": none
            # Of several processes: seconds of silence after which one counts as lost, and the rest
            # end instead of waiting for it.
            "heartbeat_timeout_s": 60.0,
            "data": _DATA,
            "views": {"view1": view(), "view2": view()},
            "model": _MODEL,
            "simclr": _SIMCLR,
            "moco": _MOCO,
            "swav": _SWAV,
            "byol": _BYOL,
            "simsiam": _SIMSIAM,
            "supervised": _SUPERVISED,
            "distill": _DISTILL,
            "init_from": _INIT_FROM,
            **_REGISTERED,
            "optim": _OPTIM,
            "eval": _EVAL,
            "checkpoint": {
                "every_epochs": 10.0,  # 0: at the end alone
                "keep": 2,  # newest checkpoints that stay; the best by kNN stays beside them
            },
        }
    )
    return config.lock()


def register_options(method: str, options: Mapping[str, Any]) -> None:
    """Adds the keys `config.<method>.<option>` to the schema; see `methods.register`.

    Args:
      method: name of the group.
      options: defaults by name, which also fix the keys' types.

    Raises:
      UserError: the schema has another group or key of that name, or a default is of a type that
        the schema doesn't have.
    """
    if method in default_config() and method not in _REGISTERED:
        raise UserError(f"config.{method} is in the schema already: register another name.")
    for key, value in options.items():
        if not isinstance(value, bool | int | float | str | tuple):
            raise UserError(
                f"config.{method}.{key} has the default {value!r}: options may be true or false, "
                "numbers, words and tuples."
            )
    _REGISTERED[method] = dict(options)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What a run's length comes to, in optimiser steps."""

    steps_per_epoch: int
    total_steps: int

    def every(self, epochs: float) -> int:
        """Steps in `epochs` epochs, at least 1; 0 epochs mean never and give 0."""
        return max(1, round(epochs * self.steps_per_epoch)) if epochs > 0 else 0


def run_schedule(config: ConfigDict, num_examples: int) -> Schedule:
    """Derives the run's length from its config.

    Args:
      config: a validated config.
      num_examples: images in the training set.

    Returns:
      Steps per epoch (whole batches) and in total.

    Raises:
      UserError: the batch is larger than the data set.
    """
    per_epoch = num_examples // config.batch_size
    if per_epoch == 0:
        fits = 1 << max(num_examples.bit_length() - 2, 0)  # twice in an epoch
        raise UserError(
            f"config.batch_size is {config.batch_size} but the training set has only "
            f"{num_examples} images: give a smaller one, such as --config.batch_size={fits}, or "
            "more data."
        )
    if config.steps:
        total = config.steps
    elif config.count_steps == "images":
        total = int(num_examples * config.epochs) // config.batch_size + 1
    else:
        total = round(per_epoch * config.epochs)
    return Schedule(per_epoch, max(total, 1))


def is_due(step: int, every: int) -> bool:
    """Whether something done every `every` steps is due after `step` steps (0: never)."""
    return every > 0 and step > 0 and step % every == 0


def load_config(path: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """Reads a config file and applies command-line overrides.

    Args:
      path: `FILE.py` or `FILE.py:VARIANT`; the file defines `get_config()`, which takes the variant
        where there are some.
      overrides: strings `a.b=VALUE`.

    Returns:
      The validated config.

    Raises:
      UserError: no such file, no `get_config`, an unknown key, a value that doesn't fit.
    """
    file, _, variant = path.partition(":")
    if not Path(file).is_file():
        raise UserError(
            f"There is no config file {file}: give --config=PATH, see configs/.{close_path(file)}"
        )
    try:
        get_config = runpy.run_path(file).get("get_config")
        if get_config is None:
            raise UserError(f"{file} does not define get_config(): see configs/ for examples.")
        if variant and not inspect.signature(get_config).parameters:
            raise UserError(f"{file} has no variants, so no '{variant}': give --config={file}.")
        config = get_config(variant) if variant else get_config()
    except SyntaxError as error:
        raise UserError(
            f"The config file {file} is not Python: line {error.lineno}, {error.msg}."
        ) from error
    except KeyError as error:
        if error.args != (variant,):
            raise UserError(f"The config file {file} is not valid: no key {error}.") from error
        raise UserError(
            f"{file} has no variant '{variant}': its first line says which it has."
        ) from error
    except (AttributeError, ImportError, LookupError, NameError, TypeError, ValueError) as error:
        raise UserError(f"The config file {file} is not valid: {_one_sentence(error)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config() in {file} returns {config!r}: return a ConfigDict.")
    return apply_overrides(config, overrides)


def apply_overrides(config: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """A copy of a config with keys set as on the command line.

    Args:
      config: with the whole schema.
      overrides: strings `a.b=VALUE`.

    Returns:
      The validated copy.

    Raises:
      UserError: an unknown key, or a value that doesn't fit.
    """
    # Through plain types: one view given twice would else stay one object, and so would overrides.
    config = from_json(to_json(config))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--config.{key} needs a value: write --config.{key}=VALUE.")
        _set(config, key, text)
    validate(config)
    return config


def validate(config: ConfigDict) -> None:
    """Checks the values that types alone don't.

    Args:
      config: a config with the whole schema.

    Raises:
      UserError: naming the first key that is wrong and what it may be.
    """
    _check_choices(config, _CHOICES, "config")
    contrastive = ("simclr", "moco", "swav", "distill")
    temperatures = [f"{method}.temperature" for method in contrastive]
    for key in (
        *("batch_size", "log_every", "eval.batch_size", "eval.knn_k", "eval.trials"),
        "eval.linear_images",
        *("model.width", "swav.epsilon", "eval.knn_temperature", *temperatures),
    ):
        if not _get(config, key) > 0:
            raise UserError(f"config.{key} is {_get(config, key)}: it must be positive.")
    for key, (low, high) in _BOUNDS.items():
        if not low <= _get(config, key) <= high:
            limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise UserError(f"config.{key} is {_get(config, key)}: it must be {limits}.")
    if config.microbatch and config.batch_size % config.microbatch:
        raise UserError(
            f"config.microbatch is {config.microbatch}, which does not divide config.batch_size, "
            f"{config.batch_size}: use a divisor of it, or 0 for the whole batch at once."
        )
    if not all(type(count) is int and count > 0 for count in config.eval.labels_per_class):
        raise UserError(
            f"config.eval.labels_per_class is {config.eval.labels_per_class}: it takes positive "
            "integers, such as (1, 5, 10)."
        )
    if config.steps == 0 and config.epochs == 0:
        raise UserError("config.epochs and config.steps are both 0: set one of them.")
    if not config.checkpoint.keep >= 1:
        raise UserError("config.checkpoint.keep must be at least 1, or nothing could be continued.")
    if not 0 < config.data.test_fraction < 1:
        raise UserError(
            f"config.data.test_fraction is {config.data.test_fraction}: it must be above 0 and "
            "below 1."
        )
    if not 0 < config.data.subset <= 1:
        raise UserError(
            f"config.data.subset is {config.data.subset}: it is a share of the training images, "
            "above 0 and at most 1."
        )
    if not config.views:
        raise UserError("config.views is empty: name at least one view.")
    for name in config.views:
        _validate_view(config.views[name], f"config.views.{name}")


def flat_views(config: ConfigDict) -> tuple[ConfigDict, ...]:
    """The views of a sample in order: `config.views` by sorted name, each `count` times."""
    return tuple(
        config.views[name] for name in sorted(config.views) for _ in range(config.views[name].count)
    )


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON types, so that what is written compares equal to what is read."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    # What happens to be registered in a process is no part of another method's run.
    return {k: v for k, v in plain.items() if k not in _REGISTERED or k == config.method}


def from_json(saved: dict[str, Any]) -> ConfigDict:
    """The config that `to_json` wrote.

    Args:
      saved: what `to_json` gave.

    Returns:
      A locked, validated ConfigDict. Keys that came after it was written have the value that says
      what was done before.

    Raises:
      UserError: keys that this version of the package doesn't know, or lacks.
    """
    config = default_config()
    with config.unlocked():
        config.views = {name: view() for name in saved.get("views", {})}
    method = config.method = str(saved.get("method"))
    later = {key.replace("*", name): v for key, v in _ADDED.items() for name in config.views}
    values = later | flatten(saved)
    unknown = set(values) ^ set(flatten(to_json(config)))
    if method in saved and method not in config:
        raise UserError(
            f"The config's method '{method}' is not one of ssl_jax's own: import the file that "
            "registers it first (on the command line by --import=FILE.py)."
        )
    if unknown:
        few = ", ".join(sorted(unknown)[:5]) + (" …" if len(unknown) > 5 else "")
        raise UserError(
            f"The saved config was written by another version of ssl_jax (keys {few}): use that "
            "version, or start again in a new workdir."
        )
    for key, value in values.items():
        _assign(config, key, tuple(value) if isinstance(value, list) else value)
    validate(config)
    return config


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines `key: old -> new` for every key in which two `to_json` configs differ.

    Keys in which a run may change when it goes on are left out.
    """
    a, b = flatten(old), flatten(new)
    for key in _FREE:
        a.pop(key, None), b.pop(key, None)
    return [
        f"{key}: {a.get(key, '(absent)')} -> {b.get(key, '(absent)')}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as one level with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint " Did you mean 'x'?" for the closest known word, or the list of known words."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else f" It may be one of: {', '.join(known)}."


def close_path(path: str | Path) -> str:
    """A hint " Did you mean 'runs/a'?" for a path that isn't there; "" if no name is close."""
    path = Path(path)
    beside: list[str] = []
    with contextlib.suppress(OSError):  # a folder that can't be listed
        beside = [file.name for file in path.parent.iterdir() if not path.exists()]
    close = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.75)
    return f" Did you mean '{path.parent / close[0]}'?" if close else ""


def _update(config: ConfigDict, changes: dict[str, Any], where: str) -> None:
    for key, value in changes.items():
        if key not in config:
            raise UserError(f"{where} has no key '{key}'.{did_you_mean(key, config)}")
        if isinstance(config[key], ConfigDict) and isinstance(value, dict):
            _update(config[key], value, f"{where}.{key}")
        else:
            _assign(config, key, value)


def _get(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _set(config: ConfigDict, key: str, text: str) -> None:
    """Sets a dotted key from the text of a command line."""
    node: Any = config
    done = "config"
    parts = key.split(".")
    for i, part in enumerate(parts):
        if not isinstance(node, ConfigDict):
            raise UserError(f"{done} is a value, it has no key '{'.'.join(parts[i:])}'.")
        if part not in node:
            raise UserError(f"{done} has no key '{part}'.{_meant(config, parts, i)}")
        node, done = node[part], f"{done}.{part}"
    if isinstance(node, ConfigDict):
        raise UserError(f"{done} is a group of keys ({', '.join(sorted(node))}): set one of them.")
    value: Any = text
    if not isinstance(node, str):
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        except (ValueError, SyntaxError) as error:
            raise UserError(
                f"{done} takes {_kind(node)}, such as {node!r}; '{text}' is not one."
            ) from error
    _assign(config, key, value)


def _meant(config: ConfigDict, parts: Sequence[str], wrong: int) -> str:
    """A hint for a key that isn't there: that of its name in another group, the method's first."""
    named = [key for key in flatten(config.to_dict()) if key.rpartition(".")[2] == parts[-1]]
    own = [key for key in named if key.startswith(f"{config.method}.")]
    if len(named) == 1 or own:
        return f" Did you mean 'config.{(own or named)[0]}'?"
    return did_you_mean(parts[wrong], _get(config, ".".join(parts[:wrong])) if wrong else config)


def _assign(config: ConfigDict, key: str, value: Any) -> None:
    *path, last = key.split(".")
    node = config
    for part in path:
        node = node[part]
    old = node[last]
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(old, tuple) and isinstance(value, Sequence) and not isinstance(value, str):
        value = tuple(value)
    if type(old) is not type(value):
        raise UserError(f"config.{key} takes {_kind(old)}, such as {old!r}; {value!r} is not one.")
    node[last] = value


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a word"}
    return names.get(type(value), "a tuple" if isinstance(value, tuple) else type(value).__name__)


def _check_choices(config: ConfigDict, choices: Mapping[str, tuple[str, ...]], where: str) -> None:
    for key, allowed in choices.items():
        value = _get(config, key)
        if value not in allowed:
            raise UserError(f"{where}.{key} is '{value}'.{did_you_mean(value, allowed)}")


def _validate_view(config: ConfigDict, where: str) -> None:
    _check_choices(config, _VIEW_CHOICES, where)
    if config.size < 1 or config.count < 1:
        raise UserError(f"{where}: size and count must be at least 1.")
    for key, most in (("crop.area", 1), ("crop.aspect", math.inf), ("blur.sigma", math.inf)):
        pair = _get(config, key)
        numbers = len(pair) == 2 and all(type(x) in (int, float) for x in pair)
        if not (numbers and 0 < pair[0] <= pair[1] <= most):
            limit = " <= 1" if most == 1 else ""
            raise UserError(f"{where}.{key} is {pair}: write (low, high), 0 < low <= high{limit}.")
    for key, value in flatten(config.to_dict()).items():
        if key.rpartition(".")[2] in ("flip", "gray", "prob") and not 0 <= value <= 1:
            raise UserError(f"{where}.{key} is {value}: a probability lies in [0, 1].")
    if len(config.mean) != len(config.std) or len(config.mean) not in (0, 3):
        raise UserError(f"{where}: mean and std must both be empty or both have three values.")


def _one_sentence(error: BaseException) -> str:
    """ConfigDict's errors list the whole config; what helps is their first and last sentence."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    text = str(error.args[0] if error.args else error).strip()
    if " Other fields present:" in text:
        first, _, rest = text.partition(" Other fields present:")
        hint = rest.splitlines()[-1]
        return f"{first} {hint}" if hint.startswith("Did you mean") else first
    return text.splitlines()[0] if text else type(error).__name__
