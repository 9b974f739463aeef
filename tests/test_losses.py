"""Compares the losses with float64 NumPy written from the papers, and 8 devices with 1."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssl_jax import loss_kernels, losses
from ssl_jax.spmd import AXIS, make_spmd


def unit64(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def nt_xent_oracle(z1, z2, temperature, memory=()):
    """SimCLR eq. 1, anchor by anchor; rows of `memory` are negatives of every anchor."""
    z = np.concatenate([unit64(z1), unit64(z2), *memory])
    n = len(z1)
    similarity = z @ z.T / temperature
    total = 0.0
    for i in range(2 * n):
        others = np.delete(np.arange(len(z)), i)
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


def computed(cases, function, *arrays):
    """Returns {case: function(*case)(*arrays)}; one program for all cases compiles faster."""
    run = jax.jit(lambda *arrays: {str(case): function(*case)(*arrays) for case in cases})
    results = run(*map(jnp.float32, arrays))
    return {case: results[str(case)] for case in cases}


def test_nt_xent_equals_the_float64_oracle(pair):
    def loss(temperature, block):
        return functools.partial(losses.nt_xent, temperature=temperature, block_size=block)

    cases = list(itertools.product([1.0, 0.1, 0.01], [None, 1, 5, 32]))
    for (temperature, block), ours in computed(cases, loss, *pair).items():
        # Scores reach 1 / temperature, in float32.
        expected = nt_xent_oracle(*pair, temperature)
        message = f"temperature {temperature}, block {block}"
        np.testing.assert_allclose(ours, expected, 1e-5, 2e-7 / temperature, err_msg=message)


def test_nt_xent_gradient_equals_the_float64_oracle(pair):
    # Second views of three images are permuted; otherwise the gradient at 0.01 would be about 0.
    z1, z2 = pair[0][:5], pair[1][[1, 2, 0, 3, 4]]

    def gradient_of(temperature, block):
        return jax.grad(
            functools.partial(losses.nt_xent, temperature=temperature, block_size=block)
        )

    temperatures = (0.2, 0.01)
    expected = {
        t: numeric_gradient(lambda a, t=t: nt_xent_oracle(a, z2, t), z1) for t in temperatures
    }
    cases = list(itertools.product(temperatures, [None, 3, 5]))
    for (temperature, block), gradient in computed(cases, gradient_of, z1, z2).items():
        np.testing.assert_allclose(
            gradient,
            expected[temperature],
            rtol=1e-5,
            atol=2e-6 / temperature,
            err_msg=f"temperature {temperature}, block {block}",
        )


def supcon_oracle(z1, z2, label, temperature):
    """SupCon's eq. 2 divided by the number of anchors, anchor by anchor."""
    z, label = np.concatenate([unit64(z1), unit64(z2)]), np.concatenate([label, label])
    total, n = 0.0, len(z1)
    for i in range(2 * n):
        scores = z @ z[i] / temperature
        others = [j for j in range(2 * n) if j != i]
        own = [j for j in others if label[j] == label[i] >= 0 or abs(i - j) == n]
        top = scores[others].max()
        total += top + np.log(np.exp(scores[others] - top).sum()) - scores[own].mean()
    return total / (2 * n)


LABELS = np.array([0, 2, 0, -1, 1, 0, -1, 1])  # a class of one image, two images without a class


def test_supcon_and_its_gradient_equal_the_float64_oracle(pair):
    z1, z2 = pair[0][:8], pair[1][:8]

    def loss(temperature, block):
        options = {"temperature": temperature, "block_size": block}
        return jax.value_and_grad(lambda a, b: losses.supcon(a, b, jnp.array(LABELS), **options))

    temperatures = (0.2, 0.01)
    expected = {}
    for t in temperatures:
        oracle = functools.partial(supcon_oracle, z2=z2, label=LABELS, temperature=t)
        expected[t] = oracle(z1), numeric_gradient(oracle, z1)
    cases = list(itertools.product(temperatures, [None, 3, 16]))
    for (temperature, block), (value, gradient) in computed(cases, loss, z1, z2).items():
        message = f"temperature {temperature}, block {block}"
        of_loss, of_gradient = expected[temperature]
        np.testing.assert_allclose(value, of_loss, 1e-5, 2e-7 / temperature, err_msg=message)
        np.testing.assert_allclose(gradient, of_gradient, 1e-4, 2e-6 / temperature, err_msg=message)


