"""SupCon: supervised contrastive learning (Khosla et al., 2020, arXiv:2004.11362).

SimCLR with labels: the positives of a view are all other views of its class in the global batch.
An image without a label (-1) has only its other view, as in SimCLR, and is a negative of all other
images.
"""

from typing import Any

from jaxtyping import Array, Float

from ssl_jax import losses
from ssl_jax.methods.base import Batch, Method, Pytree


class SupCon(Method):
    """Encoder and a projector without BatchNorm; labels are used in the loss only."""

    needs_labels = True
    keeps_unlabeled = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.require_two_views()
        options = self.config.supcon
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

    def forward(
        self, params: Pytree, state: Pytree, batch: Batch, rng: Array
    ) -> tuple[dict[str, Array], Pytree]:
        """Encodes both views in one batch; outputs `projection` [n, 2, d]."""
        return self.project_views(params, state, batch, rng, separate=False)

    def loss(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, batch: Batch, step: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Computes the loss over the global batch, times `temperature / base_temperature`."""
        options, z = self.config.supcon, outputs["projection"]
        loss = losses.supcon(
            z[:, 0],
            z[:, 1],
            batch["label"],
            temperature=options.temperature,
            axis_name=self.axis_name,
        )
        return options.temperature / options.base_temperature * loss, {"supcon": loss}
