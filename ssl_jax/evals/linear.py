"""Linear probes on frozen features: multinomial logistic regression by scikit-learn."""

import warnings

import numpy as np
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression


def linear_probe(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m d"],
    *,
    regularisation: float = 0.1,
) -> Int[np.ndarray, " m"]:
    """Fits a linear classifier on frozen features.

    Args:
      train_features: [n, d].
      train_labels: [n].
      test_features: [m, d].
      regularisation: inverse strength of the L2 penalty, scikit-learn's C.

    Returns:
      Predicted labels of the test features, [m].
    """
    # One scale for all features: one for each would have to be estimated from the few labels there
    # may be, and costs the raw pixels of digits, the baseline, three points at 5 labels per class.
    centre = train_features.mean(axis=0)
    scale = max(float((train_features - centre).std()), 1e-12)
    model = LogisticRegression(C=regularisation, max_iter=1000)
    with warnings.catch_warnings():
        # 1,000 iterations decide the classes; the last digits of the weights don't matter.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((train_features - centre) / scale, train_labels)
    predicted: np.ndarray = model.predict((test_features - centre) / scale)
    return predicted


def few_label_accuracies(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m d"],
    test_labels: Int[np.ndarray, " m"],
    *,
    labels_per_class: int,
    trials: int,
    seed: int = 0,
) -> Float[np.ndarray, " trials"]:
    """Accuracy of linear probes that see only a few labels of each class.

    The trials depend on the labels and the seed alone, so different features of the same images are
    compared on the same trials: differences are paired.

    Args:
      train_features: [n, d].
      train_labels: [n].
      test_features: [m, d].
      test_labels: [m].
      labels_per_class: how many training labels of each class are seen.
      trials: how many times they are drawn.
      seed: of the trials.

    Returns:
      Accuracy on the test features of each draw, in [0, 1].
    """
    generator = np.random.default_rng([seed, labels_per_class])
    accuracies = []
    for _ in range(trials):
        seen = np.concatenate(
            [
                generator.choice(np.flatnonzero(train_labels == c), labels_per_class, replace=False)
                for c in np.unique(train_labels)
            ]
        )
        predicted = linear_probe(train_features[seen], train_labels[seen], test_features)
        accuracies.append(np.mean(predicted == test_labels))
    return np.array(accuracies)
