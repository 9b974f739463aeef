"""What trains again, or measures a run by its path: linear recipes, fine-tuning, distillation."""

from ssl_jax.downstream.datasets import transfer
from ssl_jax.downstream.runs import distill, finetune

__all__ = ["distill", "finetune", "transfer"]
