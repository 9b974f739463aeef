"""Evaluation: features, nearest neighbours, linear classifiers, fine-tuning, distillation."""

from ssl_jax.evals.features import extract_features
from ssl_jax.evals.knn import knn_classify, knn_votes, nearest_neighbours
from ssl_jax.evals.linear import few_label_accuracies, linear_probe
from ssl_jax.evals.logistic import LinearClassifier, fit_linear
from ssl_jax.evals.metrics import classification_metrics
from ssl_jax.evals.runs import distill, finetune

__all__ = [
    "LinearClassifier",
    "classification_metrics",
    "distill",
    "extract_features",
    "few_label_accuracies",
    "finetune",
    "fit_linear",
    "knn_classify",
    "knn_votes",
    "linear_probe",
    "nearest_neighbours",
]
