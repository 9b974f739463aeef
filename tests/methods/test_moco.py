import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    make_step,
    method_config,
    random_source,
    ready_views,
    unaugmented,
    with_whole_images,
)

from ssl_jax import losses
from ssl_jax.config import Schedule
from ssl_jax.data.index import stream_key
from ssl_jax.errors import UserError
from ssl_jax.methods import make_method
from ssl_jax.models import registry
from ssl_jax.spmd import AXIS, make_spmd
from ssl_jax.step import example_batch

ONE = jax.devices()[:1]


def moco(axis_name=None, bn_group_size=0, **options):
    config = with_whole_images(method_config("moco"))
    config.model.bn_group_size = bn_group_size
    config.moco.update(options)
    return make_method(config, Schedule(1, 10), axis_name)


@pytest.mark.parametrize(("batch", "group"), [(64, 8), (32, 4), (16, 2)])
def test_shuffle_spreads_images_over_devices_and_is_inverted_exactly(batch, group):
    spmd, method = make_spmd(), moco(AXIS, bn_group_size=1)

    def per_device(x, rng):
        shuffled, unshuffle = method.shuffle(x, jax.random.wrap_key_data(rng))
        return shuffled, unshuffle(shuffled)

    mapped = spmd.map(per_device, ("sharded", "replicated"), ("sharded", "sharded"))
    x = np.arange(batch, dtype=np.float32)
    key = spmd.replicate(jax.random.key_data(jax.random.key(0)))
    shuffled, back = jax.device_get(mapped(spmd.place_batch(x), key))
    np.testing.assert_array_equal(back, x)
    assert sorted(shuffled) == x.tolist()
    share = batch // 8
    for part in shuffled.reshape(8, share):
        origins = np.unique(part // share)
        assert len(origins) == min(group, share)


def test_shuffle_uses_all_to_all_and_never_gathers_images():
    config, spmd = with_whole_images(method_config("moco")), make_spmd()
    config.model.bn_group_size = 1
    source = random_source()
    _, step, state, _ = make_step(config, spmd, source, unaugmented)
    ids = np.arange(64, dtype=np.int32)
    batch = {"id": ids, "label": source.labels[ids], "views": ready_views(config, ids)}
    program = step.lower(state, spmd.place_batch(batch), {}).compile().as_text()
    assert "all-to-all" in program
    gathers = [line for line in program.splitlines() if " all-gather(" in line]
    # The keys, [64, 1, 8], are; the views, [64, 8, 8, 3], are not.
    assert gathers
    assert not any("8,8,3" in line.split(" all-gather(")[0] for line in gathers)


class BatchCentered(nn.Module):
    """An encoder with statistics of the batch but no variables for them, computed in float32."""

    num_features: int = 8

    @nn.compact
    def __call__(self, images, train=False):
        assert images.dtype == jnp.float32
        x = nn.Dense(self.num_features)(images.mean((1, 2)))
        return x - x.mean(axis=0, keepdims=True)


@pytest.mark.parametrize(("model", "dtype"), [("resnet", "bf16"), ("vit", ""), ("mine", "f32")])
def test_images_are_sent_in_the_compute_dtype_and_only_with_batchnorm(monkeypatch, model, dtype):
    """What an encoder of the user's own takes and normalizes isn't known: it gets all as it was."""
    monkeypatch.setitem(registry._REGISTERED, "mine", lambda *_: BatchCentered())
    config = method_config("moco")
    config.dtype, config.model.bn_group_size, config.model.name = "bfloat16", 1, model
    config.model.vit.update(patch=4, width=16, depth=1, heads=2)
    method, rng = make_method(config, Schedule(1, 10), AXIS), jax.random.key(0)
    batch = jax.tree.map(lambda x: jnp.repeat(x, 32, axis=0), example_batch(config))

    def forward(batch):
        params, state = method.init(rng, batch)
        return method.forward(params, state, batch, rng)[0]["key"]

    mapped = make_spmd().map(forward, ("sharded",), "sharded")
    program = str(jax.make_jaxpr(mapped)(batch))
    sent = re.findall(r"(\w+)\[8,8,8,3\] = all_to_all\[", program)
    assert sent == [dtype] * bool(dtype)


def test_images_stay_where_batchnorm_is_global_and_keys_are_the_same():
    """Which device encodes an image changes nothing if all share BatchNorm's statistics."""
    spmd = make_spmd()
    norm = nn.BatchNorm(use_running_average=False, axis_name=AXIS, use_scale=False, use_bias=False)
    x = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    key = spmd.replicate(jax.random.key_data(jax.random.key(0)))

    def encoded(method):
        def per_device(x, rng):
            images, back = method.shuffle(x, jax.random.wrap_key_data(rng))
            return images, back(norm.apply({}, images, mutable=["batch_stats"])[0])

        mapped = spmd.map(per_device, ("sharded", "replicated"), ("sharded", "sharded"))
        return jax.device_get(mapped(spmd.place_batch(x), key))

    stayed, keys = encoded(moco(AXIS))
    np.testing.assert_array_equal(stayed, x)
    assert np.array_equal(encoded(moco(AXIS, bn_group_size=8))[0], x)  # all eight devices
    moved, same_keys = encoded(moco(AXIS, bn_group_size=1))
    assert not np.array_equal(moved, x)
    np.testing.assert_allclose(same_keys, keys, atol=1e-6)


def test_queue_is_first_in_first_out_across_wraparound():
    method = moco()  # 192 keys, batches of 64
    config = method.config
    params, method_state = jax.jit(method.init)(jax.random.key(0), example_batch(config))
    for step in range(5):
        keys = jnp.full((64, 1, 8), float(step))
        _, method_state = method.update(params, {"key": keys}, method_state, jnp.int32(step))
    blocks = np.asarray(method_state["queue"])[0].reshape(3, 64, 8)
    assert [np.unique(block).tolist() for block in blocks] == [[3.0], [4.0], [2.0]]


def info_nce_oracle(query, key, queue, temperature):
    q = np.float64(query) / np.linalg.norm(np.float64(query), axis=1, keepdims=True)
    logits = np.concatenate([np.sum(q * key, 1, keepdims=True), q @ np.float64(queue).T], axis=1)
    logits /= temperature
    top = logits.max(1, keepdims=True)
    return np.mean(np.log(np.exp(logits - top).sum(1)) + top[:, 0] - logits[:, 0])


def test_queue_does_not_hold_the_current_batch_in_the_loss():
    config = with_whole_images(method_config("moco"))
    source, spmd = random_source(), make_spmd(devices=ONE)
    method, step, state, _ = make_step(config, spmd, source, unaugmented)
    ids = np.arange(64, dtype=np.int32)
    batch = {"id": ids, "label": source.labels[ids], "views": ready_views(config, ids)}
    before = jax.device_get(state)
    key = jax.random.wrap_key_data(jnp.asarray(before.key))
    alone = make_method(config, Schedule(1, 10))
    outputs, _ = jax.jit(alone.forward)(
        before.params, before.method_state, batch, stream_key(key, "forward", 0)
    )
    query, key = (np.asarray(outputs[name])[:, 0] for name in ("query", "key"))
    after, metrics = step(state, spmd.place_batch(batch), {})
    loss = float(metrics["loss"])
    temperature = config.moco.temperature
    old, new = (np.asarray(s.method_state["queue"])[0] for s in (before, after))
    assert loss == pytest.approx(info_nce_oracle(query, key, old, temperature), rel=1e-4)
    # The step has enqueued the keys since; had it before, the loss would be another.
    np.testing.assert_allclose(new[:64], key, atol=1e-5)
    assert abs(loss - info_nce_oracle(query, key, new, temperature)) > 0.01


@pytest.mark.parametrize("devices", [1, 8])
def test_shared_queue_holds_the_first_directions_keys_in_the_second_direction(devices):
    method = moco(AXIS, symmetric=True, shared_queue=True, queue=256)
    rng, spmd = np.random.default_rng(0), make_spmd(devices=jax.devices()[:devices])
    query, key = (rng.normal(size=(64, 2, 8)).astype(np.float32) for _ in range(2))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    params, state = jax.eval_shape(method.init, jax.random.key(0), example_batch(method.config))
    assert state["queue"].shape == (1, 256, 8)
    queue = losses.normalize(rng.normal(size=(1, 256, 8)).astype(np.float32))
    params = {"encoder": {}}

    def per_device(outputs, queue, step):
        loss, _ = method.loss(params, outputs, {"queue": queue}, {}, step[0])
        state = {"queue": queue, "target": params}
        return loss, method.update(params, outputs, state, step[0])[1]["queue"]

    mapped = spmd.map(
        per_device, ("sharded", "replicated", "replicated"), ("replicated", "replicated")
    )
    temperature = method.config.moco.temperature
    batch = spmd.place_batch({"query": query, "key": key})
    for step in range(3):  # two steps fill the queue
        loss, new = jax.device_get(mapped(batch, *spmd.replicate((queue, np.int32([step])))))
        expected, at = np.array(queue[0]), 128 * (step % 2)
        first = info_nce_oracle(query[:, 0], key[:, 0], expected, temperature)
        expected[at : at + 64] = key[:, 0]
        second = info_nce_oracle(query[:, 1], key[:, 1], expected, temperature)
        expected[at + 64 : at + 128] = key[:, 1]
        assert float(loss) == pytest.approx((first + second) / 2, rel=1e-5)
        np.testing.assert_allclose(new[0], expected, rtol=1e-6)
        queue = new


def test_shared_queue_is_refused_without_a_second_direction_or_room_for_two_batches():
    with pytest.raises(UserError, match="config.moco.symmetric is off. Turn it on"):
        moco(shared_queue=True)
    with pytest.raises(UserError, match="queue is 192, .* of 128 .* twice .* such as 128"):
        moco(shared_queue=True, symmetric=True)


@pytest.mark.parametrize("devices", [1, 8])
def test_shuffle_mixes_the_splits_of_a_device_and_is_inverted_exactly(devices):
    spmd, method = make_spmd(devices=jax.devices()[:devices]), moco(AXIS, bn_group_size=1)
    method.config.model.bn_splits = 2

    def per_device(x, rng):
        shuffled, unshuffle = method.shuffle(x, jax.random.wrap_key_data(rng))
        return shuffled, unshuffle(shuffled)

    mapped = spmd.map(per_device, ("sharded", "replicated"), ("sharded", "sharded"))
    x = np.arange(64, dtype=np.float32)
    key = spmd.replicate(jax.random.key_data(jax.random.key(0)))
    shuffled, back = jax.device_get(mapped(spmd.place_batch(x), key))
    np.testing.assert_array_equal(back, x)
    assert sorted(shuffled) == x.tolist()
    splits = 2 * devices
    for part in shuffled.reshape(splits, -1):
        assert len(np.unique(part * splits // 64)) > 1


def test_batches_too_small_to_shuffle_are_refused_with_local_batchnorm():
    config = method_config("moco")
    config.model.bn_group_size = 1
    method = make_method(config, Schedule(1, 10), AXIS)
    mapped = make_spmd().map(
        lambda x: method.shuffle(x, jax.random.key(0))[0], ("sharded",), "sharded"
    )
    with pytest.raises(
        UserError, match="3 images at a time, which can't be shuffled across 8 devices"
    ):
        mapped(np.zeros((24, 2), np.float32))


def test_queue_that_is_no_multiple_of_the_batch_is_refused():
    with pytest.raises(UserError, match="config.moco.queue is 100, .* such as 64"):
        moco(queue=100)


def test_key_encoder_starts_as_a_copy_and_follows_by_ema():
    method = moco(ema_decay=0.9, ema_decay_end=0.9)
    params, method_state = jax.jit(method.init)(jax.random.key(0), example_batch(method.config))
    kernel = params["encoder"]["stem"]["conv1"]["kernel"]
    target = method_state["target"]["encoder"]["stem"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel, target)
    moved = jax.tree.map(lambda p: p + 1, params)
    _, method_state = method.update(
        moved, {"key": jnp.zeros((64, 1, 8))}, method_state, jnp.int32(0)
    )
    new = method_state["target"]["encoder"]["stem"]["conv1"]["kernel"]
    np.testing.assert_allclose(new, target + 0.1, rtol=1e-5)


def test_ema_decay_follows_a_cosine_between_its_ends():
    method = moco(ema_decay=0.9, ema_decay_end=0.99)
    assert float(method.ema_decay(jnp.int32(0))) == pytest.approx(0.9)
    assert float(method.ema_decay(jnp.int32(5))) == pytest.approx(0.945)
    assert float(method.ema_decay(jnp.int32(10))) == pytest.approx(0.99)


def leak_accuracy(shuffle, seed=0):
    """How often a query finds its key by the statistics of their batch alone.

    The two views of an image share nothing. But one image of each device's batch is an outlier in
    a direction of its own: BatchNorm subtracts a part of it from all the others, and leaves them
    a common mark. Keys of earlier batches carry other marks.
    """
    spmd, method = make_spmd(), moco(AXIS, bn_group_size=1, shuffle=shuffle)
    norm = nn.BatchNorm(use_running_average=False, use_scale=False, use_bias=False)

    def encode(x):
        return losses.normalize(norm.apply({}, x, mutable=["batch_stats"])[0])

    def per_device(first, second, earlier, rng):
        key = jax.random.wrap_key_data(rng)
        moved, back = method.shuffle(second, key)
        before, back_too = method.shuffle(earlier, key)
        query, positive = encode(first), back(encode(moved))
        queue = method.gather(back_too(encode(before)))
        scores = jnp.sum(query * positive, axis=1)
        found = scores > jnp.max(query @ queue.T, axis=1)
        return method.mean(jnp.mean(found[1:]))  # without the outlier

    rng = np.random.default_rng(seed)
    marks = 100 * rng.choice([-1, 1], size=(2, 8, 64))

    def images(mark):
        x = rng.normal(size=(8, 8, 64))
        x[:, 0] += mark
        return spmd.place_batch(x.reshape(64, 64).astype(np.float32))

    key = spmd.replicate(jax.random.key_data(jax.random.key(3)))
    mapped = spmd.map(per_device, ("sharded",) * 3 + ("replicated",), "replicated")
    return float(mapped(images(marks[0]), images(marks[0]), images(marks[1]), key))


def test_batch_statistics_leak_the_key_without_shuffle_and_not_with_it():
    assert leak_accuracy(shuffle=False) > 0.9
    assert leak_accuracy(shuffle=True) < 0.4
