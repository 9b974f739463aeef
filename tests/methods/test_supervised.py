"""Labels in the losses of methods that train a classifier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import method_config

from ssl_jax.config import Schedule
from ssl_jax.methods import make_method


@pytest.mark.parametrize("devices", [1, 2])
def test_images_without_a_label_are_in_neither_loss_nor_accuracy(devices):
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(8, 2, 4)), rng.integers(0, 4, 8)
    label[[1, 2, 3, 6]] = -1  # three of one device's, one of the other's
    known = label >= 0
    method = make_method(method_config("supervised"), Schedule(1, 1), "devices")

    def loss(logits, label):
        return method.loss({}, {"logits": logits}, {}, {"label": label}, jnp.int32(0))

    shards = [x.reshape(devices, 8 // devices, *x.shape[1:]) for x in (logits, label)]
    found, logs = jax.vmap(loss, axis_name="devices")(jnp.float32(shards[0]), shards[1])
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    own = np.take_along_axis(log_p[known], label[known][:, None, None], axis=-1)
    np.testing.assert_allclose(found, -own.mean(), rtol=1e-5)
    correct = logits[known].argmax(axis=-1) == label[known][:, None]
    np.testing.assert_allclose(logs["train_accuracy"], correct.mean(), rtol=1e-5)
    without, _ = jax.vmap(loss, axis_name="devices")(jnp.float32(shards[0]), shards[1] * 0 - 1)
    assert not np.asarray(without).any()


@pytest.mark.parametrize("devices", [1, 2])
def test_several_labels_are_learned_by_the_mean_of_known_binary_cross_entropies(devices):
    rng = np.random.default_rng(1)
    logits, targets = rng.normal(size=(8, 2, 3)), rng.integers(0, 2, (8, 3)).astype(np.int8)
    targets[[0, 1, 2], [0, 2, 2]] = -1
    targets[7] = -1
    config = method_config("supervised")
    config.supervised.sigmoid = True
    method = make_method(config, Schedule(1, 1), "devices")

    def loss(logits, targets):
        return method.loss({}, {"logits": logits}, {}, {"label": targets}, jnp.int32(0))[0]

    shards = [x.reshape(devices, 8 // devices, *x.shape[1:]) for x in (logits, targets)]
    found = jax.vmap(loss, axis_name="devices")(jnp.float32(shards[0]), shards[1])
    signs = np.where(targets == 1, 1.0, -1.0)[:, None]
    each = np.logaddexp(0, -signs * logits).mean(axis=1)
    np.testing.assert_allclose(found, each[targets >= 0].mean(), rtol=1e-5)
