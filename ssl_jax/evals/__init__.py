"""Evaluation of frozen features: extraction, nearest neighbours, linear probes."""

from ssl_jax.evals.features import extract_features
from ssl_jax.evals.knn import knn_classify, nearest_neighbours
from ssl_jax.evals.linear import few_label_accuracies, linear_probe

__all__ = [
    "extract_features",
    "few_label_accuracies",
    "knn_classify",
    "linear_probe",
    "nearest_neighbours",
]
