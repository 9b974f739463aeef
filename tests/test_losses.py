"""The losses against float64 NumPy written from the papers, and across devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssl_jax import losses
from ssl_jax.spmd import AXIS, make_spmd


def unit64(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def nt_xent_oracle(z1, z2, temperature):
    """SimCLR eq. 1, anchor by anchor."""
    z = np.concatenate([unit64(z1), unit64(z2)])
    n = len(z1)
    similarity = z @ z.T / temperature
    total = 0.0
    for i in range(2 * n):
        others = np.delete(np.arange(2 * n), i)
        positive = similarity[i, (i + n) % (2 * n)]
        top = similarity[i, others].max()
        total += top + np.log(np.exp(similarity[i, others] - top).sum()) - positive
    return total / (2 * n)


def numeric_gradient(function, x, eps=1e-6):
    gradient = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[i] = eps
        gradient[i] = (function(x + step) - function(x - step)) / (2 * eps)
    return gradient


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(16, 8))
    return first, first + 0.5 * rng.normal(size=(16, 8))


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("block", [None, 1, 5, 32])
def test_nt_xent_is_the_papers(pair, temperature, block):
    ours = losses.nt_xent(*map(jnp.float32, pair), temperature=temperature, block_size=block)
    # Scores reach 1 / temperature, in float32.
    expected = nt_xent_oracle(*pair, temperature)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-7 / temperature)


@pytest.mark.parametrize("block", [None, 5])
def test_nt_xent_gradient_is_the_oracles(pair, block):
    z1, z2 = pair[0][:5], pair[1][:5]
    gradient = jax.grad(lambda a: losses.nt_xent(a, z2, temperature=0.2, block_size=block))(
        jnp.float32(z1)
    )
    expected = numeric_gradient(lambda a: nt_xent_oracle(a, z2, 0.2), z1)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_nt_xent_agrees_with_optax(pair):
    # optax takes embeddings labelled by image, of unit length.
    z = jnp.float32(np.stack(pair, axis=1).reshape(32, 8))
    labels = jnp.arange(32) // 2
    normalized = z / jnp.linalg.norm(z, axis=1, keepdims=True)
    theirs = optax.ntxent(normalized, labels, temperature=0.5)
    ours = losses.nt_xent(*map(jnp.float32, pair), temperature=0.5)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_nt_xent_never_builds_the_whole_matrix():
    n, block = 256, 16
    z = jnp.ones((n, 4))
    text = str(
        jax.make_jaxpr(jax.grad(lambda a: losses.nt_xent(a, z, temperature=0.1, block_size=block)))(
            z
        )
    )
    assert f"f32[{block},{2 * n}]" in text
    assert f"f32[{2 * n},{2 * n}]" not in text


def test_nt_xent_takes_bfloat16_and_small_temperatures(pair):
    z1, z2 = (jnp.asarray(z, jnp.bfloat16) for z in pair)
    value, gradient = jax.value_and_grad(lambda a: losses.nt_xent(a, z2, temperature=0.01))(z1)
    assert value.dtype == jnp.float32
    expected = nt_xent_oracle(z1.astype(jnp.float32), z2.astype(jnp.float32), 0.01)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert bool(jnp.isfinite(gradient.astype(jnp.float32)).all())


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
@pytest.mark.parametrize("block", [None, 3])
def test_nt_xent_gradients_agree_between_1_and_8_devices(pair, mode, block):
    spmd = make_spmd(mode)
    weights = jnp.float32(np.random.default_rng(1).normal(size=(8, 8)))

    def loss(w, z1, z2, axis_name):
        return losses.nt_xent(z1 @ w, z2, temperature=0.2, axis_name=axis_name, block_size=block)

    def per_device(w, batch):
        value, gradient = jax.value_and_grad(loss)(w, *batch, AXIS)
        return value, jax.lax.pmean(gradient, AXIS)

    batch = tuple(map(np.float32, pair))
    mapped = spmd.map(per_device, ("replicated", "sharded"), ("replicated", "replicated"))
    value, gradient = mapped(spmd.replicate(weights), spmd.place_batch(batch))
    expected, expected_gradient = jax.value_and_grad(loss)(weights, *batch, None)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    # What the field's commonest bug gives is far outside the tolerance.
    for wrong in (8 * gradient, gradient / 8):
        assert not np.allclose(wrong, expected_gradient, rtol=1e-2)


def test_info_nce_is_the_papers():
    rng = np.random.default_rng(2)
    q, k, queue = rng.normal(size=(6, 5)), rng.normal(size=(6, 5)), unit64(rng.normal(size=(9, 5)))
    ours = losses.info_nce(*map(jnp.float32, (q, k, queue)), temperature=0.07)
    logits = np.concatenate(
        [np.sum(unit64(q) * unit64(k), 1, keepdims=True), unit64(q) @ queue.T], axis=1
    )
    p = np.exp(logits / 0.07)
    np.testing.assert_allclose(ours, -np.log(p[:, 0] / p.sum(1)).mean(), rtol=1e-5)


def test_info_nce_sends_no_gradient_to_keys_and_queue():
    rng = np.random.default_rng(3)
    arrays = [jnp.float32(rng.normal(size=shape)) for shape in [(4, 3), (4, 3), (5, 3)]]
    gradients = jax.grad(lambda a: losses.info_nce(*a, temperature=0.1), allow_int=False)(
        tuple(arrays)
    )
    assert float(jnp.abs(gradients[0]).max()) > 0
    assert float(jnp.abs(gradients[1]).max()) == float(jnp.abs(gradients[2]).max()) == 0


def sinkhorn_oracle(scores, epsilon, iterations):
    """SwAV's algorithm 1: alternate the marginals of exp(scores / epsilon)."""
    q = np.exp(np.asarray(scores, np.float64) / epsilon).T
    prototypes, samples = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * prototypes
        q /= q.sum(0, keepdims=True) * samples
    return (q * samples).T


