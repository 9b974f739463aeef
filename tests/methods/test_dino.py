"""DINO: the teacher, its temperature and center, and the crops that it sees."""

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

from ssl_jax.config import Schedule, view
from ssl_jax.errors import UserError
from ssl_jax.methods import make_method
from ssl_jax.methods.base import apply_networks
from ssl_jax.methods.dino import unit_prototypes
from ssl_jax.spmd import make_spmd
from ssl_jax.step import example_batch


def dino(**options):
    config = with_whole_images(method_config("dino"))
    config.dino.update(options)
    return make_method(config, Schedule(2, 10))


@functools.cache
def started():
    method = dino()
    batch = {**example_batch(method.config), "views": ready_views(method.config, np.arange(6))}
    params, state = jax.jit(method.init)(jax.random.key(0), batch)
    outputs, stats = jax.jit(method.forward)(params, state, batch, jax.random.key(1))
    return method, params, state, batch, outputs, stats


def test_teacher_starts_as_a_copy_with_unit_prototypes_and_no_center():
    method, params, state, *_ = started()
    online, target = leaves(params), leaves(state["target"])
    assert online.keys() == target.keys()
    for name, leaf in online.items():
        np.testing.assert_array_equal(target[name], leaf, err_msg=name)
    np.testing.assert_allclose(
        jnp.linalg.norm(unit_prototypes(params["prototypes"]), axis=0), 1, rtol=1e-5
    )
    assert not np.any(state["center"]) and state["center"].shape == (12,)
    assert method.trivial_loss == pytest.approx(np.log(12))


def test_lightlys_teacher_starts_with_a_copy_of_the_encoder_only():
    method = dino(target_init="encoder")
    batch = {**example_batch(method.config), "views": ready_views(method.config, np.arange(2))}
    params, state = jax.jit(method.init)(jax.random.key(0), batch)
    own, _ = jax.jit(method._random)(jax.random.fold_in(jax.random.key(0), 1), batch)
    for name, leaf in leaves(params["encoder"]).items():
        np.testing.assert_array_equal(leaves(state["target"]["encoder"])[name], leaf, err_msg=name)
    decay = float(method.ema_decay(jnp.int32(0)))
    for head in ("projector", "prototypes"):  # moved once, as lightly's before the first step
        online, random = leaves(params[head]), leaves(own[head])
        for name, leaf in leaves(state["target"][head]).items():
            expected = decay * random[name] + (1 - decay) * online[name]
            np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-6, err_msg=name)
            if "kernel" in name:
                assert np.abs(leaf - online[name]).max() > 0.01, name


def test_prototypes_have_their_lengths():
    rng = np.random.default_rng(0)
    kernel, length = rng.normal(size=(8, 5)), rng.normal(size=5)
    expected = length * kernel / np.linalg.norm(kernel, axis=0)
    actual = unit_prototypes({"kernel": jnp.float32(kernel), "length": jnp.float32(length)})
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_student_sees_all_crops_and_the_teacher_the_first_two():
    """Each network sees crops of a size together, and then its head all of them."""
    method, params, state, batch, outputs, stats = started()
    assert outputs["projection"].shape == (6, 4, 8) and outputs["target"].shape == (6, 2, 8)

    @functools.partial(jax.jit, static_argnames="count")
    def expected(params, own, views, count):
        encoder, projector = ({name: method.networks[name]} for name in ("encoder", "projector"))
        features = []
        for crops in (views[:2], views[2:count]):
            if crops:
                (h,), own = apply_networks(encoder, params, own, jnp.concatenate(crops))
                features.append(h)
        (z,), own = apply_networks(projector, params, own, jnp.concatenate(features))
        z /= jnp.linalg.norm(z, axis=1, keepdims=True)
        return z.reshape(count, 6, -1).swapaxes(0, 1), own

    own, views = dict(state["batch_stats"]), batch["views"]
    of_target = own.pop("target")
    z, own = expected(params, own, views, count=4)
    np.testing.assert_allclose(outputs["projection"], z, rtol=1e-3, atol=1e-5)
    target, of_target = expected(state["target"], of_target, views, count=2)
    np.testing.assert_allclose(outputs["target"], target, rtol=1e-3, atol=1e-5)
    for name, leaf in leaves({**own, "target": of_target}).items():
        np.testing.assert_allclose(leaves(stats)[name], leaf, rtol=1e-4, atol=1e-6, err_msg=name)


