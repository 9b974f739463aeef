"""Images and labels: sources, sampling order, views and augmentation."""

from ssl_jax.data.registry import register as register
from ssl_jax.lazy import module_attributes

__getattr__, __dir__ = module_attributes(__name__, __path__)
