"""Embedding caching: a large batch's step with one microbatch in memory at a time."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import ONE, SOME_METHODS, with_moved_zeros
from tiny import (
    assert_replicated,
    assert_trees_close,
    make_step,
    method_config,
    random_source,
    ready_views,
    with_two_stages,
    with_whole_images,
)

from ssl_jax.config import validate
from ssl_jax.data.index import Index
from ssl_jax.data.pipeline import make_augment_fn
from ssl_jax.errors import UserError
from ssl_jax.models import heads, resnet
from ssl_jax.spmd import make_spmd
from ssl_jax.step import (
    _take,
    batchnorm_images,
    cached_loss_and_gradients,
    loss_and_gradients,
)

MICROBATCHES = 2


class NoNorm(nn.Module):
    """Replaces BatchNorm by its scale and shift, so that examples don't affect each other."""

    use_scale: bool = True
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        channels, each = (x.shape[-1],), (*[None] * (x.ndim - 1), slice(None))
        if self.use_scale:
            x = x * self.param("scale", nn.initializers.ones, channels)[each]
        if self.use_bias:
            x = x + self.param("bias", nn.initializers.zeros, channels)[each]
        return x


@pytest.fixture
def without_batchnorm(monkeypatch):
    def norm(*args, **options):
        def make(name, **affine):
            kept = {k: v for k, v in affine.items() if k in ("use_scale", "use_bias")}
            return NoNorm(name=name, **kept)

        return make

    for module in (resnet, heads):
        monkeypatch.setattr(module, "batch_norm", norm)


def plain(method, state, raw, prepare):
    return loss_and_gradients(method, state, prepare(raw))


def cached(method, state, raw, prepare):
    return cached_loss_and_gradients(method, state, raw, prepare, MICROBATCHES)


def by_automatic_differentiation(method, state, raw, prepare):
    """Defines the expected result: one differentiable function encodes all microbatches."""
    parts = [prepare(_take(raw, jnp.int32(i), MICROBATCHES)) for i in range(MICROBATCHES)]
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.key), 1)

    def loss_of(params):
        encoded = [method.forward(params, state.method_state, part, rng) for part in parts]
        outputs = jax.tree.map(
            lambda *xs: jnp.stack(xs, axis=1).reshape(-1, *xs[0].shape[1:]),
            *(outputs for outputs, _ in encoded),
        )
        stats = jax.tree.map(lambda *xs: sum(xs) / MICROBATCHES, *(stats for _, stats in encoded))
        loss, logs = method.loss(params, outputs, state.method_state, raw, state.step)
        return loss, (outputs, stats, logs)

    (loss, (outputs, stats, logs)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
        state.params
    )
    gradients, stats = jax.tree.map(method.mean, (gradients, stats))
    return loss, gradients, outputs, stats, logs


def computed(config, devices, way, augment=False):
    """Returns loss, gradients, outputs, statistics and logs, before the optimizer."""
    source, spmd = random_source(), make_spmd(devices=devices)
    method, _, state, device_data = make_step(config, spmd, source)
    prepare = make_augment_fn(config)

    def per_device(state, raw, device_data):
        key = jax.random.wrap_key_data(state.key)
        if augment:
            return tuple(way(method, state, raw, lambda part: prepare(part, device_data, key)))
        return tuple(way(method, state, raw, lambda part: part))

    layouts = ("replicated", "replicated", "sharded", "replicated", "replicated")
    mapped = spmd.map(per_device, ("replicated", "sharded", "replicated"), layouts)
    ids = Index(source.num_examples, config.batch_size, 0).ids(0)
    raw = {"id": ids, "label": source.labels[ids]}
    if not augment:
        raw["views"] = ready_views(config, ids)
    return jax.device_get(mapped(with_moved_zeros(state), spmd.place_batch(raw), device_data))


@pytest.mark.parametrize("method", SOME_METHODS)
def test_without_batchnorm_cached_gradients_match_the_plain_step(method, without_batchnorm):
    config = method_config(method)
    expected = computed(config, ONE, plain)
    actual = computed(config, ONE, cached)
    # Its loss divides by deviations of 1e-3 here; a shift has no gradient but rounding.
    tolerance = {"rtol": 1e-3, "atol": 3e-3} if method == "barlow" else {"rtol": 1e-4, "atol": 1e-6}
    assert_trees_close(actual, expected, **tolerance)
    assert max(np.abs(g).max() for g in jax.tree.leaves(expected[1])) > 1e-4


def test_both_passes_augment_identically(without_batchnorm):
    config = method_config("simclr")
    expected = computed(config, ONE, plain, augment=True)
    actual = computed(config, ONE, cached, augment=True)
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", SOME_METHODS)
def test_with_batchnorm_cached_gradients_match_automatic_differentiation(method):
    config = method_config(method)
    expected = computed(config, ONE, by_automatic_differentiation)
    one = computed(config, ONE, cached)
    assert_trees_close(one, expected, rtol=1e-3, atol=1e-5)
    # On eight devices the same examples share statistics.
    eight = computed(config, jax.devices(), cached)
    for name in ("embedding",):
        np.testing.assert_allclose(eight[2][name], one[2][name], rtol=1e-3, atol=1e-4)
    assert_trees_close(eight[:2], one[:2], rtol=1e-3, atol=1e-5)


