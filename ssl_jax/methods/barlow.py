"""Barlow Twins: redundancy reduction (Zbontar et al., 2021, arXiv:2103.03230).

Each dimension of the embeddings should agree between the two views of an image and be uncorrelated
with the others, over the global batch. One network, no negatives, predictor, EMA or stop-gradient.
"""

from typing import Any

from jaxtyping import Array, Float

from ssl_jax import losses
from ssl_jax.methods.base import Batch, Method, Pytree


class BarlowTwins(Method):
    """Encoder and projector; the embeddings are normalized over the global batch in the loss."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.require_two_views()
        options = self.config.barlow
        projector = self.head(
            hidden=options.hidden,
            out=options.out,
            layers=options.layers,
            hidden_bias=options.hidden_bias,
            out_bias=options.out_bias,
            kernel_init="torch",
        )
        self.networks = {"encoder": self.encoder, "projector": projector}
        # Constant embeddings have no correlation at all.
        self.trivial_loss = options.loss_scale * options.out

    def forward(
        self, params: Pytree, state: Pytree, batch: Batch, rng: Array
    ) -> tuple[dict[str, Array], Pytree]:
        """Encodes each view as its own batch; outputs `projection` [n, 2, d], not normalized."""
        return self.project_views(params, state, batch, rng, separate=True)

    def loss(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, batch: Batch, step: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Adds the invariance and λ times the redundancy (eq. 1), times `loss_scale`.

        The gradient is the true one. The official code sums C over devices without its gradient and
        then averages over devices, which divides the gradient by their number.
        """
        options, z = self.config.barlow, outputs["projection"]
        invariance, redundancy = losses.barlow_twins(z[:, 0], z[:, 1], axis_name=self.axis_name)
        loss = invariance + options.redundancy_weight * redundancy
        return options.loss_scale * loss, {"invariance": invariance, "redundancy": redundancy}
