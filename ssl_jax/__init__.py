"""Self-supervised image pretraining on JAX: one train step for every method, laptop to pod."""

from typing import Any

from ssl_jax.lazy import module_attributes
from ssl_jax.version import __version__

__all__ = ["__version__", "load"]

_module, _modules = module_attributes(__name__, __path__)


def __getattr__(name: str) -> Any:
    # Importing JAX takes seconds, and `ssl-jax --help` should not wait for it.
    if name == "load":
        from ssl_jax.interop.load import load

        return load
    return _module(name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_modules()])
