"""A linear evaluation of one's own, on features of a run: python examples/linear_eval.py RUN."""

import sys

from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ssl_jax.data.sources import make_sources
from ssl_jax.encoder import load

encoder = load(sys.argv[1])
train, test = make_sources(encoder.config)
features = [encoder.apply(split.clean(range(split.num_examples))) for split in (train, test)]
scale = StandardScaler().fit(features[0])
model = LogisticRegression(C=0.1, max_iter=1000)
model.fit(scale.transform(features[0]), train.labels)
print(f"top-1 {100 * model.score(scale.transform(features[1]), test.labels):.2f} %")
