"""Self-supervised image pretraining on JAX: one train step for every method, laptop to pod."""

import pkgutil

import lazy_loader

# Importing JAX takes seconds, and `ssl-jax --help` should not wait for it.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    [module.name for module in pkgutil.iter_modules(__path__)],
    {"interop.load": ["load"], "version": ["__version__"]},
)