@pytest.mark.parametrize("label", [np.full(16, -1), np.arange(16)])
def test_supcon_without_shared_classes_is_nt_xent(pair, label):
    arrays = tuple(map(jnp.float32, pair))
    found = losses.supcon(*arrays, jnp.array(label), temperature=0.1)
    np.testing.assert_allclose(found, losses.nt_xent(*arrays, temperature=0.1), rtol=1e-6)


def test_nt_xent_agrees_with_optax(pair):
    # optax takes embeddings labeled by image, with unit length.
    z = jnp.float32(np.stack(pair, axis=1).reshape(32, 8))
    labels = jnp.arange(32) // 2
    normalized = z / jnp.linalg.norm(z, axis=1, keepdims=True)
    theirs = optax.ntxent(normalized, labels, temperature=0.5)
    ours = losses.nt_xent(*map(jnp.float32, pair), temperature=0.5)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_nt_xent_is_finite_when_all_scores_are_very_negative():
    z1 = np.random.default_rng(8).normal([3, 0, 0], 0.01, size=(16, 3))
    z2 = z1.copy()
    z1[0] *= -1

    def loss(block):
        return jax.value_and_grad(
            functools.partial(losses.nt_xent, temperature=0.01, block_size=block)
        )

    for ours, gradient in computed([(None,), (5,)], loss, z1, z2).values():
        np.testing.assert_allclose(ours, nt_xent_oracle(z1, z2, 0.01), rtol=1e-5)
        assert bool(jnp.isfinite(gradient).all())


def test_nt_xent_with_a_memory_bank_equals_the_float64_oracle(pair):
    z1, z2 = pair[0][:4], pair[1][:4]
    memory = unit64(np.random.default_rng(9).normal(size=(6, 8)))

    def loss(block):
        def of_arrays(a, m, b):
            return losses.nt_xent(a, b, temperature=0.2, memory=m, block_size=block)

        return jax.value_and_grad(of_arrays, argnums=(0, 1))

    def oracle(a):
        return nt_xent_oracle(a, z2, 0.2, [memory])

    expected, expected_gradient = oracle(z1), numeric_gradient(oracle, z1)
    results = computed([(None,), (5,)], loss, z1, memory, z2)
    for (block,), (value, (gradient, to_memory)) in results.items():
        message = f"block {block}"
        np.testing.assert_allclose(value, expected, rtol=1e-5, err_msg=message)
        np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5, err_msg=message)
        assert float(jnp.abs(to_memory).max()) == 0, message


@pytest.mark.parametrize("memory", [0, 8])
def test_nt_xent_never_materializes_the_score_matrix(memory):
    n, block = 256, 16
    z, more = jnp.ones((n, 4)), jnp.ones((memory, 4))

    def loss(a):
        return losses.nt_xent(a, z, temperature=0.1, block_size=block, memory=more)

    text = str(jax.make_jaxpr(jax.grad(loss))(z))
    # Pairs of blocks where all rows are anchors, else a block of rows with all columns.
    assert f"f32[{block},{2 * n + memory if memory else block}]" in text
    assert f"f32[{2 * n},{2 * n + memory}]" not in text


def compiled_mib(function, *shapes):
    """Returns the temporary memory of the compiled value and gradient; nothing is run."""
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(jax.value_and_grad(function)).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


@pytest.mark.parametrize(("n", "limit"), [(8192, 64), (65536, 1024)])
def test_nt_xent_stays_within_its_memory_bound(n, limit):
    shape = (n, 128)
    assert compiled_mib(lambda a, b: losses.nt_xent(a, b, temperature=0.1), shape, shape) < limit


def collectives(text, kind):
    """Returns the result shapes of collectives of that kind in a compiled program."""
    found = re.findall(rf"= (.*?) {kind}(?:-start)?\(", text)
    return [shape for shapes in found for shape in re.findall(r"\w+\[[\d,]*\]", shapes)]


def test_nt_xent_all_gathers_each_embedding_once_and_all_reduces_only_scalars():
    n, d = 64, 24

    def per_device(z1, z2):
        def loss(a, b):
            return losses.nt_xent(a, b, temperature=0.1, axis_name=AXIS, block_size=4)

        return jax.value_and_grad(loss, argnums=(0, 1))(z1, z2)

    mapped = make_spmd().map(per_device, ("sharded", "sharded"), ("replicated", "sharded"))
    z = jax.ShapeDtypeStruct((n, d), jnp.float32)
    text = mapped.lower(z, z).compile().as_text()
    # Embeddings of both views, and their log-sum-exps.
    assert sorted(collectives(text, "all-gather")) == [f"f32[2,{n},{d}]", f"f32[2,{n}]"]
    assert set(collectives(text, "all-reduce")) == {"f32[]"}
    for kind in ("reduce-scatter", "all-to-all", "collective-permute"):
        assert collectives(text, kind) == []