def test_sinkhorn_is_the_papers():
    scores = np.random.default_rng(4).uniform(-1, 1, size=(24, 7))
    ours = losses.sinkhorn(jnp.float32(scores), epsilon=0.05, iterations=3)
    np.testing.assert_allclose(ours, sinkhorn_oracle(scores, 0.05, 3), atol=1e-5)
    np.testing.assert_allclose(ours.sum(1), 1, rtol=1e-5)


def test_sinkhorn_is_safe_for_any_finite_scores():
    scores = jnp.array([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [-1e4, -1e4, 1e4]])
    out = losses.sinkhorn(scores)
    assert bool(jnp.isfinite(out).all())
    np.testing.assert_allclose(out.sum(1), 1, rtol=1e-5)


def test_sinkhorn_reduces_over_all_devices():
    scores = np.float32(np.random.default_rng(5).uniform(-1, 1, size=(16, 5)))
    spmd = make_spmd()
    mapped = spmd.map(lambda s: losses.sinkhorn(s, axis_name=AXIS), ("sharded",), "sharded")
    np.testing.assert_allclose(
        mapped(spmd.place_batch(scores)), losses.sinkhorn(scores), rtol=1e-4, atol=1e-6
    )
    # Each device alone would balance only its own samples.
    alone = spmd.map(lambda s: losses.sinkhorn(s), ("sharded",), "sharded")
    assert not np.allclose(alone(spmd.place_batch(scores)), losses.sinkhorn(scores), rtol=1e-2)


def test_swapped_prediction_is_the_papers():
    rng = np.random.default_rng(6)
    scores = rng.normal(size=(5, 4, 6))
    q = rng.dirichlet(np.ones(6), size=(5, 2))
    ours = losses.swapped_prediction(jnp.float32(scores), jnp.float32(q), temperature=0.1)
    p = np.exp(scores / 0.1) / np.exp(scores / 0.1).sum(-1, keepdims=True)
    total = 0.0
    for a in range(2):
        others = [v for v in range(4) if v != a]
        total += np.mean([-(q[:, a] * np.log(p[:, v])).sum(-1).mean() for v in others])
    np.testing.assert_allclose(ours, total / 2, rtol=1e-5)


def test_regressions_are_the_papers():
    rng = np.random.default_rng(7)
    p, z = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    cosine = np.sum(unit64(p) * unit64(z), axis=1)
    np.testing.assert_allclose(losses.negative_cosine(p, z), -cosine.mean(), rtol=1e-5)
    expected = np.square(unit64(p) - unit64(z)).sum(1).mean()
    np.testing.assert_allclose(losses.normalized_mse(p, z), expected, rtol=1e-5)


def test_a_zero_row_has_a_finite_gradient():
    gradient = jax.grad(lambda x: losses.negative_cosine(x, jnp.ones((2, 3))))(jnp.zeros((2, 3)))
    assert bool(jnp.isfinite(gradient).all())
