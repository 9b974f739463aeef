"""The methods: one protocol, one file for each."""

from collections.abc import Callable

from ml_collections import ConfigDict

from ssl_jax.config import Schedule, did_you_mean
from ssl_jax.errors import UserError
from ssl_jax.methods.base import Method
from ssl_jax.methods.byol import BYOL
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
}


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """A class decorator that makes a method available as `config.method = name`."""

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
      UserError: no method of that name.
    """
    if config.method not in _METHODS:
        raise UserError(
            f"config.method is '{config.method}'.{did_you_mean(config.method, _METHODS)}"
        )
    return _METHODS[config.method](config, schedule, axis_name, groups)
