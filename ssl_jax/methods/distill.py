"""Distillation of a classifier into a student (SimCLR v2: Chen et al., 2020, arXiv:2006.10029).

The last of SimCLR v2's three steps: a teacher, fine-tuned on few labels, predicts the classes of
unlabeled images, and a student of the same size or smaller learns these predictions (section 2,
equations 2 and 3).
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssl_jax.errors import UserError
from ssl_jax.methods.base import Batch, Pytree, apply_networks, init_networks
from ssl_jax.methods.supervised import (
    Classifier,
    ClassifierMethod,
    classifying_networks,
    cross_entropy,
    evaluate_networks,
)
from ssl_jax.models.resnet import ResNet, architecture


class Distill(ClassifierMethod):
    """A student; its teacher, a ResNet in `state`, is constant and runs in evaluation mode."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        options, classes = self.config.distill, self.config.data.num_classes
        if not options.depth:
            raise UserError(
                "config.distill.teacher is empty. Set it to the workdir of a supervised or "
                "fine-tuned run."
            )
        if options.labels and classes < 2:
            raise UserError(
                f"config.distill.labels is {options.labels}, but the training images have no "
                "labels. Set it to 0."
            )
        self.needs_labels = options.labels > 0
        teacher = ResNet(**architecture(options), dtype=self.config.dtype)
        self.teacher = classifying_networks(self, teacher, options)
        self.networks: dict[str, nn.Module] = {
            "encoder": self.encoder,
            "classifier": Classifier(classes),
        }

    def init(self, rng: Array, batch: Batch) -> tuple[Pytree, Pytree]:
        """Creates the student, and a random teacher whose weights are loaded later."""
        keys = jax.random.split(rng)
        params, stats = init_networks(self.networks, keys[0], batch["views"][0])
        teacher, teacher_stats = init_networks(self.teacher, keys[1], batch["views"][0])
        variables = {"params": teacher, "batch_stats": teacher_stats}
        return params, {"batch_stats": stats, "teacher": variables}

    def forward(
        self, params: Pytree, state: Pytree, batch: Batch, rng: Array
    ) -> tuple[dict[str, Array], Pytree]:
        """Runs both networks on each view; outputs `logits` and `teacher` [n, V, classes]."""
        stats, features, logits, teacher_logits = state["batch_stats"], [], [], []
        weights = state["teacher"]["params"], state["teacher"]["batch_stats"]
        keys: Sequence[Array | None] = self.image_keys(rng, batch) or [None] * len(batch["views"])
        for view, random in zip(batch["views"], keys, strict=True):
            (h, out), stats = apply_networks(self.networks, params, stats, view, random)
            features.append(h)
            logits.append(out)
            taught = evaluate_networks(self.teacher, *weights, view, self.teacher)[-1]
            teacher_logits.append(jax.lax.stop_gradient(taught))
        return {
            "embedding": features[0],
            "logits": jnp.stack(logits, axis=1),
            "teacher": jnp.stack(teacher_logits, axis=1),
        }, stats

    def loss(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, batch: Batch, step: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Mixes the cross-entropies with the teacher's softened predictions and with the labels."""
        options = self.config.distill
        t = options.temperature
        targets = jax.nn.softmax(outputs["teacher"].astype(jnp.float32) / t)
        log_p = jax.nn.log_softmax(outputs["logits"].astype(jnp.float32) / t)
        distilled = -jnp.mean(jnp.sum(targets * log_p, axis=-1)) * t * t
        agree = outputs["teacher"].argmax(-1) == outputs["logits"].argmax(-1)
        logs = {"distillation": self.mean(distilled), "agreement": self.mean(jnp.mean(agree))}
        if not options.labels:
            return self.mean(distilled), logs
        weights = self.label_weights(batch["label"])
        labeled, correct = cross_entropy(outputs["logits"], batch["label"], weights)
        loss = (1 - options.labels) * distilled + options.labels * labeled
        return self.mean(loss), {**logs, "train_accuracy": self.mean(correct)}
