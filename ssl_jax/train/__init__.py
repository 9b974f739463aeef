"""Pretraining: what a run is set up with, its loop, and what it tells."""

from ssl_jax.train.loop import pretrain

__all__ = ["pretrain"]
