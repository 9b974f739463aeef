"""MoCo v2 and SwAV sketched on the protocol: what bends it must show before it is settled."""

import jax
import jax.numpy as jnp

from ssl_jax import ema, losses
from ssl_jax.methods import register
from ssl_jax.methods.base import Method, encode_together, init_module, train_apply


class WithProjector(Method):
    hidden_bn = False

    def __init__(self, *args):
        super().__init__(*args)
        self.projector = self.head(
            hidden=8, out=8, layers=2, hidden_bn=self.hidden_bn, kernel_init="torch"
        )

    def init_networks(self, rng, batch):
        a, b = jax.random.split(rng)
        encoder, encoder_stats = init_module(self.encoder, a, batch["views"][0])
        features = jnp.zeros((1, self.encoder.num_features))
        projector, projector_stats = init_module(self.projector, b, features)
        params = {"encoder": encoder, "projector": projector}
        return params, {"encoder": encoder_stats, "projector": projector_stats}


@register("moco_sketch")
class MoCoSketch(WithProjector):
    """Queue, shuffled keys, an averaged key encoder."""

    queue_size = 96

    def init(self, rng, batch):
        params, stats = self.init_networks(rng, batch)
        queue = losses.normalize(jax.random.normal(rng, (self.queue_size, 8)))
        stats = {**stats, "target": stats}
        return params, {
            "batch_stats": stats,
            "target": jax.tree.map(jnp.copy, params),
            "queue": queue,
        }

    def shuffle(self, images, rng):
        """A local permutation, then the exchange; returns what undoes it too."""
        if self.axis_name is None:
            order = jax.random.permutation(rng, images.shape[0])
            return images[order], lambda x: x[jnp.argsort(order)]
        key = jax.random.fold_in(rng, jax.lax.axis_index(self.axis_name))
        order = jax.random.permutation(key, images.shape[0])

        def exchange(x):
            return jax.lax.all_to_all(x, self.axis_name, 0, 0, tiled=True)

        return exchange(images[order]), lambda x: exchange(x)[jnp.argsort(order)]

    def network(self, params, stats, images):
        features, encoder_stats = train_apply(self.encoder, "encoder", params, stats, images)
        out, projector_stats = train_apply(self.projector, "projector", params, stats, features)
        return features, out, {"encoder": encoder_stats, "projector": projector_stats}

    def forward(self, params, extra, batch, rng):
        stats = extra["batch_stats"]
        features, query, new_stats = self.network(params, stats, batch["views"][0])
        shuffled, unshuffle = self.shuffle(batch["views"][1], rng)
        _, key, target_stats = self.network(extra["target"], stats["target"], shuffled)
        key = jax.lax.stop_gradient(unshuffle(key))
        outputs = {"embedding": features, "query": query, "key": losses.normalize(key)}
        return outputs, {**new_stats, "target": target_stats}

    def loss(self, params, outputs, extra, batch, step):
        loss = losses.info_nce(outputs["query"], outputs["key"], extra["queue"], temperature=0.2)
        return self.mean(loss), {}

    def update(self, params, outputs, extra, step):
        keys = self.gather(outputs["key"])
        start = (step * len(keys)) % self.queue_size
        queue = jax.lax.dynamic_update_slice_in_dim(extra["queue"], keys, start, 0)
        # After the optimiser of this step is before the keys of the next.
        target = ema.update(extra["target"], params, 0.99)
        return params, {**extra, "queue": queue, "target": target}


@register("swav_sketch")
class SwAVSketch(WithProjector):
    """Crops of two sizes, prototypes that start frozen, a queue for the assignments."""

    prototypes, queue_size, queue_from, hidden_bn = 12, 64, 2, True

    def init(self, rng, batch):
        params, stats = self.init_networks(rng, batch)
        kernel = losses.normalize(jax.random.normal(rng, (self.prototypes, 8)))
        queue = jnp.zeros((2, self.queue_size, 8))
        return {**params, "prototypes": {"kernel": kernel}}, {"batch_stats": stats, "queue": queue}

    def forward(self, params, extra, batch, rng):
        stats, features, sizes = extra["batch_stats"], [], []
        for view in batch["views"]:
            if view.shape[1] not in sizes:
                sizes.append(view.shape[1])
        for size in sizes:
            crops = tuple(v for v in batch["views"] if v.shape[1] == size)
            encoded, encoder_stats = encode_together(self, params, stats, crops)
            stats = {**stats, "encoder": encoder_stats}
            features += encoded
        z, projector_stats = train_apply(
            self.projector, "projector", params, stats, jnp.concatenate(features)
        )
        z = losses.normalize(jnp.stack(jnp.split(z, len(features)), axis=1))
        return {"embedding": features[0], "projection": z}, {**stats, "projector": projector_stats}

    def loss(self, params, outputs, extra, batch, step):
        kernel, z = params["prototypes"]["kernel"], outputs["projection"]
        scores = z @ kernel.T
        ready = step >= self.queue_from
        assignments = []
        for crop in range(2):
            batch_scores = scores[:, crop]
            queued = self.my_slice(extra["queue"][crop]) @ kernel.T
            alone = losses.sinkhorn(batch_scores, axis_name=self.axis_name)
            together = losses.sinkhorn(
                jnp.concatenate([batch_scores, queued]), axis_name=self.axis_name
            )
            assignments.append(jnp.where(ready, together[: len(z)], alone))
        q = jnp.stack(assignments, axis=1)
        return self.mean(losses.swapped_prediction(scores, q, temperature=0.1)), {}

    def my_slice(self, queue):
        if self.axis_name is None:
            return queue
        share = len(queue) // jax.lax.axis_size(self.axis_name)
        start = jax.lax.axis_index(self.axis_name) * share
        return jax.lax.dynamic_slice_in_dim(queue, start, share)

    def update(self, params, outputs, extra, step):
        kernel = losses.normalize(params["prototypes"]["kernel"])
        new = self.gather(outputs["projection"][:, :2]).swapaxes(0, 1)
        queue = jnp.concatenate([new, extra["queue"]], axis=1)[:, : self.queue_size]
        return {**params, "prototypes": {"kernel": kernel}}, {**extra, "queue": queue}

    def param_groups(self, params):
        labels = super().param_groups(params)
        return {**labels, "prototypes": {"kernel": "frozen_until"}}
