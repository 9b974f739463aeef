"""Supervised cross-entropy on the same pipeline: what labels for all images would give."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssl_jax.errors import UserError
from ssl_jax.methods.base import Batch, Method, Pytree, apply_networks, init_networks
from ssl_jax.optim import role_labels


class Classifier(nn.Module):
    """A linear layer, called as the other networks are.

    Attributes:
      classes: of the logits.
      init: standard deviation of the first weights.
    """

    classes: int
    init_scale: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "n d"], train: bool) -> Float[Array, "n classes"]:
        """Logits of features."""
        init = nn.initializers.normal(self.init_scale)
        return nn.Dense(self.classes, kernel_init=init)(x)


class Supervised(Method):
    """Encoder, what is kept of a projector, and classifier, trained on every view of an image.

    With `config.init_from.path` this is fine-tuning (SimCLR v2, section 2: from a hidden layer of
    the projector); with `config.supervised.freeze` also linear evaluation: the encoder runs in
    evaluation mode and stays as it is, bit for bit.
    """

    needs_labels = classifies = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        options, classes = self.config.supervised, self.config.data.num_classes
        if classes < 2:
            raise UserError(
                f"config.method is '{self.config.method}', but the training images have no labels: "
                "use a folder with one subfolder per class."
            )
        self.networks = classifying_networks(self, self.encoder, options, options.classifier_init)
        if options.freeze:
            self.frozen = tuple(name for name in self.networks if name != "classifier")

    def init(self, rng: Array, batch: Batch) -> tuple[Pytree, Pytree]:
        """Nothing beside the networks and their batch statistics."""
        params, stats = init_networks(self.networks, rng, batch["views"][0])
        return params, {"batch_stats": stats}

    def forward(
        self, params: Pytree, state: Pytree, batch: Batch, rng: Array
    ) -> tuple[dict[str, Array], Pytree]:
        """Each view on its own: `logits` [n, V, classes]."""
        stats, features, logits = state["batch_stats"], [], []
        for view in batch["views"]:
            if self.config.supervised.freeze:
                h, out = self._of_frozen(params, stats, view)
            else:
                (h, *_, out), stats = apply_networks(self.networks, params, stats, view)
            features.append(h)
            logits.append(out)
        return {"embedding": features[0], "logits": jnp.stack(logits, axis=1)}, stats

    def _of_frozen(self, params: Pytree, stats: Pytree, view: Array) -> tuple[Array, Array]:
        outputs = evaluate_networks(self.networks, params, stats, view, self.frozen)
        outputs = [jax.lax.stop_gradient(x) for x in outputs]
        logits = self.networks["classifier"].apply(
            {"params": params["classifier"]}, outputs[-1], True
        )
        return outputs[0], jnp.asarray(logits)

    def param_groups(self, params: Pytree) -> Pytree:
        """The classifier's own, and all else is frozen where the encoder is."""
        labels = {**super().param_groups(params), **classifier_group(self.config, params)}
        return {
            name: jax.tree.map(lambda _: "frozen", tree) if name in self.frozen else tree
            for name, tree in labels.items()
        }

    def loss(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, batch: Batch, step: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Cross-entropy with the labels, averaged over views."""
        loss, correct = cross_entropy(outputs["logits"], batch["label"])
        return self.mean(loss), {"train_accuracy": self.mean(correct)}

    def classify(self, params: Pytree, stats: Pytree, images: Array) -> Float[Array, "n classes"]:
        """Logits of images, in evaluation mode."""
        return evaluate_networks(self.networks, params, stats, images, self.networks)[-1]


def classifying_networks(
    method: Method, encoder: nn.Module, options: Any, classifier_init: float = 0.0
) -> dict[str, nn.Module]:
    """Encoder, kept projector layers, classifier.

    Args:
      method: whose head and classes they are.
      encoder: the first of them.
      options: with `projector_layer` and `projector_hidden`.
      classifier_init: standard deviation of the classifier's first weights.
    """
    networks: dict[str, nn.Module] = {"encoder": encoder}
    if options.projector_layer:
        networks["projector"] = method.head(
            hidden=options.projector_hidden or encoder.num_features,
            out=1,  # of the last layer, which isn't there
            layers=options.projector_layer + 1,
            kept=options.projector_layer,
            kernel_init="normal_0.01",
        )
    networks["classifier"] = Classifier(method.config.data.num_classes, classifier_init)
    return networks


def classifier_group(config: Any, params: Pytree) -> Pytree:
    """The optimiser's labels of the classifier: LARS neither adapts nor decays it.

    Nor does SimCLR's; its code adds the kernel's decay to the loss instead, which is left out here.
    """
    if not config.optim.name.startswith("lars"):
        return {"classifier": role_labels(params["classifier"])}
    return {"classifier": jax.tree.map(lambda _: "norm_bias", params["classifier"])}


def evaluate_networks(
    networks: Any, params: Pytree, stats: Pytree, x: Array, names: Any
) -> list[Array]:
    """Each network's output in evaluation mode, one after another."""
    outputs = []
    for name in names:
        variables = {"params": params[name], "batch_stats": stats.get(name, {})}
        x = networks[name].apply(variables, x, train=False)
        outputs.append(x)
    return outputs


def cross_entropy(logits: Float[Array, "n v c"], label: Array) -> tuple[Array, Array]:
    """The mean over examples and views, and the share that is correct."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    loss = -jnp.mean(jnp.take_along_axis(log_p, label[:, None, None], axis=-1))
    return loss, jnp.mean(jnp.argmax(log_p, axis=-1) == label[:, None])
