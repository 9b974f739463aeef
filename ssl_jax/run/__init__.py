"""A run on disk and its processes: folder, checkpoints, log, stopping."""

from ssl_jax.lazy import module_attributes

__getattr__, __dir__ = module_attributes(__name__, __path__)
