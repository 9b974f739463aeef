"""BYOL and SimSiam: no negatives, so everything hangs on targets and stopped gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    leaves,
    make_step,
    method_config,
    random_source,
    ready_views,
    unaugmented,
    with_whole_images,
)

from ssl_jax.config import Schedule, flat_views
from ssl_jax.methods import make_method
from ssl_jax.spmd import make_spmd
from ssl_jax.step import example_batch


@functools.cache
def made(name):
    method = make_method(with_whole_images(method_config(name)), Schedule(1, 10))
    rng = np.random.default_rng(0)
    sizes = [view.size for view in flat_views(method.config)]
    views = tuple(jnp.float32(rng.uniform(size=(16, size, size, 3))) for size in sizes)
    batch = {**example_batch(method.config), "views": views}
    params, state = jax.jit(method.init)(jax.random.key(0), batch)
    return method, params, state, batch


def run_steps(config, steps):
    spmd, source = make_spmd(devices=jax.devices()[:1]), random_source()
    _, step, state, _ = make_step(with_whole_images(config), spmd, source, unaugmented)
    states = [jax.device_get(state)]
    ids = np.arange(64, dtype=np.int32)
    views = ready_views(config, ids)
    for _ in range(steps):
        batch = spmd.place_batch({"id": ids, "label": source.labels[ids], "views": views})
        state, metrics = step(state, batch, {})
        states.append(jax.device_get(state))
    return states, metrics


def test_byol_target_is_initialized_independently_and_decay_ends_at_one():
    method, params, state, _ = made("byol")
    online, target = leaves(params["encoder"]), leaves(state["target"]["encoder"])
    kernels = [name for name in online if "kernel" in name]
    assert kernels
    assert all(not np.array_equal(online[name], target[name]) for name in kernels)
    assert "predictor" not in state["target"]
    assert float(method.ema_decay(jnp.int32(0))) == pytest.approx(method.config.byol.ema_decay)
    assert float(method.ema_decay(jnp.int32(10))) == pytest.approx(1.0)


def test_byol_target_is_updated_after_the_step_and_uses_batch_statistics():
    method, params, state, batch = made("byol")
    moved = jax.tree.map(lambda p: p + 1, params)
    _, after = method.update(moved, {}, state, jnp.int32(0))
    decay = method.config.byol.ema_decay
    for name, leaf in leaves(after["target"]).items():
        online = leaves({k: moved[k] for k in state["target"]})[name]
        expected = decay * leaves(state["target"])[name] + (1 - decay) * online
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-6)
    forward = jax.jit(method.forward)
    outputs, stats = forward(params, state, batch, jax.random.key(0))
    # In train mode the running statistics it has do not matter, and they move.
    other = jax.tree.map(lambda s: s + 5, state["batch_stats"])
    again, _ = forward(params, {**state, "batch_stats": other}, batch, jax.random.key(0))
    np.testing.assert_allclose(outputs["target"], again["target"], rtol=1e-4, atol=1e-5)
    before = leaves(state["batch_stats"]["target"])
    assert any(
        not np.array_equal(leaf, before[name]) for name, leaf in leaves(stats["target"]).items()
    )


def test_byol_loss_equals_the_paper():
    method, params, state, batch = made("byol")
    rng = np.random.default_rng(1)
    p, z = rng.normal(size=(2, 16, 2, 8))
    loss, _ = method.loss(params, {"prediction": p, "target": z}, state, batch, jnp.int32(0))
    cos = [
        np.sum(p[:, a] * z[:, 1 - a], 1)
        / np.linalg.norm(p[:, a], axis=1)
        / np.linalg.norm(z[:, 1 - a], axis=1)
        for a in (0, 1)
    ]
    assert float(loss) == pytest.approx(np.mean(4 - 2 * cos[0] - 2 * cos[1]), rel=1e-5)


def test_simsiam_loss_equals_the_paper_and_stops_the_gradient():
    method, params, state, batch = made("simsiam")
    rng = np.random.default_rng(1)
    p, z = (jnp.float32(x) for x in rng.normal(size=(2, 16, 2, 16)))

    def loss_of(p, z):
        outputs = {"prediction": p, "projection": z}
        return method.loss(params, outputs, state, batch, jnp.int32(0))[0]

    cos = [
        np.sum(p[:, a] * z[:, 1 - a], 1)
        / np.linalg.norm(p[:, a], axis=1)
        / np.linalg.norm(z[:, 1 - a], axis=1)
        for a in (0, 1)
    ]
    assert float(loss_of(p, z)) == pytest.approx(float(-np.mean(cos[0] + cos[1]) / 2), rel=1e-4)
    gradient_p, gradient_z = jax.jit(jax.grad(loss_of, argnums=(0, 1)))(p, z)
    assert float(jnp.abs(gradient_p).max()) > 0
    assert float(jnp.abs(gradient_z).max()) == 0


def test_simsiam_predictor_keeps_a_constant_learning_rate():
    config = method_config("simsiam")
    config.epochs = 4.0
    config.optim.update(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, warmup_epochs=0.0)
    states, metrics = run_steps(config, 4)
    # The cosine has nearly ended at the last of four steps.
    assert float(metrics["learning_rate"]) < 0.2 * 0.1 * 64 / 256
    moved = {
        name: [
            np.abs(b.params[name]["dense1"]["kernel"] - a.params[name]["dense1"]["kernel"]).max()
            for a, b in zip(states, states[1:], strict=False)
        ]
        for name in ("projector", "predictor")
    }
    assert moved["projector"][-1] / moved["projector"][0] < 0.5
    assert moved["predictor"][-1] / moved["predictor"][0] > 0.5


def test_simsiam_bias_before_the_last_batchnorm_is_frozen():
    config = method_config("simsiam")
    config.optim.update(name="sgd", lr=0.1, weight_decay=0.1, decay_norm_bias=True)
    states, _ = run_steps(config, 2)
    first, last = (s.params["projector"] for s in (states[0], states[-1]))
    np.testing.assert_array_equal(first["dense3"]["bias"], last["dense3"]["bias"])
    assert "bn3" not in last  # without affine parameters
    assert np.abs(first["dense3"]["kernel"] - last["dense3"]["kernel"]).max() > 0


@pytest.mark.parametrize("name", ["byol", "moco", "mocov3", "simclr_memory", "dino"])
def test_no_gradient_reaches_the_target(name):
    method, params, state, batch = made(name)

    def loss_of(target):
        outputs, _ = method.forward(params, {**state, "target": target}, batch, jax.random.key(0))
        return method.loss(params, outputs, state, batch, jnp.int32(0))[0]

    gradient = jax.jit(jax.grad(loss_of))(state["target"])
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) == 0
