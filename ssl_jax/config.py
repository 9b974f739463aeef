"""The schema of a run: every key with its default, validation, and values derived from it.

A config file is a Python file with `get_config(variant="")` that starts from `default_config()` and
changes what its experiment needs. The schema is locked, so a misspelt key is an error, and typed,
so a value of another type is too.
"""

import ast
import dataclasses
import difflib
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
    "epochs": (0, 1e9),
    "heartbeat_s": (1, 1e6),
    "optim.lr": (0, 1e9),
    "optim.momentum": (0, 1),
    "optim.weight_decay": (0, 1e9),
    "optim.warmup_epochs": (0, 1e9),
    "optim.frozen_steps": (0, math.inf),
    "model.bn_group": (0, math.inf),
    "eval.crop_fraction": (1e-3, 1),
    "eval.knn_every_epochs": (0, 1e9),
    "eval.projector_layer": (0, math.inf),
    "checkpoint.every_epochs": (0, 1e9),
    "data.threads": (0, math.inf),
    "data.num_classes": (0, math.inf),
    "moco.queue": (1, math.inf),
    "moco.hidden": (0, math.inf),
    "swav.prototypes": (1, math.inf),
    "swav.iterations": (1, math.inf),
    "swav.queue": (0, math.inf),
    "swav.queue_from_epoch": (0, 1e9),
    "simclr.memory": (0, math.inf),
    "simclr.block_size": (0, math.inf),
    "simclr.hidden": (0, math.inf),
    "simsiam.hidden": (0, math.inf),
    "moco.momentum": (0, 1),
    "moco.momentum_end": (0, 1),
    "byol.momentum": (0, 1),
    "byol.momentum_end": (0, 1),
    "simclr.memory_momentum": (0, 1),
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
    "test_dir": "",
    # Of TFDS: the data set, its splits (slices too: train[:10%]) and its features.
    "dataset": "",
    "split": "train",
    "test_split": "",
    "image_key": "image",
    "label_key": "label",  # "": none
    "on_bad_image": "fatal",
    "num_classes": 0,  # 0: as many as the labels show
    "test_fraction": 0.25,  # held out where a source has no test split of its own
    "threads": 0,  # of the host pipeline; 0: one per core
}
_MODEL = {
    "depth": 50,
    "width": 1.0,
    "sk": False,
    "stem": "imagenet",
    "padding": "symmetric",
    "conv_init": "truncated_fan_in",
    "zero_init_residual": True,
    # Devices that share BatchNorm statistics: 0 all, 1 each its own, n groups of n.
    "bn_group": 0,
}
_SIMCLR = {
    "temperature": 0.1,
    "hidden": 0,  # 0: as wide as the encoder's features
    "out": 128,
    "layers": 2,
    "loss_scale": 1.0,  # 2 is what the official code trains on
    "block_size": 0,  # 0: chosen
    # SimCLR v2's memory: projections of an averaged network as further negatives; 0: none.
    "memory": 0,
    "memory_momentum": 0.999,
}
_MOCO = {
    "queue": 65536,
    "momentum": 0.999,
    "momentum_end": 0.999,  # reached by a cosine over the run; the same: constant
    "temperature": 0.2,  # v1: 0.07
    "hidden": 0,  # 0: as wide as the encoder's features
    "out": 128,
    "layers": 2,  # of the projector; v1: 1
    "symmetric": False,  # each view asks for the other (lightly, solo-learn)
}
_SWAV = {
    "prototypes": 3000,
    "hidden": 2048,
    "out": 128,
    "temperature": 0.1,
    "epsilon": 0.05,
    "iterations": 3,
    "queue": 0,  # embeddings for each assigned crop
    "queue_from_epoch": 15.0,
}
_BYOL = {
    "hidden": 4096,
    "out": 256,
    "momentum": 0.996,  # at the first step
    "momentum_end": 1.0,  # reached by a cosine over the run; the same: constant
    "head_bn": True,
    "loss_scale": 1.0,
}
_SIMSIAM = {
    "hidden": 0,  # 0: as wide as the encoder's features
    "out": 2048,
    "layers": 3,
    "predictor_hidden": 512,
    "predictor_constant_lr": True,
    "stop_gradient": True,
}
# A run goes on with other values of these: how it waits and reads, and on how many devices the
# same number of images shares BatchNorm (it says so where that number is another).
_FREE = ("heartbeat_s", "data.threads", "model.bn_group")
# Groups of keys of methods that a file outside the package has registered.
_REGISTERED: dict[str, dict[str, Any]] = {}
_OPTIM = {
    "name": "lars",
    "lr": 0.3,
    "lr_scaling": "linear",
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 1e-6,
    "trust_coefficient": 0.001,
    "decay_norm_bias": False,
    "schedule": "cosine",
    "warmup_epochs": 10.0,
    "warmup_start": 0.0,
    "final_lr": 0.0,
    "step_epochs": (),
    "step_gamma": 0.1,
    "per_epoch": False,
    "frozen_steps": 0,
}
_EVAL = {
    "knn_every_epochs": 10.0,  # 0: never during training
    "knn_k": 200,
    "knn_temperature": 0.1,
    "crop_fraction": 0.875,  # centre crop of the evaluated image; 1: whole
    "interpolation": "bicubic",
    "batch_size": 256,
    "labels_per_class": (1, 5, 10),
    "draws": 20,
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
            "size": 224,
            "count": 1,
            "crop": {
                "sampler": "tf",
                "area": (0.08, 1.0),
                "aspect": (3 / 4, 4 / 3),
                "interpolation": "bicubic",
            },
            "affine": {"degrees": 0.0, "shear": 0.0, "translate": 0.0},
            "flip": 0.5,
            "jitter": {
                "prob": 0.8,
                "brightness": 0.8,
                "contrast": 0.8,
                "saturation": 0.8,
                "hue": 0.2,
                "style": "tf",
                "brightness_mode": "multiply",
                "random_order": True,
            },
            "gray": 0.2,
            "gray_first": False,
            "blur": {"prob": 0.5, "sigma": (0.1, 2.0), "kernel_size": 0},
            "solarize": {"prob": 0.0, "threshold": 0.5},
            "noise": 0.0,
            "mean": (),
            "std": (),
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
            "seed": 0,
            "method": "simclr",
            "batch_size": 256,  # images in a step, over all devices
            # Of them, images in memory at a time, over all devices; 0: all. The loss still sees the
            # whole batch, BatchNorm a microbatch. See docs/large_batches.md.
            "microbatch": 0,
            "remat": False,  # keep only the blocks' inputs for the backward pass
            "epochs": 100.0,
            "steps": 0,  # 0: from epochs
            # How epochs become steps: "epochs" counts the whole batches of each epoch (MoCo, SwAV,
            # SimSiam); "images" is SimCLR's N * epochs // B + 1.
            "count_steps": "epochs",
            "spmd": "shard_map",
            "dtype": "float32",  # of the computation; parameters, statistics, losses stay float32
            "log_every": 10,  # steps between lines of metrics
            # Of several processes: seconds of silence after which one counts as lost, and the rest
            # end instead of waiting for it.
            "heartbeat_s": 60.0,
            "data": _DATA,
            "views": {"view1": view(), "view2": view()},
            "model": _MODEL,
            "simclr": _SIMCLR,
            "moco": _MOCO,
            "swav": _SWAV,
            "byol": _BYOL,
            "simsiam": _SIMSIAM,
            **_REGISTERED,
            "optim": _OPTIM,
            "eval": _EVAL,
            "checkpoint": {"every_epochs": 10.0, "keep": 2},
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
        raise UserError(
            f"config.batch_size is {config.batch_size} but the training set has only "
            f"{num_examples} images: use a smaller batch or more data."
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
      path: `FILE.py` or `FILE.py:VARIANT`; the file defines `get_config(variant="")`.
      overrides: strings `a.b=VALUE`.

    Returns:
      The validated config.

    Raises:
      UserError: no such file, no `get_config`, an unknown key, a value that doesn't fit.
    """
    file, _, variant = path.partition(":")
    if not Path(file).is_file():
        raise UserError(f"There is no config file {file}: give --config=PATH, see configs/.")
    try:
        get_config = runpy.run_path(file).get("get_config")
        if get_config is None:
            raise UserError(f"{file} does not define get_config(): see configs/ for examples.")
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
    temperatures = [f"{method}.temperature" for method in ("simclr", "moco", "swav")]
    for key in (
        *("batch_size", "log_every", "eval.batch_size", "eval.knn_k", "eval.draws"),
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
            f"config.data.test_fraction is {config.data.test_fraction}: it must be between 0 and 1."
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
      A locked, validated ConfigDict.

    Raises:
      UserError: keys that this version of the package doesn't know, or lacks.
    """
    config = default_config()
    with config.unlocked():
        config.views = {name: view() for name in saved.get("views", {})}
    method = config.method = str(saved.get("method"))
    unknown = set(flatten(saved)) ^ set(flatten(to_json(config)))
    if method in saved and method not in config:
        raise UserError(
            f"The config's method '{method}' is not one of ssl_jax's own: import the file that "
            "registers it first."
        )
    if unknown:
        raise UserError(
            f"The saved config was written by another version of ssl_jax (keys {sorted(unknown)}): "
            "use that version, or start again in a new workdir."
        )
    for key, value in flatten(saved).items():
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
            raise UserError(f"{done} has no key '{part}'.{did_you_mean(part, node)}")
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
    for key in ("flip", "jitter.prob", "gray", "blur.prob", "solarize.prob"):
        if not 0 <= _get(config, key) <= 1:
            raise UserError(f"{where}.{key} is {_get(config, key)}: a probability lies in [0, 1].")
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
