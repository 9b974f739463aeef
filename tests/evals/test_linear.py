import numpy as np

from ssl_jax.evals import few_label_accuracies, linear_probe


def data(seed=0, n=200, d=5):
    rng = np.random.default_rng(seed)
    centres = 2 * np.random.default_rng(9).normal(size=(4, d))
    labels = np.arange(n) % 4
    return (centres[labels] + 2 * rng.normal(size=(n, d))).astype(np.float32), labels


def test_a_probe_separates_what_is_separable():
    train, labels = data(0)
    test, test_labels = data(1)
    accuracy = np.mean(linear_probe(train, labels, test) == test_labels)
    assert 0.6 < accuracy <= 1
    shuffled = np.random.default_rng(0).permutation(labels)
    assert np.mean(linear_probe(train, shuffled, test) == test_labels) < 0.5


def test_the_scale_of_the_features_does_not_matter():
    train, labels = data(0)
    test, _ = data(1)
    moved = linear_probe(100 * train + 7, labels, 100 * test + 7)
    assert (linear_probe(train, labels, test) == moved).mean() > 0.99


def test_draws_are_paired_and_class_balanced():
    train, labels = data(0)
    test, test_labels = data(1)
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