def test_nt_xent_is_accurate_in_bfloat16_and_at_small_temperatures(pair):
    z1, z2 = (jnp.asarray(z, jnp.bfloat16) for z in pair)
    value, gradient = jax.value_and_grad(lambda a: losses.nt_xent(a, z2, temperature=0.01))(z1)
    assert value.dtype == jnp.float32
    expected = nt_xent_oracle(z1.astype(jnp.float32), z2.astype(jnp.float32), 0.01)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert bool(jnp.isfinite(gradient.astype(jnp.float32)).all())


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_nt_xent_gradients_agree_between_1_and_8_devices(pair, mode):
    spmd = make_spmd(mode)
    weights = jnp.float32(np.random.default_rng(1).normal(size=(8, 8)))
    batch = tuple(map(np.float32, pair))

    def value_and_gradient(axis_name, w, batch):
        def loss(w, block):
            z1, z2 = batch
            return losses.nt_xent(
                z1 @ w, z2, temperature=0.2, axis_name=axis_name, block_size=block
            )

        return {str(block): jax.value_and_grad(loss)(w, block) for block in (None, 3)}

    def per_device(w, batch):
        return {
            block: (value, jax.lax.pmean(gradient, AXIS))
            for block, (value, gradient) in value_and_gradient(AXIS, w, batch).items()
        }

    mapped = spmd.map(per_device, ("replicated", "sharded"), "replicated")
    actual = mapped(spmd.replicate(weights), spmd.place_batch(batch))
    alone = jax.jit(functools.partial(value_and_gradient, None))(weights, batch)
    assert actual.keys() == alone.keys()
    for block, (expected, expected_gradient) in alone.items():
        value, gradient = actual[block]
        np.testing.assert_allclose(value, expected, rtol=1e-5, err_msg=block)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6, err_msg=block)
        # The most common bug, a wrong factor of 8, is far outside the tolerance.
        for wrong in (8 * gradient, gradient / 8):
            assert not np.allclose(wrong, expected_gradient, rtol=1e-2)


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_losses_of_labels_and_of_batch_keys_agree_between_1_and_8_devices(pair, mode):
    spmd = make_spmd(mode)
    weights = jnp.float32(np.random.default_rng(1).normal(size=(8, 8)))
    batch = (*map(np.float32, pair), np.int32([0, 1, 2, -1] * 4))

    def value_and_gradient(axis_name, gather, w, batch):
        def supcon(w):
            z1, z2, label = batch
            return losses.supcon(z1 @ w, z2, label, temperature=0.2, axis_name=axis_name)

        def info_nce(w):
            q, k, own = batch[0] @ w, batch[1], losses.batch_positions(len(batch[1]), axis_name)
            keys = gather(losses.normalize(k))
            return losses.info_nce(q, k, keys, own=own, temperature=0.2)

        return [jax.value_and_grad(loss)(w) for loss in (supcon, info_nce)]

    def per_device(w, batch):
        gather = functools.partial(jax.lax.all_gather, axis_name=AXIS, tiled=True)
        return jax.lax.pmean(value_and_gradient(AXIS, gather, w, batch), AXIS)

    mapped = spmd.map(per_device, ("replicated", "sharded"), "replicated")
    actual = jax.device_get(mapped(spmd.replicate(weights), spmd.place_batch(batch)))
    expected = jax.jit(functools.partial(value_and_gradient, None, lambda x: x))(weights, batch)
    for (value, gradient), (one, of_one) in zip(actual, expected, strict=True):
        np.testing.assert_allclose(value, one, rtol=1e-5)
        np.testing.assert_allclose(gradient, of_one, rtol=1e-4, atol=1e-6)
        assert np.abs(of_one).max() > 1e-3


def test_supcon_all_gathers_labels_and_embeddings_once_and_never_holds_the_score_matrix():
    n, d, block = 64, 24, 4

    def per_device(z1, z2, label):
        def loss(a):
            return losses.supcon(a, z2, label, temperature=0.1, axis_name=AXIS, block_size=block)

        return jax.value_and_grad(loss)(z1)

    mapped = make_spmd().map(per_device, ("sharded",) * 3, ("replicated", "sharded"))
    z, label = jax.ShapeDtypeStruct((n, d), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.int32)
    text = mapped.lower(z, z, label).compile().as_text()
    gathered = [f"f32[2,{n},{d}]", f"f32[2,{n}]", f"s32[1,{n}]"]
    assert sorted(collectives(text, "all-gather")) == gathered
    assert set(collectives(text, "all-reduce")) == {"f32[]"}
    assert f"[{block},{2 * n}]" in text and f"[{2 * n // 8},{2 * n}]" not in text


