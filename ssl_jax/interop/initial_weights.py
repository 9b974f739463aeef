"""Initial weights from another run or a file: `config.init_from`, and the teacher to distill."""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from ssl_jax.config import Schedule
from ssl_jax.errors import UserError
from ssl_jax.interop.import_weights import is_weights_file
from ssl_jax.interop.infer_architecture import require_finite_array
from ssl_jax.interop.load import (
    config_at,
    network_at,
    restore_state,
    weights_at,
    weights_fingerprint,
)
from ssl_jax.methods import make_method
from ssl_jax.models import make_encoder, resnet
from ssl_jax.models.registry import architecture, encoder_name
from ssl_jax.models.vit import image_size
from ssl_jax.step import TrainState

_PROJECTOR_KEYS = ("projector_layer", "projector_hidden")


def resolve_initial_weights(config: ConfigDict, started: ConfigDict | None = None) -> None:
    """Completes a config with keys of the runs that its weights come from.

    Args:
      config: changed in place: the width of a kept projector, the teacher's networks, the image
        size of a ViT's positions, which stays that of the run where its encoder gets other images;
        `init_from.network` becomes "online" or "target".
      started: config of the run that is resumed, if any. Its checkpoints have all weights, so its
        keys are copied. Of the sources, which may be gone, only the network's name is read.

    Raises:
      UserError: a source doesn't exist, or its networks don't fit.
    """
    if config.model.name == "vit":
        config.model.vit.image_size = image_size(config)
    if started is not None:
        if config.init_from.path:
            config.supervised.projector_hidden = started.supervised.projector_hidden
            config.init_from.network = _resumed_network(config, started)
        config.distill.update(resnet.architecture(started.distill))
        config.distill.update({key: started.distill[key] for key in _PROJECTOR_KEYS})
        return
    if config.init_from.path:
        _resolve_encoder(config)
        config.init_from.network = _network(config)
    elif config.init_from.state == "all":
        raise UserError(
            "config.init_from.state is 'all', but config.init_from.path is empty: set it to the "
            "workdir of the run to load."
        )
    if config.method == "distill" and config.distill.teacher:
        _resolve_teacher(config)


def _network(config: ConfigDict) -> str:
    """The network whose encoder is loaded; "default" where networks are not chosen.

    Raises:
      UserError: the source has no such network, or the choice would have no effect.
    """
    init_from = config.init_from
    chosen, whole = init_from.network, init_from.state == "all"
    if not whole and (not init_from.heads or is_weights_file(init_from.path)):
        return network_at(init_from.path, chosen, "config.init_from.network")
    if chosen != "default":
        option, loaded = (
            ("state is 'all'", "all networks")
            if whole
            else ("heads is true", "the online network with its heads")
        )
        raise UserError(
            f"config.init_from.network is '{chosen}', but config.init_from.{option}, which loads "
            f"{loaded}: leave out config.init_from.network."
        )
    return "default"


def _resumed_network(config: ConfigDict, started: ConfigDict) -> str:
    """The network of a resumed run's config, to be compared with that of the run that started."""
    chosen, before = config.init_from.network, started.init_from.network
    if before == "default":  # nothing was chosen
        return str(chosen)
    with contextlib.suppress(UserError):
        return network_at(config.init_from.path, chosen)
    return str(before if chosen == "default" else chosen)


def _resolve_encoder(config: ConfigDict) -> None:
    source = config_at(config.init_from.path)
    kept, custom = (make_method(each, Schedule(1, 1)).custom_encoder for each in (source, config))
    if kept != custom:
        raise UserError(
            f"The encoder in {config.init_from.path} (config.init_from.path) is "
            f"{kept or 'that of its config.model'}, but that of config.method="
            f"'{config.method}' is {custom or 'that of config.model'}: use a method with the same "
            "encoder."
        )
    own = architecture(config.model)
    for name, needed in architecture(source.model).items():  # the first is the encoder's name
        # Loaded scales replace any initial ones.
        scales = name == "vit.layer_scale" and own[name] and needed
        if own[name] != needed and not scales:
            raise UserError(
                f"config.model.{name} is {own[name]!r}, but the encoder in "
                f"{config.init_from.path} (config.init_from.path) has {needed!r}: set "
                f"config.model.{name}={needed}."
            )
    if source.data.channels != config.data.channels:
        raise UserError(
            f"config.data.channels is {config.data.channels}, but the encoder in "
            f"{config.init_from.path} (config.init_from.path) was trained on images of "
            f"{source.data.channels}: set config.data.channels={source.data.channels}, or start "
            "from weights of the same number of channels."
        )
    if config.init_from.heads and source.method != config.method:
        raise UserError(
            f"config.init_from.heads is true, but {config.init_from.path} has heads of "
            f"'{source.method}', not of '{config.method}': set it to false."
        )
    if config.init_from.state == "all":
        _require_same_kind(config, source)
    options = config.supervised
    if config.method != "supervised" or not options.projector_layer:
        return
    if source.method == "supervised":
        hidden = source.supervised.projector_hidden
        layers = source.supervised.projector_layer
    else:
        hidden, layers = source.simclr.hidden, source.simclr.layers - 1
        if source.method != "simclr":
            raise UserError(
                f"config.supervised.projector_layer is {options.projector_layer}, but "
                f"{config.init_from.path} is a run of '{source.method}', and only SimCLR's "
                "projectors can be kept: use 0."
            )
        if source.simclr.head_bn == "none":
            raise UserError(
                f"config.supervised.projector_layer is {options.projector_layer}, but "
                f"{config.init_from.path} has a projector without BatchNorm (simclr.head_bn), "
                "which can't be kept: use 0."
            )
    if options.projector_layer > layers:
        raise UserError(
            f"config.supervised.projector_layer is {options.projector_layer}, but the projector in "
            f"{config.init_from.path} has {layers} hidden layers: use 0 to {layers}."
        )
    options.projector_hidden = hidden or make_encoder(source).num_features


