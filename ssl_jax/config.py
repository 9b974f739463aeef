"""Configs: defaults from the schema, config files, overrides, validation, and their JSON form.

A config file is a Python file with `get_config()`, or `get_config(variant)`, that starts from
`default_config()` and changes what its experiment needs. The keys are those of `ssl_jax.schema`.
The config is locked, so a misspelled key is an error, and typed, so a value of another type is too.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import os
import runpy
from collections.abc import Collection, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

from ml_collections import ConfigDict

from ssl_jax.errors import UserError, did_you_mean
from ssl_jax.files import local_path, reading
from ssl_jax.schema import MAX_INT, SCHEMA, VIEW, Group, Key

# Names that other libraries give to keys of the schema.
_USUAL_NAMES = {
    "base_lr": "lr",
    "learning_rate": "lr",
    "max_epochs": "epochs",
    "num_epochs": "epochs",
    "num_workers": "threads",
    "wd": "weight_decay",
    "workers": "threads",
}
# Groups of keys of methods and of encoders registered from outside the package.
_REGISTERED: dict[str, dict[str, Key]] = {}
_ENCODERS: dict[str, dict[str, Key]] = {}
_MODEL = cast(Group, SCHEMA["model"])
# Keys of views that operate on RGB colors, and the operations' names.
_RGB_KEYS = {"jitter.saturation": "saturation", "jitter.hue": "hue", "gray": "grayscale"}
# Names of sources of images registered from outside the package.
_SOURCES: set[str] = set()


def view(**changes: Any) -> ConfigDict:
    """One kind of view of an image; the defaults are SimCLR's ImageNet view.

    Args:
      **changes: keys to change, nested ones as dicts: `view(size=32, jitter=dict(prob=0.5))`.

    Returns:
      A locked ConfigDict. `ssl_jax.schema.VIEW` documents its keys.
    """
    config = ConfigDict(_defaults(VIEW))
    _update(config, changes, "view")
    return config.lock()


def default_config() -> ConfigDict:
    """The whole schema with its defaults: SimCLR v1 on ImageNet is a few changes away.

    Returns:
      A locked ConfigDict; assign to its keys, replace `views` with a dict of `view(...)`.
    """
    defaults = _defaults(_schema())
    defaults["views"] = {"view1": view(), "view2": view()}
    return ConfigDict(defaults).lock()


def schema_keys() -> dict[str, Key]:
    """Every key of the schema by its dotted name, those of a view as `views.*.NAME`.

    Keys of registered methods and encoders are included.
    """
    return flatten(_schema())


def _schema() -> dict[str, Any]:
    """The schema with the keys of registered methods and encoders."""
    return {**SCHEMA, **_REGISTERED, "model": {**_MODEL, **_ENCODERS}}


def register_options(method: str, options: Mapping[str, Any]) -> None:
    """Adds the keys `config.<method>.<option>` to the schema; see `methods.register`.

    Args:
      method: name of the group.
      options: defaults by name, which also fix the keys' types; or instances of
        `ssl_jax.schema.Key`, which document and check them, too.

    Raises:
      UserError: the schema has another group or key of that name, or a default is of a type that
        the schema doesn't have.
    """
    if method in default_config() and method not in _REGISTERED:
        raise UserError(f"config.{method} is already in the schema. Register another name.")
    _REGISTERED[method] = _keys(f"config.{method}", options)


def register_encoder(name: str, options: Mapping[str, Any]) -> None:
    """Adds a value of `config.model.name` and its keys; see `ssl_jax.models.register`.

    Args:
      name: the encoder's name, and that of the group `config.model.<name>`.
      options: as in `register_options`.

    Raises:
      UserError: the name is an encoder of ssl_jax or a key of `config.model`, or a default is of a
        type that the schema doesn't have.
    """
    if name in _MODEL or name in schema_keys()["model.name"].choices:
        raise UserError(f"config.model already has the name '{name}'. Register another name.")
    _ENCODERS[name] = _keys(f"config.model.{name}", options)


def _keys(group: str, options: Mapping[str, Any]) -> dict[str, Key]:
    """Keys of a registered group, from defaults or keys by name."""
    keys = {name: o if isinstance(o, Key) else Key(o) for name, o in options.items()}
    for name, key in keys.items():
        if not isinstance(key.default, bool | int | float | str | tuple):
            raise UserError(
                f"{group}.{name} has the default {key.default!r}. Use a bool, number, string or "
                "tuple."
            )
    return keys


def _require_known(key: str, name: str, what: str, registered: Iterable[str]) -> None:
    """Checks that the value of a key is built in or registered; `what` has its article."""
    known = [*schema_keys()[key].choices, *sorted(registered)]
    if name not in known:
        raise UserError(
            f"config.{key} is '{name}', which is no {what.partition(' ')[2]} of ssl_jax."
            f"{did_you_mean(name, known)} For {what} of your own, import the file that registers "
            "it (on the command line, --import=FILE.py)."
        )


def register_source(name: str) -> None:
    """Adds a value that `config.data.name` may have; see `ssl_jax.data.register`.

    Raises:
      UserError: the name is a source of ssl_jax.
    """
    if name in schema_keys()["data.name"].choices:
        raise UserError(f"'{name}' is a source of ssl_jax. Register another name.")
    _SOURCES.add(name)


def require_source(name: str) -> None:
    """Checks that a source of images is built in or registered.

    Args:
      name: value of `config.data.name`.

    Raises:
      UserError: an unknown name.
    """
    _require_known("data.name", name, "a source", _SOURCES)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A run's length in optimizer steps, and how many steps other numbers of epochs take.

    Every `steps_per_epoch` steps the images are permuted again, whatever `config.count_steps` is;
    a run may end within such an epoch.

    Attributes:
      steps_per_epoch: whole batches in the training set, N // B.
      total_steps: steps of the run.
      exact_epoch: N / B, if epochs are counted in images; None if they are whole batches.
    """

    steps_per_epoch: int
    total_steps: int
    exact_epoch: Fraction | None = None

    def steps(self, epochs: float) -> int:
        """Steps in a number of epochs, as `config.count_steps` counts them; at most `MAX_INT`."""
        if self.exact_epoch is None:
            return min(round(epochs * self.steps_per_epoch), MAX_INT)
        return min(math.floor(Fraction(epochs) * self.exact_epoch), MAX_INT)

    def every(self, epochs: float) -> int:
        """Steps in `epochs` epochs, at least 1; 0 epochs mean never and give 0."""
        return max(1, self.steps(epochs)) if epochs > 0 else 0