def info_nce_oracle(q, k, queue, temperature):
    """MoCo eq. 1, the positive first."""
    positive = np.sum(unit64(q) * unit64(k), 1, keepdims=True)
    logits = np.concatenate([positive, unit64(q) @ queue.T], axis=1) / temperature
    top = logits.max(1, keepdims=True)
    return np.mean(np.log(np.exp(logits - top).sum(1)) + top[:, 0] - logits[:, 0])


def test_info_nce_equals_the_float64_oracle():
    rng = np.random.default_rng(2)
    q, k, queue = rng.normal(size=(6, 5)), rng.normal(size=(6, 5)), unit64(rng.normal(size=(9, 5)))

    def results(temperature, block):
        loss = functools.partial(losses.info_nce, temperature=temperature, block_size=block)
        return lambda *arrays: (loss(*arrays), *jax.value_and_grad(loss)(*arrays))

    temperatures = (0.07, 0.01)
    expected = {}
    for t in temperatures:
        oracle = functools.partial(info_nce_oracle, k=k, queue=queue, temperature=t)
        expected[t] = oracle(q), numeric_gradient(oracle, q)
    cases = list(itertools.product(temperatures, [None, 1, 4]))
    for (temperature, block), (alone, value, gradient) in computed(
        cases, results, q, k, queue
    ).items():
        message = f"temperature {temperature}, block {block}"
        loss, of_loss = expected[temperature]
        np.testing.assert_allclose(value, loss, rtol=1e-5, err_msg=message)
        np.testing.assert_allclose(alone, value, rtol=1e-6, err_msg=message)
        np.testing.assert_allclose(gradient, of_loss, rtol=1e-3, atol=1e-4, err_msg=message)


def batch_info_nce_oracle(q, k, temperature):
    """MoCo v3's algorithm 1 in one direction, without 2τ: other images' keys are negatives."""
    logits = unit64(q) @ unit64(k).T / temperature
    top = logits.max(1)
    lse = top + np.log(np.exp(logits - top[:, None]).sum(1))
    return np.mean(lse - np.diagonal(logits))


def test_info_nce_among_a_batchs_keys_equals_the_float64_oracle(pair):
    q, k = pair[0][:7], unit64(pair[1][:7][::-1])

    def loss(temperature, block):
        def of_arrays(q, k):
            own = losses.batch_positions(len(q), None)
            return losses.info_nce(q, k, k, own=own, temperature=temperature, block_size=block)

        return jax.value_and_grad(of_arrays, (0, 1))

    temperatures = (1.0, 0.05)
    expected = {}
    for t in temperatures:
        oracle = functools.partial(batch_info_nce_oracle, k=k, temperature=t)
        expected[t] = oracle(q), numeric_gradient(oracle, q)
    cases = list(itertools.product(temperatures, [None, 1, 4]))
    for (temperature, block), (value, (gradient, to_keys)) in computed(cases, loss, q, k).items():
        message = f"temperature {temperature}, block {block}"
        of_loss, of_gradient = expected[temperature]
        np.testing.assert_allclose(value, of_loss, rtol=1e-5, err_msg=message)
        np.testing.assert_allclose(gradient, of_gradient, 1e-4, 1e-5, err_msg=message)
        assert float(jnp.abs(to_keys).max()) == 0, message


@pytest.mark.parametrize(("n", "limit"), [(256, 64), (8192, 256)])
def test_info_nce_stays_within_its_memory_bound(n, limit):
    shapes = (n, 128), (n, 128), (65536, 128)
    assert compiled_mib(lambda *a: losses.info_nce(*a, temperature=0.1), *shapes) < limit


def test_info_nce_has_no_gradient_for_keys_and_queue():
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


def test_sinkhorn_equals_the_float64_oracle():
    scores = np.random.default_rng(4).uniform(-1, 1, size=(24, 7))
    cases = [(1,), (3,), (10,)]
    results = computed(
        cases, lambda n: functools.partial(losses.sinkhorn, epsilon=0.05, iterations=n), scores
    )
    for (iterations,), ours in results.items():
        np.testing.assert_allclose(ours, sinkhorn_oracle(scores, 0.05, iterations), atol=1e-5)
        np.testing.assert_allclose(ours.sum(1), 1, rtol=1e-5)


