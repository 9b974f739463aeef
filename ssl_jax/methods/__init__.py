"""The methods: one protocol, one file for each."""

from collections.abc import Callable

from ml_collections import ConfigDict

from ssl_jax.config import did_you_mean
from ssl_jax.errors import UserError
from ssl_jax.methods.base import Method
from ssl_jax.methods.simclr import SimCLR

_METHODS: dict[str, type[Method]] = {"simclr": SimCLR}


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """A class decorator that makes a method available as `config.method = name`."""

    def add(cls: type[Method]) -> type[Method]:
        _METHODS[name] = cls
        return cls

    return add


def make_method(
    config: ConfigDict,
    total_steps: int,
    axis_name: str | None = None,
    groups: tuple[tuple[int, ...], ...] | None = None,
) -> Method:
    """The method that a config names.

    Args:
      config: of the run.
      total_steps: its length, for schedules inside the method.
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
    return _METHODS[config.method](config, total_steps, axis_name, groups)