def test_center_moves_to_the_mean_logits_and_then_the_teacher_to_the_student():
    method, params, state, _, outputs, _ = started()
    state = {**state, "center": jnp.full(12, 0.3)}
    moved = jax.tree.map(lambda p: p + 1, params)
    _, after = jax.jit(method.update)(moved, outputs, state, jnp.int32(3))
    logits = outputs["target"] @ unit_prototypes(state["target"]["prototypes"])
    expected = 0.9 * 0.3 + 0.1 * np.asarray(logits, np.float64).mean((0, 1))
    np.testing.assert_allclose(after["center"], expected, rtol=1e-4, atol=1e-6)
    decay = 1 - (1 - 0.996) * (1 + np.cos(np.pi * 3 / 10)) / 2
    for name, leaf in leaves(after["target"]).items():
        expected = decay * leaves(state["target"])[name] + (1 - decay) * leaves(moved)[name]
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-6, err_msg=name)


def test_logs_split_the_loss_into_entropy_and_divergence():
    method, params, state, batch, outputs, _ = started()
    loss, logs = jax.jit(method.loss)(params, outputs, state, batch, jnp.int32(0))
    assert float(logs["teacher_entropy"] + logs["divergence"]) == pytest.approx(float(loss))
    assert 0 < float(logs["teacher_entropy"]) < np.log(12) and float(logs["divergence"]) > 0
    collapsed = {**outputs, "target": jnp.zeros_like(outputs["target"])}
    _, logs = jax.jit(method.loss)(params, collapsed, state, batch, jnp.int32(0))
    assert float(logs["teacher_entropy"]) == pytest.approx(np.log(12), rel=1e-5)
    assert float(logs["prototypes_used"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(0, [0.07] * 5), (1, [0.04, *[0.07] * 4]), (3, [0.04, 0.055, 0.07, 0.07, 0.07])],
)
def test_teacher_temperature_rises_by_epoch_as_in_the_official_code(epochs, expected):
    method = dino(teacher_temperature=0.07, teacher_temperature_epochs=epochs)
    temperatures = jax.vmap(method.teacher_temperature)(jnp.arange(10))
    np.testing.assert_allclose(temperatures, np.repeat(expected, 2), rtol=1e-6)


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_prototypes_are_frozen_at_first_and_their_lengths_if_configured(norm_last_layer):
    config, source = with_whole_images(method_config("dino")), random_source()
    config.epochs = 8.0  # of one step each
    config.optim.update(frozen_steps=2, warmup_epochs=0.0)
    config.dino.norm_last_layer = norm_last_layer
    spmd, ids = make_spmd(devices=jax.devices()[:1]), np.arange(64, dtype=np.int32)
    _, step, state, _ = make_step(config, spmd, source, unaugmented)
    batch = {"id": ids, "label": source.labels[ids], "views": ready_views(config, ids)}
    batch, moved = spmd.place_batch(batch), []
    before = jax.device_get(state.params)
    for _ in range(4):
        state, _ = step(state, batch, {})
        after = jax.device_get(state.params)
        same = jax.tree.map(np.array_equal, before, after)
        moved.append([not same["prototypes"][name] for name in ("kernel", "length")])
        assert not same["projector"]["dense1"]["kernel"]
        before = after
    free = not norm_last_layer
    assert moved == [[False, False]] * 2 + [[True, free]] * 2


@pytest.mark.parametrize("sizes", [[8], [8, 6], [6, 8, 8]])
def test_the_first_two_views_must_be_of_one_size(sizes):
    config = method_config("dino")
    config.views = {f"view{i}": view(size=size) for i, size in enumerate(sizes)}
    with pytest.raises(UserError, match="DINO's teacher sees the first two"):
        make_method(config, Schedule(1, 10))


@pytest.mark.parametrize("network", ["online", "target"])
def test_network_to_evaluate_is_chosen_by_the_config(network):
    config = method_config("dino")
    config.eval.network = network
    assert make_method(config, Schedule(1, 1)).network_name() == network
    config = method_config("simsiam")
    config.eval.network = network
    if network == "target":
        with pytest.raises(UserError, match="'simsiam' has no target network. Use default"):
            make_method(config, Schedule(1, 1))
    else:
        assert make_method(config, Schedule(1, 1)).network_name() == "online"
