"""Evaluation of a frozen encoder: features, nearest neighbors, linear classifiers."""

from ssl_jax.evals.features import extract_features
from ssl_jax.evals.knn import knn_classify, knn_votes, nearest_neighbors
from ssl_jax.evals.linear import LinearClassifier, few_label_accuracies, fit_linear, linear_probe
from ssl_jax.evals.metrics import classification_metrics

__all__ = [
    "LinearClassifier",
    "classification_metrics",
    "extract_features",
    "few_label_accuracies",
    "fit_linear",
    "knn_classify",
    "knn_votes",
    "linear_probe",
    "nearest_neighbors",
]
