"""SimCLR v1: a simple framework for contrastive learning (Chen et al., 2020, arXiv:2002.05709).

Two views of each image go through one encoder and a projector together, so that BatchNorm sees all
2B images of the global batch; NT-Xent pulls the two projections of an image together against the
2B - 2 others. The projector is thrown away.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssl_jax import losses
from ssl_jax.methods.base import Batch, Method, Pytree, encode_together, init_module, train_apply


class SimCLR(Method):
    """SimCLR v1: encoder, projector, NT-Xent."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        options = self.config.simclr
        self.projector = self.head(
            hidden=options.hidden or self.encoder.num_features,
            out=options.out,
            layers=options.layers,
            hidden_bn=True,
            out_bn="scale",
            kernel_init="normal_0.01",
        )

    def init(self, rng: Array, batch: Batch) -> tuple[Pytree, Pytree]:
        """Initial encoder and projector; nothing beside their batch statistics."""
        rng_encoder, rng_projector = jax.random.split(rng)
        encoder, encoder_stats = init_module(self.encoder, rng_encoder, batch["views"][0])
        features = jnp.zeros((1, self.encoder.num_features))
        projector, projector_stats = init_module(self.projector, rng_projector, features)
        params = {"encoder": encoder, "projector": projector}
        return params, {"batch_stats": {"encoder": encoder_stats, "projector": projector_stats}}

    def forward(
        self, params: Pytree, extra: Pytree, batch: Batch, rng: Array
    ) -> tuple[dict[str, Array], Pytree]:
        """Both views together through encoder and projector: `projection` [n, 2, d]."""
        stats = extra["batch_stats"]
        features, encoder_stats = encode_together(self, params, stats, batch["views"])
        both = jnp.concatenate(features)
        z, projector_stats = train_apply(self.projector, "projector", params, stats, both)
        outputs = {"embedding": features[0], "projection": jnp.stack(jnp.split(z, 2), axis=1)}
        return outputs, {"encoder": encoder_stats, "projector": projector_stats}

    def loss(
        self, params: Pytree, outputs: dict[str, Array], extra: Pytree, batch: Batch, step: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """NT-Xent over the global batch, times `loss_scale`."""
        options = self.config.simclr
        z = outputs["projection"]
        loss = losses.nt_xent(
            z[:, 0],
            z[:, 1],
            temperature=options.temperature,
            axis_name=self.axis_name,
            block_size=options.block_size or None,
        )
        return options.loss_scale * loss, {"nt_xent": loss}
