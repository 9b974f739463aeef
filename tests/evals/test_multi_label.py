"""Average precision and linear classifiers of images that may be of several classes."""

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.metrics import average_precision_score

from ssl_jax.errors import UserError
from ssl_jax.evals import multi_label
from ssl_jax.evals.linear import fit_linear, fit_multi_label
from ssl_jax.evals.metrics import metrics_line
from ssl_jax.evals.multi_label import (
    average_precision,
    mean_average_precision,
    multi_label_metrics,
)


def eleven_points(scores, positive):
    """VOC2007's measure, by its definition, with equal scores entering together."""
    best = []
    for step in range(11):
        found = [scores >= threshold for threshold in np.unique(scores)]
        reached = [s for s in found if 10 * positive[s].sum() >= step * positive.sum()]
        best.append(max(positive[s].mean() for s in reached))
    return np.mean(best)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_average_precision_matches_its_definitions_with_ties(levels):
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, 60).astype(np.float64)
    positive = rng.random(60) < 0.3
    every, eleven = average_precision(scores, positive)
    assert every[0] == pytest.approx(average_precision_score(positive, scores), abs=1e-12)
    assert eleven[0] == pytest.approx(eleven_points(scores, positive), abs=1e-12)


def test_weights_are_repeated_images():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 9, 40).astype(float), rng.random(40) < 0.4
    weights = rng.integers(0, 3, (4, 40))
    every, eleven = average_precision(scores, positive, weights)
    for k, weight in enumerate(weights):
        again = np.repeat(scores, weight), np.repeat(positive, weight)
        expected = average_precision(*again)
        assert (every[k], eleven[k]) == pytest.approx((expected[0][0], expected[1][0]))


def test_unknown_images_are_left_out_and_classes_without_images_are_named():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(50, 3))
    targets = (rng.random((50, 3)) < 0.5).astype(np.int8)
    targets[:20, 0], targets[:, 1] = -1, np.minimum(targets[:, 1], 0)
    found = multi_label_metrics(scores, targets, ("cat", "dog", "emu"), resamples=50)
    expected = [
        average_precision_score(targets[20:, 0], scores[20:, 0]),
        average_precision_score(targets[:, 2], scores[:, 2]),
    ]
    assert [each["mean_ap"] for each in found["classes"]] == pytest.approx(expected)
    mean = found["mean_ap"]
    assert mean["value"] == pytest.approx(np.mean(expected))
    assert mean["value"] == pytest.approx(mean_average_precision(scores, targets))
    assert mean["low"] < mean["value"] < mean["high"]
    assert found["excluded"] == ["dog"] and found["examples"] == 50
    assert "without dog" in metrics_line(found) and "11-point mAP" in metrics_line(found)
    with pytest.raises(UserError, match="No class has an image in both"):
        multi_label_metrics(scores, np.zeros_like(targets), ("cat", "dog", "emu"))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(150, 4)).astype(np.float32)
    targets = (features @ rng.normal(size=(4, 3)) + rng.normal(size=(150, 3)) > 0).astype(np.int8)
    targets[:30, 1] = -1
    return features, targets


def test_fit_minimizes_the_sigmoid_cross_entropy_of_known_images(data):
    features, targets = data
    settings = {"num_classes": 3, "penalties": [0.01], "metric": "mean_ap"}
    model = fit_linear(features, targets, tolerance=1e-6, **settings)
    center, scale = features.mean(axis=0), (features - features.mean(axis=0)).std()
    x = ((features - center) / scale).astype(np.float64)
    for c, target in enumerate(targets.T):
        known = target >= 0
        signs = 2.0 * target[known] - 1

        def objective(w, known=known, signs=signs):
            logits = x[known] @ w[:-1] + w[-1]
            return np.logaddexp(0, -signs * logits).mean() + 0.005 * np.sum(w[:-1] ** 2)

        expected = minimize(objective, np.zeros(5), tol=1e-10).x[:-1] / scale
        np.testing.assert_allclose(model.weights[:, c], expected, atol=2e-3)


@pytest.mark.parametrize("metric", ["mean_ap", "mean_ap_11_point"])
def test_penalty_is_chosen_by_average_precision_on_validation_images_only(data, metric):
    features, targets = data
    settings = {"num_classes": 3, "metric": metric}
    model = fit_linear(features, targets, penalties=[100.0, 1e-3], **settings)
    shuffled = np.random.default_rng(0).permutation(150)
    held, seen = shuffled[:15], shuffled[15:]
    part = fit_linear(features[seen], targets[seen], penalties=[1e-3], **settings)
    expected = mean_average_precision(part.scores(features[held]), targets[held], metric)
    assert model.validation[1e-3] == pytest.approx(expected, abs=0.03)
    assert model.penalty == max(model.validation, key=lambda p: (model.validation[p], -p))
    empty = targets.copy()
    empty[held] = 0
    with pytest.raises(UserError, match="None of the 15 images .* is of any class"):
        fit_linear(features, empty, penalties=[1.0, 0.1], **settings)


def test_class_that_a_split_lacks_is_excluded(data):
    features, targets = data
    train, test = targets.copy(), targets.copy()
    train[:, 0], test[:, 1] = 0, 0
    metrics, penalty = fit_multi_label(
        features, train, features, test, ("a", "b", "c"), penalties=[0.01]
    )
    assert metrics["excluded"] == ["a", "b"] and penalty == 0.01
    assert [each["name"] for each in metrics["classes"]] == ["c"]
    with pytest.raises(UserError, match="No class has an image in both"):
        fit_multi_label(features, train[:, :2], features, test[:, :2], ("a", "b"))
    with pytest.raises(UserError, match="The metric"):
        fit_linear(features, targets, num_classes=3, metric="top1")


def test_number_of_resamples_is_bounded_by_images_times_classes(monkeypatch):
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(50, 2)), rng.integers(0, 2, (50, 2)).astype(np.int8)
    taken = []

    def counted(scores, positive, weights):
        taken.append(len(weights))
        return average_precision(scores, positive, weights)

    monkeypatch.setattr(multi_label, "average_precision", counted)
    for work, expected in ((10**9, 400), (100 * 150, 150), (1, 100)):
        monkeypatch.setattr(multi_label, "_WORK", work)
        taken.clear()
        multi_label_metrics(scores, targets, ("a", "b"), resamples=400)
        assert sum(taken) == 2 * (1 + expected)
    whole = multi_label_metrics(scores, targets, ("a", "b"), resamples=100)
    monkeypatch.setattr(multi_label, "_CELLS", 50 * 30)
    taken.clear()
    assert multi_label_metrics(scores, targets, ("a", "b"), resamples=100) == whole
    assert max(taken) == 30
