import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from ssl_jax.errors import UserError
from ssl_jax.evals.logistic import fit_linear


@pytest.fixture(scope="module")
def digits():
    """Standardised alike, as `fit_linear` does it; 1,200 to fit, 597 to test."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order], y[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


def objective(x, y, weights, bias, penalty):
    """In float64, from the definition."""
    logits = x @ weights + bias
    logits -= logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(y)), y]
    cross_entropy = np.log(np.exp(logits).sum(axis=1)) - chosen
    return cross_entropy.mean() + penalty / 2 * np.square(weights).sum()


@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_it_is_scikit_learns_solution(digits, penalty):
    x, y, test, test_labels = digits
    fitted = fit_linear(x, y, num_classes=10, penalties=[penalty])
    centre = x.mean(axis=0)
    scale = (x - centre).std()
    scaled = (x - centre) / scale
    reference = LogisticRegression(C=1 / (len(y) * penalty), tol=1e-8, max_iter=5000)
    reference.fit(scaled, y)
    ours = objective(
        scaled, y, fitted.weights * scale, fitted.bias + centre @ fitted.weights, penalty
    )
    theirs = objective(scaled, y, reference.coef_.T, reference.intercept_, penalty)
    assert ours == pytest.approx(theirs, rel=1e-3)
    agree = fitted.predict(test) == reference.predict((test - centre) / scale)
    assert agree.mean() > 0.995
    assert fitted.penalty == penalty and fitted.validation == {}


def test_the_penalty_is_chosen_on_images_held_out(digits):
    x, y, test, test_labels = digits
    rng = np.random.default_rng(0)
    few, noise = rng.permutation(1200)[:400], rng.normal(size=(1200, 300)) * 8
    noisy = np.concatenate([x, noise], axis=1)
    tested = np.concatenate([test, rng.normal(size=(597, 300)) * 8], axis=1)
    chosen = fit_linear(noisy[few], y[few], num_classes=10)
    assert set(chosen.validation) == {1e-1, 1e-2, 1e-3, 1e-4, 1e-5}
    assert chosen.validation[chosen.penalty] == max(chosen.validation.values())
    accuracy = {
        penalty: np.mean(
            fit_linear(noisy[few], y[few], num_classes=10, penalties=[penalty]).predict(tested)
            == test_labels
        )
        for penalty in (1e-5, 1e-1)
    }
    mine = np.mean(chosen.predict(tested) == test_labels)
    assert mine >= max(accuracy.values()) - 0.05 and mine > 0.5


def test_a_class_that_is_absent_is_never_predicted_and_scores_are_logits(digits):
    x, y, test, _ = digits
    fitted = fit_linear(x, y, num_classes=12, penalties=[1e-2])
    assert fitted.scores(test).shape == (597, 12)
    assert set(fitted.predict(test)) <= set(range(10))
    np.testing.assert_array_equal(fitted.predict(test), fitted.scores(test).argmax(1))


@pytest.mark.usefixtures("unchecked_arrays")
@pytest.mark.parametrize(
    ("features", "labels", "options", "words"),
    [
        (np.zeros((3, 2)), [0, 1], {}, r"Features \[3, 2\] have 2 labels"),
        (np.zeros((3, 2)), [0, 1, 5], {}, "Labels go from 0 to 5, which 3 classes"),
        (np.full((3, 2), np.nan), [0, 1, 2], {}, "not finite"),
        (np.zeros((3, 2)), [0, 1, 2], {}, "no validation split"),
        (np.zeros((3, 2)), [0, 1, 2], {"penalties": []}, "at least one"),
    ],
)
def test_bad_input_is_told(features, labels, options, words):
    with pytest.raises(UserError, match=words):
        fit_linear(features, np.array(labels), num_classes=3, **options)


def test_the_metric_chooses_the_penalty():
    """A rare class drowns under a strong penalty, at which the frequent one is told best."""
    rng = np.random.default_rng(0)
    y = (np.arange(600) % 10 == 0).astype(int)
    told = 2 * y[:, None] + rng.normal(size=(600, 1))
    x = np.concatenate([told, rng.normal(size=(600, 150))], axis=1)
    chosen = {m: fit_linear(x, y, num_classes=2, metric=m) for m in ("top1", "mean_per_class")}
    assert chosen["top1"].penalty > chosen["mean_per_class"].penalty
    assert chosen["top1"].validation != chosen["mean_per_class"].validation
    with pytest.raises(UserError, match="metric is 'mean': it may be 'top1'"):
        fit_linear(x, y, num_classes=2, metric="mean")


@pytest.mark.parametrize("penalty", [0.0, 1e-7, 1e-3])
def test_features_of_few_directions_are_fitted(penalty):
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = (y[:, None] == np.arange(3)) @ rng.normal(size=(3, 200))  # rank 3, of 200
    model = fit_linear(x, y, num_classes=3, penalties=[penalty], max_iterations=100)
    assert (model.predict(x) == y).all()
