"""Linear classifiers and kNN on frozen features: ssl_jax and scikit-learn, in alternation.

Features are ReLUs of 512 random projections of packed images, on which L-BFGS needs about as many
iterations as on an encoder's features.

    python benchmarks/linear.py --train=train.npz --test=test.npz [--rounds=3]
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np


def random_features(images: np.ndarray, width: int) -> np.ndarray:
    """ReLU of random projections of the pixels, float32 [n, width]."""
    flat = images.reshape(len(images), -1).astype(np.float32) / 255 - 0.5
    weights = np.random.default_rng(0).normal(size=(flat.shape[1], width)) / flat.shape[1] ** 0.5
    return np.maximum(flat @ weights.astype(np.float32), 0)


def fit_ssl_jax(x: np.ndarray, y: np.ndarray, penalty: float) -> Callable[[np.ndarray], np.ndarray]:
    """Fits `fit_linear`; returns its prediction function."""
    from ssl_jax.evals.linear import fit_linear

    return fit_linear(x, y, num_classes=int(y.max()) + 1, penalties=[penalty]).predict


def fit_scikit_learn(x: np.ndarray, y: np.ndarray, penalty: float) -> Callable:
    """Fits the same objective at scikit-learn's default tolerance; returns the prediction."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    center = x.mean(axis=0)
    scale = (x - center).std()
    model = LogisticRegression(C=1 / (len(y) * penalty), max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((x - center) / scale, y)
    return lambda test: model.predict((test - center) / scale)


def vote_ssl_jax(x: np.ndarray, y: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Majority vote of the 200 nearest neighbors by cosine similarity."""
    from ssl_jax.evals.knn import knn_classify

    classes = int(y.max()) + 1
    return knn_classify(x, y, test, num_classes=classes, k=200, temperature=None)


def vote_scikit_learn(x: np.ndarray, y: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The same by scikit-learn, which holds all similarities of a chunk in memory."""
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(200, algorithm="brute", metric="cosine").fit(x, y).predict(test)


def knn_table(
    x: np.ndarray, y: np.ndarray, test: np.ndarray, test_labels: np.ndarray, rounds: int
) -> None:
    """Prints the table of kNN as Markdown."""
    print(f"\n{len(test):,} queries, {len(x):,} keys of dimension {x.shape[1]}\n")
    print("| kNN, majority of 200 | accuracy % | seconds (median) | times ssl_jax |")
    print("| --- | --- | --- | --- |")
    votes = {"ssl_jax": vote_ssl_jax, "scikit-learn": vote_scikit_learn}
    seconds: dict[str, list[float]] = {name: [] for name in votes}
    accuracy = {}
    for _ in range(rounds):
        for name, vote in votes.items():
            start = time.perf_counter()
            predicted = vote(x, y, test)
            seconds[name].append(time.perf_counter() - start)
            accuracy[name] = 100 * np.mean(predicted == test_labels)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name, median in medians.items():
        ratio = median / medians["ssl_jax"]
        print(f"| {name} | {accuracy[name]:.2f} | {median:.1f} | {ratio:.2f} |", flush=True)


def main() -> None:
    """Prints the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, help="packed images, FILE.npz")
    parser.add_argument("--test", required=True, help="packed images to evaluate on, FILE.npz")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--penalties", default="1e-3,1e-4,1e-5")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    splits = []
    for file in (args.train, args.test):
        with np.load(file) as packed:
            images = packed["images"]
            splits.append((random_features(images, args.width), packed["labels"]))
    (x, y), (test, test_labels) = splits
    print(f"{x.shape[0]:,} × {x.shape[1]} features\n")
    print("| penalty | implementation | accuracy % | seconds (median) | times ssl_jax |")
    print("| --- | --- | --- | --- | --- |")
    for penalty in map(float, args.penalties.split(",")):
        seconds: dict[str, list[float]] = {"ssl_jax": [], "scikit-learn": []}
        accuracy = {}
        for _ in range(args.rounds):
            for name, fit in (("ssl_jax", fit_ssl_jax), ("scikit-learn", fit_scikit_learn)):
                start = time.perf_counter()
                predict = fit(x, y, penalty)
                seconds[name].append(time.perf_counter() - start)
                accuracy[name] = 100 * np.mean(predict(test) == test_labels)
        medians = {name: statistics.median(taken) for name, taken in seconds.items()}
        for name, median in medians.items():
            cells = [f"{penalty:g}", name, f"{accuracy[name]:.2f}", f"{median:.1f}"]
            print(
                "| " + " | ".join([*cells, f"{median / medians['ssl_jax']:.2f}"]) + " |", flush=True
            )
    knn_table(x, y, test, test_labels, args.rounds)


if __name__ == "__main__":
    main()
