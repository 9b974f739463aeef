"""The online probe: a linear classifier trained during pretraining on stopped-gradient features.

It reuses the features of each train step and has its own optimizer, so its accuracy tracks the
representation without an extra forward pass, and the encoder is not affected.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Pytree = Any

_RATE = 1e-2
# Adam, because the scale of features differs by orders of magnitude between methods.
_OPTIMIZER = optax.adam(_RATE)


def init(features: int, classes: int) -> Pytree:
    """The initial probe.

    Args:
      features: dimension of the features.
      classes: number of classes.

    Returns:
      "params" (zeros) and "opt_state".
    """
    params = {"kernel": jnp.zeros((features, classes)), "bias": jnp.zeros((classes,))}
    return {"params": params, "opt_state": _OPTIMIZER.init(params)}


def scores(params: Pytree, features: Float[Array, "n d"]) -> Float[Array, "n classes"]:
    """Logits of features."""
    return jnp.asarray(features) @ params["kernel"] + params["bias"][None, :]


def loss(
    params: Pytree,
    features: Float[Array, "n d"],
    label: Int[Array, " n"],
    weights: Float[Array, " n"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted means of cross-entropy and accuracy on this device's examples; float32.

    Args:
      params: of the probe.
      features: of the encoder; no gradient flows into them.
      label: class of each example.
      weights: from `Method.label_weights`.
    """
    logits = scores(params, jax.lax.stop_gradient(features).astype(jnp.float32))
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
    return jnp.mean(weights * each), jnp.mean(weights * (jnp.argmax(logits, axis=1) == label))


def update(probe: Pytree, gradients: Pytree) -> Pytree:
    """The probe after an optimizer step with the global gradient of its loss."""
    updates, opt_state = _OPTIMIZER.update(gradients, probe["opt_state"])
    return {"params": optax.apply_updates(probe["params"], updates), "opt_state": opt_state}
