"""Evaluation of a frozen encoder: features, nearest neighbors, linear classifiers."""

from ssl_jax.evals.features import extract_features
from ssl_jax.evals.knn import knn_classify, knn_votes, nearest_neighbours
from ssl_jax.evals.linear import few_label_accuracies, linear_probe
from ssl_jax.evals.logistic import LinearClassifier, fit_linear
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
    "nearest_neighbours",
]
