"""Self-supervised image pretraining on JAX: one train step for every method, laptop to pod."""

from typing import Any

from ssl_jax.version import __version__

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Importing JAX takes seconds, and `ssl-jax --help` should not wait for it.
    if name == "load":
        from ssl_jax.interop.load import load

        return load
    raise AttributeError(f"module 'ssl_jax' has no attribute '{name}'")
