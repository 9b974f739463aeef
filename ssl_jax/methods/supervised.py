"""Supervised cross-entropy: the baseline with all labels, fine-tuning, linear evaluation.

With one label y per image, the loss is -log softmax(z)_y of the logits z, averaged over labeled
images and views. With several labels per image (`config.supervised.sigmoid`), classes are
independent, as in the one-vs-rest classifiers of PASCAL VOC: with targets t of 0 and 1, it is

    -t log sigmoid(z) - (1 - t) log(1 - sigmoid(z)),

averaged over views and over all pairs of an image and a class whose target is known: the mean over
classes, not their sum.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ssl_jax.errors import UserError
from ssl_jax.methods.base import Batch, Method, Pytree, apply_networks
from ssl_jax.models.layers import KERNEL_INITS

CLASSIFIER_INITS = {
    "zeros": nn.initializers.zeros,
    **{name: KERNEL_INITS[name] for name in ("normal_0.01", "haiku")},
}


class Classifier(nn.Module):
    """A linear layer with the call signature of the other networks.

    Attributes:
      classes: number of logits.
      kernel_init: a key of `CLASSIFIER_INITS`; the bias starts at 0.
    """

    classes: int
    kernel_init: str = "zeros"

    @nn.compact
    def __call__(self, x: Float[Array, "n d"], train: bool) -> Float[Array, "n classes"]:
        """Computes the logits of features."""
        return nn.Dense(self.classes, kernel_init=CLASSIFIER_INITS[self.kernel_init])(x)


class ClassifierMethod(Method):
    """Base of the methods that train a classifier, the last of `networks`."""

    classifies = True

    def param_groups(self, params: Pytree) -> Pytree:
        """Labels parameters as usual, except that LARS neither adapts nor decays the classifier.

        SimCLR's code instead adds weight decay of the classifier's kernel to the loss, which is
        omitted here.
        """
        labels = dict(super().param_groups(params))
        if self.config.optim.name.startswith("lars"):
            labels["classifier"] = jax.tree.map(lambda _: "norm_bias", params["classifier"])
        return labels

    def classify(self, params: Pytree, stats: Pytree, images: Array) -> Float[Array, "n classes"]:
        """Computes the logits of images, in evaluation mode."""
        return evaluate_networks(self.networks, params, stats, images, self.networks)[-1]


class Supervised(ClassifierMethod):
    """Encoder, kept projector layers and classifier, trained on every view of an image.

    With `config.init_from.path` this is fine-tuning (SimCLR v2, section 2: from a hidden layer of
    the projector); with `config.supervised.freeze` it is linear evaluation: the encoder runs in
    evaluation mode and stays bit-identical.
    """

    needs_labels = True
    takes_targets = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        options, classes = self.config.supervised, self.config.data.num_classes
        if classes < (1 if options.sigmoid else 2):
            lack = "are all of one class" if classes else "have no labels"
            raise UserError(
                f"config.method is '{self.config.method}', but the training images {lack}. "
                "Use a folder with one subfolder per class."
            )
        self.networks = classifying_networks(self, self.encoder, options, options.classifier_init)
        if options.freeze:
            self.frozen = tuple(name for name in self.networks if name != "classifier")

    def forward(
        self, params: Pytree, state: Pytree, batch: Batch, rng: Array
    ) -> tuple[dict[str, Array], Pytree]:
        """Encodes each view as a separate batch; outputs `logits` [n, V, classes]."""
        stats, features, logits = state["batch_stats"], [], []
        keys: Sequence[Array | None] = self.image_keys(rng, batch) or [None] * len(batch["views"])
        for view, random in zip(batch["views"], keys, strict=True):
            if self.config.supervised.freeze:
                h, out = self._apply_frozen(params, stats, view)
            else:
                (h, *_, out), stats = apply_networks(self.networks, params, stats, view, random)
            features.append(h)
            logits.append(out)
        return {"embedding": features[0], "logits": jnp.stack(logits, axis=1)}, stats

    def _apply_frozen(self, params: Pytree, stats: Pytree, view: Array) -> tuple[Array, Array]:
        outputs = evaluate_networks(self.networks, params, stats, view, self.frozen)
        outputs = [jax.lax.stop_gradient(x) for x in outputs]
        logits = self.networks["classifier"].apply(
            {"params": params["classifier"]}, outputs[-1], True
        )
        return outputs[0], jnp.asarray(logits)

    def param_groups(self, params: Pytree) -> Pytree:
        """Labels parameters as for any classifier, and frozen networks as "frozen"."""
        return {
            name: jax.tree.map(lambda _: "frozen", tree) if name in self.frozen else tree
            for name, tree in super().param_groups(params).items()
        }

    def loss(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, batch: Batch, step: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Computes the cross-entropy with the labels; the module's docstring has the averages."""
        weights = self.label_weights(batch["label"])
        if self.config.supervised.sigmoid:
            loss = sigmoid_cross_entropy(outputs["logits"], batch["label"], weights)
            return self.mean(loss), {}
        loss, correct = cross_entropy(outputs["logits"], batch["label"], weights)
        return self.mean(loss), {"train_accuracy": self.mean(correct)}


def classifying_networks(
    method: Method, encoder: nn.Module, options: Any, classifier_init: str = "zeros"
) -> dict[str, nn.Module]:
    """Returns encoder, kept projector layers and classifier, by name.

    Args:
      method: builds the projector's layers; its config has the number of classes.
      encoder: the first network.
      options: a config group with `projector_layer` and `projector_hidden`.
      classifier_init: initialization of the classifier's weights.
    """
    networks: dict[str, nn.Module] = {"encoder": encoder}
    if options.projector_layer:
        networks["projector"] = method.head(
            hidden=options.projector_hidden or encoder.num_features,
            out=1,  # width of the last layer, which is not kept
            layers=options.projector_layer + 1,
            kept=options.projector_layer,
            kernel_init="normal_0.01",
        )
    networks["classifier"] = Classifier(method.config.data.num_classes, classifier_init)
    return networks


def evaluate_networks(
    networks: Any, params: Pytree, stats: Pytree, x: Array, names: Any
) -> list[Array]:
    """Applies the named networks in sequence, in evaluation mode; returns all outputs."""
    outputs = []
    for name in names:
        variables = {"params": params[name], "batch_stats": stats.get(name, {})}
        x = networks[name].apply(variables, x, train=False)
        outputs.append(x)
    return outputs


def sigmoid_cross_entropy(
    logits: Float[Array, "n v c"], targets: Int[Array, "n c"], weights: Float[Array, "n c"]
) -> Array:
    """Returns the weighted mean over examples, views and classes of binary cross-entropies."""
    known = jnp.maximum(targets, 0).astype(jnp.float32)[:, None]
    losses = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), known)
    return jnp.mean(weights[:, None] * losses)


def cross_entropy(
    logits: Float[Array, "n v c"], label: Int[Array, " n"], weights: Float[Array, " n"]
) -> tuple[Array, Array]:
    """Returns the weighted means over examples and views of cross-entropy and accuracy."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    losses = -jnp.take_along_axis(log_p, jnp.maximum(label, 0)[:, None, None], axis=-1)
    correct = jnp.argmax(log_p, axis=-1) == label[:, None]
    return jnp.mean(weights[:, None, None] * losses), jnp.mean(weights[:, None] * correct)
