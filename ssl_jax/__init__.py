"""Self-supervised image pretraining on JAX: one train step for every method, laptop to pod."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Importing JAX takes seconds, which `ssl-jax --help` should not.
    if name == "load":
        from ssl_jax.encoder import load

        return load
    raise AttributeError(f"module 'ssl_jax' has no attribute '{name}'")
