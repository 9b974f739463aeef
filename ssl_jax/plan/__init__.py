"""Cost of a run on other hardware, from compiling its train step ahead of time."""

from ssl_jax.lazy import module_attributes

__getattr__, __dir__ = module_attributes(__name__, __path__)
