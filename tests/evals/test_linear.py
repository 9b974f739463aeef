import jax
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from ssl_jax.errors import UserError
from ssl_jax.evals import few_label_accuracies, fit_linear, linear, linear_probe
from ssl_jax.spmd import make_spmd


def blobs(seed=0, n=200, d=5):
    """Overlapping classes around four centers, which are the same for each seed."""
    rng = np.random.default_rng(seed)
    centers = 2 * np.random.default_rng(9).normal(size=(4, d))
    labels = np.arange(n) % 4
    return (centers[labels] + 2 * rng.normal(size=(n, d))).astype(np.float32), labels


@pytest.fixture(scope="module")
def digits():
    """1,200 digits to fit, 597 to test."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order], y[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


def scaled_like(x, *others):
    """Arrays centered and divided by one scale, those of `x`, as `fit_linear` does it."""
    center = x.mean(axis=0)
    scale = (x - center).std()
    return [(array - center) / scale for array in (x, *others)]


def objective(x, y, weights, bias, penalty):
    """In float64, from the definition."""
    logits = x @ weights + bias
    logits -= logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(y)), y]
    cross_entropy = np.log(np.exp(logits).sum(axis=1)) - chosen
    return cross_entropy.mean() + penalty / 2 * np.square(weights).sum()


# linear_probe and few_label_accuracies


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("count", [10, 50, 1200])
def test_linear_probe_predicts_what_scikit_learn_predicts(digits, count, classes):
    x, y, test, _ = digits
    few = np.flatnonzero(y < classes)[:count]
    x, y = x[few], 3 * y[few] + 1  # labels needn't be 0, 1, …
    scaled, tested = scaled_like(x, test)
    reference = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000).fit(scaled, y)
    assert np.mean(linear_probe(x, y, test) == reference.predict(tested)) > 0.996


def test_few_label_accuracies_are_those_of_scikit_learn(digits):
    x, y, test, test_labels = digits
    expected, generator = [], np.random.default_rng([0, 5])
    for _ in range(4):
        seen = np.concatenate(
            [generator.choice(np.flatnonzero(y == c), 5, replace=False) for c in range(10)]
        )
        scaled, tested = scaled_like(x[seen], test)
        reference = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000).fit(scaled, y[seen])
        expected.append(reference.score(tested, test_labels))
    found = few_label_accuracies(x, y, test, test_labels, labels_per_class=5, trials=4)
    np.testing.assert_allclose(found, expected, atol=2.1 / len(test_labels))


def test_linear_probe_learns_separable_classes_and_nothing_from_shuffled_labels():
    train, labels = blobs(0)
    test, test_labels = blobs(1)
    accuracy = np.mean(linear_probe(train, labels, test) == test_labels)
    assert 0.6 < accuracy <= 1
    shuffled = np.random.default_rng(0).permutation(labels)
    assert np.mean(linear_probe(train, shuffled, test) == test_labels) < 0.5


def test_linear_probe_is_invariant_to_scale_and_offset_of_the_features():
    train, labels = blobs(0)
    test, _ = blobs(1)
    moved = linear_probe(100 * train + 7, labels, 100 * test + 7)
    assert (linear_probe(train, labels, test) == moved).mean() > 0.99


def test_few_label_trials_are_reproducible_and_improve_with_features_and_labels():
    train, labels = blobs(0)
    test, test_labels = blobs(1)
    arguments = dict(labels_per_class=3, trials=6)
    first = few_label_accuracies(train, labels, test, test_labels, **arguments)
    again = few_label_accuracies(train, labels, test, test_labels, **arguments)
    np.testing.assert_array_equal(first, again)
    assert len(set(first)) > 1
    noise = np.random.default_rng(1).normal(size=train.shape)
    worse = few_label_accuracies(noise, labels, test, test_labels, **arguments)
    assert worse.mean() < first.mean() - 0.1
    more = few_label_accuracies(train, labels, test, test_labels, labels_per_class=25, trials=6)
    assert more.mean() > first.mean()


def test_trials_share_the_axes_of_as_many_labels_as_features(monkeypatch):
    train, labels = blobs(0)
    test, test_labels = blobs(1)
    data, found = (train, labels, test, test_labels), []

    def counted(matrix, plain=np.linalg.eigh):
        found.append(matrix.shape)
        return plain(matrix)

    monkeypatch.setattr(np.linalg, "eigh", counted)
    shared = few_label_accuracies(*data, labels_per_class=10, trials=3)
    assert found == [(5, 5)]
    few_label_accuracies(*data, labels_per_class=1, trials=3)  # 4 labels, 5 features
    assert len(found) == 4
    generator = np.random.default_rng([0, 10])
    for accuracy in shared:
        seen = np.concatenate(
            [generator.choice(np.flatnonzero(labels == c), 10, replace=False) for c in range(4)]
        )
        own = linear_probe(train[seen], labels[seen], test)  # along its own axes
        assert accuracy == pytest.approx(np.mean(own == test_labels), abs=1.1 / len(test))


# fit_linear


@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_fit_linear_finds_scikit_learns_solution(digits, penalty):
    x, y, test, _ = digits
    fitted = fit_linear(x, y, num_classes=10, penalties=[penalty])
    scaled, tested = scaled_like(x, test)
    center, scale = x.mean(axis=0), (x - x.mean(axis=0)).std()
    reference = LogisticRegression(C=1 / (len(y) * penalty), tol=1e-8, max_iter=5000)
    reference.fit(scaled, y)
    found = objective(
        scaled, y, fitted.weights * scale, fitted.bias + center @ fitted.weights, penalty
    )
    expected = objective(scaled, y, reference.coef_.T, reference.intercept_, penalty)
    assert found == pytest.approx(expected, rel=1e-3)
    assert (fitted.predict(test) == reference.predict(tested)).mean() > 0.995
    assert fitted.penalty == penalty and fitted.validation == {}


def test_penalty_is_chosen_on_held_out_examples(digits):
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
    found = np.mean(chosen.predict(tested) == test_labels)
    assert found >= max(accuracy.values()) - 0.05 and found > 0.5


def test_absent_classes_are_never_predicted_and_scores_are_logits(digits):
    x, y, test, _ = digits
    fitted = fit_linear(x, y, num_classes=12, penalties=[1e-2])
    assert fitted.scores(test).shape == (597, 12)
    assert set(fitted.predict(test)) <= set(range(10))
    np.testing.assert_array_equal(fitted.predict(test), fitted.scores(test).argmax(1))


@pytest.mark.usefixtures("unchecked_arrays")
@pytest.mark.parametrize(
    ("features", "labels", "options", "message"),
    [
        (np.zeros((3, 2)), [0, 1], {}, r"Features \[3, 2\] and 2 labels don't match"),
        (np.zeros((3, 2)), [0, 1, 5], {}, "Labels range from 0 to 5, but there are 3 classes"),
        (np.full((3, 2), np.nan), [0, 1, 2], {}, "not finite"),
        (np.zeros((3, 2)), [0, 1, 2], {}, "validation split of 0.1 of 3 examples is empty"),
        (np.zeros((3, 2)), [0, 1, 2], {"penalties": []}, "at least one"),
        (np.zeros((3, 2)), [0, 1, 2], {"metric": "top2"}, "is 'top2'. Did you mean 'top1'"),
    ],
)
def test_fit_linear_refuses_bad_input(features, labels, options, message):
    with pytest.raises(UserError, match=message):
        fit_linear(features, np.array(labels), num_classes=3, **options)


def test_the_metric_decides_which_penalty_is_chosen():
    """A strong penalty hides the rare class, and gives the best accuracy on the frequent one."""
    rng = np.random.default_rng(0)
    y = (np.arange(600) % 10 == 0).astype(int)
    informative = 2 * y[:, None] + rng.normal(size=(600, 1))
    x = np.concatenate([informative, rng.normal(size=(600, 150))], axis=1)
    chosen = {m: fit_linear(x, y, num_classes=2, metric=m) for m in ("top1", "mean_per_class")}
    assert chosen["top1"].penalty > chosen["mean_per_class"].penalty
    assert chosen["top1"].validation != chosen["mean_per_class"].validation
    with pytest.raises(UserError, match="metric is 'mean'"):
        fit_linear(x, y, num_classes=2, metric="mean")


@pytest.mark.parametrize("penalty", [0.0, 1e-7, 1e-3])
@pytest.mark.parametrize("count", [60, 300])
def test_fit_linear_converges_on_features_of_low_rank(count, penalty):
    """With fewer examples than features, and with more."""
    rng = np.random.default_rng(0)
    y = np.arange(count) % 3
    x = (y[:, None] == np.arange(3)) @ rng.normal(size=(3, 200))  # rank 3 of 200
    model = fit_linear(x, y, num_classes=3, penalties=[penalty], max_iterations=100)
    assert (model.predict(x) == y).all()


# On several devices


@pytest.fixture
def shared_by_all(monkeypatch):
    """Splits fits of any size over the eight devices; returns a function that undoes it."""
    monkeypatch.setattr(linear, "_SHARED", 0)
    return lambda: monkeypatch.setattr(linear, "_SHARED", np.inf)


@pytest.mark.parametrize("several", [False, True], ids=["one class", "several classes"])
def test_eight_devices_find_the_solution_of_one(shared_by_all, several):
    x, y = blobs(n=203)  # which 8 doesn't divide
    if several:
        y = ((np.arange(4)[None, :] - y[:, None]) % 4 < 2).astype(np.int8)
        y[::7, 2] = -1  # unknown
    options = {"num_classes": 4, "tolerance": 1e-6, "metric": "mean_ap" if several else "top1"}
    options["penalties"] = [1e-3] if several else [1e-1, 1e-3]
    fit = linear._Fit(linear._Data(x, y, 4, (100, 1e-6), None))
    for array in (fit.projected, fit.targets, fit.shares):
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {26}
        assert len({shard.device for shard in array.addressable_shards}) == 8
    split = fit_linear(x, y, **options)
    scores = split.scores(x)
    shared_by_all()
    whole = fit_linear(x, y, **options)
    assert split.penalty == whole.penalty
    assert split.validation == pytest.approx(whole.validation, abs=1e-6)
    np.testing.assert_allclose(split.weights, whole.weights, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(split.bias, whole.bias, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(scores, x @ split.weights + split.bias[None, :], atol=1e-4)
    np.testing.assert_allclose(whole.scores(x), scores, rtol=1e-3, atol=1e-3)


def test_only_large_fits_are_split():
    assert linear._shared_by(np.broadcast_to(np.float32(0), (1200, 64)), 10).size == 1
    large = np.broadcast_to(np.float32(0), (50_000, 2048))
    assert linear._shared_by(large, 10).size == len(jax.local_devices()) == 8


def test_imagenet_is_split_over_the_devices():
    """Each holds its share of the features and of the logits, and the whole state of L-BFGS."""
    count, width, classes = 1_281_168, 2048, 1000
    spmd = make_spmd(devices=jax.local_devices())

    def on_devices(layout, *shape, dtype=np.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=spmd.sharding(layout))

    lowered = linear._minimize.lower(
        on_devices("replicated", width + 1, classes),
        on_devices("sharded", count, width),
        on_devices("sharded", count, dtype=np.int32),
        on_devices("sharded", count),
        np.float32(1e-3),
        on_devices("replicated", width + 1, 1),
        500,
        1e-4,
    )
    memory = lowered.compile().memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    features, logits = 4 * count * width / 8, 4 * count * classes / 8
    solver = 30 * 4 * width * classes  # ten past steps and gradients, and what a step makes
    assert features + logits < used < features + 3.1 * logits + solver


def test_evaluations_of_the_objective_are_counted(monkeypatch):
    seen, plain = [], optax.softmax_cross_entropy_with_integer_labels

    def watched(logits, labels):
        jax.debug.callback(lambda: seen.append(1))
        return plain(logits, labels)

    monkeypatch.setattr(optax, plain.__name__, watched)
    x, y = blobs(d=7)  # a shape that no other test compiles
    fitted = fit_linear(x, y, num_classes=4, penalties=[1e-3], tolerance=1e-6)
    jax.effects_barrier()
    assert fitted.evaluations == len(seen) > 5


def test_too_little_memory_is_a_clear_error(monkeypatch):
    def fail(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(linear, "_minimize", fail)
    with pytest.raises(UserError, match=r"classifier on 200 feature vectors doesn't fit .* fewer"):
        fit_linear(*blobs(), num_classes=4, penalties=[1e-3])
