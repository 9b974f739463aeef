"""Pretraining: a run's setup, its loop, and the summaries that it prints."""

from ssl_jax.train.loop import pretrain

__all__ = ["pretrain"]
