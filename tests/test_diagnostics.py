"""Measures of embeddings, and warnings of collapse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import diagnostics
from ssl_jax.diagnostics import CollapseDetector
from ssl_jax.spmd import AXIS, make_spmd


def gaussian(n=4096, d=16, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def test_embedding_std_is_1_for_spread_and_0_for_collapsed_embeddings():
    assert float(diagnostics.embedding_std(jnp.array(gaussian()))) == pytest.approx(1, abs=0.02)
    assert float(diagnostics.embedding_std(jnp.ones((8, 16)))) == pytest.approx(0, abs=1e-6)


def test_embedding_std_matches_numpy_on_1_and_8_devices():
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


def test_rankme_is_the_rank_of_orthogonal_features():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    for rank in (1, 5, 20):
        features = basis[:, :rank] @ np.linalg.qr(rng.normal(size=(32, 32)))[0][:rank]
        assert diagnostics.rankme(features) == pytest.approx(rank, rel=1e-3)


def test_rankme_of_nonfinite_features_is_nan():
    features = gaussian(20)
    features[3, 2] = np.nan
    assert np.isnan(diagnostics.rankme(features))


def test_unit_rows_are_float64_and_zeros_stay_zero():
    unit = diagnostics.unit_rows(np.float32([[3, 4], [0, 0]]))
    assert unit.dtype == np.float64
    np.testing.assert_allclose(unit, [[0.6, 0.8], [0, 0]], rtol=1e-15)


def test_alignment_and_uniformity_match_the_papers_definitions():
    x, y = gaussian(30), gaussian(30, seed=1)
    ux = x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
    uy = y.astype(np.float64) / np.linalg.norm(y, axis=1, keepdims=True)
    expected = np.mean([np.linalg.norm(a - b) ** 2 for a, b in zip(ux, uy, strict=True)])
    assert diagnostics.alignment(x, y) == pytest.approx(expected)
    pairs = [np.exp(-2 * np.linalg.norm(ux[i] - ux[j]) ** 2) for i in range(30) for j in range(i)]
    assert diagnostics.uniformity(x) == pytest.approx(np.log(np.mean(pairs)))
    assert diagnostics.alignment(x, x) == 0
    assert diagnostics.uniformity(np.ones((4, 3))) == pytest.approx(0)


def test_collapse_warns_once_and_names_its_first_step():
    detector = CollapseDetector()
    assert detector.check(10, {"loss": -0.5, "embedding_std": 0.4}) == []
    assert detector.check(20, {"loss": -1.0, "embedding_std": 0.001}) == []
    (warning,) = detector.check(30, {"loss": -1.0, "embedding_std": 0.001})
    assert "since step 20" in warning and "embeddings" in warning
    assert detector.check(40, {"loss": -1.0, "embedding_std": 0.001}) == []


def test_single_bad_batch_is_not_a_collapse():
    detector = CollapseDetector()
    for step, std in [(1, 0.001), (2, 0.5), (3, 0.001), (4, 0.5)]:
        assert detector.check(step, {"loss": 1.0, "embedding_std": std}) == []


def test_loss_stuck_at_ln_k_warns():
    detector = CollapseDetector(trivial_loss=float(np.log(3000)))
    metrics = {"loss": 8.0064, "embedding_std": 0.5}
    assert detector.check(1, metrics) == []
    (warning,) = detector.check(2, metrics)
    assert "constant outputs (8.0064, constant: 8.0064)" in warning
    assert CollapseDetector(trivial_loss=8.0).check(1, {"loss": 6.0, "embedding_std": 0.5}) == []


def test_nan_embeddings_count_as_collapsed():
    detector = CollapseDetector()
    detector.check(1, {"loss": 1.0, "embedding_std": float("nan")})
    assert detector.check(2, {"loss": 1.0, "embedding_std": float("nan")})


def test_loss_that_starts_at_ln_k_warns_after_patience():
    detector = CollapseDetector(trivial_loss=8.0, patience=100)
    for step in (10, 60, 110):
        assert detector.check(step, {"loss": 8.0}) == []
    assert "since step 10" in detector.check(120, {"loss": 8.0})[0]


def test_evaluations_and_logged_steps_are_checked_separately():
    detector = CollapseDetector()
    assert detector.check(10, {"embedding_std": 0.001}) == []
    assert detector.check(15, {"rankme": 1.1}) == []
    assert "since step 10" in detector.check(20, {"embedding_std": 0.001})[0]
    (warning,) = detector.check(25, {"rankme": 1.2})
    assert "since step 15" in warning and "RankMe 1.20" in warning


def test_prototypes_used_detects_collapse():
    rng = np.random.default_rng(0)
    spread = rng.integers(12, size=6000)
    assert 11.5 < float(diagnostics.prototypes_used(spread, 12)) <= 12.001
    same = np.full_like(spread, 3)
    assert float(diagnostics.prototypes_used(same, 12)) == pytest.approx(1, abs=1e-4)
    detector = CollapseDetector()
    detector.check(1, {"prototypes_used": 1.0})
    assert "one prototype" in detector.check(2, {"prototypes_used": 1.0})[0]


def test_halved_embedding_spread_warns_once():
    detector = diagnostics.CollapseDetector()
    spreads = [0.5, 0.64, 0.5, 0.31, 0.4, 0.3, 0.29, 0.2]
    warned = [detector.check(10 * i, {"embedding_std": std}) for i, std in enumerate(spreads)]
    assert [len(warnings) for warnings in warned] == [0] * 6 + [1, 0]
    (warning,) = warned[6]
    halved = "collapse since step 50: the spread of embeddings has halved (embedding_std 0.29, 0.64"
    assert halved in warning
    assert detector.check(90, {"embedding_std": float("nan")}) == []


def indicators(stds, **options):
    records = [(10 * i, {"embedding_std": std, "loss": 8.0}) for i, std in enumerate(stds)]
    found = diagnostics.collapse_signs(records, **options)
    return [(sign.kind, sign.since, sign.until) for sign in found]


def test_collapse_signs_have_their_first_and_last_step():
    assert indicators([0.5, 0.6, 0.5]) == []
    assert indicators([0.5, 0.001, 0.5, 0.5]) == []  # a single batch is not enough
    assert indicators([0.5, 0.001, 0.002, 0.5]) == [("embedding_std", 10, 30)]
    assert indicators([0.5, 0.5, 0.002, 0.001]) == [("embedding_std", 20, None)]
    assert indicators([0.9, 0.3, 0.3, 0.8, 0.01, 0.01]) == [
        ("embedding_std", 40, None),
        ("halved", 10, 30),
    ]


def test_trivial_loss_is_a_sign_only_if_it_stays_or_returns():
    def of(losses, patience=0):
        records = [(i, {"loss": loss}) for i, loss in enumerate(losses)]
        found = diagnostics.collapse_signs(records, trivial_loss=8.0, patience=patience)
        return [(s.since, s.until) for s in found]

    assert of([8.0, 8.0, 8.0, 7.0, 6.0]) == []
    assert of([8.0, 8.0, 8.0]) == [(0, None)]
    assert of([8.0, 7.0, 8.0, 8.0]) == [(2, None)]
    assert of([7.0, 8.0, 8.0, 7.0]) == [(1, 3)]
    # With patience, as in a run's detector.
    assert of([8.0, 8.0, 8.0], patience=2) == []
    assert of([8.0, 8.0, 8.0, 8.0], patience=2) == [(0, None)]
    assert of([7.0, 8.0, 8.0], patience=2) == [(1, None)]
