import numpy as np
import pytest

from ssl_jax.errors import UserError
from ssl_jax.evals import classification_metrics
from ssl_jax.evals.metrics import metrics_line
from ssl_jax.evals.results import read_result, write_result


def data(n=300, classes=7, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    scores = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels]
    return scores.astype(np.float32), labels


def matrix(confusion, classes):
    """Counts by true and predicted class."""
    counts = np.zeros((classes, classes), int)
    for true, predicted, count in confusion:
        counts[true, predicted] += count
    return counts


def by_hand(scores, labels):
    """The metrics in plain Python, in float64."""
    n, classes = scores.shape
    top1, top5, of_class, bins = 0, 0, {c: [] for c in range(classes)}, {}
    for row, label in zip(scores.astype(np.float64), labels, strict=True):
        order = sorted(range(classes), key=lambda c: -row[c])
        top1 += order[0] == label
        top5 += label in order[:5]
        of_class[label].append(order[0] == label)
        p = np.exp(row - row.max())
        confidence = (p / p.sum()).max()
        bins.setdefault(int(confidence * 15), []).append((order[0] == label, confidence))
    gaps = [abs(np.sum([correct - c for correct, c in b])) for b in bins.values()]
    per_class = np.mean([np.mean(c) for c in of_class.values() if c])
    return top1 / n, top5 / n, per_class, sum(gaps) / n


def test_metrics_are_those_computed_in_plain_python():
    scores, labels = data()
    found = classification_metrics(scores, labels, resamples=0)
    names = ("top1", "top5", "mean_per_class", "calibration_error")
    for name, expected in zip(names, by_hand(scores, labels), strict=True):
        assert found[name]["value"] == pytest.approx(expected, abs=1e-6), name
        assert found[name]["low"] == found[name]["high"] == found[name]["value"]
    confusion = matrix(found["confusion"], 7)
    assert confusion.sum() == found["examples"] == 300
    assert np.trace(confusion) / 300 == pytest.approx(found["top1"]["value"])
    expected = np.zeros((7, 7), int)
    np.add.at(expected, (labels, scores.argmax(axis=1)), 1)
    np.testing.assert_array_equal(confusion, expected)


def test_top1_interval_is_that_of_a_proportion_and_reproducible():
    scores, labels = data(n=2000)
    found = classification_metrics(scores, labels)["top1"]
    half = 1.96 * np.sqrt(found["value"] * (1 - found["value"]) / 2000)
    assert found["low"] == pytest.approx(found["value"] - half, abs=0.25 * half)
    assert found["high"] == pytest.approx(found["value"] + half, abs=0.25 * half)
    again = classification_metrics(scores, labels)["top1"]
    assert again == found


def test_mean_per_class_ignores_absent_classes():
    scores = np.eye(3)[[0, 0, 1, 0]]
    found = classification_metrics(scores, np.array([0, 0, 1, 1]), resamples=5)
    assert found["mean_per_class"]["value"] == 0.75
    assert "top5" not in found


def test_equal_scores_are_ranked_by_class_number():
    labels = np.random.default_rng(0).integers(0, 7, 300)
    scores = np.random.default_rng(1).integers(0, 3, (300, 7))
    found = classification_metrics(scores, labels, resamples=0)
    order = np.argsort(-scores, axis=1, kind="stable")
    assert found["top1"]["value"] == np.mean(order[:, 0] == labels)
    assert found["top5"]["value"] == np.mean((order[:, :5] == labels[:, None]).any(axis=1))
    assert found["top1"]["value"] == np.trace(matrix(found["confusion"], 7)) / 300


def test_float64_scores_are_compared_unrounded():
    found = classification_metrics(np.array([[1.0, 1.0 + 1e-12]]), np.array([1]), resamples=0)
    assert found["top1"]["value"] == 1


@pytest.mark.parametrize("n", [20, 300, 3000])
def test_calibration_interval_contains_the_error(n):
    """For a calibrated classifier, resampling only increases the error."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, n)
    scores = np.log(np.stack([confidence, 1 - confidence], axis=1))
    found = classification_metrics(scores, (rng.random(n) > confidence).astype(int))
    error = found["calibration_error"]
    assert 0 <= error["low"] <= error["value"] <= error["high"]
    assert error["low"] < error["high"]


def test_images_with_nonfinite_scores_count_as_wrong():
    scores = np.array([[np.nan, 0, 0], [np.inf, 0, 0], [1, 0, 0]])
    found = classification_metrics(scores, np.zeros(3, int), resamples=5)
    assert found["top1"]["value"] == pytest.approx(1 / 3)
    assert found["confusion"] == [[0, 0, 1]]
    many = classification_metrics(np.full((2, 6), np.nan), np.array([0, 1]), resamples=5)
    assert many["top5"]["value"] == 0


def test_result_of_thousands_of_classes_is_small_and_can_be_read(tmp_path):
    scores = np.random.default_rng(0).normal(size=(9, 6000)).astype(np.float32)
    found = classification_metrics(scores, np.arange(9) * 600, resamples=5)
    file = write_result(tmp_path, "classifier", "iNaturalist", found)
    assert file.stat().st_size < 2**12
    assert read_result(tmp_path, "classifier")["metrics"] == found


@pytest.mark.usefixtures("unchecked_arrays")
def test_labels_that_do_not_match_the_scores_are_refused():
    with pytest.raises(UserError, match="don't match 3 labels"):
        classification_metrics(np.zeros((2, 3)), np.zeros(3, int))
    with pytest.raises(UserError, match="Labels range from 0 to 3, but scores have 3 classes"):
        classification_metrics(np.zeros((2, 3)), np.array([0, 3]))


def test_metrics_line_is_in_percent():
    scores, labels = data()
    line = metrics_line(classification_metrics(scores, labels))
    assert line.startswith("top-1 ") and "top-5" in line and line.endswith("% of 300 images")
