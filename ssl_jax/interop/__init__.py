"""Reads and writes encoders: load, initial weights, imports, exports, model cards."""

from ssl_jax.lazy import module_attributes

__getattr__, __dir__ = module_attributes(__name__, __path__)
