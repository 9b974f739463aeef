"""SimSiam: exploring simple Siamese representation learning (Chen & He, 2020, arXiv:2011.10566).

One network, two views, a predictor and a stop-gradient: no negatives, no EMA, no queue.
"""

from typing import Any

import jax
from jaxtyping import Array, Float

from ssl_jax import losses
from ssl_jax.methods.base import Batch, Method, Pytree


class SimSiam(Method):
    """Encoder, three-layer projector, predictor with a constant learning rate."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.require_two_views()
        options = self.config.simsiam
        projector = self.head(
            hidden=options.hidden or self.encoder.num_features,
            out=options.out,
            layers=options.layers,
            out_bias=options.out_bias,
            out_bn=options.out_bn,
            kernel_init="torch",
        )
        predictor = self.head(
            hidden=options.predictor_hidden,
            out=options.out,
            layers=2,
            out_bias=True,
            kernel_init="torch",
        )
        self.networks = {"encoder": self.encoder, "projector": projector, "predictor": predictor}

    def forward(
        self, params: Pytree, state: Pytree, batch: Batch, rng: Array
    ) -> tuple[dict[str, Array], Pytree]:
        """Encodes each view as its own batch; outputs `prediction` and `projection` [n, 2, d]."""
        views, keys = batch["views"], self.image_keys(rng, batch)
        (features, projection, prediction), stats = self.apply_to_views(
            self.networks, params, state["batch_stats"], views, separate=True, keys=keys
        )
        outputs = {
            "embedding": features[:, 0],
            "prediction": prediction,
            "projection": projection,
        }
        return outputs, stats

    def loss(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, batch: Batch, step: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Averages both directions' negative cosines (eq. 4)."""
        p, z = outputs["prediction"], outputs["projection"]
        if self.config.simsiam.stop_gradient:
            z = jax.lax.stop_gradient(z)
        forth = losses.negative_cosine(p[:, 0], z[:, 1])
        back = losses.negative_cosine(p[:, 1], z[:, 0])
        return self.mean((forth + back) / 2), {}

    def param_groups(self, params: Pytree) -> Pytree:
        """Holds the predictor's learning rate; freezes the bias before the last BatchNorm."""
        labels = super().param_groups(params)
        if self.config.simsiam.predictor_constant_lr:
            labels["predictor"] = jax.tree.map(lambda _: "constant_lr", params["predictor"])
        if self.config.simsiam.out_bias:
            labels["projector"][f"dense{self.config.simsiam.layers}"]["bias"] = "frozen"
        return labels
