"""The online probe: its loss and gradient, and that training is the same without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_replicated, leaves, make_step, random_source, tiny_config, with_whole_images

from ssl_jax.evals import probe
from ssl_jax.spmd import make_spmd

ONE = jax.devices()[:1]


def trained(steps=3, devices=None, **changes):
    config = with_whole_images(tiny_config())
    config.data.num_classes = 4
    config.eval.update(changes)
    spmd, source = make_spmd(devices=devices), random_source()
    _, step, state, device_data = make_step(config, spmd, source)
    for number in range(steps):
        ids = np.arange(32, dtype=np.int32) + 32 * (number % 2)
        raw = next(source.batches(iter([(number, ids)])))
        state, metrics = step(state, spmd.place_batch(raw), device_data)
    return state, metrics


def test_loss_is_cross_entropy_and_features_get_no_gradient():
    rng = np.random.default_rng(0)
    x, label = rng.normal(size=(6, 5)), rng.integers(0, 3, 6)
    params = {"kernel": rng.normal(size=(5, 3)), "bias": rng.normal(size=3)}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    logits = x @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    weights = np.array([0, 2, 1, 1, 0, 2.0])
    given = [jnp.asarray(label), jnp.asarray(weights, jnp.float32)]
    value, accuracy = probe.loss(params, jnp.asarray(x, jnp.float32), *given)
    assert value == pytest.approx(-(weights * log_p[np.arange(6), label]).mean(), rel=1e-5)
    assert accuracy == pytest.approx(np.mean(weights * (logits.argmax(axis=1) == label)))
    gradient = jax.grad(lambda x: probe.loss(params, x, *given)[0])
    assert not gradient(jnp.asarray(x, jnp.float32)).any()


def test_probe_learns_and_leaves_the_rest_of_the_state_unchanged():
    probed, metrics = trained(steps=40)
    plain, plain_metrics = trained(steps=40, probe=False)
    assert plain.probe == {} and "probe_loss" not in plain_metrics
    assert float(metrics["probe_loss"]) < np.log(4) - 0.005
    for name in ("params", "method_state", "opt_state"):
        found = leaves(getattr(probed, name))
        for key, expected in leaves(getattr(plain, name)).items():
            np.testing.assert_allclose(found[key], expected, rtol=1e-5, atol=1e-6, err_msg=key)


def test_probe_is_equal_on_one_and_eight_devices():
    eight, one = trained()[0].probe, trained(devices=ONE)[0].probe
    assert_replicated(eight)
    for key, expected in leaves(one["params"]).items():
        np.testing.assert_allclose(leaves(eight["params"])[key], expected, rtol=2e-2, atol=1e-4)


def test_update_steps_against_the_gradient():
    before = probe.init(2, 2)
    gradients = {"kernel": jnp.array([[1.0, -1.0], [0.0, 0.0]]), "bias": jnp.array([2.0, -2.0])}
    after = probe.update(before, gradients)["params"]
    assert (np.sign(after["bias"]) == [-1, 1]).all() and after["kernel"][0, 0] < 0
    assert (after["kernel"][1] == 0).all()