def _require_same_kind(config: ConfigDict, source: ConfigDict) -> None:
    """Checks that another run's whole state is one of this config; shapes are checked later."""
    path = config.init_from.path
    if is_weights_file(path):
        raise UserError(
            f"config.init_from.state is 'all', but {path} (config.init_from.path) is a file of "
            "weights, without the state of an optimizer: set the workdir of a run, or "
            "config.init_from.state=weights."
        )
    kinds = {
        "method": (source.method, config.method),
        "optim.name": (source.optim.name, config.optim.name),
    }
    for key, (old, new) in kinds.items():
        if old != new:
            raise UserError(
                f"config.init_from.state is 'all', but {path} (config.init_from.path) is a run "
                f"with {key}={old}, not {new}: set config.{key}={old}, or "
                "config.init_from.state=weights."
            )


def _resolve_teacher(config: ConfigDict) -> None:
    source = config_at(config.distill.teacher)
    if source.method not in ("supervised", "distill"):
        raise UserError(
            f"{config.distill.teacher} (config.distill.teacher) is a run of '{source.method}', "
            "which has no classifier to learn from: fine-tune it first with ssl-jax finetune."
        )
    if source.model.name != "resnet":
        raise UserError(
            f"The encoder of the teacher in {config.distill.teacher} (config.distill.teacher) is "
            f"{encoder_name(source.model)}, but only a ResNet can be distilled: use the run of a "
            "ResNet; the student may be any encoder."
        )
    if source.method == "supervised" and source.supervised.sigmoid:
        raise UserError(
            f"The teacher in {config.distill.teacher} (config.distill.teacher) has a sigmoid per "
            "class, for images with several labels each, but a student learns a softmax over the "
            "classes: fine-tune a teacher on one label per image."
        )
    config.distill.update(resnet.architecture(source.model))
    kept = source.supervised if source.method == "supervised" else dict.fromkeys(_PROJECTOR_KEYS, 0)
    config.distill.update({key: kept[key] for key in _PROJECTOR_KEYS})
    if config.data.num_classes != source.data.num_classes:
        raise UserError(
            f"config.data.num_classes is {config.data.num_classes}, but the teacher in "
            f"{config.distill.teacher} has {source.data.num_classes} classes: set "
            f"config.data.num_classes={source.data.num_classes}."
        )