def run_schedule(config: ConfigDict, num_examples: int) -> Schedule:
    """Derives the run's length from its config.

    Args:
      config: a validated config.
      num_examples: images in the training set.

    Returns:
      The schedule: `config.steps`, or `config.epochs` as `config.count_steps` counts them.

    Raises:
      UserError: the batch is larger than the dataset, or the run is too long.
    """
    per_epoch = num_examples // config.batch_size
    if per_epoch == 0:
        fits = 1 << max(num_examples.bit_length() - 2, 0)  # twice in an epoch
        raise UserError(
            f"config.batch_size is {config.batch_size} but the training set has only "
            f"{num_examples} images. Use a smaller batch, such as --config.batch_size={fits}, or "
            "more data."
        )
    whole = config.count_steps == "epochs"
    exact = None if whole else Fraction(num_examples, config.batch_size)
    total = config.steps or Schedule(per_epoch, 0, exact).steps(config.epochs)
    if config.count_steps == "images_plus_1" and not config.steps:
        total += 1
    if total >= MAX_INT:
        raise UserError(
            f"config.epochs is {config.epochs}, which takes {MAX_INT} steps or more. Reduce it."
        )
    return Schedule(per_epoch, max(total, 1), exact)


def is_due(step: int, every: int) -> bool:
    """Whether something done every `every` steps is due after `step` steps (0: never)."""
    return every > 0 and step > 0 and step % every == 0


