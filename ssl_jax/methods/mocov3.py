"""MoCo v3 (Chen, Xie & He, 2021, arXiv:2104.02057).

MoCo without a queue: the negatives are the keys of the other images in the global batch. The query
network has a predictor, keys come from an EMA of encoder and projector, and each view is a query
and a key. ViTs keep their patch projection at its random initial values, which makes their training
stable (section 4.3).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssl_jax import ema, losses
from ssl_jax.methods.base import Batch, Method, Pytree, init_networks


class MoCoV3(Method):
    """Encoder, projector and predictor; the target is the EMA of encoder and projector."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.require_two_views()
        options = self.config.mocov3
        head = {"hidden": options.hidden, "out": options.out, "kernel_init": "torch"}
        projector = self.head(layers=options.layers, out_bn="no_affine", **head)
        predictor_bn = "no_affine" if options.predictor_bn else "none"
        predictor = self.head(layers=2, out_bn=predictor_bn, **head)
        self.target_networks = {"encoder": self.encoder, "projector": projector}
        self.networks = {**self.target_networks, "predictor": predictor}

    def init(self, rng: Array, batch: Batch) -> tuple[Pytree, Pytree]:
        """Starts the target as a copy."""
        params, stats = init_networks(self.networks, rng, batch["views"][0])
        target, target_stats = (
            {name: jax.tree.map(jnp.copy, tree[name]) for name in self.target_networks}
            for tree in (params, stats)
        )
        return params, {"batch_stats": {**stats, "target": target_stats}, "target": target}

    def forward(
        self, params: Pytree, state: Pytree, batch: Batch, rng: Array
    ) -> tuple[dict[str, Array], Pytree]:
        """Encodes each view as a separate batch; outputs `query` and `key` [n, 2, d], by view.

        Keys are unit rows. The target also runs in train mode.
        """
        stats = dict(state["batch_stats"])
        target_stats = stats.pop("target")
        views, keys = batch["views"], self.image_keys(rng, batch)
        (features, _, query), stats = self.apply_to_views(
            self.networks, params, stats, views, separate=True, keys=keys
        )
        (_, key), target_stats = self.apply_to_views(
            self.target_networks, state["target"], target_stats, views, separate=True
        )
        outputs = {
            "embedding": features[:, 0],
            "query": query,
            "key": losses.normalize(jax.lax.stop_gradient(key)),
        }
        return outputs, {**stats, "target": target_stats}

    def loss(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, batch: Batch, step: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Sums both directions' InfoNCE among the global batch's keys, times 2τ (algorithm 1)."""
        tau = self.config.mocov3.temperature
        key, keys = outputs["key"], self.gather(outputs["key"])
        own = losses.batch_positions(len(key), self.axis_name)
        terms, correct = [], []
        for view, other in ((0, 1), (1, 0)):
            query, candidates = outputs["query"][:, view], keys[:, other]
            terms.append(
                losses.info_nce(query, key[:, other], candidates, own=own, temperature=tau)
            )
            accuracy = losses.contrastive_accuracy(
                query, key[:, other], candidates, among=True, axis_name=self.axis_name
            )
            correct.append(accuracy)
        return 2 * tau * self.mean(jnp.sum(jnp.stack(terms))), {
            "contrastive_accuracy": self.mean(jnp.mean(jnp.stack(correct))),
            "ema_decay": self.ema_decay(step),
        }

    def update(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, step: Array
    ) -> tuple[Pytree, Pytree]:
        """Updates the target's parameters; its batch statistics are no EMA of the online ones.

        The official code does so before it encodes the next step's keys, which is equivalent.
        """
        online = {name: params[name] for name in self.target_networks}
        target = ema.update(state["target"], online, self.ema_decay(step))
        return params, {**state, "target": target}

    def param_groups(self, params: Pytree) -> Pytree:
        """Freezes a ViT's patch projection unless configured otherwise."""
        labels = super().param_groups(params)
        if not self.config.mocov3.freeze_patches or "patch_embed" not in params["encoder"]:
            return labels
        frozen = jax.tree.map(lambda _: "frozen", params["encoder"]["patch_embed"])
        return {**labels, "encoder": {**labels["encoder"], "patch_embed": frozen}}

    def ema_decay(self, step: Array) -> Float[Array, ""]:
        """The target's EMA decay after a step: a cosine from `ema_decay` to `ema_decay_end`."""
        options = self.config.mocov3
        return ema.cosine_decay(
            options.ema_decay, step + 1, self.schedule.total_steps, end=options.ema_decay_end
        )
