"""Linear probes and kNN on frozen features: ours in JAX beside scikit-learn's, in turns.

Features are random ones (ReLU of random projections) of packed images, 512 of each, which ask for
as many iterations as an encoder's.

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


def ours(x: np.ndarray, y: np.ndarray, penalty: float) -> Callable[[np.ndarray], np.ndarray]:
    """Fits, and gives the prediction."""
    from ssl_jax.evals.linear import fit_linear

    return fit_linear(x, y, num_classes=int(y.max()) + 1, penalties=[penalty]).predict


def scikit_learn(x: np.ndarray, y: np.ndarray, penalty: float) -> Callable:
    """Fits the same objective, with its default tolerance."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    centre = x.mean(axis=0)
    scale = (x - centre).std()
    model = LogisticRegression(C=1 / (len(y) * penalty), max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((x - centre) / scale, y)
    return lambda test: model.predict((test - centre) / scale)


def our_vote(x: np.ndarray, y: np.ndarray, test: np.ndarray) -> np.ndarray:
    """A majority of 200 neighbours by cosine."""
    from ssl_jax.evals.knn import knn_classify

    classes = int(y.max()) + 1
    return knn_classify(x, y, test, num_classes=classes, k=200, temperature=None)


def their_vote(x: np.ndarray, y: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The same; it keeps all similarities of a chunk in memory."""
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(200, algorithm="brute", metric="cosine").fit(x, y).predict(test)


def knn_table(
    x: np.ndarray, y: np.ndarray, test: np.ndarray, test_labels: np.ndarray, rounds: int
) -> None:
    """Prints it."""
    print(f"\n{len(test):,} of {x.shape[1]} features against {len(x):,}\n")
    print("| kNN, majority of 200 | accuracy % | seconds (median) | times ours |")
    print("| --- | --- | --- | --- |")
    votes = {"ours": our_vote, "scikit-learn": their_vote}
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
        ratio = median / medians["ours"]
        print(f"| {name} | {accuracy[name]:.2f} | {median:.1f} | {ratio:.2f} |", flush=True)


def main() -> None:
    """Prints a table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, help="packed images, FILE.npz")
    parser.add_argument("--test", required=True, help="the same, to be measured on")
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
    print("| penalty | implementation | accuracy % | seconds (median) | times ours |")
    print("| --- | --- | --- | --- | --- |")
    for penalty in map(float, args.penalties.split(",")):
        seconds: dict[str, list[float]] = {"ours": [], "scikit-learn": []}
        accuracy = {}
        for _ in range(args.rounds):
            for name, fit in (("ours", ours), ("scikit-learn", scikit_learn)):
                start = time.perf_counter()
                predict = fit(x, y, penalty)
                seconds[name].append(time.perf_counter() - start)
                accuracy[name] = 100 * np.mean(predict(test) == test_labels)
        medians = {name: statistics.median(taken) for name, taken in seconds.items()}
        for name, median in medians.items():
            cells = [f"{penalty:g}", name, f"{accuracy[name]:.2f}", f"{median:.1f}"]
            print("| " + " | ".join([*cells, f"{median / medians['ours']:.2f}"]) + " |", flush=True)
    knn_table(x, y, test, test_labels, args.rounds)


if __name__ == "__main__":
    main()
