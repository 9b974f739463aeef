"""Supervised cross-entropy on the same pipeline: what labels for all images would give."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssl_jax.errors import UserError
from ssl_jax.methods.base import Batch, Method, Pytree, apply_networks, init_networks


class Classifier(nn.Module):
    """A linear layer that starts at zero, called as the other networks are."""

    classes: int

    @nn.compact
    def __call__(self, x: Float[Array, "n d"], train: bool) -> Float[Array, "n classes"]:
        """Logits of features."""
        return nn.Dense(self.classes, kernel_init=nn.initializers.zeros)(x)


class Supervised(Method):
    """Encoder and classifier, trained on every view of an image."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        classes = self.config.data.num_classes
        if classes < 2:
            raise UserError(
                "config.method is 'supervised', but the training images have no labels: use a "
                "folder with one subfolder per class."
            )
        self.networks = {"encoder": self.encoder, "classifier": Classifier(classes)}

    def init(self, rng: Array, batch: Batch) -> tuple[Pytree, Pytree]:
        """Nothing beside the networks and their batch statistics."""
        params, stats = init_networks(self.networks, rng, batch["views"][0])
        return params, {"batch_stats": stats}

    def forward(
        self, params: Pytree, extra: Pytree, batch: Batch, rng: Array
    ) -> tuple[dict[str, Array], Pytree]:
        """Each view on its own: `logits` [n, V, classes]."""
        stats, features, logits = extra["batch_stats"], [], []
        for view in batch["views"]:
            (h, out), stats = apply_networks(self.networks, params, stats, view)
            features.append(h)
            logits.append(out)
        return {"embedding": features[0], "logits": jnp.stack(logits, axis=1)}, stats

    def loss(
        self, params: Pytree, outputs: dict[str, Array], extra: Pytree, batch: Batch, step: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Cross-entropy with the labels, averaged over views."""
        log_p = jax.nn.log_softmax(outputs["logits"].astype(jnp.float32))
        label = batch["label"][:, None, None]
        loss = -jnp.mean(jnp.take_along_axis(log_p, label, axis=-1))
        right = jnp.mean(jnp.argmax(log_p, axis=-1) == batch["label"][:, None])
        return self.mean(loss), {"train_accuracy": self.mean(right)}
