"""SwAV: contrasting cluster assignments (Caron et al., 2020, arXiv:2006.09882).

The first two crops of each image are assigned to prototypes by Sinkhorn-Knopp, evenly over the
global batch; every crop learns to predict the other crops' assignments. The small crops, which are
cheap, are not assigned themselves.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssl_jax import losses
from ssl_jax.diagnostics import prototypes_used
from ssl_jax.errors import UserError
from ssl_jax.methods.base import Batch, Method, Pytree, init_networks


class SwAV(Method):
    """Encoder, projector, prototypes [d, K], and a queue of embeddings for the assignments."""

    assigned = 2  # the number of crops with assignments

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        options = self.config.swav
        projector = self.head(
            hidden=options.hidden,
            out=options.out,
            layers=2,
            hidden_bias=options.hidden_bias,
            out_bias=True,
            kernel_init="torch",
        )
        self.trivial_loss = math.log(options.prototypes)
        self.networks = {"encoder": self.encoder, "projector": projector}
        self.queue_from = self.schedule.steps(options.queue_from_epoch)
        if options.queue % self.config.batch_size:
            raise UserError(
                f"config.swav.queue is {options.queue}: it must be 0 or a multiple of "
                f"config.batch_size, {self.config.batch_size}."
            )

    def init(self, rng: Array, batch: Batch) -> tuple[Pytree, Pytree]:
        """Creates prototypes and an empty queue [2, L, d], newest first, with its count."""
        options = self.config.swav
        rng_networks, rng_prototypes = jax.random.split(rng)
        params, stats = init_networks(self.networks, rng_networks, batch["views"][0])
        # Initialized as in torch.nn.Linear: uniform in ±1/sqrt(fan in), for each of the K rows.
        bound = options.out**-0.5
        shape = (options.prototypes, options.out)
        kernel = jax.random.uniform(rng_prototypes, shape, minval=-bound, maxval=bound)
        if options.prototype_norm == "weight_norm":
            length = jnp.linalg.norm(kernel, axis=1)
            params["prototypes"] = {"kernel": kernel.T, "length": length}
        else:
            params["prototypes"] = {"kernel": losses.normalize(kernel).T}
        if options.prototype_bias:
            rng_bias = jax.random.fold_in(rng_prototypes, 1)
            params["prototypes"]["bias"] = jax.random.uniform(
                rng_bias, (options.prototypes,), minval=-bound, maxval=bound
            )
        state = {"batch_stats": stats}
        if options.queue:
            state["queue"] = jnp.zeros((self.assigned, options.queue, options.out))
            state["queued"] = jnp.zeros((), jnp.int32)
        return params, state

    def forward(
        self, params: Pytree, state: Pytree, batch: Batch, rng: Array
    ) -> tuple[dict[str, Array], Pytree]:
        """Outputs `projection` [n, V, d], unit rows.

        Crops of equal size are encoded together, and then all are projected together; with
        `separate_views`, every crop is encoded and projected by itself.
        """
        embedding, z, stats = self.apply_to_crops(
            self.networks,
            params,
            state["batch_stats"],
            batch["views"],
            separate=self.config.swav.separate_views,
            keys=self.image_keys(rng, batch),
        )
        return {"embedding": embedding, "projection": losses.normalize(z)}, stats

    def loss(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, batch: Batch, step: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Computes swapped prediction; assignments use the queue once it is full."""
        options = self.config.swav
        scores = self.scores(outputs["projection"], params["prototypes"])
        q = self.assign(scores, params["prototypes"], state)
        loss = losses.swapped_prediction(scores, q, temperature=options.temperature)
        nearest = jnp.argmax(scores[:, 0], axis=1)
        used = prototypes_used(nearest, options.prototypes, self.mean)
        return self.mean(loss), {"prototypes_used": used}

    def assign(
        self, scores: Float[Array, "n v k"], prototypes: Pytree, state: Pytree
    ) -> Float[Array, "n a k"]:
        """Assigns the first crops to prototypes, over the global batch and the queue."""
        options = self.config.swav
        own = jax.lax.stop_gradient(scores[:, : self.assigned])

        # Crops are assigned separately; with vmap they share all-reduces, which halves the number.
        @functools.partial(jax.vmap, in_axes=1, out_axes=1)
        def balanced(rows: Array) -> Array:
            return losses.sinkhorn(
                rows,
                epsilon=options.epsilon,
                iterations=options.iterations,
                axis_name=self.axis_name,
            )

        if "queue" not in state:
            return balanced(own)
        share = jnp.stack([self.my_share(queue) for queue in state["queue"]], axis=1)
        queued = jax.lax.stop_gradient(self.scores(share, prototypes))
        # All devices take the same branch, because the count is replicated.
        return jax.lax.cond(
            state["queued"] >= options.queue,
            lambda: balanced(jnp.concatenate([own, queued]))[: own.shape[0]],
            lambda: balanced(own),
        )

    @staticmethod
    def scores(projection: Float[Array, "*n d"], prototypes: Pytree) -> Float[Array, "*n k"]:
        """Scores embeddings against prototypes; in full float32, as Sinkhorn-Knopp divides by ε."""
        kernel = prototypes["kernel"]
        if "length" in prototypes:
            kernel = losses.normalize(kernel.T).T * prototypes["length"][None, :]
        scores = jnp.matmul(projection, kernel, precision="highest")
        if "bias" in prototypes:
            scores += jnp.broadcast_to(prototypes["bias"], scores.shape)
        return scores

    def my_share(self, queue: Float[Array, "l d"]) -> Float[Array, "share d"]:
        """Slices this device's rows of the queue."""
        if self.axis_name is None:
            return queue
        share = queue.shape[0] // jax.lax.axis_size(self.axis_name)
        start = jax.lax.axis_index(self.axis_name) * share
        return jax.lax.dynamic_slice_in_dim(queue, start, share)

    def update(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, step: Array
    ) -> tuple[Pytree, Pytree]:
        """Normalizes the prototypes and puts the global batch into the queue."""
        if self.config.swav.prototype_norm == "unit":
            kernel = losses.normalize(params["prototypes"]["kernel"].T).T
            params = {**params, "prototypes": {**params["prototypes"], "kernel": kernel}}
        if "queue" not in state:
            return params, state
        new = self.gather(outputs["projection"][:, : self.assigned]).swapaxes(0, 1)
        filled = jnp.concatenate([new, state["queue"]], axis=1)[:, : state["queue"].shape[1]]
        # A queue from another run (`config.init_from.state`) is in use from the start.
        filling = (step >= self.queue_from) | (state["queued"] > 0)
        return params, {
            **state,
            "queue": jnp.where(filling, filled, state["queue"]),
            "queued": jnp.minimum(state["queued"] + filling * new.shape[1], filled.shape[1]),
        }

    def param_groups(self, params: Pytree) -> Pytree:
        """Freezes the prototypes for the first `config.optim.frozen_steps` steps."""
        labels = super().param_groups(params)
        frozen = jax.tree.map(lambda _: "frozen_until", params["prototypes"])
        return {**labels, "prototypes": frozen}
