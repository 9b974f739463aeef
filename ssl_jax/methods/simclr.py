"""SimCLR v1 (Chen et al., 2020, arXiv:2002.05709) and v2 (Chen et al., 2020, arXiv:2006.10029).

Two views of each image go through one encoder and a projector together, so that BatchNorm sees all
2B views of the global batch; NT-Xent pulls the two projections of an image together, with the
other 2B - 2 as negatives. v2 has a three-layer projector, whose first layer fine-tuning may keep,
and optionally a memory bank: projections of earlier batches by an EMA of the networks, as
additional negatives (section 2; not in the official code).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssl_jax import ema, losses
from ssl_jax.errors import UserError
from ssl_jax.methods.base import Batch, Method, Pytree, init_networks


class SimCLR(Method):
    """Encoder, projector, NT-Xent; a memory bank adds `target` and `queue` to `state`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.require_two_views()
        options = self.config.simclr
        if options.memory_bank % (2 * self.config.batch_size):
            raise UserError(
                f"config.simclr.memory_bank is {options.memory_bank}: it must be 0 or a multiple "
                f"of twice config.batch_size, {2 * self.config.batch_size}."
            )
        self.width = options.out if options.layers else self.encoder.num_features
        projector = self.head(
            hidden=options.hidden or self.encoder.num_features,
            out=options.out,
            layers=options.layers,
            hidden_bias=options.head_bn == "none",
            hidden_bn=options.head_bn != "none",
            out_bias=options.head_bn == "none",
            out_bn=options.head_bn,
            kernel_init="normal_0.01",
        )
        self.networks = {"encoder": self.encoder, "projector": projector}
        self.target_networks = self.networks if options.memory_bank else {}

    def init(self, rng: Array, batch: Batch) -> tuple[Pytree, Pytree]:
        """Starts the EMA as a copy and the memory bank with normalized Gaussian rows."""
        rng_networks, rng_memory = jax.random.split(rng)
        params, stats = init_networks(self.networks, rng_networks, batch["views"][0])
        options = self.config.simclr
        if not options.memory_bank:
            return params, {"batch_stats": stats}
        queue = losses.normalize(jax.random.normal(rng_memory, (options.memory_bank, self.width)))
        return params, {
            "batch_stats": {**stats, "target": jax.tree.map(jnp.copy, stats)},
            "target": jax.tree.map(jnp.copy, params),
            "queue": queue,
        }

    def forward(
        self, params: Pytree, state: Pytree, batch: Batch, rng: Array
    ) -> tuple[dict[str, Array], Pytree]:
        """Encodes both views in one batch, or one by one; outputs `projection` [n, 2, d]."""
        stats, separate = dict(state["batch_stats"]), self.config.simclr.separate_views
        target_stats = stats.pop("target", None)
        keys = self.image_keys(rng, batch)
        (features, z), stats = self.apply_to_views(
            self.networks, params, stats, batch["views"], separate=separate, keys=keys
        )
        outputs = {"embedding": features[:, 0], "projection": z}
        if target_stats is None:
            return outputs, stats
        (_, key), target_stats = self.apply_to_views(
            self.networks, state["target"], target_stats, batch["views"], separate=separate
        )
        outputs["key"] = losses.normalize(jax.lax.stop_gradient(key))
        return outputs, {**stats, "target": target_stats}

    def loss(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, batch: Batch, step: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Computes NT-Xent over the global batch, times `loss_scale`."""
        options = self.config.simclr
        z = outputs["projection"]
        loss, accuracy = losses.nt_xent_and_accuracy(
            z[:, 0],
            z[:, 1],
            temperature=options.temperature,
            axis_name=self.axis_name,
            block_size=options.block_size or None,
            memory=state.get("queue"),
        )
        logs = {"nt_xent": loss, "contrastive_accuracy": accuracy}
        if "queue" in state:
            logs["ema_decay"] = jnp.float32(options.ema_decay)
        return options.loss_scale * loss, logs

    def update(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, step: Array
    ) -> tuple[Pytree, Pytree]:
        """Stores the global batch's projections in the memory bank and updates the EMA."""
        if "queue" not in state:
            return params, state
        options = self.config.simclr
        keys = self.gather(outputs["key"]).reshape(-1, self.width)
        start = step % (options.memory_bank // keys.shape[0]) * keys.shape[0]
        queue = jax.lax.dynamic_update_slice_in_dim(state["queue"], keys, start, axis=0)
        target = ema.update(state["target"], params, options.ema_decay)
        return params, {**state, "queue": queue, "target": target}
