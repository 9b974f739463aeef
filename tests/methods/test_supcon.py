"""SupCon: its labels, with and without classes, and its factor."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import method_config, random_source

from ssl_jax import losses
from ssl_jax.config import Schedule
from ssl_jax.data.arrays import ArraySource
from ssl_jax.errors import UserError
from ssl_jax.methods import make_method
from ssl_jax.train.setup import Setup


@pytest.mark.parametrize("base", [0.07, 1.0])
def test_loss_is_scaled_by_the_temperatures(base):
    config = method_config("supcon")
    config.supcon.update(temperature=0.2, base_temperature=base)
    z = jnp.float32(np.random.default_rng(0).normal(size=(8, 2, 4)))
    label = jnp.array([0, 0, 1, 1, 2, 2, -1, -1])
    loss, logs = make_method(config, Schedule(1, 1)).loss(
        {}, {"projection": z}, {}, {"label": label}, jnp.int32(0)
    )
    expected = losses.supcon(z[:, 0], z[:, 1], label, temperature=0.2)
    assert float(logs["supcon"]) == pytest.approx(float(expected))
    assert float(loss) == pytest.approx(0.2 / base * float(expected), rel=1e-6)


def source(labels):
    images = random_source(len(labels)).images
    return ArraySource(images, np.int32(labels), ["a", "b"] if max(labels) >= 0 else [])


def test_images_without_a_label_are_trained_on_unlike_in_supervised_training():
    labels = [0, 1, -1, -1] * 32
    for method, images in (("supcon", 128), ("supervised", 64)):
        config = method_config(method)
        config.data.num_classes = 2
        assert Setup(config, train=source(labels)).train.num_examples == images


def test_data_without_labels_are_refused():
    with pytest.raises(UserError, match="'supcon', but the training images have no labels"):
        Setup(method_config("supcon"), train=source([-1] * 128))