def load_config(path: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """Reads a config file and applies command-line overrides.

    Args:
      path: `FILE.py` or `FILE.py:VARIANT`; the file defines `get_config()`, which takes the variant
        if it has variants.
      overrides: strings `a.b=VALUE`.

    Returns:
      The validated config.

    Raises:
      UserError: no such file, no `get_config`, an unknown key, or an invalid value.
    """
    file, _, variant = os.path.expanduser(path).partition(":")
    if not local_path(file).is_file():
        raise UserError(
            f"There is no config file {file}. Set --config=PATH; see configs/.{close_path(file)}"
        )
    try:
        with reading(file):
            get_config = runpy.run_path(str(local_path(file))).get("get_config")
        if get_config is None:
            raise UserError(f"{file} does not define get_config(). See configs/ for examples.")
        if variant and not inspect.signature(get_config).parameters:
            raise UserError(f"{file} has no variants, so no '{variant}'. Use --config={file}.")
        config = get_config(variant) if variant else get_config()
    except SyntaxError as error:
        raise UserError(
            f"The config file {file} is not valid Python: line {error.lineno}, {error.msg}."
        ) from error
    except (KeyError, ValueError) as error:
        if error.args == (variant,) or (variant and repr(variant) in str(error)):
            described = (ast.get_docstring(ast.parse(Path(file).read_text())) or "").splitlines()
            raise UserError(
                f"{file} has no variant '{variant}'. {' '.join(described[:1])}".strip()
            ) from error
        message = f"no key {error}." if isinstance(error, KeyError) else _short_message(error)
        raise UserError(f"The config file {file} is not valid: {message}") from error
    except (AttributeError, ImportError, LookupError, NameError, TypeError) as error:
        message = _short_message(error)
        if "field 'size'" in message:  # ml_collections keeps the type of a key
            message += ". Give a pair when the view is made, as in view(size=(96, 64))."
        raise UserError(f"The config file {file} is not valid: {message}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config() in {file} returns {config!r}. Return a ConfigDict.")
    return apply_overrides(config, overrides)


def apply_overrides(config: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """Copies a config and sets keys as on the command line.

    Args:
      config: with the whole schema.
      overrides: strings `a.b=VALUE`.

    Returns:
      The validated copy.

    Raises:
      UserError: an unknown key or an invalid value.
    """
    # Through JSON: otherwise one view used under two names would stay a single object, and an
    # override of one would change both.
    config = _restored(to_json(config))  # not validated yet: an override may correct it
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--config.{key} needs a value. Write --config.{key}=VALUE.")
        _set(config, key, text)
    validate(config)
    # Not part of `validate`: a run's encoder is loaded without the source of its images.
    require_source(config.data.name)
    return config


def validate(config: ConfigDict) -> None:
    """Checks values against the schema's bounds and choices, and against each other.

    Args:
      config: a config with the whole schema.

    Raises:
      UserError: naming the first key that is wrong and the allowed values.
    """
    # A config that was made before a method or encoder was registered has no group for it.
    methods = {name: keys for name, keys in _REGISTERED.items() if name in config}
    encoders = {name: keys for name, keys in _ENCODERS.items() if name in config.model}
    model = {**_MODEL, **encoders}
    _require({**SCHEMA, **methods, "model": model}, config, "config")
    _require_known("method", config.method, "a method", _REGISTERED)
    _require_known("model.name", config.model.name, "an encoder", _ENCODERS)
    if config.microbatch and config.batch_size % config.microbatch:
        raise UserError(
            f"config.microbatch is {config.microbatch}, which does not divide config.batch_size, "
            f"{config.batch_size}. Use a divisor, or 0 for the whole batch at once."
        )
    if config.model.bn_splits > 1 and config.model.bn_group_size != 1:
        raise UserError(
            f"config.model.bn_splits is {config.model.bn_splits}, which divides each device's "
            f"images, but config.model.bn_group_size is {config.model.bn_group_size}, which joins "
            "devices. Set config.model.bn_group_size=1, or bn_splits=1."
        )
    if config.steps == 0 and config.epochs == 0:
        raise UserError("config.epochs and config.steps are both 0. Set one of them.")
    if config.data.label_separator and config.data.name != "paths":
        raise UserError(
            f"config.data.label_separator is '{config.data.label_separator}', but only the labels "
            f"of a list of images are separated, and config.data.name is '{config.data.name}'. Set "
            "config.data.label_separator= or config.data.name=paths."
        )
    if not config.views:
        raise UserError("config.views is empty. Add at least one view.")
    if config.method == "swav" and len(flat_views(config)) < 2:
        (name,) = config.views
        raise UserError(
            "config.views has one crop, but SwAV predicts the assignments of other crops of an "
            f"image. Set --config.views.{name}.count=2, or add a view."
        )
    _require_fitting_channels(config)


def require_fitting_range(config: ConfigDict) -> None:
    """Raises a UserError if `config.data.range` is empty, or exceeds the values of its bits."""
    limits = config.data.range
    if limits and limits[0] == limits[1]:
        raise UserError(
            f"config.data.range is {limits}: write (low, high) with low below high, or () for all "
            "values of the images' type."
        )
    if limits and config.data.bits == 8 and limits[1] > 255:
        raise UserError(
            f"config.data.range is {limits}, but config.data.bits is 8, with which values are 0 to "
            "255. Set config.data.bits=16, or a range within 0 to 255."
        )


def _require_fitting_channels(config: ConfigDict) -> None:
    """Checks the range of the images' values, and that views fit the number of channels."""
    channels = config.data.channels
    require_fitting_range(config)
    for name, each in config.views.items():
        if len(each.mean) != len(each.std) or len(each.mean) not in (0, channels):
            values = "three values" if channels == 3 else f"{channels} (config.data.channels)"
            raise UserError(
                f"config.views.{name} has {len(each.mean)} values in mean and {len(each.std)} in "
                f"std. Set both to {values}, or leave both empty."
            )
    used = {} if channels == 3 else {name: rgb_keys(each) for name, each in config.views.items()}
    if any(used.values()):
        flags = [f"--config.views.{name}.{key}=0" for name, keys in used.items() for key in keys]
        operations = sorted({_RGB_KEYS[key] for keys in used.values() for key in keys})
        raise UserError(
            f"config.data.channels is {channels}, but {' and '.join(operations)} in config.views "
            f"need RGB. Add {' '.join(flags)}, or call ssl_jax.recipes.set_channels(config, "
            f"{channels}) in the config file."
        )


def rgb_keys(view: ConfigDict) -> list[str]:
    """The keys of a view that turn on operations that are defined for RGB images only."""
    jitter = view.jitter
    on = {
        "jitter.saturation": jitter.prob > 0 and jitter.saturation > 0,
        "jitter.hue": jitter.prob > 0 and jitter.hue > 0,
        "gray": view.gray > 0,
    }
    return [key for key in _RGB_KEYS if on[key]]


def view_size(view: ConfigDict) -> tuple[int, int]:
    """Height and width of a view in pixels."""
    size: int | tuple[int, int] = view.size
    return (size, size) if isinstance(size, int) else size


def view_shape(config: ConfigDict, view: ConfigDict) -> tuple[int, int, int]:
    """Height, width and number of channels of a view of a config's images."""
    return (*view_size(view), config.data.channels)


def size_text(view: ConfigDict) -> str:
    """A view's size for people, in pixels: "224" of a square, else "96×64", height first."""
    height, width = view_size(view)
    return str(height) if height == width else f"{height}×{width}"


def flat_views(config: ConfigDict) -> tuple[ConfigDict, ...]:
    """The views of a sample in order: `config.views` by sorted name, each `count` times."""
    return tuple(
        config.views[name] for name in sorted(config.views) for _ in range(config.views[name].count)
    )


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON types, equal to what is read back from a file."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    # Other methods and encoders that happen to be registered in this process are not part of the
    # run.
    model = plain.get("model", {})  # none in the config of a view
    for group, registered, used in ((plain, _REGISTERED, "method"), (model, _ENCODERS, "name")):
        for name in registered.keys() - {group.get(used)}:
            group.pop(name, None)
    return plain


def from_json(saved: dict[str, Any]) -> ConfigDict:
    """Restores the config that `to_json` wrote.

    Args:
      saved: the result of `to_json`.

    Returns:
      A locked, validated ConfigDict.

    Raises:
      UserError: unknown or missing keys.
    """
    config = _restored(saved)
    validate(config)
    return config


def _restored(saved: dict[str, Any]) -> ConfigDict:
    config = default_config()
    with config.unlocked():
        views = saved.get("views")
        config.views = {name: view() for name in (views if isinstance(views, dict) else ())}
    model = saved.get("model")
    model = model if isinstance(model, dict) else {}
    method, encoder = config.method, config.model.name = [
        str(group.get(key)) for group, key in ((saved, "method"), (model, "name"))
    ]
    values = flatten(saved)
    mismatched = sorted(set(values) ^ set(flatten(to_json(config))))
    for what, name, group, known in (
        ("method", method, saved, config),
        ("encoder", encoder, model, config.model),
    ):
        if name in group and name not in known:
            raise UserError(
                f"The config's {what} '{name}' is not built into ssl_jax. Import the file that "
                "registers it first (on the command line, --import=FILE.py)."
            )
    if mismatched:
        few = ", ".join(mismatched[:5]) + (" …" if len(mismatched) > 5 else "")
        raise UserError(
            f"The saved config was written by another version of ssl_jax (keys {few}). Use that "
            "version, or start again in a new workdir."
        )
    for key, value in values.items():
        _assign(config, key, tuple(value) if isinstance(value, list) else value)
    return config


def differences(
    old: dict[str, Any], new: dict[str, Any], ignore: Collection[str] = ()
) -> list[str]:
    """Lines `key: old -> new` for every key in which two `to_json` configs differ.

    Args:
      old: a config from `to_json`.
      new: another one.
      ignore: leaves out keys that affect only this; see `ssl_jax.schema.Key`.
    """
    a, b = flatten(old), flatten(new)
    keys = schema_keys()
    return [
        f"{name}: {a.get(name, '(absent)')} -> {b.get(name, '(absent)')}"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name) and not (name in keys and keys[name].affects in ignore)
    ]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as one level with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def close_path(path: str | Path) -> str:
    """A hint " Did you mean 'runs/a'?" for a path that doesn't exist; "" if no name is close."""
    path = Path(path)
    siblings: list[str] = []
    with contextlib.suppress(OSError):  # a folder that can't be listed
        siblings = [file.name for file in path.parent.iterdir() if not path.exists()]
    close = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.75)
    return f" Did you mean '{path.parent / close[0]}'?" if close else ""


