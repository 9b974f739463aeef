"""MoCo v1 (He et al., 2019, arXiv:1911.05722) and v2 (Chen et al., 2020, arXiv:2003.04297).

The query encoder learns to match each query with the key of the same image; the negatives are a
queue of earlier batches' keys. Keys come from an EMA of the query encoder. With BatchNorm per
device (`config.model.bn_group_size=1`, the official recipe) a query and its key would share batch
statistics, which would reveal the match. Key images are therefore shuffled across devices before
they are encoded, and the keys are sent back. Global statistics don't depend on where an image is,
so with them nothing is sent. `config.model.bn_splits` makes one device act as several, with keys
shuffled across its splits.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ssl_jax import ema, losses
from ssl_jax.errors import UserError
from ssl_jax.methods.base import Batch, Method, Pytree, init_networks
from ssl_jax.models import ResNet, ViT


class MoCo(Method):
    """Encoder, projector, their EMA (`state["target"]`), and a queue of keys."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.require_two_views()
        options = self.config.moco
        if options.shared_queue and not options.symmetric:
            raise UserError(
                "config.moco.shared_queue shares a queue between the two directions of a symmetric "
                "loss, but config.moco.symmetric is off. Turn it on, or shared_queue off."
            )
        keys = self.config.batch_size * (2 if options.shared_queue else 1)
        self.keys_per_step = keys  # in each queue
        if options.queue % keys:
            twice = "twice " * options.shared_queue
            raise UserError(
                f"config.moco.queue is {options.queue}, which steps of {keys} keys don't fill "
                f"evenly. Use a multiple of {twice}config.batch_size, such as "
                f"{keys * max(1, options.queue // keys)}."
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
        self.target_networks = self.networks

    def init(self, rng: Array, batch: Batch) -> tuple[Pytree, Pytree]:
        """Copies the key encoder; fills the queues with normalized Gaussian rows.

        They are [1, K, d], or if each direction of a symmetric loss has its own [2, K, d].
        """
        rng_networks, rng_queue = jax.random.split(rng)
        params, stats = init_networks(self.networks, rng_networks, batch["views"][0])
        options = self.config.moco
        queues = 2 if options.symmetric and not options.shared_queue else 1
        queue = jax.random.normal(rng_queue, (queues, options.queue, options.out))
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
        directions = 2 if self.config.moco.symmetric else 1
        stats = dict(state["batch_stats"])
        target_stats = stats.pop("target")
        images, random = batch["views"][:directions], self.image_keys(rng, batch)
        random = random and random[:directions]
        (features, query), stats = self.apply_to_views(
            self.networks, params, stats, images, separate=True, keys=random
        )
        # A ViT has no BatchNorm; an encoder of your own may have statistics without variables.
        leaks = bool(jax.tree.leaves(target_stats)) or not self._built_in
        shuffled = [
            self.shuffle(view, jax.random.fold_in(rng, i)) if leaks else (view, lambda x: x)
            for i, view in enumerate(batch["views"][::-1][:directions])
        ]
        (_, key), target_stats = self.apply_to_views(
            self.networks, state["target"], target_stats, [x for x, _ in shuffled], separate=True
        )
        keys = [unshuffle(key[:, i]) for i, (_, unshuffle) in enumerate(shuffled)]
        outputs = {
            "embedding": features[:, 0],
            "query": query,
            "key": losses.normalize(jax.lax.stop_gradient(jnp.stack(keys, axis=1))),
        }
        return outputs, {**stats, "target": target_stats}

    def loss(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, batch: Batch, step: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Computes InfoNCE against the queue, which doesn't hold this batch yet.

        Only with a shared queue, the second direction's negatives include the first one's keys.
        """
        options, queues = self.config.moco, state["queue"]
        temperature = options.temperature
        terms, correct = [], []
        for i in range(outputs["query"].shape[1]):
            query, key = outputs["query"][:, i], outputs["key"][:, i]
            if options.shared_queue and i == 1:
                first = self.gather(jax.lax.stop_gradient(outputs["key"][:, 0]))
                queues = self.enqueue(queues, first[None], step)
            queue = queues[0 if options.shared_queue else i]
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
        keys = self.gather(outputs["key"]).swapaxes(0, 1)  # [directions, batch, d]
        keys = keys.reshape(len(state["queue"]), -1, keys.shape[-1])
        queue = self.enqueue(state["queue"], keys, step)
        target = ema.update(state["target"], params, self.ema_decay(step))
        return params, {**state, "queue": queue, "target": target}

    def enqueue(
        self, queue: Float[Array, "q k d"], keys: Float[Array, "q b d"], step: Array
    ) -> Float[Array, "q k d"]:
        """Puts keys of this step in the place of the oldest, from where its first one belongs."""
        start = step % (queue.shape[1] // self.keys_per_step) * self.keys_per_step
        return jax.lax.dynamic_update_slice_in_dim(queue, keys, start, axis=1)

    def ema_decay(self, step: Array) -> Float[Array, ""]:
        """The key encoder's EMA decay: a cosine from `ema_decay` to `ema_decay_end`."""
        options = self.config.moco
        return ema.cosine_decay(
            options.ema_decay, step, self.schedule.total_steps, end=options.ema_decay_end
        )

    @property
    def _built_in(self) -> bool:
        return isinstance(self.encoder, ResNet | ViT)

    def shuffle(
        self, images: Float[Array, "n *shape"], rng: Array
    ) -> tuple[Array, Callable[[Array], Array]]:
        """Shuffles images across devices (section 3.3, "Shuffling BN").

        A local permutation, then an all-to-all of equal shares; no device receives all images. With
        fewer images per device than devices, the all-to-all stays within groups of devices. The
        local permutation also shuffles across `config.model.bn_splits`.

        Args:
          images: this device's images, [n, ...]; not moved if `config.moco.shuffle` is off or
            BatchNorm's statistics are global, else sent in the compute dtype of a built-in encoder.
          rng: the same on every device.

        Returns:
          The same number of images, from all devices (of the group), and a function that returns
          arrays computed from them to the images' own devices, in the original order.

        Raises:
          UserError: the images can't be split evenly among devices.
        """
        n = images.shape[0]
        devices = 1 if self.axis_name is None else jax.lax.axis_size(self.axis_name)
        splits = self.config.model.bn_splits
        local_statistics = 0 < self.config.model.bn_group_size < devices or splits > 1
        if not self.config.moco.shuffle or not local_statistics:
            return images, lambda x: x
        group = math.gcd(n, devices)
        if group == 1 < devices:
            raise UserError(
                f"Each device encodes {n} images at a time, which can't be shuffled across "
                f"{devices} devices, so BatchNorm would leak which key matches. Make "
                f"config.batch_size (or config.microbatch) a multiple of {2 * devices}, or set "
                "config.model.bn_group_size=0."
            )
        if self.axis_name is not None:
            rng = jax.random.fold_in(rng, jax.lax.axis_index(self.axis_name))
        order: Int[Array, " n"] = jax.random.permutation(rng, n)
        # Strided groups, so that each group spans hosts.
        stride = devices // group
        groups = [list(range(first, devices, stride)) for first in range(stride)]

        def all_to_all(x: Array) -> Array:
            if devices == 1:
                return x
            return jax.lax.all_to_all(
                x,
                self.axis_name,
                0,
                0,
                tiled=True,
                axis_index_groups=None if group == devices else groups,
            )

        # In the dtype in which they are encoded, if that is known.
        dtype = self.config.dtype if self._built_in else images.dtype
        sent = all_to_all(images[order].astype(dtype)).astype(images.dtype)
        return sent, lambda x: all_to_all(x)[jnp.argsort(order)]
