"""VICReg: variance-invariance-covariance regularization (Bardes et al., 2021, arXiv:2105.04906).

The embeddings of an image's two views should be near each other, while each dimension keeps a
standard deviation of 1 over the global batch and is uncorrelated with the others. One network, no
negatives, predictor, EMA, stop-gradient or normalization of the embeddings.
"""

from typing import Any

from jaxtyping import Array, Float

from ssl_jax import losses
from ssl_jax.methods.base import Batch, Method, Pytree


class VICReg(Method):
    """Encoder and projector (the paper's expander)."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.require_two_views()
        options = self.config.vicreg
        projector = self.head(
            hidden=options.hidden,
            out=options.out,
            layers=options.layers,
            hidden_bias=options.hidden_bias,
            out_bias=options.out_bias,
            kernel_init="torch",
        )
        self.networks = {"encoder": self.encoder, "projector": projector}
        # Constant embeddings have a standard deviation of √1e-4.
        self.trivial_loss = options.variance_weight * 0.99

    def forward(
        self, params: Pytree, state: Pytree, batch: Batch, rng: Array
    ) -> tuple[dict[str, Array], Pytree]:
        """Encodes each view as its own batch; outputs `projection` [n, 2, d]."""
        return self.project_views(params, state, batch, rng, separate=True)

    def loss(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, batch: Batch, step: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Weights and adds invariance, variance and covariance (eq. 6)."""
        options, z = self.config.vicreg, outputs["projection"]
        terms = losses.vicreg(z[:, 0], z[:, 1], axis_name=self.axis_name)
        named = dict(zip(("invariance", "variance", "covariance"), terms, strict=True))
        loss = sum(options[f"{name}_weight"] * term for name, term in named.items())
        return loss, named