def _defaults(group: Group) -> dict[str, Any]:
    return {
        name: node.default if isinstance(node, Key) else _defaults(node)
        for name, node in group.items()
    }


def _require(group: Group, config: ConfigDict, where: str) -> None:
    """Checks a config's values against a group of the schema; "*" stands for all its names."""
    for name, node in group.items():
        if isinstance(node, Key):
            node.require(f"{where}.{name}", config[name])
        else:
            for each in config if name == "*" else [name]:
                _require(node, config[each], f"{where}.{each}")


def _update(config: ConfigDict, changes: dict[str, Any], where: str) -> None:
    for key, value in changes.items():
        if key not in config:
            raise UserError(f"{where} has no key '{key}'.{did_you_mean(key, config)}")
        if isinstance(config[key], ConfigDict) and isinstance(value, dict):
            _update(config[key], value, f"{where}.{key}")
        else:
            _assign(config, key, value)


def _set(config: ConfigDict, key: str, text: str) -> None:
    """Sets a dotted key from the text of a command line."""
    node: Any = config
    path = "config"
    parts = key.split(".")
    for i, part in enumerate(parts):
        if not isinstance(node, ConfigDict):
            raise UserError(f"{path} is a value and has no key '{'.'.join(parts[i:])}'.")
        if part not in node:
            raise UserError(f"{path} has no key '{part}'.{_key_hint(config, node, parts, part)}")
        node, path = node[part], f"{path}.{part}"
    if isinstance(node, ConfigDict):
        raise UserError(f"{path} is a group of keys ({', '.join(sorted(node))}). Set one of them.")
    value: Any = text
    if not isinstance(node, str):
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise UserError(f"{path} takes {_type_of(node)}, not '{text}'.") from error
    _assign(config, key, value)