# By 300 iterations, factors of rows and columns that are never multiplied in would overflow.
@pytest.mark.parametrize("iterations", [3, 300])
def test_sinkhorn_is_finite_for_any_finite_scores(iterations):
    for size in (1e4, 3e38):
        scores = size * jnp.array([[1.0, -1.0, 0.0], [1.0, -1.0, 0.0], [-1.0, -1.0, 1.0]])
        out = losses.sinkhorn(scores, iterations=iterations)
        assert bool(jnp.isfinite(out).all())
        np.testing.assert_allclose(out.sum(1), 1, rtol=1e-5)


def test_sinkhorn_has_no_gradient():
    scores = jnp.float32(np.random.default_rng(0).normal(size=(6, 4)))
    gradient = jax.grad(lambda s: jnp.sum(losses.sinkhorn(s)[:, 0]))(scores)
    assert float(jnp.abs(gradient).max()) == 0


def test_swapped_prediction_is_exact_for_large_scores():
    scores = jnp.full((1, 2, 3), 1e4)
    q = jnp.full((1, 2, 3), 1 / 3)
    loss = losses.swapped_prediction(scores, q, temperature=0.01)
    assert float(loss) == pytest.approx(np.log(3), rel=1e-5)


def test_sinkhorn_holds_at_most_one_matrix():
    scores = jax.ShapeDtypeStruct((1024, 3000), jnp.float32)
    memory = jax.jit(losses.sinkhorn).lower(scores).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.1 * 4 * 1024 * 3000


def test_sinkhorn_on_8_devices_equals_1_device():
    scores = np.float32(np.random.default_rng(5).uniform(-1, 1, size=(16, 5)))
    spmd = make_spmd()
    mapped = spmd.map(lambda s: losses.sinkhorn(s, axis_name=AXIS), ("sharded",), "sharded")
    np.testing.assert_allclose(
        mapped(spmd.place_batch(scores)), losses.sinkhorn(scores), rtol=1e-4, atol=1e-6
    )
    # Without `axis_name`, each device balances only its own samples.
    alone = spmd.map(lambda s: losses.sinkhorn(s), ("sharded",), "sharded")
    assert not np.allclose(alone(spmd.place_batch(scores)), losses.sinkhorn(scores), rtol=1e-2)


def test_swapped_prediction_equals_the_float64_oracle():
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


def self_distillation_oracle(student, prototypes, teacher, teacher_prototypes, center, tt):
    """DINO's algorithm 1 with multi-crop, pair by pair: cross-entropy and the teacher's entropy."""

    def log_softmax(x):
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    log_p = log_softmax(student @ prototypes / 0.1)
    log_q = log_softmax((teacher @ teacher_prototypes - center) / tt)
    q = np.exp(log_q)
    pairs = [(a, v) for a in range(q.shape[1]) for v in range(log_p.shape[1]) if a != v]
    total = [-(q[:, a] * log_p[:, v]).sum(-1).mean() for a, v in pairs]
    return np.mean(total), -(q * log_q).sum(-1).mean(), q[:, 0].argmax(-1)


def distillation_arrays(n=5, d=4, k=7):
    rng = np.random.default_rng(7)
    center = 0.1 * rng.normal(size=k)
    crops = unit64(rng.normal(size=(n, 4, d))), unit64(rng.normal(size=(n, 2, d)))
    prototypes = [unit64(rng.normal(size=(k, d))).T for _ in range(2)]
    return crops[0], prototypes[0], crops[1], prototypes[1], center


def test_self_distillation_equals_the_float64_oracle():
    arrays = distillation_arrays()

    def results(tt, block):
        def loss(x, p, t, tp, c):
            options = {"temperature": 0.1, "teacher_temperature": tt, "block_size": block}
            loss, *rest = losses.self_distillation(x, t, p, tp, c, **options)
            return 3 * loss, (loss, *rest)

        return jax.value_and_grad(loss, range(5), has_aux=True)

    def expected(tt):
        x, p, *rest = arrays
        oracle = functools.partial(self_distillation_oracle, tt=tt)
        values = oracle(*arrays)
        dx = numeric_gradient(lambda x: oracle(x, p, *rest)[0], x)
        return values, dx, numeric_gradient(lambda p: oracle(x, p, *rest)[0], p)

    oracles = {tt: expected(tt) for tt in (0.04, 0.07)}
    cases = [(0.04, None), (0.04, 2), (0.07, 1)]
    for (tt, block), found in computed(cases, results, *arrays).items():
        values, dx, dp = oracles[tt]
        (_, actual), (own, of_prototypes, *of_teacher) = found
        message = f"temperature {tt}, block {block}"
        for a, b in zip(actual, values, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, err_msg=message)
        np.testing.assert_allclose(own, 3 * dx, rtol=1e-3, atol=1e-5, err_msg=message)
        np.testing.assert_allclose(of_prototypes, 3 * dp, rtol=1e-3, atol=1e-5, err_msg=message)
        assert all(not np.any(each) for each in of_teacher), message


