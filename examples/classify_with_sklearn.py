"""Uses an exported encoder in scikit-learn: python examples/classify_with_sklearn.py FILE.

FILE is the output of `ssl-jax export --format=program` for a run on digits, whose encoder has seen
three quarters of these images without labels. Needs only JAX and scikit-learn.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

program = jax.export.deserialize(bytearray(Path(sys.argv[1]).read_bytes()))
digits = load_digits()
images = np.repeat(np.round(digits.images * 255 / 16).astype(np.uint8)[..., None], 3, axis=-1)
encode = FunctionTransformer(lambda x: np.asarray(program.call(x)))
model = make_pipeline(encode, StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
scores = cross_val_score(model, images, digits.target, cv=5)
print(f"accuracy {100 * scores.mean():.2f} % ± {100 * scores.std():.2f} over five folds")
