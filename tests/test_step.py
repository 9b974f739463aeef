"""Compares the train step on 1 and 8 devices, before and after the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    METHODS,
    assert_replicated,
    assert_trees_close,
    leaves,
    make_step,
    norm_of,
    random_source,
    ready_views,
    tiny_config,
    with_two_stages,
    with_whole_images,
)

from ssl_jax.data.index import Index
from ssl_jax.data.pipeline import make_augment_fn
from ssl_jax.methods import Method
from ssl_jax.spmd import AXIS, make_spmd
from ssl_jax.step import loss_and_gradients

ONE = jax.devices()[:1]
# For what takes seconds with each method: `make test` tries some, `make long` the others.
OTHERS = ("simclr_memory", "simsiam", "supervised", "mocov3", "barlow", "vicreg", "supcon")
SOME_METHODS = [pytest.param(name, marks=[pytest.mark.long] * (name in OTHERS)) for name in METHODS]


def with_moved_zeros(state):
    """Moves parameters that start at 0 away from it, because some gradients are 0 there."""
    return state.replace(params=jax.tree.map(lambda p: jnp.where(p == 0, 0.1, p), state.params))


def gradients_on(config, source, mode, devices, augment=False):
    """Returns loss, gradients and batch statistics of a batch, before the optimizer."""
    spmd = make_spmd(mode, devices, config.batch_size)
    method, _, state, device_data = make_step(config, spmd, source)
    prepare = make_augment_fn(config)

    def per_device(state, raw, device_data):
        key = jax.random.wrap_key_data(state.key)
        batch = prepare(raw, device_data, key) if augment else raw
        computed = loss_and_gradients(method, state, batch)
        return computed.loss, computed.gradients, computed.stats

    mapped = spmd.map(per_device, ("replicated", "sharded", "replicated"), ("replicated",) * 3)
    ids = Index(source.num_examples, config.batch_size, 0).ids(0)
    raw = {"id": ids, "label": source.labels[ids]}
    if not augment:
        raw["views"] = ready_views(config, ids)
    return jax.device_get(mapped(with_moved_zeros(state), spmd.place_batch(raw), device_data))


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_loss_and_gradients_agree_between_1_and_8_devices(mode):
    config, source = tiny_config(), random_source()
    # Asymmetric: views are augmented differently, and every device has different images.
    config.views.view2.crop.area = (0.2, 0.6)
    expected = gradients_on(config, source, "shard_map", ONE, augment=True)
    actual = gradients_on(config, source, mode, jax.devices(), augment=True)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    assert_trees_close(actual, expected, rtol=2e-4)
    for name, gradient in leaves(expected[1]).items():
        assert np.abs(gradient).max() > 1e-6, name


@pytest.mark.parametrize("reduce", [jax.lax.psum, lambda x, axis: jax.lax.pmean(x, axis) / 8])
def test_wrong_gradient_averaging_is_detected(reduce, monkeypatch):
    """A sum instead of a mean, or a second mean: gradients 8 times too large or too small."""
    config, source = tiny_config(), random_source()
    expected = gradients_on(config, source, "shard_map", ONE)
    plain = Method.mean
    # After differentiation, only gradients of convolutions have four axes.
    monkeypatch.setattr(
        Method, "mean", lambda self, x: reduce(x, AXIS) if x.ndim == 4 else plain(self, x)
    )
    actual = gradients_on(config, source, "shard_map", jax.devices())
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)  # not visible in the loss
    with pytest.raises(AssertionError, match="kernel"):
        assert_trees_close(actual[1], expected[1], rtol=2e-4)


def test_batchnorm_groups_change_the_loss_and_the_state_stays_replicated():
    source = random_source()
    config = with_whole_images(tiny_config())
    all_devices = gradients_on(config, source, "shard_map", jax.devices())
    config.model.bn_group_size = 2
    pairs = gradients_on(config, source, "shard_map", jax.devices())
    assert not np.isclose(all_devices[0], pairs[0], rtol=1e-4)
    spmd = make_spmd("shard_map", batch_size=32)
    _, step, state, device_data = make_step(config, spmd, source)
    ids = np.arange(32, dtype=np.int32)
    batch = spmd.place_batch({"id": ids, "label": source.labels[ids]})
    state, _ = step(state, batch, device_data)
    assert_replicated(state)


def run_steps(config, source, spmd, steps):
    method, step, state, device_data = make_step(config, spmd, source)
    index = Index(source.num_examples, config.batch_size, config.seed)
    losses = []
    for number in range(steps):
        ids = index.ids(number)
        batch = spmd.place_batch({"id": ids, "label": source.labels[ids]})
        state, metrics = step(state, batch, device_data)
        losses.append(float(metrics["loss"]))
    return state, losses


def test_1_and_8_devices_agree_over_20_steps():
    config, source = tiny_config(epochs=10.0), random_source()
    # A small learning rate, and not LARS: rounding errors grow with every step.
    config.optim.update(name="adamw", lr=0.02)
    _, one = run_steps(config, source, make_spmd("shard_map", ONE), 20)
    state, eight = run_steps(config, source, make_spmd("shard_map"), 20)
    assert np.mean(one[-4:]) < np.mean(one[:4]) - 0.1
    np.testing.assert_allclose(eight, one, rtol=1e-4)
    assert_replicated(state)
    assert int(state.step) == 20


def test_1_and_8_devices_see_the_same_ids_and_pixels():
    config, source = tiny_config(), random_source()
    prepare = make_augment_fn(config)
    seen = []
    for devices in (ONE, jax.devices()):
        spmd = make_spmd("shard_map", devices)
        mapped = spmd.map(prepare, ("sharded", "replicated", "replicated"), "sharded")
        ids = Index(64, 32, 5).ids(3)
        batch = spmd.place_batch({"id": ids})
        key = spmd.replicate(jax.random.key_data(jax.random.key(1)))
        made = mapped_with_key(mapped, batch, spmd.replicate(source.device_data()), key)
        seen.append(jax.device_get(made))
    np.testing.assert_array_equal(seen[0]["id"], seen[1]["id"])
    for one, eight in zip(seen[0]["views"], seen[1]["views"], strict=True):
        np.testing.assert_allclose(one, eight, atol=1e-6)
        assert one.std() > 0.05


def mapped_with_key(mapped, batch, device_data, key):
    return mapped(batch, device_data, jax.random.wrap_key_data(key))


def test_state_is_donated_and_counts_steps():
    config, source = tiny_config(), random_source()
    spmd = make_spmd("shard_map")
    _, step, state, device_data = make_step(config, spmd, source)
    ids = np.arange(32, dtype=np.int32)
    batch = spmd.place_batch({"id": ids, "label": source.labels[ids]})
    new, _ = step(state, batch, device_data)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert int(new.step) == 1


def test_train_step_transfers_nothing_to_the_devices():
    config, source = tiny_config(), random_source()
    spmd = make_spmd("shard_map")
    _, step, state, device_data = make_step(config, spmd, source)
    ids = np.arange(32, dtype=np.int32)
    batch = spmd.place_batch({"id": ids, "label": source.labels[ids]})
    state, _ = step(state, batch, device_data)
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        for _ in range(3):
            state, metrics = step(state, batch, device_data)
        with pytest.raises(Exception, match="[Dd]isallowed host-to-device"):
            jnp.add(metrics["loss"], np.float32(1))


def test_parameters_and_statistics_stay_float32_under_bfloat16():
    config, source = with_whole_images(tiny_config(dtype="bfloat16")), random_source()
    state, losses = run_steps(config, source, make_spmd("shard_map", ONE), 2)
    for name, leaf in leaves((state.params, state.method_state, state.opt_state)).items():
        assert leaf.dtype != jnp.bfloat16, name
    assert np.isfinite(losses).all()


def test_golden_metrics_of_one_step():
    """Update the values if the method, its defaults or the augmentation change on purpose.

    To do so, print `metrics` here. Any other change of these numbers is a bug.
    """
    config, source = with_two_stages(tiny_config()), random_source()
    config.optim.warmup_epochs = 0.0  # or the first step's learning rate is 0
    spmd = make_spmd("shard_map", ONE)
    _, step, state, device_data = make_step(config, spmd, source)
    ids = Index(64, 32, 0).ids(0)
    batch = spmd.place_batch({"id": ids, "label": source.labels[ids]})
    state, metrics = step(state, batch, device_data)
    assert (metrics.pop("nonfinite_steps"), metrics.pop("nonfinite_step")) == (0, 0)
    metrics["parameter_norm"] = norm_of(state.params)
    assert metrics.keys() == GOLDEN.keys()
    for name, value in GOLDEN.items():
        message = f"{name} changed; if that is intended, update the golden values of this test"
        np.testing.assert_allclose(float(metrics[name]), value, rtol=1e-3, err_msg=message)


GOLDEN = {
    "loss": 6.255115509033203,
    "nt_xent": 6.255115509033203,
    "learning_rate": 0.125,
    "gradient_norm": 65.90265655517578,
    "embedding_std": 0.3630104660987854,
    "contrastive_accuracy": 0.03125,
    "parameter_norm": 9.813742637634277,
}