def source_fingerprints(
    config: ConfigDict, recorded: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Identifies the weights that a run starts from.

    Args:
      config: of the run.
      recorded: the fingerprints when the run started, {} for a new run. They name the checkpoints
        to compare with, because a source in progress has newer ones.

    Returns:
      `weights_fingerprint` of `config.init_from.path` and of `config.distill.teacher`, by the name
      of the group; without those that are not set or can't be read.
    """
    init_from, distill = config.init_from, config.distill
    sources = {"init_from": (init_from.path, init_from.step)}
    sources["distill"] = (distill.teacher, distill.step)
    found = {}
    for name, (path, step) in sources.items():
        if path:
            step = recorded.get(name, {}).get("step") or step
            with contextlib.suppress(UserError):
                found[name] = weights_fingerprint(path, step or None)
    return found


def load_initial_weights(state: TrainState, config: ConfigDict) -> TrainState:
    """Replaces random initial weights by those of the config's sources.

    Args:
      state: at initialization.
      config: completed by `resolve_initial_weights`.

    Returns:
      The state; loaded arrays are on the host, to be placed once the initial ones are freed. A
      target network gets the same weights and statistics as the network that it follows.

    Raises:
      UserError: a source has no checkpoint, other shapes, or values that are not finite.
    """
    if config.init_from.path and config.init_from.state == "all":
        state = _whole_state(state, config)
    params, method_state = dict(state.params), dict(state.method_state)
    if config.init_from.path and config.init_from.state == "weights":
        path, heads = config.init_from.path, config.init_from.heads
        # A file has one network; of a run, heads such as predictors belong to the online one.
        network = "online" if heads and not is_weights_file(path) else config.init_from.network
        source = weights_at(path, config.init_from.step or None, network)
        stats = dict(method_state["batch_stats"])
        for name in _names(config, params):
            if name not in source.params:
                raise UserError(
                    f"{config.init_from.path} (config.init_from.path) has no {name}: set "
                    "config.init_from.heads=false."
                )
            params[name] = _copy_params(params[name], source.params[name], name)
            if name in stats:
                stats[name] = _copy_params(stats[name], source.batch_stats.get(name, {}), name)
            if name in method_state.get("target", {}):
                method_state["target"] = {**method_state["target"], name: params[name]}
            if name in stats.get("target", {}):
                stats["target"] = {**stats["target"], name: stats[name]}
        method_state["batch_stats"] = stats
    if "teacher" in method_state:
        source = weights_at(config.distill.teacher, config.distill.step or None)
        stats = source.batch_stats
        method_state["teacher"] = {
            "params": _copy_params(method_state["teacher"]["params"], source.params, "teacher"),
            "batch_stats": _copy_params(method_state["teacher"]["batch_stats"], stats, "teacher"),
        }
    return state.replace(params=params, method_state=method_state)


def _whole_state(state: TrainState, config: ConfigDict) -> TrainState:
    """The state of the run in `config.init_from.path`, at step 0 of a new run."""
    source = restore_state(config.init_from.path, config.init_from.step or None)
    own, found = _arrays(state), _arrays(source)
    for name in sorted(own.keys() | found.keys()):
        old, new = (
            str(list(each[name].shape)) if name in each else "none" for each in (found, own)
        )
        if old != new:
            raise UserError(
                f"config.init_from.state is 'all', but {config.init_from.path} "
                f"(config.init_from.path) has {name} of shape {old} and this run {new}: use the "
                f"config.model, config.optim and config.{config.method} of that run, and its "
                "config.data.num_classes, or config.init_from.state=weights."
            )
        require_finite_array(found[name], f"{name} of its state", config.init_from.path)
    return state.replace(
        params=source.params,
        method_state=source.method_state,
        opt_state=_moments(state.opt_state, source.opt_state),
    )


def _arrays(state: TrainState) -> dict[str, Any]:
    """The arrays that are loaded with a whole state, by name."""
    parts = {name: getattr(state, name) for name in ("params", "method_state", "opt_state")}
    leaves = jax.tree_util.tree_leaves_with_path(parts)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _moments(initial: Any, source: Any) -> Any:
    """The source's optimizer state, with the initial counts of schedules and frozen steps.

    Adam's own count stays, as its moments have been averaged over that many steps.
    """

    def take(new: Any, old: Any) -> Any:
        if isinstance(new, wrappers):
            return new._replace(inner_state=_moments(new.inner_state, old.inner_state))
        return new if isinstance(new, optax.ScaleByScheduleState) else old

    wrappers = (optax.ConditionallyMaskState, optax.InjectStatefulHyperparamsState)
    counts = (*wrappers, optax.ScaleByScheduleState)
    return jax.tree.map(take, initial, source, is_leaf=lambda x: isinstance(x, counts))


def _names(config: ConfigDict, params: Any) -> list[str]:
    """The networks that are loaded."""
    if config.init_from.heads:
        return list(params)
    kept = ("encoder", "projector") if config.method == "supervised" else ("encoder",)
    return [name for name in kept if name in params]


def _copy_params(initial: Any, source: Any, name: str) -> Any:
    """Copies the source's leaves into the structure of the initial tree."""
    if not isinstance(initial, dict):
        if initial.shape != source.shape:
            raise UserError(
                f"The loaded {name} has weights of shape {list(source.shape)} where this run has "
                f"{list(initial.shape)}: use the config.model of the run that it comes from."
            )
        return np.asarray(source)
    missing = sorted(set(initial) - set(source))
    if missing:
        raise UserError(
            f"The loaded {name} has no {missing[0]}: use the config.model of the run that it comes "
            "from."
        )
    return {key: _copy_params(initial[key], source[key], name) for key in initial}