def keys_named(name: str, config: ConfigDict | None = None) -> list[str]:
    """Finds keys by their last part, or by the name that other libraries give it.

    Args:
      name: the last part of a key, such as "lr", or another library's name, such as "base_lr".
      config: whose keys are searched; None for the default config.
    """
    name = _USUAL_NAMES.get(name, name)
    keys = flatten((config or default_config()).to_dict())
    return [key for key in keys if key.rpartition(".")[2] == name]


def _key_hint(config: ConfigDict, group: ConfigDict, parts: Sequence[str], wrong: str) -> str:
    """A hint for an unknown key: the same name in another group, the method's own first."""
    named = keys_named(parts[-1], config)
    own = [key for key in named if key.startswith(f"{config.method}.")]
    if len(named) == 1 or own:
        return f" Did you mean 'config.{(own or named)[0]}'?"
    return did_you_mean(wrong, group)


def _assign(config: ConfigDict, key: str, value: Any) -> None:
    *path, last = key.split(".")
    node = config
    for part in path:
        node = node[part]
    old = node[last]
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            value = float(value)
    if isinstance(old, tuple) and isinstance(value, Sequence) and not isinstance(value, str):
        value = tuple(value)
    is_size = last == "size" and (not path or path[0] == "views")  # the key of a view
    if is_size and isinstance(value, Sequence) and not isinstance(value, str):
        value = tuple(value)
    if type(old) is not type(value) and not (is_size and type(value) in (int, tuple)):
        raise UserError(f"config.{key} takes {_type_of(old)}, not {value!r}.")
    with node.ignore_type() if is_size else contextlib.nullcontext():
        node[last] = value


def _type_of(value: Any) -> str:
    """Names the type of a key's value, with an example."""
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    return f"{names.get(type(value), f'a {type(value).__name__}')}, such as {value!r}"


def _short_message(error: BaseException) -> str:
    """The first and last sentences of an error; ConfigDict's list the whole config in between."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    text = str(error.args[0] if error.args else error).strip()
    if " Other fields present:" in text:
        first, _, rest = text.partition(" Other fields present:")
        hint = rest.splitlines()[-1]
        return f"{first} {hint}" if hint.startswith("Did you mean") else first
    return text.splitlines()[0] if text else type(error).__name__
