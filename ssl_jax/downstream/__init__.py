"""Downstream use of a trained encoder: fine-tuning, distillation, transfer, linear evaluation."""

from ssl_jax.downstream.distillation import distill
from ssl_jax.downstream.finetuning import finetune
from ssl_jax.downstream.transfer_learning import transfer

__all__ = ["distill", "finetune", "transfer"]
