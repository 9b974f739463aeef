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
