"""MoCo v1 (He et al., 2019, arXiv:1911.05722) and v2 (Chen et al., 2020, arXiv:2003.04297).

The query encoder learns to match each query with the key of the same image; the negatives are a
queue of earlier batches' keys. Keys come from an EMA of the query encoder. With BatchNorm per
device (`config.model.bn_group_size=1`, the official recipe) a query and its key would share batch
statistics, which would reveal the match. Key images are therefore shuffled across devices before
they are encoded, and the keys are sent back. Global statistics don't depend on where an image is,
so with them nothing is sent.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ssl_jax import ema, losses
from ssl_jax.errors import UserError
from ssl_jax.methods.base import Batch, Method, Pytree, apply_networks, init_networks


class MoCo(Method):
    """Encoder, projector, their EMA (`state["target"]`), and a queue of keys."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.require_two_views()
        options, batch = self.config.moco, self.config.batch_size
        if options.queue % batch:
            multiple = batch * max(1, options.queue // batch)
            raise UserError(
                f"config.moco.queue is {options.queue}, which batches of {batch} don't fill "
                f"evenly. Use a multiple of config.batch_size, such as {multiple}."
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
        """Copies the key encoder; fills the queue [views, K, d] with normalized Gaussian rows."""
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
        """Outputs `query` and `key`, [n, 1 or 2, d]; keys are unit rows.

        View 1's query is paired with view 2's key, and the reverse if `symmetric`.
        """
        pairs = [(0, 1), (1, 0)] if self.config.moco.symmetric else [(0, 1)]
        stats = dict(state["batch_stats"])
        target_stats = stats.pop("target")
        queries, keys, embeddings = [], [], []
        for number, (query_view, key_view) in enumerate(pairs):
            (features, query), stats = apply_networks(
                self.networks, params, stats, batch["views"][query_view]
            )
            embeddings.append(features)
            images, unshuffle = self.shuffle(
                batch["views"][key_view], jax.random.fold_in(rng, number)
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
        """Computes InfoNCE against the queue, which doesn't hold this batch yet."""
        temperature = self.config.moco.temperature
        terms, correct = [], []
        for i in range(outputs["query"].shape[1]):
            query, key = outputs["query"][:, i], outputs["key"][:, i]
            queue = state["queue"][i]
            terms.append(losses.info_nce(query, key, queue, temperature=temperature))
            accuracy = losses.contrastive_accuracy(
                query, key, queue, among=False, axis_name=self.axis_name
            )
            correct.append(accuracy)
        loss = self.mean(jnp.mean(jnp.stack(terms)))
        return loss, {
            "contrastive_accuracy": self.mean(jnp.mean(jnp.stack(correct))),
            "ema_decay": self.ema_decay(step),
        }

    def update(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, step: Array
    ) -> tuple[Pytree, Pytree]:
        """Enqueues the global batch's keys and updates the key encoder.

        The official code updates the key encoder before it encodes keys. Updating it after the
        previous step's optimizer is equivalent, because at the first step both encoders are equal.
        """
        options = self.config.moco
        keys = self.gather(outputs["key"]).swapaxes(0, 1)  # [views, batch, d]
        start = step % (options.queue // keys.shape[1]) * keys.shape[1]
        queue = jax.lax.dynamic_update_slice_in_dim(state["queue"], keys, start, axis=1)
        decay = self.ema_decay(step)
        target = ema.update(state["target"], params, decay)
        return params, {**state, "queue": queue, "target": target}

    def ema_decay(self, step: Array) -> Float[Array, ""]:
        """The key encoder's EMA decay: a cosine from `ema_decay` to `ema_decay_end`."""
        options = self.config.moco
        return ema.cosine_decay(
            options.ema_decay, step, self.schedule.total_steps, end=options.ema_decay_end
        )

    def shuffle(
        self, images: Float[Array, "n *shape"], rng: Array
    ) -> tuple[Array, Callable[[Array], Array]]:
        """Shuffles images across devices (section 3.3, "Shuffling BN").

        A local permutation, then an all-to-all of equal shares; no device receives all images. With
        fewer images per device than devices, the all-to-all stays within groups of devices.

        Args:
          images: this device's images, [n, ...]; not moved if `config.moco.shuffle` is off or
            BatchNorm's statistics are global.
          rng: the same on every device.

        Returns:
          The same number of images, from all devices (of the group), and a function that returns
          arrays computed from them to the images' own devices, in the original order.

        Raises:
          UserError: the images can't be split evenly among devices.
        """
        n = images.shape[0]
        devices = 1 if self.axis_name is None else jax.lax.axis_size(self.axis_name)
        local_statistics = 0 < self.config.model.bn_group_size < devices
        if not self.config.moco.shuffle or not local_statistics:
            return images, lambda x: x
        group = math.gcd(n, devices)
        if group == 1:
            raise UserError(
                f"Each device encodes {n} images at a time, which can't be shuffled across "
                f"{devices} devices, so BatchNorm would leak which key matches. Make "
                f"config.batch_size (or config.microbatch) a multiple of {2 * devices}, or set "
                "config.model.bn_group_size=0."
            )
        rng = jax.random.fold_in(rng, jax.lax.axis_index(self.axis_name))
        order: Int[Array, " n"] = jax.random.permutation(rng, n)
        # Strided groups, so that each group spans hosts.
        stride = devices // group
        groups = [list(range(first, devices, stride)) for first in range(stride)]

        def all_to_all(x: Array) -> Array:
            return jax.lax.all_to_all(
                x,
                self.axis_name,
                0,
                0,
                tiled=True,
                axis_index_groups=None if group == devices else groups,
            )

        return all_to_all(images[order]), lambda x: all_to_all(x)[jnp.argsort(order)]
