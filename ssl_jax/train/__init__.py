"""Pretraining: a run's setup, its loop, and the summaries that it prints."""

from ssl_jax.train.loop import pretrain
from ssl_jax.train.result import PretrainResult

__all__ = ["PretrainResult", "pretrain"]
