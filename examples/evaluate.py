"""Evaluates a run's frozen encoder: python examples/evaluate.py RUN.

Computes features once, then evaluates a kNN classifier and linear classifiers with all labels and
with few.
"""

import sys

import numpy as np

from ssl_jax.downstream.features import knn_metrics, linear_metrics, run_features
from ssl_jax.evals import few_label_accuracies
from ssl_jax.evals.metrics import metrics_line

features = run_features(sys.argv[1], labeled_only=True)
print("kNN   ", metrics_line(knn_metrics(features, k=20)))
metrics, penalty = linear_metrics(features)
print("linear", metrics_line(metrics), f"(penalty {penalty:g})")
for count in (1, 5):
    trials = few_label_accuracies(
        features.train,
        features.train_labels,
        features.test,
        features.test_labels,
        labels_per_class=count,
        trials=5,
    )
    print(f"{count} labels per class: {100 * np.mean(trials):.1f} % ± {100 * np.std(trials):.1f}")
