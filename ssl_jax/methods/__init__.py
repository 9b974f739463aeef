"""The methods: one protocol, one file for each."""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from ssl_jax.config import Schedule, did_you_mean, register_options
from ssl_jax.errors import UserError
from ssl_jax.methods.base import Method
from ssl_jax.methods.byol import BYOL
from ssl_jax.methods.distill import Distill
from ssl_jax.methods.moco import MoCo
from ssl_jax.methods.simclr import SimCLR
from ssl_jax.methods.simsiam import SimSiam
from ssl_jax.methods.supervised import Supervised
from ssl_jax.methods.swav import SwAV

_METHODS: dict[str, type[Method]] = {
    "simclr": SimCLR,
    "moco": MoCo,
    "swav": SwAV,
    "byol": BYOL,
    "simsiam": SimSiam,
    "supervised": Supervised,
    "distill": Distill,
}
_OWN = frozenset(_METHODS)


def register(name: str, **options: Any) -> Callable[[type[Method]], type[Method]]:
    """A class decorator that makes a method available as `config.method = name`.

    A file of the user's own, such as a config file, may register one; docs/new_method.md shows how.
    Registered again under its name, a method replaces the earlier one.

    Args:
      name: of the method.
      **options: defaults of the keys `config.<name>.<option>`, set and checked like all others.

    Returns:
      The decorator, which returns the class as it is.

    Raises:
      UserError: the name is that of a method of ssl_jax, or of another key of the schema.
    """
    if name in _OWN:
        raise UserError(f"'{name}' is a method of ssl_jax: register another name.")
    register_options(name, options)

    def add(cls: type[Method]) -> type[Method]:
        _METHODS[name] = cls
        return cls

    return add


def make_method(
    config: ConfigDict,
    schedule: Schedule,
    axis_name: str | None = None,
    groups: tuple[tuple[int, ...], ...] | None = None,
) -> Method:
    """The method that a config names.

    Args:
      config: of the run.
      schedule: its length, for schedules inside the method.
      axis_name: mapped axis of the devices; None on a single one.
      groups: of devices that share BatchNorm statistics; None for all.

    Returns:
      The method, ready for `init`.

    Raises:
      UserError: no method of that name, or options that it can't have.
    """
    if config.method not in _METHODS:
        raise UserError(
            f"config.method is '{config.method}'.{did_you_mean(config.method, _METHODS)}"
        )
    method = _METHODS[config.method](config, schedule, axis_name, groups)
    method.check_projector_layer(config.eval.projector_layer)
    return method
