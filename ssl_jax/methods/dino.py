"""DINO: self-distillation with no labels (Caron et al., 2021, arXiv:2104.14294).

Every crop of an image predicts, as a distribution over prototypes, what the teacher sees in the
large crops; the teacher is the student's EMA. A low temperature sharpens the teacher's
distributions, and a moving average of its logits centers them: sharpening alone collapses to one
prototype, centering alone to the uniform distribution. The teacher is the network to evaluate.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssl_jax import ema, losses
from ssl_jax.config import flat_views, view_size
from ssl_jax.diagnostics import prototypes_used
from ssl_jax.errors import UserError
from ssl_jax.methods.base import Batch, Method, Pytree, init_networks


class DINO(Method):
    """Encoder, projector and prototypes, their EMA, and the center of the teacher's logits [K]."""

    evaluates_target = True
    assigned = 2  # the number of crops that the teacher sees

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        options, views = self.config.dino, flat_views(self.config)
        sizes = [view_size(view) for view in views[: self.assigned]]
        if len(sizes) < self.assigned or len(set(sizes)) > 1:
            raise UserError(
                f"config.views gives views of sizes {[view.size for view in views]}, but DINO's "
                "teacher sees the first two, of one size: name two with count 1, or one with "
                "count 2, before the small crops by name."
            )
        projector = self.head(
            hidden=options.hidden,
            out=options.out,
            layers=options.layers,
            hidden_bias=options.hidden_bias,
            hidden_bn=options.head_bn,
            out_bias=True,
            activation="gelu",
            kernel_init="normal_0.02",
        )
        self.trivial_loss = math.log(options.prototypes)
        self.networks = {"encoder": self.encoder, "projector": projector}
        self.target_networks = self.networks

    def init(self, rng: Array, batch: Batch) -> tuple[Pytree, Pytree]:
        """Creates unit prototypes [d, K], with lengths [K] of 1; copies the teacher or its encoder.

        `config.dino.target_init` is "copy" (official) or "encoder", lightly's, whose teacher has
        other random weights in projector and prototypes and moves once before the first step.
        """
        params, stats = self._random(rng, batch)
        target = jax.tree.map(jnp.copy, params)
        if self.config.dino.target_init == "encoder":
            own, _ = self._random(jax.random.fold_in(rng, 1), batch)
            moved = ema.update(own, params, self.ema_decay(jnp.int32(0)))
            target = {**moved, "encoder": target["encoder"]}
        return params, {
            "batch_stats": {**stats, "target": jax.tree.map(jnp.copy, stats)},
            "target": target,
            "center": jnp.zeros(self.config.dino.prototypes),
        }

    def _random(self, rng: Array, batch: Batch) -> tuple[Pytree, Pytree]:
        """Random parameters with prototypes, and initial batch statistics."""
        options = self.config.dino
        rng_networks, rng_prototypes = jax.random.split(rng)
        params, stats = init_networks(self.networks, rng_networks, batch["views"][0])
        # Initialized as in torch.nn.Linear: uniform in ±1/sqrt(fan in), of which only the
        # direction matters.
        bound = options.out**-0.5
        kernel = jax.random.uniform(
            rng_prototypes, (options.out, options.prototypes), minval=-bound, maxval=bound
        )
        params["prototypes"] = {"kernel": kernel, "length": jnp.ones(options.prototypes)}
        return params, stats

    def forward(
        self, params: Pytree, state: Pytree, batch: Batch, rng: Array
    ) -> tuple[dict[str, Array], Pytree]:
        """Outputs unit rows: `projection` [n, V, d] and the teacher's, `target` [n, 2, d].

        Crops of equal size are encoded together, and then all are projected together; with
        `separate_views`, every crop by itself. The teacher runs in train mode and drops nothing.
        """
        stats, separate = dict(state["batch_stats"]), self.config.dino.separate_views
        target_stats, keys = stats.pop("target"), self.image_keys(rng, batch)
        embedding, z, stats = self.apply_to_crops(
            self.networks, params, stats, batch["views"], separate=separate, keys=keys
        )
        large = batch["views"][: self.assigned]
        _, target, target_stats = self.apply_to_crops(
            self.networks, state["target"], target_stats, large, separate=separate
        )
        outputs = {
            "embedding": embedding,
            "projection": losses.normalize(z),
            "target": losses.normalize(jax.lax.stop_gradient(target)),
        }
        return outputs, {**stats, "target": target_stats}

    def loss(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, batch: Batch, step: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Averages the cross-entropies of pairs of a teacher's crop and another crop.

        Logs their parts: the teacher's entropy, from 0 (one prototype for each image) to ln K
        (uniform), and the divergence of the student from it. A collapsed teacher has an entropy
        of 0 or ln K and no divergence (section 5.3).
        """
        options = self.config.dino
        temperature, prototypes = self.teacher_temperature(step), params["prototypes"]
        if options.norm_last_layer:
            length = jax.lax.stop_gradient(prototypes["length"])
            prototypes = {**prototypes, "length": length}
        loss, entropy, nearest = losses.self_distillation(
            outputs["projection"],
            outputs["target"],
            unit_prototypes(prototypes),
            unit_prototypes(state["target"]["prototypes"]),
            state["center"],
            temperature=options.temperature,
            teacher_temperature=temperature,
            block_size=options.block_size or None,
        )
        loss, entropy = self.mean(loss), self.mean(entropy)
        return loss, {
            "teacher_entropy": entropy,
            "divergence": jax.lax.stop_gradient(loss) - entropy,
            "prototypes_used": prototypes_used(nearest, options.prototypes, self.mean),
            "teacher_temperature": temperature,
            "ema_decay": self.ema_decay(step),
        }

    def update(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, step: Array
    ) -> tuple[Pytree, Pytree]:
        """Moves the center to the mean of this step's logits, and then the teacher.

        The mean of the logits is that of the embeddings, scored.
        """
        prototypes = unit_prototypes(state["target"]["prototypes"])
        mean = self.mean(jnp.mean(outputs["target"], axis=(0, 1)))
        logits = jnp.matmul(mean, prototypes, precision="highest")
        keep = self.config.dino.center_decay
        target = ema.update(state["target"], params, self.ema_decay(step))
        return params, {
            **state,
            "center": keep * state["center"] + (1 - keep) * logits,
            "target": target,
        }

    def param_groups(self, params: Pytree) -> Pytree:
        """Freezes the prototypes for `config.optim.frozen_steps` steps, their lengths by config."""
        length = "frozen" if self.config.dino.norm_last_layer else "frozen_until"
        prototypes = {"kernel": "frozen_until", "length": length}
        return {**super().param_groups(params), "prototypes": prototypes}

    def teacher_temperature(self, step: Array) -> Float[Array, ""]:
        """The temperature of the step's epoch, which rises linearly in the first epochs."""
        options = self.config.dino
        start, end = options.teacher_temperature_start, options.teacher_temperature
        epochs = options.teacher_temperature_epochs
        epoch = jnp.asarray(step // self.schedule.steps_per_epoch, jnp.float32)
        rising = start + (end - start) * epoch / max(epochs - 1, 1)
        return jnp.where(epoch < epochs, rising, end)

    def ema_decay(self, step: Array) -> Float[Array, ""]:
        """The teacher's EMA decay: a cosine from `ema_decay` to `ema_decay_end`."""
        options = self.config.dino
        return ema.cosine_decay(
            options.ema_decay, step, self.schedule.total_steps, end=options.ema_decay_end
        )


def unit_prototypes(prototypes: Pytree) -> Float[Array, "d k"]:
    """The prototypes as they are used: PyTorch's weight_norm, directions times lengths."""
    return losses.normalize(prototypes["kernel"].T).T * prototypes["length"][None, :]
