"""Reads TensorFlow checkpoints of SimCLR's v1 and v2 codebases into ssl_jax's parameter trees.

Only tensors are read; no graph is loaded or run.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from ssl_jax.data.tensorflow import load_tensorflow, tf, trackable_object_graph_pb2
from ssl_jax.errors import UserError, first_line
from ssl_jax.interop.infer_architecture import Found
from ssl_jax.models.resnet import STAGES

Arrays = Mapping[str, np.ndarray]

_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_BATCH_NORM = ("gamma", "beta", "moving_mean", "moving_variance")
# Parts of v2 blocks, in the order in which v1 creates their variables.
_PARTS = (
    *("initial_conv_relu_max_pool", "block_groups", "projection_layers", "shortcut_layers"),
    *("conv2d_bn_layers", "conv_relu_dropblock_layers"),
    # Selective kernels.
    *("conv2d_fixed_padding", "batch_norm_relu", "conv2d_0", "batch_norm_relu_1", "conv2d_1"),
)
# All attribute names on the path to a v2 weight.
_ATTRIBUTES = {
    *("model", "resnet_model", "layers", "conv2d", "bn", "kernel", "bias", *_BATCH_NORM, *_PARTS),
    *("_projection_head", "linear_layers", "dense", "bn_relu", "supervised_head", "linear_layer"),
}


def checkpoint_prefix(path: Path) -> Path | None:
    """The common prefix of a checkpoint's files, or None if there is no checkpoint.

    Args:
      path: the prefix, its .index file, or the folder of a saved model.
    """
    candidates = [path, path.with_suffix("") if path.suffix == ".index" else path]
    candidates += [path / "variables" / "variables", path / "saved_model/variables/variables"]
    return next((p for p in candidates if Path(f"{p}.index").is_file()), None)


def read_checkpoint(prefix: Path) -> dict[str, np.ndarray]:
    """Reads the variables of a checkpoint by name, without optimizer slots.

    Raises:
      UserError: TensorFlow isn't installed, or the files can't be read.
    """
    load_tensorflow()
    try:
        reader = tf.train.load_checkpoint(str(prefix))
        shapes = reader.get_variable_to_shape_map()
        if _GRAPH in shapes:
            names = _paths(reader.get_tensor(_GRAPH))
        else:
            names = {name: name for name in shapes if not name.endswith("Momentum")}
        found = {name: np.asarray(reader.get_tensor(key)) for name, key in names.items()}
        return {name: value for name, value in found.items() if value.dtype.kind not in "OS"}
    except Exception as error:  # TensorFlow's, protobuf's, and those of a corrupt object graph
        reason = first_line(error)[:200]
        raise UserError(f"Cannot read {prefix} ({reason}). Download its files again.") from error


def _paths(serialized: bytes) -> dict[str, str]:
    """Keys of an object-based checkpoint's variables, by their paths in the network.

    A variable's key is the shortest path to it, which may lead through a list of all variables. Its
    path in the network is found by following the attributes of the official modules.
    """
    graph = trackable_object_graph_pb2.TrackableObjectGraph.FromString(serialized)
    found: dict[str, str] = {}
    waiting, seen = [(0, "")], set()
    while waiting:
        number, path = waiting.pop()
        node = graph.nodes[number]
        for attribute in node.attributes:
            found[path] = attribute.checkpoint_key
        for child in node.children:
            name = child.local_name
            edge = (number, child.node_id)
            if (name in _ATTRIBUTES or name.isdigit()) and edge not in seen:
                seen.add(edge)
                waiting.append((child.node_id, f"{path}/{name}".lstrip("/")))
    return found


def _in_order(names: Iterable[str], prefix: str) -> tuple[list[str], list[str]]:
    """Convolution kernels and BatchNorms below a prefix, in network order.

    Args:
      names: names of all variables.
      prefix: prefix of the network's variables.

    Returns:
      Names of kernels; names of BatchNorms without the variable.
    """
    below = [name for name in names if name.startswith(prefix)]
    kernels = sorted((n for n in below if n.endswith("/kernel")), key=_order)
    norms = {n.rpartition("/")[0] for n in below if n.rpartition("/")[2] in _BATCH_NORM}
    return kernels, sorted(norms, key=_order)


def _order(name: str) -> list[Any]:
    """Sort key of a variable: its layer number in v1, its place in the blocks in v2."""
    if "/block_groups/" not in name and "/initial_conv" not in name:
        found = re.search(r"_(\d+)(?:/\w+)?$", name)
        return [int(found[1]) if found else 0]
    keys = []
    for part in name.split("/"):
        if part in _PARTS:
            keys.append(_PARTS.index(part))
        elif part.isdigit():
            keys.append(int(part))
    return keys


def read_simclr(variables: Arrays, path: Path) -> Found:
    """Builds the encoder and projector from variables of SimCLR v1 (numbered) or v2 (by module).

    Args:
      variables: from `read_checkpoint`.
      path: the checkpoint's path, for messages.

    Raises:
      UserError: the variables don't match a supported ResNet.
    """
    is_v2 = any(name.startswith("model/resnet_model/") for name in variables)
    base = "model/resnet_model/" if is_v2 else "base_model/"
    kernels, norms = _in_order(variables, base)
    shape = _simclr_shape(len(kernels), variables[kernels[0]].shape if kernels else ())
    if shape is None:
        raise UserError(
            f"{path} has {len(kernels)} convolutions in {base}, which matches no ResNet of SimCLR. "
            "Give a checkpoint of the official code."
        )
    params: dict[str, np.ndarray] = {}
    stats: dict[str, np.ndarray] = {}
    convs, batch_norms = _places(*shape)
    for place, name in zip(convs, kernels, strict=True):
        params[f"{place}/kernel"] = np.asarray(variables[name], np.float32)
    if len(norms) != len(batch_norms):
        raise UserError(
            f"{path} has {len(norms)} BatchNorms in {base} instead of {len(batch_norms)}. Give a "
            "checkpoint of the official code."
        )
    for place, name in zip(batch_norms, norms, strict=True):
        _batch_norm(variables, name, place, params, stats)
    found = Found(
        "simclr",
        {"encoder": unflatten_dict(params, sep="/")},
        {"encoder": unflatten_dict(stats, sep="/")},
    )
    head = "model/_projection_head/linear_layers/" if is_v2 else "head_contrastive/nl_"
    layers: dict[str, np.ndarray] = {}
    layer_stats: dict[str, np.ndarray] = {}
    for number in range(1, 9):
        start = f"{head}{number - 1}/"
        kernel = variables.get(f"{start}dense/kernel")
        if kernel is None:
            break
        layers[f"dense{number}/kernel"] = np.asarray(kernel, np.float32)
        norm = {n.rpartition("/")[0] for n in variables if n.startswith(start) and "gamma" in n}
        for name in norm:
            _batch_norm(variables, name, f"bn{number}", layers, layer_stats)
    if layers:
        found.params["projector"] = unflatten_dict(layers, sep="/")
        found.batch_stats["projector"] = unflatten_dict(layer_stats, sep="/")
    found.left_out = tuple(sorted(n for n in variables if not n.startswith((base, head))))
    return found


def _batch_norm(
    variables: Arrays,
    name: str,
    place: str,
    params: dict[str, np.ndarray],
    stats: dict[str, np.ndarray],
) -> None:
    leaves = {"gamma": (params, "scale"), "beta": (params, "bias")}
    leaves |= {"moving_mean": (stats, "mean"), "moving_variance": (stats, "var")}
    for variable, (tree, leaf) in leaves.items():
        if f"{name}/{variable}" in variables:
            tree[f"{place}/{leaf}"] = np.asarray(variables[f"{name}/{variable}"], np.float32)


def _simclr_shape(count: int, first: tuple[int, ...]) -> tuple[int, bool, str] | None:
    """Depth, selective kernels and stem, from the number of convolutions and the first kernel."""
    for depth in STAGES:
        for sk in (False, True):
            for stem in ("imagenet", "cifar"):
                convs, _ = _places(depth, sk, stem)
                size = 7 if stem == "imagenet" and not sk else 3
                if len(convs) == count and first[:1] == (size,):
                    return depth, sk, stem
    return None


def _places(depth: int, sk: bool, stem: str) -> tuple[list[str], list[str]]:
    """ssl_jax's convolutions and BatchNorms in the order in which SimCLR's code creates them."""
    count = 3 if sk and stem == "imagenet" else 1
    convs = [f"stem/conv{i}" for i in range(1, count + 1)]
    norms = [f"stem/bn{i}" for i in range(1, count + 1)]
    bottleneck = depth >= 50
    for stage, blocks in enumerate(STAGES[depth], start=1):
        for block in range(1, blocks + 1):
            name = f"stage{stage}_block{block}"
            if block == 1:
                convs.append(f"{name}/proj_conv")
                norms.append(f"{name}/proj_bn")
            for i in range(1, 4 if bottleneck else 3):
                convs.append(f"{name}/conv{i}")
                norms.append(f"{name}/bn{i}")
                if sk and bottleneck and i == 2:
                    convs += [f"{name}/sk/conv1", f"{name}/sk/conv2"]
                    norms.append(f"{name}/sk/bn")
    return convs, norms
