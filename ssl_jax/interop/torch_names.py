"""Our encoder's tree and torchvision's (and timm's) names, each from the other."""

import re
from collections.abc import Iterable, Mapping

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ssl_jax.interop.weights import Pytree

# By ours; a BatchNorm's statistics are in another tree.
_PARAMS = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_STATS = {"mean": "running_mean", "var": "running_var"}
_STAGE = re.compile(r"stage(\d)_block(\d+)$")
_LAYER = re.compile(r"layer(\d)\.(\d+)\.(?:(conv\d|bn\d)|(?:downsample|shortcut)\.([01]))\.(\w+)$")
_STEM = re.compile(r"(conv1|bn1)\.(\w+)$")


def to_torch(params: Pytree, batch_stats: Pytree) -> dict[str, np.ndarray]:
    """An encoder's state dict under torchvision's names.

    Args:
      params: of an encoder without selective kernels.
      batch_stats: its running statistics.

    Returns:
      float32 arrays in PyTorch's layout; BatchNorm's `num_batches_tracked`, which its arithmetic
      doesn't use, is 0.
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
    """A kernel [h, w, in, out] as [out, in, h, w], a matrix transposed, a vector as it is."""
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    return value.T if value.ndim == 2 else value


def from_torch_layout(value: np.ndarray) -> np.ndarray:
    """The reverse of `to_torch_layout`, in float32."""
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


def from_torch(
    state: Mapping[str, np.ndarray], split: bool = False
) -> tuple[Pytree, Pytree, list[str]]:
    """An encoder's tree from a state dict under torchvision's names.

    Args:
      state: arrays by name; a block's shortcut may be `downsample` or `shortcut`.
      split: BatchNorm may have its statistics several times, for parts of the batch (lightly's
        split BatchNorm): their mean is taken, as it does itself.

    Returns:
      Parameters and running statistics, and the names that are not an encoder's.
    """
    params: dict[str, np.ndarray] = {}
    stats: dict[str, np.ndarray] = {}
    unknown = []
    for name, value in state.items():
        path = _path(name)
        if path is None:
            unknown.append(name)
            continue
        place, leaf = path
        if leaf in _STATS.values():
            value = np.asarray(value, np.float32)
            channels = np.size(state.get(name.replace(leaf, "weight"), value))
            if split and channels and value.size % channels == 0:
                value = value.reshape(-1, channels).mean(axis=0)
            stats[f"{place}/{leaf.removeprefix('running_')}"] = value
        elif leaf != "num_batches_tracked":
            ours = "bias" if leaf == "bias" else "kernel" if "conv" in place else "scale"
            params[f"{place}/{ours}"] = from_torch_layout(value)
    return unflatten_dict(params, sep="/"), unflatten_dict(stats, sep="/"), unknown


def _path(name: str) -> tuple[str, str] | None:
    stem = _STEM.match(name)
    if stem:
        return f"stem/{stem[1]}", stem[2]
    layer = _LAYER.match(name)
    if not layer:
        return None
    stage, block, module, shortcut, leaf = layer.groups()
    place = module or {"0": "proj_conv", "1": "proj_bn"}[shortcut]
    return f"stage{stage}_block{int(block) + 1}/{place}", leaf


def sequential(names: Iterable[str]) -> dict[str, str]:
    """Renames the children of a `Sequential` made of a ResNet's, 0 to 7, as the ResNet's.

    Args:
      names: such as `0.weight` and `4.0.conv1.weight` (torchvision's children, the ReLU and the
        pool among them) or `2.0.conv1.weight` (lightly's small ResNets, without those two).

    Returns:
      Theirs to torchvision's.
    """
    listed = list(names)
    first = min((int(n.split(".")[0]) for n in listed if re.match(r"\d+\.\d+\.", n)), default=4)
    children = {"0": "conv1", "1": "bn1"} | {str(first + i): f"layer{i + 1}" for i in range(4)}
    renamed = {}
    for name in listed:
        child, _, rest = name.partition(".")
        renamed[name] = f"{children.get(child, child)}.{rest}"
    return renamed
