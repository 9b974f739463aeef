"""The grid of `ssl-jax sweep`: the settings of its runs, without JAX."""

import argparse
import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence

from ml_collections import ConfigDict

from ssl_jax.config import load_config
from ssl_jax.errors import UserError

Axis = tuple[str, list[str]]  # a config key and the texts of its values


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
    key, _, values = text.partition("=")
    found = [value.strip() for value in re.split(r",(?![^(\[]*[)\]])", values)]
    if not key or not all(found):
        raise argparse.ArgumentTypeError(f"'{text}' is not KEY=VALUE,VALUE such as seed=0,1")
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"'{text}' has a value twice")
    return key.removeprefix("config."), found


def make_settings(path: str, overrides: Iterable[str], grid: Sequence[Axis]) -> list[Setting]:
    """The settings of all combinations of a grid's values; the last key changes fastest.

    Args:
      path: of the config file, `FILE.py[:VARIANT]`.
      overrides: strings `a.b=VALUE` of all runs.
      grid: keys and values.

    Raises:
      UserError: a key is given twice, a combination isn't valid, or two would share a folder.
    """
    overrides, keys = tuple(overrides), [key for key, _ in grid]
    given = [override.partition("=")[0] for override in overrides]
    for key in keys:
        if key in given:
            raise UserError(f"config.{key} is set by --config.{key} and by --grid. Remove one.")
        if keys.count(key) > 1:
            raise UserError(f"--grid has config.{key} twice. List all its values in one --grid.")
    last = [key.rpartition(".")[2] for key in keys]
    shown = [key if last.count(end) > 1 else end for key, end in zip(keys, last, strict=True)]
    settings = []
    for values in itertools.product(*(values for _, values in grid)):
        name = "_".join(f"{key}_{_slug(value)}" for key, value in zip(shown, values, strict=True))
        own = tuple(f"{key}={value}" for key, value in zip(keys, values, strict=True))
        both = (*overrides, *own)
        settings.append(Setting(name, both, load_config(path, both)))
    names = [setting.name for setting in settings]
    if shared := [name for name in names if names.count(name) > 1]:
        raise UserError(f"Two runs of the grid would have the same folder, {shared[0]}.")
    return settings


def _slug(value: str) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "-", value).strip("-.") or "-"
