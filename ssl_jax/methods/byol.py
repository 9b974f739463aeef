"""BYOL: bootstrap your own latent (Grill et al., 2020, arXiv:2006.07733).

From one view, the online network predicts the target's projection of the other view; the target is
the online network's EMA. There are no negatives: predictor, EMA and BatchNorm prevent collapse.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssl_jax import ema, losses
from ssl_jax.methods.base import Batch, Method, Pytree, init_networks


class BYOL(Method):
    """Encoder, projector and predictor; the target has an encoder and a projector."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.require_two_views()
        options = self.config.byol
        head = {
            "hidden": options.hidden,
            "out": options.out,
            "layers": 2,
            "hidden_bias": options.hidden_bias,
            "hidden_bn": options.head_bn,
            "out_bias": options.out_bias,
            "kernel_init": "haiku",
        }
        self.target_networks = {"encoder": self.encoder, "projector": self.head(**head)}
        self.networks = {**self.target_networks, "predictor": self.head(**head)}

    def init(self, rng: Array, batch: Batch) -> tuple[Pytree, Pytree]:
        """Initializes the target independently of the online network (official), or as its copy."""
        rng_online, rng_target = jax.random.split(rng)
        image = batch["views"][0]
        params, stats = init_networks(self.networks, rng_online, image)
        if self.config.byol.target_init == "copy":
            target, target_stats = (
                {name: jax.tree.map(jnp.copy, tree[name]) for name in self.target_networks}
                for tree in (params, stats)
            )
        else:
            target, target_stats = init_networks(self.target_networks, rng_target, image)
        return params, {"batch_stats": {**stats, "target": target_stats}, "target": target}

    def forward(
        self, params: Pytree, state: Pytree, batch: Batch, rng: Array
    ) -> tuple[dict[str, Array], Pytree]:
        """Encodes each view as a separate batch; outputs `prediction` and `target` [n, 2, d].

        Running statistics are updated twice per step. The target also runs in train mode.
        """
        stats = dict(state["batch_stats"])
        target_stats = stats.pop("target")
        views, keys = batch["views"], self.image_keys(rng, batch)
        (features, _, prediction), stats = self.apply_to_views(
            self.networks, params, stats, views, separate=True, keys=keys
        )
        (_, target), target_stats = self.apply_to_views(
            self.target_networks, state["target"], target_stats, views, separate=True
        )
        outputs = {
            "embedding": features[:, 0],
            "prediction": prediction,
            "target": jax.lax.stop_gradient(target),
        }
        return outputs, {**stats, "target": target_stats}

    def loss(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, batch: Batch, step: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Sums both directions' squared distances, each 2 - 2 cos, times `loss_scale`."""
        p, z = outputs["prediction"], outputs["target"]
        loss = losses.normalized_mse(p[:, 0], z[:, 1]) + losses.normalized_mse(p[:, 1], z[:, 0])
        loss = self.config.byol.loss_scale * self.mean(loss)
        return loss, {"ema_decay": self.ema_decay(step)}

    def update(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, step: Array
    ) -> tuple[Pytree, Pytree]:
        """Updates the target's parameters; its batch statistics are no EMA of the online ones."""
        online = {name: params[name] for name in self.target_networks}
        target = ema.update(state["target"], online, self.ema_decay(step))
        return params, {**state, "target": target}

    def ema_decay(self, step: Array) -> Float[Array, ""]:
        """The target's EMA decay: a cosine from `ema_decay` to `ema_decay_end`."""
        options = self.config.byol
        return ema.cosine_decay(
            options.ema_decay, step, self.schedule.total_steps, end=options.ema_decay_end
        )
