"""Exponential moving averages of parameters: momentum encoders and their schedules."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Pytree = Any


def update(target: Pytree, online: Pytree, decay: float | Float[Array, ""]) -> Pytree:
    """Moves a target network toward the online one: decay·target + (1-decay)·online.

    MoCo's momentum encoder (He et al., 2020, eq. 2) and BYOL's target (Grill et al., 2020, eq. 1).

    Args:
      target: float arrays, any pytree.
      online: a pytree of the same structure and shapes.
      decay: in [0, 1]; 1 keeps the target, 0 copies the online network.

    Returns:
      The new target; leaves keep the target's dtype, averages are computed in float32 or better.
    """
    # Use an array: with bfloat16 leaves, a Python scalar would become bfloat16, where 0.999 is 1.
    # Subtract before the conversion, while a Python float still has 64 bits.
    step_size = jnp.asarray(1.0 - decay, float)
    moved = optax.incremental_update(online, target, step_size)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), moved, target)


def cosine_decay(
    base: float, step: int | Int[Array, ""], total_steps: int, *, end: float = 1.0
) -> Float[Array, ""]:
    """Computes the EMA decay of a step: end - (end-base)·(cos(π·step/total_steps) + 1)/2.

    BYOL (Grill et al., 2020, section 3.2). After `total_steps` it stays at `end`, as in the
    official code.

    Args:
      base: decay at step 0, in [0, 1].
      step: completed optimizer steps.
      total_steps: the run's length in steps, positive.
      end: decay at the last step, in [0, 1]; equal to `base` for a constant decay.

    Returns:
      float32 scalar.
    """
    progress = jnp.minimum(step / total_steps, 1.0)
    return end - (end - base) * (jnp.cos(jnp.pi * progress) + 1.0) / 2.0