def test_self_distillation_is_exact_for_large_scores():
    x, p, t, tp, c = map(jnp.float32, distillation_arrays())
    loss = functools.partial(losses.self_distillation, temperature=0.1, teacher_temperature=0.04)
    expected, *_ = self_distillation_oracle(*map(np.float64, (x, 1e3 * p, t, 1e3 * tp, c)), 0.04)
    np.testing.assert_allclose(loss(x, t, 1e3 * p, 1e3 * tp, c)[0], expected, rtol=1e-5)
    # Equal outputs of all prototypes.
    np.testing.assert_allclose(loss(x, t, 0 * p, 0 * tp, 0 * c)[:2], [np.log(7)] * 2, rtol=1e-6)


def test_self_distillation_never_has_all_logits_in_memory():
    """10 crops of 64 images against 65,536 prototypes: 160 MiB of logits of the student alone."""
    n, k, d = 64, 65_536, 16
    shapes = (n, 10, d), (d, k), (n, 2, d), (d, k), (k,)

    def loss(both, t, tp, c):
        options = {"temperature": 0.1, "teacher_temperature": 0.04}
        return losses.self_distillation(both[0], t, both[1], tp, c, **options)[0]

    x, p, *rest = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    memory = jax.jit(jax.grad(loss)).lower((x, p), *rest).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 2**20 < n * 10 * k * 4


def barlow_twins_oracle(z1, z2):
    """Barlow Twins' algorithm 1 with PyTorch's BatchNorm: the diagonal's term, then the rest's."""
    u, v = ((z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5) for z in (z1, z2))
    c = u.T @ v / len(z1)
    off = ~np.eye(len(c), dtype=bool)
    return np.array([np.square(np.diag(c) - 1).sum(), np.square(c[off]).sum()])


def vicreg_oracle(z1, z2):
    """VICReg's algorithm 1: invariance, variance (halved, as in the official code), covariance."""
    terms = np.array([np.square(z1 - z2).mean(), 0, 0])
    for z in (z1, z2):
        covariance, d = np.cov(z.T), z.shape[1]
        deviation = np.sqrt(z.var(0, ddof=1) + 1e-4)
        terms[1] += np.maximum(0, 1 - deviation).mean() / 2
        terms[2] += np.square(covariance[~np.eye(d, dtype=bool)]).sum() / d
    return terms


STATISTICS = {
    "barlow_twins": (losses.barlow_twins, barlow_twins_oracle),
    "vicreg": (losses.vicreg, vicreg_oracle),
}
FORMS = [(True, None), (True, 3), (False, None)]  # gram, block


