"""Self-supervised image pretraining on JAX: one train step for every method, laptop to pod."""

__version__ = "0.1.0"
