"""Evaluates a run with a custom linear classifier: python examples/linear_eval.py RUN."""

import sys

from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ssl_jax.downstream.features import run_features

features = run_features(sys.argv[1], labeled_only=True)
scale = StandardScaler().fit(features.train)
model = LogisticRegression(C=0.1, max_iter=1000).fit(
    scale.transform(features.train), features.train_labels
)
print(f"top-1 {100 * model.score(scale.transform(features.test), features.test_labels):.2f} %")
