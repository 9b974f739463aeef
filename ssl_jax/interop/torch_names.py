"""Conversion between our encoder's tree and the names of torchvision and timm."""

import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ssl_jax.interop.weights import Pytree

# Our leaf to PyTorch's; BatchNorm's statistics are in a tree of their own.
_PARAMS = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_STATS = {"mean": "running_mean", "var": "running_var"}
_STAGE = re.compile(r"stage(\d)_block(\d+)$")
_LAYER = re.compile(r"layer(\d)\.(\d+)\.(?:(conv\d|bn\d)|(?:downsample|shortcut)\.([01]))\.(\w+)$")
_STEM = re.compile(r"(conv1|bn1)\.(\w+)$")


def to_torch(params: Pytree, batch_stats: Pytree) -> dict[str, np.ndarray]:
    """Converts an encoder to a state dict with torchvision's names.

    Args:
      params: parameters of an encoder without selective kernels.
      batch_stats: its running statistics.

    Returns:
      float32 arrays in PyTorch's layout. BatchNorm's `num_batches_tracked`, which does not affect
      its output, is 0.
    """
    found: dict[str, np.ndarray] = {}
    for tree, leaves in ((params, _PARAMS), (batch_stats, _STATS)):
        for name, value in flatten_dict(tree, sep="/").items():
            block, layer, leaf = name.split("/")
            found[f"{_module(block, layer)}.{leaves[leaf]}"] = to_torch_layout(value)
    for name in [name for name in found if name.endswith("running_mean")]:
        found[name.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    return found


def to_torch_layout(value: np.ndarray) -> np.ndarray:
    """Transposes a kernel [h, w, in, out] to [out, in, h, w], a matrix to its transpose."""
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    return value.T if value.ndim == 2 else value


def from_torch_layout(value: np.ndarray) -> np.ndarray:
    """Reverses `to_torch_layout`, in float32."""
    value = np.asarray(value, np.float32)
    if value.ndim == 4:
        value = value.transpose(2, 3, 1, 0)
    return np.ascontiguousarray(value.T if value.ndim == 2 else value)


def _module(block: str, layer: str) -> str:
    stage = _STAGE.match(block)
    if stage is None:  # the stem
        return layer
    module = {"proj_conv": "downsample.0", "proj_bn": "downsample.1"}.get(layer, layer)
    return f"layer{stage[1]}.{int(stage[2]) - 1}.{module}"


def encoder_place(name: str) -> tuple[str, str] | None:
    """Looks up where a tensor of a ResNet belongs.

    Args:
      name: torchvision's; a block's shortcut may be called `downsample` or `shortcut`.

    Returns:
      The layer's path in our tree and PyTorch's name of the leaf, None for other tensors.
    """
    stem = _STEM.match(name)
    if stem:
        return f"stem/{stem[1]}", stem[2]
    layer = _LAYER.match(name)
    if not layer:
        return None
    stage, block, module, shortcut, leaf = layer.groups()
    place = module or {"0": "proj_conv", "1": "proj_bn"}[shortcut]
    return f"stage{stage}_block{int(block) + 1}/{place}", leaf


def from_torch(
    state: Mapping[str, np.ndarray],
    place: Callable[[str], tuple[str, str] | None] = encoder_place,
    split: bool = False,
) -> tuple[Pytree, Pytree, list[str]]:
    """Converts a state dict to our tree.

    Args:
      state: arrays by name.
      place: gives the layer's path in our tree and PyTorch's leaf for a name, None for a name that
        is not of this network.
      split: average BatchNorm statistics that are stored once per part of the batch, as lightly's
        split BatchNorm does in evaluation.

    Returns:
      Parameters, running statistics, and the names that are not of this network.
    """
    params: dict[str, np.ndarray] = {}
    stats: dict[str, np.ndarray] = {}
    unknown = []
    for name, value in state.items():
        path = place(name)
        if path is None:
            unknown.append(name)
            continue
        layer, leaf = path
        if leaf in _STATS.values():
            value = np.asarray(value, np.float32)
            channels = np.size(state.get(name.replace(leaf, "weight"), value))
            if split and channels and value.size % channels == 0:
                value = value.reshape(-1, channels).mean(axis=0)
            stats[f"{layer}/{leaf.removeprefix('running_')}"] = value
        elif leaf != "num_batches_tracked":
            linear = "conv" in layer or "dense" in layer.lower()
            ours = "bias" if leaf == "bias" else "kernel" if linear else "scale"
            params[f"{layer}/{ours}"] = from_torch_layout(value)
    return unflatten_dict(params, sep="/"), unflatten_dict(stats, sep="/"), unknown


def sequential(names: Iterable[str]) -> dict[str, str]:
    """Maps the names of a ResNet's children in a `Sequential` to the ResNet's own.

    Args:
      names: such as `0.weight` and `4.0.conv1.weight` (torchvision's children 0 to 7, with the ReLU
        and the pool) or `2.0.conv1.weight` (lightly's small ResNets, without those two).

    Returns:
      torchvision's name for each name.
    """
    listed = list(names)
    first = min((int(n.split(".")[0]) for n in listed if re.match(r"\d+\.\d+\.", n)), default=4)
    children = {"0": "conv1", "1": "bn1"} | {str(first + i): f"layer{i + 1}" for i in range(4)}
    renamed = {}
    for name in listed:
        child, _, rest = name.partition(".")
        renamed[name] = f"{children.get(child, child)}.{rest}"
    return renamed
