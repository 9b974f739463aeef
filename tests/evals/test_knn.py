import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

import ssl_jax.memory
from ssl_jax.downstream.features import Features, knn_metrics
from ssl_jax.errors import UserError
from ssl_jax.evals import knn as knn_module
from ssl_jax.evals import knn_classify, knn_votes, nearest_neighbors
from ssl_jax.spmd import Spmd


def data(n=300, m=40, d=6, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    centers = rng.normal(size=(3, d))
    train = centers[labels] + rng.normal(size=(n, d))
    test = centers[rng.integers(0, 3, m)] + rng.normal(size=(m, d))
    return train.astype(np.float32), labels, test.astype(np.float32)


def oracle(train, labels, test, k, temperature, classes):
    """Wu et al., section 3.4, in float64."""
    train = train.astype(np.float64) / np.linalg.norm(train, axis=1, keepdims=True)
    test = test.astype(np.float64) / np.linalg.norm(test, axis=1, keepdims=True)
    out = []
    for query in test:
        similarity = train @ query
        nearest = np.argsort(-similarity)[:k]
        votes = [
            np.exp(similarity[nearest][labels[nearest] == c] / temperature).sum()
            for c in range(classes)
        ]
        out.append(int(np.argmax(votes)))
    return out


@pytest.mark.parametrize("k", [1, 20, 200, 1000])
def test_predictions_are_those_of_the_paper_in_float64(k):
    train, labels, test = data()
    found = knn_classify(train, labels, test, num_classes=3, k=k, temperature=0.1)
    assert found.tolist() == oracle(train, labels, test, k, 0.1, 3)


def test_neighbors_are_those_of_scikit_learn_across_chunks(monkeypatch):
    monkeypatch.setattr(knn_module, "_QUERIES", 16)
    monkeypatch.setattr(knn_module, "_KEYS", 7)
    train, _, test = data()
    similarity, index = nearest_neighbors(train, test, k=5)
    reference = NearestNeighbors(n_neighbors=5, metric="cosine").fit(train)
    distance, expected = reference.kneighbors(test)
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_allclose(similarity, 1 - distance, atol=1e-5)


def test_keys_are_sent_once_per_group_of_query_chunks(monkeypatch):
    train, _, test = data(m=230)
    whole = nearest_neighbors(train, test, k=5)
    sent, replicate = [], Spmd.replicate

    def counted(self, tree):
        sent.append(len(tree[0]))
        return replicate(self, tree)

    monkeypatch.setattr(Spmd, "replicate", counted)
    monkeypatch.setattr(knn_module, "_KEYS", 100)
    monkeypatch.setattr(knn_module, "_QUERIES", 5)  # 40 on eight devices, so there are six chunks
    parts = nearest_neighbors(train, test, k=5)
    assert sent == [100, 100, 100]
    sent.clear()
    monkeypatch.setattr(knn_module, "_CHUNKS", 4)
    blocks = nearest_neighbors(train, test, k=5)
    assert sent == 2 * [100, 100, 100]
    for found in (parts, blocks):
        np.testing.assert_array_equal(found[1], whole[1])
        np.testing.assert_allclose(found[0], whole[0], atol=1e-6)


@pytest.mark.parametrize(("k", "temperature"), [(4, None), (7, None), (7, 0.1)])
def test_knn_metrics_agree_with_knn_classify_on_ties(k, temperature):
    """With few neighbors of equal weight, many votes are ties."""
    train, labels, test = data()
    truth = np.random.default_rng(1).integers(0, 3, len(test))
    features = Features(train, labels, test, truth, ("a", "b", "c"), step=1)
    found = knn_metrics(features, k=k, temperature=temperature)
    predicted = knn_classify(train, labels, test, num_classes=3, k=k, temperature=temperature)
    assert found["top1"]["value"] == pytest.approx(np.mean(predicted == truth))
    correct = sum(count for true, voted, count in found["confusion"] if true == voted)
    assert found["top1"]["value"] == pytest.approx(correct / len(test))


def test_a_tiny_temperature_does_not_overflow():
    train, labels, test = data()
    one = knn_classify(train, labels, test, num_classes=3, k=1)
    sharp = knn_classify(train, labels, test, num_classes=3, k=50, temperature=1e-4)
    assert (one == sharp).mean() > 0.9


@pytest.mark.usefixtures("unchecked_arrays")
def test_mismatched_shapes_are_refused():
    train, labels, test = data()
    with pytest.raises(UserError, match=r"features \(300\) and labels \(299\) differ"):
        knn_classify(train, labels[1:], test, num_classes=3)
    with pytest.raises(UserError, match="dimension 5 with features of dimension 6"):
        nearest_neighbors(train, test[:, :5], k=1)


def test_neighbors_that_cannot_fit_in_memory_are_refused(monkeypatch):
    train, labels, test = data()
    with pytest.raises(UserError, match="The votes of .* for 1000000000000 classes take .* gaps"):
        knn_votes(train, labels, test, num_classes=10**12)
    together = knn_classify(train, labels, test, num_classes=3)
    monkeypatch.setattr(knn_module, "_VOTES", 6)  # of two images
    assert (knn_classify(train, labels, test, num_classes=3) == together).all()
    monkeypatch.setattr(ssl_jax.memory, "host_memory", lambda: 16 * 9 * len(test))
    nearest_neighbors(train, test, k=9)
    with pytest.raises(UserError, match="10 neighbors of .* take .* smaller config.eval.knn_k"):
        nearest_neighbors(train, test, k=10)


def test_temperature_none_gives_neighbors_equal_votes():
    train = np.array([[1, 0], [1, 0.5], [1, 0.6]], np.float32)
    labels = np.array([0, 1, 1], np.int32)
    query = np.array([[1, 0]], np.float32)
    options = {"num_classes": 2, "k": 3}
    assert knn_classify(train, labels, query, temperature=0.01, **options) == [0]
    assert knn_classify(train, labels, query, temperature=None, **options) == [1]
    votes = knn_votes(train, labels, query, temperature=None, **options)
    np.testing.assert_allclose(votes, [[1 / 3, 2 / 3]])


@pytest.mark.parametrize("queries", [1, 7, 8, 9])
def test_any_number_of_queries_is_sharded_over_the_devices(queries):
    rng = np.random.default_rng(0)
    keys, asked = rng.normal(size=(50, 4)), rng.normal(size=(queries, 4))
    similarity, index = nearest_neighbors(keys, asked, k=3)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (asked, keys)]
    expected = np.sort(unit[0] @ unit[1].T, axis=1)[:, ::-1][:, :3]
    np.testing.assert_allclose(similarity, expected, rtol=1e-5, atol=1e-6)
    assert index.shape == (queries, 3)
