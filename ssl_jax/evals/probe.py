"""A linear classifier that is trained along with the encoder, and doesn't touch it.

It sees the features that each step has anyway, with their gradient stopped, and has an optimiser of
its own; its accuracy follows the representation while it is learnt, without an evaluation.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Pytree = Any

_RATE = 1e-2
# Adam: features of different methods differ in scale by orders of magnitude.
_OPTIMIZER = optax.adam(_RATE)


def init(features: int, classes: int) -> Pytree:
    """The probe before the first step.

    Args:
      features: D.
      classes: of the labels.

    Returns:
      "params" (zeros) and "opt_state".
    """
    params = {"kernel": jnp.zeros((features, classes)), "bias": jnp.zeros((classes,))}
    return {"params": params, "opt_state": _OPTIMIZER.init(params)}


def scores(params: Pytree, features: Float[Array, "n d"]) -> Float[Array, "n classes"]:
    """Logits of features."""
    return jnp.asarray(features) @ params["kernel"] + params["bias"][None, :]


def loss(
    params: Pytree, features: Float[Array, "n d"], label: Int[Array, " n"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The local mean of the cross-entropy, and the share that is right; float32."""
    logits = scores(params, jax.lax.stop_gradient(features).astype(jnp.float32))
    each = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return jnp.mean(each), jnp.mean(jnp.argmax(logits, axis=1) == label)


def update(probe: Pytree, gradients: Pytree) -> Pytree:
    """The probe after a step with the global gradient of its loss."""
    updates, opt_state = _OPTIMIZER.update(gradients, probe["opt_state"])
    return {"params": optax.apply_updates(probe["params"], updates), "opt_state": opt_state}
