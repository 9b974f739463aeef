"""Evaluates a run with a custom linear classifier: python examples/linear_eval.py RUN."""

import sys

from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ssl_jax.downstream.features import run_features

train, labels, test, test_labels, _ = run_features(sys.argv[1], labeled=True).labeled()
scale = StandardScaler().fit(train)
model = LogisticRegression(C=0.1, max_iter=1000).fit(scale.transform(train), labels)
print(f"top-1 {100 * model.score(scale.transform(test), test_labels):.2f} %")