def test_batchnorm_statistics_are_per_microbatch():
    config = method_config("simclr")
    one, whole = computed(config, ONE, cached), computed(config, ONE, plain)
    assert not np.isclose(whole[0], one[0], rtol=1e-4)


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_train_step_with_microbatches_stays_replicated_and_finite(mode):
    config, source = with_whole_images(method_config("moco", spmd=mode)), random_source()
    config.microbatch = 16
    config.model.bn_group_size = 1
    spmd = make_spmd(mode, batch_size=64, microbatch=16)
    _, step, state, device_data = make_step(config, spmd, source)
    ids = np.arange(64, dtype=np.int32)
    batch = spmd.place_batch({"id": ids, "label": source.labels[ids]})
    for _ in range(2):
        state, metrics = step(state, batch, device_data)
    assert_replicated(state)
    assert np.isfinite(float(metrics["loss"]))


def test_host_views_are_split_into_microbatches_like_ids():
    rng = np.random.default_rng(0)
    raw = {"id": jnp.arange(12), "views": (jnp.asarray(rng.integers(0, 9, (12, 2, 2, 3))),)}
    parts = [_take(raw, jnp.int32(i), 3) for i in range(3)]
    assert parts[1]["id"].tolist() == [1, 4, 7, 10]
    np.testing.assert_array_equal(parts[1]["views"][0], raw["views"][0][1::3])
    assert sorted(int(i) for part in parts for i in part["id"]) == list(range(12))


def convolutions(program):
    return program.count(" convolution(")


def test_moco_keys_are_encoded_once():
    """Two forward passes of queries and one of keys; only queries have a backward pass."""
    counts = {}
    for microbatch in (0, 16):
        config = method_config("moco", microbatch=microbatch)
        with_two_stages(with_whole_images(config))
        spmd, source = make_spmd(devices=ONE), random_source()
        _, step, state, device_data = make_step(config, spmd, source)
        ids = np.arange(64, dtype=np.int32)
        batch = spmd.place_batch({"id": ids, "label": source.labels[ids]})
        lowered = step.lower(state, batch, device_data)
        counts[microbatch] = convolutions(lowered.compile().as_text())
    config = with_two_stages(method_config("moco"))
    _, method_state = jax.eval_shape(
        make_step(config, make_spmd(devices=ONE), random_source())[0].init,
        jax.random.key(0),
        {"views": (jnp.zeros((2, 8, 8, 3)),) * 2},
    )
    of_one_forward = sum(leaf.ndim == 4 for leaf in jax.tree.leaves(method_state["target"]))
    assert of_one_forward >= 5
    assert counts[16] == counts[0] + of_one_forward


def temporary_bytes(config):
    spmd, source = make_spmd(devices=ONE), random_source(4096)
    _, step, state, device_data = make_step(config, spmd, source)
    batch = spmd.place_batch({"id": np.arange(config.batch_size, dtype=np.int32)})
    analysis = step.lower(state, batch, device_data).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def sized(batch, microbatch=0):
    config = with_whole_images(method_config("simclr", microbatch=microbatch))
    config.batch_size = batch
    return config


def test_memory_depends_on_the_microbatch_not_the_batch():
    small = temporary_bytes(sized(256))
    large = temporary_bytes(sized(2048, 256))
    assert large < 1.5 * small
    assert temporary_bytes(sized(2048)) > 4 * small


def test_microbatches_that_do_not_divide_are_refused():
    config = method_config("simclr", microbatch=24)
    with pytest.raises(UserError, match="config.microbatch is 24, which does not divide"):
        validate(config)
    with pytest.raises(UserError, match="config.microbatch is 4, which 8 devices.* such as 8"):
        make_spmd(batch_size=64, microbatch=4)
    # 24 is a multiple of 8, but doesn't divide the batch.
    with pytest.raises(UserError, match="that divides the batch, such as 16"):
        make_spmd(batch_size=64, microbatch=28)


@pytest.mark.parametrize(
    ("microbatch", "bn_group_size", "splits", "images"),
    [(0, 0, 1, 64), (16, 0, 1, 16), (16, 1, 1, 2), (0, 2, 1, 16), (0, 1, 4, 2)],
)
def test_batchnorm_images_counts_the_group(microbatch, bn_group_size, splits, images):
    config = method_config("simclr", microbatch=microbatch)
    config.model.update(bn_group_size=bn_group_size, bn_splits=splits)
    assert batchnorm_images(config, 8) == images


def test_remat_recomputes_and_changes_no_result():
    config, source = with_whole_images(method_config("simclr")), random_source()
    expected = computed(config, ONE, plain)
    written = []
    for remat in (False, True):
        config.remat = remat
        spmd = make_spmd(devices=ONE)
        _, step, state, device_data = make_step(config, spmd, source)
        batch = spmd.place_batch({"id": np.arange(64, dtype=np.int32)})
        text = step.lower(state, batch, device_data).as_text()
        written.append(text.count("stablehlo.convolution"))
    assert written[1] > written[0] > 0
    assert_trees_close(computed(config, ONE, plain), expected, rtol=1e-4, atol=1e-6)