def correlated(n, d, seed=0):
    """Two views with correlated dimensions, of standard deviations below and above 1."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * np.linspace(0.1, 1, d) + 3
    return mixed, mixed + 0.3 * rng.normal(size=(n, d))


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_terms_of_the_batchs_statistics_and_gradients_equal_the_float64_oracle(name, shape):
    loss, oracle = STATISTICS[name]
    z1, z2 = correlated(*shape)

    def with_gradients(gram, block):
        def terms(a, b):
            return jnp.stack(loss(a, b, gram=gram, block_size=block))

        return lambda a, b: (terms(a, b), *jax.jacrev(terms, (0, 1))(a, b))

    # Both losses are symmetric in the views.
    slopes = [
        [numeric_gradient(lambda x, i=i, b=b: oracle(x, b)[i], a) for i in range(len(oracle(a, b)))]
        for a, b in ((z1, z2), (z2, z1))
    ]
    for form, (value, *gradients) in computed(FORMS, with_gradients, z1, z2).items():
        np.testing.assert_allclose(value, oracle(z1, z2), rtol=2e-5, err_msg=f"{form}")
        for actual, expected in zip(gradients, slopes, strict=True):
            for mine, slope in zip(actual, expected, strict=True):
                atol = 1e-5 * np.abs(slope).max() + 1e-6
                np.testing.assert_allclose(mine, slope, rtol=1e-3, atol=atol, err_msg=f"{form}")


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_losses_and_gradients_agree_between_1_and_8_devices(name, mode):
    spmd, loss = make_spmd(mode), STATISTICS[name][0]
    batch = tuple(map(np.float32, correlated(16, 8, seed=1)))
    weights = np.float32(np.random.default_rng(2).normal(size=(8, 20)))

    def values_and_gradients(axis_name, w, batch):
        def total(w, gram, block):
            terms = loss(*(z @ w for z in batch), axis_name=axis_name, gram=gram, block_size=block)
            return sum((i + 1) * term for i, term in enumerate(terms)), terms

        forms = {str(form): functools.partial(total, gram=form[0], block=form[1]) for form in FORMS}
        return {
            form: jax.value_and_grad(of_form, has_aux=True)(w) for form, of_form in forms.items()
        }

    def per_device(w, batch):
        return {
            form: (value, jax.lax.pmean(gradient, AXIS))
            for form, (value, gradient) in values_and_gradients(AXIS, w, batch).items()
        }

    mapped = spmd.map(per_device, ("replicated", "sharded"), "replicated")
    actual = mapped(spmd.replicate(weights), spmd.place_batch(batch))
    expected, expected_gradient = jax.jit(functools.partial(values_and_gradients, None))(
        weights, batch
    )[str(FORMS[0])]
    assert len(actual) == len(FORMS)
    for form, (value, gradient) in actual.items():
        for mine, one in zip(jax.tree.leaves(value), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(mine, one, rtol=2e-5, err_msg=form)
        atol = 1e-4 * np.abs(expected_gradient).max()
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-3, atol=atol, err_msg=form)
        for wrong in (8 * gradient, gradient / 8):
            assert not np.allclose(wrong, expected_gradient, rtol=1e-2)


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_losses_never_hold_all_pairs_of_images_or_of_dimensions(name):
    loss = STATISTICS[name][0]

    def traced(n, d, block=None):
        z = jnp.ones((n, d))
        total = lambda a: sum(loss(a, z, block_size=block))  # noqa: E731 - in one line
        return str(jax.make_jaxpr(jax.value_and_grad(total))(z))

    text = traced(64, 80, block=16)
    assert "f32[16,64]" in text
    assert "f32[64,64]" not in text and "80,80]" not in text
    # With fewer dimensions than images, pairs of dimensions are fewer.
    text = traced(64, 48, block=16)
    assert "48,48]" in text and "f32[16,64]" not in text


@pytest.mark.parametrize(
    ("name", "sums"), [("barlow_twins", {"f32[3,128]"}), ("vicreg", {"f32[]"})]
)
def test_statistics_losses_all_gather_the_embeddings_once(name, sums):
    n, d, loss = 64, 128, STATISTICS[name][0]

    def per_device(z1, z2):
        def total(a, b):
            return sum(loss(a, b, axis_name=AXIS))

        return jax.value_and_grad(total, argnums=(0, 1))(z1, z2)

    mapped = make_spmd().map(per_device, ("sharded", "sharded"), ("replicated", "sharded"))
    z = jax.ShapeDtypeStruct((n, d), jnp.float32)
    text = mapped.lower(z, z).compile().as_text()
    assert collectives(text, "all-gather") == [f"f32[2,{n},{d}]"]
    # No statistics, and nothing in the backward pass.
    assert set(collectives(text, "all-reduce")) == sums
    for kind in ("reduce-scatter", "all-to-all", "collective-permute"):
        assert collectives(text, kind) == []


def test_statistics_losses_of_constant_embeddings_are_the_trivial_ones():
    @jax.jit
    def both(z):
        def total(a, loss):
            terms = loss(a, z)
            return sum(terms), terms

        return [jax.value_and_grad(total, has_aux=True)(z, loss) for loss, _ in STATISTICS.values()]

    found = both(jnp.full((6, 9), 0.7, jnp.bfloat16))
    for ((_, terms), gradient), expected in zip(found, ([9, 0], [0, 0.99, 0]), strict=True):
        assert [float(term) for term in terms] == pytest.approx(expected, abs=1e-6)
        assert gradient.dtype == jnp.bfloat16 and bool(jnp.isfinite(gradient).all())


def test_negative_cosine_and_mse_equal_the_float64_oracle():
    rng = np.random.default_rng(7)
    p, z = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    cosine = np.sum(unit64(p) * unit64(z), axis=1)
    np.testing.assert_allclose(losses.negative_cosine(p, z), -cosine.mean(), rtol=1e-5)
    expected = np.square(unit64(p) - unit64(z)).sum(1).mean()
    np.testing.assert_allclose(losses.normalized_mse(p, z), expected, rtol=1e-5)


def test_negative_cosine_of_a_zero_row_has_a_finite_gradient():
    gradient = jax.grad(lambda x: losses.negative_cosine(x, jnp.ones((2, 3))))(jnp.zeros((2, 3)))
    assert bool(jnp.isfinite(gradient).all())


@pytest.mark.parametrize(("platform", "block"), [("cpu", 1024), ("cuda", 4096), ("tpu", 4096)])
def test_blocks_are_larger_on_accelerators(platform, block):
    z = jnp.zeros((2048, 8))
    loss = jax.jit(lambda z: losses.nt_xent(z, z, temperature=0.1))
    text = loss.trace(z).lower(lowering_platforms=(platform,)).as_text()
    assert f"tensor<{block}x{block}xf32>" in text
    assert (f"tensor<{4096 // block}x{block}x8xf32>" in text) == (block < 4096)


@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_nt_xent_is_the_same_for_all_block_layouts(temperature, monkeypatch):
    rng = np.random.default_rng(0)
    z1, z2 = (jnp.asarray(rng.normal(size=(37, 8)), jnp.float32) for _ in range(2))

    @jax.jit
    def by_every_way(z1, z2):
        loss = functools.partial(losses.nt_xent, temperature=temperature)
        results = []
        for limits in (loss_kernels._CPU_BLOCK, (1, 20), (74 * 10, 20), (74 * 74, 1)):
            monkeypatch.setattr(loss_kernels, "_CPU_BLOCK", limits)
            results.append(jax.value_and_grad(loss, (0, 1))(z1, z2))
        return results

    whole, *others = by_every_way(z1, z2)
    assert len(others) == 3
    for other in others:
        for mine, expected in zip(jax.tree.leaves(other), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-5)


def accuracy64(first, second):
    """The share of rows of `first` whose nearest row of `second` is their own."""
    return np.mean((unit64(first) @ unit64(second).T).argmax(axis=1) == np.arange(len(first)))


def test_contrastive_accuracy_matches_numpy_and_is_0_when_collapsed():
    rng = np.random.default_rng(0)
    first = np.float32(rng.normal(size=(300, 8)))
    accuracy = functools.partial(losses.contrastive_accuracy, among=True)
    assert float(accuracy(first, first, first)) == 1
    second = first + np.float32(rng.normal(size=first.shape))
    expected = accuracy64(first, second)
    assert 0.1 < expected < 0.9
    assert float(accuracy(first, second, second)) == pytest.approx(expected, abs=0.005)
    same = np.ones((9, 4), np.float32)
    assert float(accuracy(same, same, same)) == 0
    # A queue contains only negatives.
    assert float(losses.contrastive_accuracy(first, second, second[300:], among=False)) == 1
    assert float(losses.contrastive_accuracy(same, same, same, among=False)) == 0


def test_contrastive_accuracy_is_the_same_on_1_and_8_devices():
    rng = np.random.default_rng(0)
    first = np.float32(rng.normal(size=(1024, 8)))
    second = first + np.float32(rng.normal(size=first.shape))
    queue = np.float32(rng.normal(size=(64, 8)))

    def per_device(z1, z2, queue):
        _, of_batch = losses.nt_xent_and_accuracy(z1, z2, temperature=0.1, axis_name=AXIS)
        of_queue = losses.contrastive_accuracy(z1, z2, queue, among=False, axis_name=AXIS)
        return of_batch, jax.lax.pmean(of_queue, AXIS)

    found = []
    for devices in (1, 8):
        spmd = make_spmd(devices=jax.devices()[:devices])
        mapped = spmd.map(per_device, ("sharded", "sharded", "replicated"), "replicated")
        arrays = (*map(spmd.place_batch, (first, second)), spmd.replicate(queue))
        found.append([float(value) for value in mapped(*arrays)])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    # 256 of the anchors, evenly spaced, among all second views.
    hits = (unit64(first) @ unit64(second).T).argmax(axis=1) == np.arange(1024)
    assert 0 < np.mean(hits[::4]) < 1
    assert found[0][0] == pytest.approx(np.mean(hits[::4]), abs=1e-6)
