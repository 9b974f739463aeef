import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import diagnostics
from ssl_jax.diagnostics import CollapseWatch
from ssl_jax.spmd import AXIS, make_spmd


def gaussian(n=4096, d=16, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def test_std_is_one_for_spread_and_zero_for_collapsed_embeddings():
    assert float(diagnostics.embedding_std(jnp.array(gaussian()))) == pytest.approx(1, abs=0.02)
    assert float(diagnostics.embedding_std(jnp.ones((8, 16)))) == pytest.approx(0, abs=1e-6)


def test_std_is_the_written_out_one_and_that_of_the_global_batch():
    x = gaussian(64) + 0.5
    unit = x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
    expected = unit.std(axis=0).mean() * np.sqrt(16)
    spmd = make_spmd()
    mapped = spmd.map(
        lambda b: diagnostics.embedding_std(b, lambda v: jax.lax.pmean(v, AXIS)),
        ("sharded",),
        "replicated",
    )
    np.testing.assert_allclose(diagnostics.embedding_std(jnp.array(x)), expected, rtol=1e-5)
    np.testing.assert_allclose(mapped(spmd.place_batch(x)), expected, rtol=1e-5)


def test_rankme_counts_directions():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    for rank in (1, 5, 20):
        features = basis[:, :rank] @ np.linalg.qr(rng.normal(size=(32, 32)))[0][:rank]
        assert diagnostics.rankme(features) == pytest.approx(rank, rel=1e-3)


def test_alignment_and_uniformity_are_the_papers():
    x, y = gaussian(30), gaussian(30, seed=1)
    ux = x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
    uy = y.astype(np.float64) / np.linalg.norm(y, axis=1, keepdims=True)
    expected = np.mean([np.linalg.norm(a - b) ** 2 for a, b in zip(ux, uy, strict=True)])
    assert diagnostics.alignment(x, y) == pytest.approx(expected)
    pairs = [np.exp(-2 * np.linalg.norm(ux[i] - ux[j]) ** 2) for i in range(30) for j in range(i)]
    assert diagnostics.uniformity(x) == pytest.approx(np.log(np.mean(pairs)))
    assert diagnostics.alignment(x, x) == 0
    assert diagnostics.uniformity(np.ones((4, 3))) == pytest.approx(0)


def test_a_collapse_is_told_once_with_its_first_step():
    watch = CollapseWatch()
    assert watch.check(10, {"loss": -0.5, "embedding_std": 0.4}) == []
    assert watch.check(20, {"loss": -1.0, "embedding_std": 0.001}) == []
    (warning,) = watch.check(30, {"loss": -1.0, "embedding_std": 0.001})
    assert "since step 20" in warning and "embeddings" in warning
    assert watch.check(40, {"loss": -1.0, "embedding_std": 0.001}) == []


def test_a_single_bad_batch_is_no_collapse():
    watch = CollapseWatch()
    for step, std in [(1, 0.001), (2, 0.5), (3, 0.001), (4, 0.5)]:
        assert watch.check(step, {"loss": 1.0, "embedding_std": std}) == []


def test_a_loss_stuck_at_ln_k_is_told():
    watch = CollapseWatch(trivial_loss=float(np.log(3000)))
    metrics = {"loss": 8.0064, "embedding_std": 0.5}
    assert watch.check(1, metrics) == []
    (warning,) = watch.check(2, metrics)
    assert "ln K = 8.0064" in warning
    assert CollapseWatch(trivial_loss=8.0).check(1, {"loss": 6.0, "embedding_std": 0.5}) == []


def test_nan_embeddings_count_as_collapsed():
    watch = CollapseWatch()
    watch.check(1, {"loss": 1.0, "embedding_std": float("nan")})
    assert watch.check(2, {"loss": 1.0, "embedding_std": float("nan")})
