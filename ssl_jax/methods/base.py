"""The protocol that every method implements, and the code that methods share.

A method is five pure functions over pytrees, written for one device's share of the batch; one train
step serves all methods. The rest of the package relies on these conventions:

* `params["encoder"]` and `state["batch_stats"]["encoder"]` are the trained (online) encoder. A
  method with a target has its networks in `state["target"]` and `state["batch_stats"]["target"]`,
  by the same names. `Method.evaluated` returns the one that evaluations, `load` and exports take.
* every leaf of `outputs` has this device's examples on axis 0, and `outputs["embedding"]` [n, D]
  holds the online encoder's features of the first view.
* outputs are floats. With `config.microbatch`, `forward` sees one microbatch at a time, always with
  the same `rng`, and `loss` gets a batch of ids and labels without views.
* `stats` is the new `state["batch_stats"]`; the rest of `state` changes only in `update`.
* `loss` returns the mean over the global batch on every device (the pmean of local means); its
  gradient is this device's share, and the step averages parameters' gradients once.
* state is replicated: `update` must return the same values on all devices. Queues are kept in the
  order of the global batch.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from ssl_jax.config import Schedule, flat_views, view_shape, view_size
from ssl_jax.errors import UserError, require_choice
from ssl_jax.models import MLPHead, ResNet, make_encoder
from ssl_jax.models.registry import encoder_name
from ssl_jax.models.resnet import architecture, resnet_name
from ssl_jax.optim import role_labels

_IMAGE_KEYS = 0x1D  # no number that a method folds into its key
Pytree = Any
# "views", a tuple of [n, H, W, C] float32; "id" [n]; for labeled data "label" [n], -1 for none, or
# for a method that takes them the rows of `Targets.values`, [n, classes].
Batch = dict[str, Any]


class Method:
    """Base class of the methods: holds the config and builds the encoder.

    Attributes:
      config: the run's config.
      schedule: the run's length in steps.
      axis_name: mapped axis of the devices; None on a single device.
      groups: groups of devices that share BatchNorm statistics; None for a single group.
      encoder: the Flax module of the evaluated network, that of `config.model`. A method may set
        another, called as `module(images, train=...)`, with features [n, D] as its output.
    """

    networks: Mapping[str, nn.Module] = {}  # keyed as in `params`
    target_networks: Mapping[str, nn.Module] = {}  # keyed as in `state["target"]`
    evaluates_target = False  # whether the target is evaluated unless configured otherwise
    trivial_loss: float | None = None  # the loss of constant outputs, if known
    frozen: tuple[str, ...] = ()  # networks whose batch statistics never change
    needs_labels = False  # whether the loss uses labels
    keeps_unlabeled = False  # whether a loss with labels also uses images without one
    takes_targets = False  # whether these may be rows of several classes, "label" int8 [n, classes]
    classifies = False  # whether it trains a classifier and implements `classify`

    def __init__(
        self,
        config: ConfigDict,
        schedule: Schedule,
        axis_name: str | None = None,
        groups: tuple[tuple[int, ...], ...] | None = None,
    ) -> None:
        self.config = config
        self.schedule = schedule
        self.axis_name = axis_name
        self.groups = groups
        self.encoder = self._configured = make_encoder(config, axis_name, groups)

    def init(self, rng: Array, batch: Batch) -> tuple[Pytree, Pytree]:
        """Creates initial parameters and state: by default networks and their batch statistics.

        Args:
          rng: a key, the same on every device.
          batch: any batch with the shapes of training, on one device.

        Returns:
          `params`, `state`; `state["batch_stats"]` mirrors the modules of `params`.
        """
        params, stats = init_networks(self.networks, rng, batch["views"][0])
        return params, {"batch_stats": stats}

    def forward(
        self, params: Pytree, state: Pytree, batch: Batch, rng: Array
    ) -> tuple[dict[str, Array], Pytree]:
        """Encodes this device's (or this microbatch's) examples; returns `outputs`, `stats`."""
        raise NotImplementedError

    def loss(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, batch: Batch, step: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Computes the global loss through `axis_name`; returns it and scalars to log."""
        raise NotImplementedError

    def update(
        self, params: Pytree, outputs: dict[str, Array], state: Pytree, step: Array
    ) -> tuple[Pytree, Pytree]:
        """Moves targets and fills queues after the optimizer; returns `params`, `state`."""
        return params, state

    def evaluated(self, params: Pytree, state: Pytree, network: str = "") -> tuple[Pytree, Pytree]:
        """The networks that evaluations, `load` and exports take, "encoder" among them.

        Args:
          params: of the run.
          state: the method's.
          network: "online" or "target"; "" for `network_name()`.

        Returns:
          Parameters and batch statistics, by the networks' names.
        """
        stats = state["batch_stats"]
        if (network or self.network_name()) == "target":
            return state["target"], stats["target"]
        return params, {name: stats[name] for name in params if name in stats}

    def network_name(self, chosen: str = "default", what: str = "The network to evaluate") -> str:
        """Resolves a choice of `config.eval.network` to "online" or "target".

        Args:
          chosen: "online", "target", or "default" for the config's and, if that is "default", too,
            the method's.
          what: names the choice in errors, such as its key.

        Raises:
          UserError: the method has no target, or another choice.
        """
        require_choice(what, chosen, ("default", "online", "target"))
        if chosen == "default":
            chosen = self.config.eval.network
            what = "The network to evaluate (config.eval.network)"
        if chosen == "default":
            return "target" if self.evaluates_target else "online"
        if chosen == "target" and not self.target_networks:
            raise UserError(
                f"{what} is 'target', but a run of '{self.config.method}' has no target network. "
                "Use default or online."
            )
        return chosen

    def param_groups(self, params: Pytree) -> Pytree:
        """Labels each leaf of `params` for the optimizer; see `optim.make_optimizer`."""
        return role_labels(params)

    @property
    def custom_encoder(self) -> str:
        """What a method sets as `encoder` in place of that of `config.model`; "" for that one."""
        if self.encoder is self._configured:
            return ""
        if not isinstance(self.encoder, ResNet):
            return type(self.encoder).__name__
        own = architecture(self.config.model)
        model = {key: getattr(self.encoder, key) for key in own}
        return "" if (self.config.model.name, model) == ("resnet", own) else resnet_name(model)

    @property
    def encoder_name(self) -> str:
        """The name of the encoder in summaries and cards."""
        return self.custom_encoder or encoder_name(self.config.model)

    @property
    def num_features(self) -> int:
        """The number of features that the encoder returns per image."""
        known = getattr(self.encoder, "num_features", None)
        if isinstance(known, int):
            return known
        shape = (1, *view_shape(self.config, flat_views(self.config)[0]))
        image = jax.ShapeDtypeStruct(shape, jnp.float32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        out, _ = jax.eval_shape(
            lambda k, x: self.encoder.init_with_output(k, x, train=False), key, image
        )
        return int(out.shape[-1])

    def classify(self, params: Pytree, stats: Pytree, images: Array) -> Float[Array, "n classes"]:
        """Computes logits in evaluation mode, for methods that train a classifier."""
        raise NotImplementedError

    def features(
        self, params: Pytree, stats: Pytree, images: Array, projector_layer: int = 0
    ) -> Float[Array, "n d"]:
        """Computes the evaluated features: an encoder's, or a projector's hidden layer.

        Args:
          params: with "encoder", and "projector" if one of its layers is requested.
          stats: batch statistics under the same names.
          images: encoder inputs, [n, H, W, C].
          projector_layer: 0 for the encoder's features; l for the projector's hidden layer l after
            its ReLU (SimCLR v2, section 2: the selector).

        Returns:
          float32 [n, D], in evaluation mode.
        """
        variables = {
            name: {"params": params[name], "batch_stats": stats[name]}
            for name in evaluated_names(projector_layer)
        }
        x = self.encoder.apply(variables["encoder"], images, train=False)
        if projector_layer:
            x = self.networks["projector"].apply(
                variables["projector"], x, train=False, return_hidden=projector_layer
            )
        return jnp.asarray(x)

    def check_projector_layer(self, layer: int) -> None:
        """Raises a UserError if this method's projector has no such hidden layer."""
        if layer == 0:
            return
        hidden = max(getattr(self.networks.get("projector"), "layers", 1) - 1, 0)
        if not 0 < layer <= hidden:
            has = f"hidden layers 1 to {hidden}" if hidden else "no hidden layer to evaluate"
            raise UserError(
                f"The projector layer to evaluate (config.eval.projector_layer) is {layer}, but "
                f"the projector of '{self.config.method}' has {has}: 0 is the encoder."
            )

    def head(self, **options: Any) -> MLPHead:
        """Builds an MLP head with the run's precision, BatchNorm groups and initialization."""
        if self.config.model.head_init == "torch":
            options["kernel_init"] = "torch"
        return MLPHead(
            dtype=self.config.dtype,
            axis_name=self.axis_name,
            axis_index_groups=self.groups,
            bn_splits=self.config.model.bn_splits,
            bn_unbiased=self.config.model.bn_unbiased,
            **options,
        )

    def apply_to_views(
        self,
        networks: Mapping[str, nn.Module],
        params: Pytree,
        stats: Pytree,
        views: Sequence[Array],
        *,
        separate: bool,
        keys: Sequence[Array] | None = None,
    ) -> tuple[list[Array], Pytree]:
        """Applies networks in sequence to views, in train mode.

        Args:
          networks: by name; see `apply_networks`.
          params: by name.
          stats: batch statistics by name.
          views: [n, ...] each; all of one shape unless `separate`.
          separate: apply the networks to each view by itself, in order, so that the running
            statistics are updated once per view; otherwise once to all views together.
          keys: `image_keys` of the views; None to drop nothing, as in target networks.

        Returns:
          Each network's outputs [n, V, ...], and the updated `stats`.
        """
        if separate:
            outputs = []
            each_key: Sequence[Array | None] = keys or [None] * len(views)
            for view, of_images in zip(views, each_key, strict=True):
                of_view, stats = apply_networks(networks, params, stats, view, of_images)
                outputs.append(of_view)
            return [jnp.stack(each, axis=1) for each in zip(*outputs, strict=True)], stats
        splits = self.config.model.bn_splits

        def joined(arrays: Sequence[Array]) -> Array:
            # A split has all views of its images, as a device does.
            n, *shape = arrays[0].shape
            parts = [x.reshape(splits, n // splits, *shape) for x in arrays]
            return jnp.concatenate(parts, axis=1).reshape(-1, *shape)

        of_all = None if keys is None else joined(keys)
        together, stats = apply_networks(networks, params, stats, joined(views), of_all)
        in_parts = [x.reshape(splits, len(views), -1, *x.shape[1:]) for x in together]
        return [x.swapaxes(1, 2).reshape(-1, len(views), *x.shape[3:]) for x in in_parts], stats

    def apply_to_crops(
        self,
        networks: Mapping[str, nn.Module],
        params: Pytree,
        stats: Pytree,
        views: Sequence[Array],
        *,
        separate: bool = False,
        keys: Sequence[Array] | None = None,
    ) -> tuple[Array, Array, Pytree]:
        """Encodes crops of equal size together, and then projects all crops together.

        Args:
          networks: "encoder", and those applied to its features, in order.
          params: by name.
          stats: batch statistics by name.
          views: [n, H, W, C] each, crops of one size next to each other.
          separate: encode and project every crop by itself; see `apply_to_views`.
          keys: as in `apply_to_views`.

        Returns:
          The first view's features [n, D], the last network's outputs [n, V, d], and the updated
          `stats`.
        """
        encoder = {"encoder": networks["encoder"]}
        head = {name: module for name, module in networks.items() if name != "encoder"}
        features: list[Array] = []
        for _, group in itertools.groupby(views, key=lambda view: view.shape[1:3]):
            crops = list(group)
            random = keys and keys[len(features) : len(features) + len(crops)]
            (h,), stats = self.apply_to_views(
                encoder, params, stats, crops, separate=separate, keys=random
            )
            features += list(jnp.unstack(h, axis=1))
        (*_, z), stats = self.apply_to_views(head, params, stats, features, separate=separate)
        return features[0], z, stats

    def project_views(
        self, params: Pytree, state: Pytree, batch: Batch, rng: Array, *, separate: bool
    ) -> tuple[dict[str, Array], Pytree]:
        """The `forward` of an encoder and a projector; outputs `projection` [n, V, d].

        The other arguments and the results are those of `forward`; see `apply_to_views` for
        `separate`.
        """
        views, keys = batch["views"], self.image_keys(rng, batch)
        (features, z), stats = self.apply_to_views(
            self.networks, params, state["batch_stats"], views, separate=separate, keys=keys
        )
        return {"embedding": features[:, 0], "projection": z}, stats

    def image_keys(self, rng: Array, batch: Batch) -> list[Array] | None:
        """Makes a random key per image and view, for an encoder with `uses_keys`.

        They depend on the sample ids, so microbatches and devices don't change them.

        Args:
          rng: the key that `forward` gets.
          batch: with ids and views.

        Returns:
          Keys [n] per view; None if the encoder takes none.
        """
        if not getattr(self.encoder, "uses_keys", False):
            return None
        rng = jax.random.fold_in(rng, _IMAGE_KEYS)
        views = [jax.random.fold_in(rng, view) for view in range(len(batch["views"]))]
        return [jax.vmap(jax.random.fold_in, (None, 0))(key, batch["id"]) for key in views]

    def require_two_views(self) -> None:
        """Raises a UserError unless the config has exactly two views of one size."""
        views = flat_views(self.config)
        sizes = [view_size(view) for view in views]
        if len(sizes) != 2 or sizes[0] != sizes[1]:
            raise UserError(
                f"config.views gives views of sizes {[view.size for view in views]}, but "
                f"'{self.config.method}' pairs two of one size: name two with "
                "count 1, or one with count 2."
            )

    def mean(self, x: Array) -> Array:
        """Averages a local mean over devices."""
        return x if self.axis_name is None else jax.lax.pmean(x, self.axis_name)

    def label_weights(self, label: Int[Array, "n *c"]) -> Float[Array, "n *c"]:
        """Weights of labels in losses: 0 where there is none (-1), else equal.

        Their mean over the global batch is 1, or 0 if there is no label.
        """
        has_label = (label >= 0).astype(jnp.float32)
        share = self.mean(jnp.mean(has_label))
        return has_label / jnp.where(share > 0, share, 1.0)

    def gather(self, x: Float[Array, "n ..."]) -> Float[Array, "batch ..."]:
        """Gathers all devices' examples, in the order of the global batch."""
        if self.axis_name is None:
            return x
        return jax.lax.all_gather(x, self.axis_name, axis=0, tiled=True)


def evaluated_names(projector_layer: int) -> tuple[str, ...]:
    """Returns the names of the networks that `Method.features` uses."""
    return ("encoder", "projector") if projector_layer else ("encoder",)


def init_networks(
    networks: Mapping[str, nn.Module], rng: Array, images: Array
) -> tuple[Pytree, Pytree]:
    """Creates initial parameters of networks applied in sequence.

    Args:
      networks: by name, each called as `module(x, train=...)` on the previous output.
      rng: a key.
      images: a view, [n, H, W, C].

    Returns:
      `params` and `batch_stats` by name, {} for a network without statistics.

    Raises:
      UserError: the encoder's features don't have the shape [n, `num_features`].
    """
    params, stats, x = {}, {}, images[:1]
    for key, (name, module) in zip(
        jax.random.split(rng, len(networks)), networks.items(), strict=True
    ):
        out, variables = module.init_with_output(key, x, train=False)
        params[name], stats[name] = (
            variables.get("params", {}),
            variables.get("batch_stats", {}),
        )
        if name == "encoder":
            _require_features(module, out.shape)
        x = jnp.zeros(out.shape, out.dtype)
    return params, stats


def _require_features(encoder: nn.Module, shape: tuple[int, ...]) -> None:
    """Checks the shape of an encoder's output for one image."""
    promised = getattr(encoder, "num_features", None)
    if len(shape) == 2 and promised in (None, shape[1]):
        return
    known = "" if promised is None else f", where num_features is {promised}"
    raise UserError(
        f"The encoder {type(encoder).__name__} returns features of shape {list(shape)} for one "
        f"image{known}. Return [n, num_features]: average over height and width, and correct "
        "num_features."
    )


def apply_networks(
    networks: Mapping[str, nn.Module],
    params: Pytree,
    stats: Pytree,
    x: Array,
    keys: Array | None = None,
) -> tuple[list[Array], Pytree]:
    """Applies networks in sequence, in train mode.

    Args:
      networks: by name.
      params: by name; entries of other networks are ignored.
      stats: batch statistics by name; entries of other networks are kept.
      x: input of the first network.
      keys: a random key per image, for an encoder with `uses_keys`; None for none.

    Returns:
      Each network's output, and `stats` with the entries of these networks updated.
    """
    outputs, new_stats = [], dict(stats)
    for name, module in networks.items():
        variables = {"params": params[name], "batch_stats": stats[name]}
        random: dict[str, Any] = (
            {} if keys is None or not getattr(module, "uses_keys", False) else {"keys": keys}
        )
        x, changed = module.apply(variables, x, train=True, mutable=["batch_stats"], **random)
        outputs.append(x)
        new_stats[name] = changed.get("batch_stats", {})
    return outputs, new_stats
