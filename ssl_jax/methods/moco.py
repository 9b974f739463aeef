"""MoCo v1 (He et al., 2019, arXiv:1911.05722) and v2 (Chen et al., 2020, arXiv:2003.04297).

A query encoder is trained to tell the key of its own image from a queue of keys of earlier batches.
Keys come from a slow average of the query encoder. Where BatchNorm is per device
(`config.model.bn_group_size=1`, the official recipe) a query and its key would share the
statistics of one batch, and the network could tell them by those; so key images change devices
before they are encoded, and their keys come back.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ssl_jax import ema, losses
from ssl_jax.diagnostics import contrastive_accuracy
from ssl_jax.errors import UserError
from ssl_jax.methods.base import Batch, Method, Pytree, apply_networks, init_networks


class MoCo(Method):
    """MoCo: encoder, projector, their momentum copies (`state["target"]`), a queue."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.require_two_views()
        options, batch = self.config.moco, self.config.batch_size
        if options.queue % batch:
            multiple = batch * max(1, options.queue // batch)
            raise UserError(
                f"config.moco.queue is {options.queue}, which batches of {batch} don't fill "
                f"evenly: use a multiple of config.batch_size, such as {multiple}."
            )
        projector = self.head(
            hidden=options.hidden or self.encoder.num_features,
            out=options.out,
            layers=options.layers,
            hidden_bias=True,
            hidden_bn=False,
            out_bias=True,
            kernel_init="torch",
        )
        self.networks = {"encoder": self.encoder, "projector": projector}

    def init(self, rng: Array, batch: Batch) -> tuple[Pytree, Pytree]:
        """The key encoder starts as a copy, the queue [views, K, d] as unit Gaussian vectors."""
        rng_networks, rng_queue = jax.random.split(rng)
        params, stats = init_networks(self.networks, rng_networks, batch["views"][0])
        options = self.config.moco
        queue = jax.random.normal(
            rng_queue, (2 if options.symmetric else 1, options.queue, options.out)
        )
        return params, {
            "batch_stats": {**stats, "target": jax.tree.map(jnp.copy, stats)},
            "target": jax.tree.map(jnp.copy, params),
            "queue": losses.normalize(queue),
        }

    def forward(
        self, params: Pytree, state: Pytree, batch: Batch, rng: Array
    ) -> tuple[dict[str, Array], Pytree]:
        """`query` and `key` [n, 1 or 2, d], unit keys: view 1 asks for view 2, and the reverse."""
        pairs = [(0, 1), (1, 0)] if self.config.moco.symmetric else [(0, 1)]
        stats = dict(state["batch_stats"])
        target_stats = stats.pop("target")
        queries, keys, embeddings = [], [], []
        for number, (asking, answering) in enumerate(pairs):
            (features, query), stats = apply_networks(
                self.networks, params, stats, batch["views"][asking]
            )
            embeddings.append(features)
            images, unshuffle = self.shuffle(
                batch["views"][answering], jax.random.fold_in(rng, number)
            )
            (_, key), target_stats = apply_networks(
                self.networks, state["target"], target_stats, images
            )
            queries.append(query)
            keys.append(losses.normalize(jax.lax.stop_gradient(unshuffle(key))))
        outputs = {
            "embedding": embeddings[0],
            "query": jnp.stack(queries, axis=1),
            "key": jnp.stack(keys, axis=1),
        }
        return outputs, {**stats, "target": target_stats}

    def loss(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, batch: Batch, step: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """InfoNCE against the queue as it was before this batch."""
        temperature = self.config.moco.temperature
        terms, correct = [], []
        for i in range(outputs["query"].shape[1]):
            query, key = outputs["query"][:, i], outputs["key"][:, i]
            queue = state["queue"][i]
            terms.append(losses.info_nce(query, key, queue, temperature=temperature))
            correct.append(contrastive_accuracy(query, key, queue, among=False))
        loss = self.mean(jnp.mean(jnp.stack(terms)))
        accuracy = self.mean(jnp.mean(jnp.stack(correct)))
        return loss, {"contrastive_accuracy": accuracy, "ema_decay": self.ema_decay(step)}

    def update(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, step: Array
    ) -> tuple[Pytree, Pytree]:
        """Enqueues the global keys, moves the key encoder.

        The official code moves it before it encodes keys. After this step's optimiser is the same
        moment as before the next step's keys, and at the first step both encoders are equal.
        """
        options = self.config.moco
        keys = self.gather(outputs["key"]).swapaxes(0, 1)  # [views, batch, d]
        start = step % (options.queue // keys.shape[1]) * keys.shape[1]
        queue = jax.lax.dynamic_update_slice_in_dim(state["queue"], keys, start, axis=1)
        decay = self.ema_decay(step)
        target = ema.update(state["target"], params, decay)
        return params, {**state, "queue": queue, "target": target}

    def ema_decay(self, step: Array) -> Float[Array, ""]:
        """The key encoder's decay: constant, or a cosine from `momentum` to `ema_decay_end`."""
        options = self.config.moco
        return ema.cosine_decay(
            options.ema_decay, step, self.schedule.total_steps, end=options.ema_decay_end
        )

    def shuffle(
        self, images: Float[Array, "n *shape"], rng: Array
    ) -> tuple[Array, Callable[[Array], Array]]:
        """Spreads this device's images over the devices (section 3.3, "Shuffling BN").

        A local permutation, then an exchange of equal shares; no device sees all images. Where a
        device has fewer images than there are devices, they are exchanged within groups.

        Args:
          images: this device's; with `config.moco.shuffle` off they stay where they are.
          rng: the same on every device.

        Returns:
          As many images from all devices (of the group), and what brings anything back that was
          computed from them.

        Raises:
          UserError: BatchNorm is not global, and the images can't be exchanged.
        """
        n = images.shape[0]
        devices = 1 if self.axis_name is None else jax.lax.axis_size(self.axis_name)
        group = math.gcd(n, devices)
        own_statistics = 0 < self.config.model.bn_group_size < devices
        if not self.config.moco.shuffle:
            return images, lambda x: x
        if group == 1 and own_statistics:
            raise UserError(
                f"A device encodes {n} images at a time, which {devices} devices can't exchange, "
                "and BatchNorm would tell a key by its batch: make config.batch_size (or "
                f"config.microbatch) a multiple of {2 * devices}, or set "
                "config.model.bn_group_size=0."
            )
        if group == 1:
            return images, lambda x: x
        rng = jax.random.fold_in(rng, jax.lax.axis_index(self.axis_name))
        order: Int[Array, " n"] = jax.random.permutation(rng, n)
        # Neighbours by a stride, so that a group spans hosts.
        stride = devices // group
        groups = [list(range(first, devices, stride)) for first in range(stride)]

        def exchange(x: Array) -> Array:
            return jax.lax.all_to_all(
                x,
                self.axis_name,
                0,
                0,
                tiled=True,
                axis_index_groups=None if group == devices else groups,
            )

        return exchange(images[order]), lambda x: exchange(x)[jnp.argsort(order)]
