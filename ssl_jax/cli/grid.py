"""The grid of `ssl-jax sweep`: the settings of its runs, without JAX."""

import argparse
import dataclasses
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterable, Sequence

from ml_collections import ConfigDict

from ssl_jax.config import load_config, to_json
from ssl_jax.errors import UserError

Axis = tuple[str, list[str]]  # a config key and the texts of its values
_MOST = 10_000  # combinations, each of which is loaded and checked first
# Bytes of a folder's name. File systems allow 255, and encrypted ones 143.
_LONGEST = 128


@dataclasses.dataclass(frozen=True)
class Setting:
    """One run of a sweep.

    Attributes:
      name: of the run's folder.
      overrides: strings `a.b=VALUE`, those of the whole sweep and its own.
      config: with all overrides.
    """

    name: str
    overrides: tuple[str, ...]
    config: ConfigDict


def parse_axis(text: str) -> Axis:
    """Parses `KEY=VALUE,VALUE`, the `type` of `--grid`; commas inside of brackets are kept."""
    key, equals, values = text.partition("=")
    key = key.strip().removeprefix("--").removeprefix("config.")
    found = [value.strip() for value in re.split(r",(?![^(\[]*[)\]])", values)]
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not KEY=VALUE,VALUE such as seed=0,1")
    if not all(found):
        where = "no value" if not values.strip() else "an empty value, where a comma is too many"
        raise argparse.ArgumentTypeError(f"'{text}' has {where}, for config.{key}")
    if twice := [value for value in found if found.count(value) > 1]:
        raise argparse.ArgumentTypeError(f"'{text}' has the value {twice[0]} twice")
    return key, found


def make_settings(path: str, overrides: Iterable[str], grid: Sequence[Axis]) -> list[Setting]:
    """The settings of all combinations of a grid's values; the last key changes fastest.

    Args:
      path: of the config file, `FILE.py[:VARIANT]`.
      overrides: strings `a.b=VALUE` of all runs.
      grid: keys and values.

    Raises:
      UserError: a key is given twice, there are too many combinations, one isn't valid, or two
        have the same config or would share a folder.
    """
    overrides, keys = tuple(overrides), [key for key, _ in grid]
    given = [override.partition("=")[0] for override in overrides]
    for key in keys:
        if key in given:
            raise UserError(f"config.{key} is set by --config.{key} and by --grid. Remove one.")
        if keys.count(key) > 1:
            raise UserError(f"--grid has config.{key} twice. List all its values in one --grid.")
    count = math.prod(len(values) for _, values in grid)
    if count > _MOST:
        raise UserError(f"--grid has {count:,} combinations, more than {_MOST:,}. Remove values.")
    last = [key.rpartition(".")[2] for key in keys]
    shown = [key if last.count(end) > 1 else end for key, end in zip(keys, last, strict=True)]
    settings: dict[str, Setting] = {}
    for values in itertools.product(*(values for _, values in grid)):
        named = zip(shown, values, strict=True)
        name = _shortened("_".join(f"{key}_{_slug(value)}" for key, value in named))
        own = tuple(f"{key}={value}" for key, value in zip(keys, values, strict=True))
        setting = Setting(name, own, load_config(path, (*overrides, *own)))
        same = settings.setdefault(json.dumps(to_json(setting.config)), setting)
        if same is not setting:
            raise UserError(
                f"{' '.join(same.overrides)} and {' '.join(own)} are the same setting. Remove one "
                "of the values from --grid."
            )
    names = [setting.name for setting in settings.values()]
    if shared := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"Two runs of the grid would have the same folder, {shared[0]}. Use two sweeps, each "
            "with a --workdir of its own."
        )
    return [
        dataclasses.replace(setting, overrides=(*overrides, *setting.overrides))
        for setting in settings.values()
    ]


def _slug(value: str) -> str:
    """A value as part of a folder's name; different values have different names."""
    plain = re.sub(r"[^\w.+-]+", "-", value)
    return value if plain == value else f"{plain.strip('-') or 'value'}-{_digest(value)}"


def _shortened(name: str) -> str:
    """A folder's name, with a digest in place of its end if file systems could refuse it."""
    encoded = name.encode()
    if len(encoded) <= _LONGEST:
        return name
    digest = _digest(name)
    return f"{encoded[: _LONGEST - len(digest) - 1].decode(errors='ignore')}-{digest}"


def _digest(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
