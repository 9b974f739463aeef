"""BYOL's official checkpoint: a pickle of its experiment's state with Haiku's trees.

The pickle is read as data, see `pickled`.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from ssl_jax.errors import UserError
from ssl_jax.interop.infer_architecture import Found
from ssl_jax.interop.pickled import Inert

Tree = dict[str, dict[str, np.ndarray]]  # of Haiku: arrays by module and name

_ENCODER = re.compile(
    r"\w+/(?:initial_(conv|batchnorm)|block_group_(\d)/block_(\d+)/"
    r"(?:shortcut_(conv|batchnorm)|(conv|batchnorm)_(\d)))$"
)
_HEAD_LAYERS = {"linear": "dense1", "batch_norm": "bn1", "linear_1": "dense2"}
_LAYERS = {"conv": "conv", "batchnorm": "bn"}
_MAX_PARTS = 64  # of an object around a module's arrays
_LEAVES = {"w": "kernel", "b": "bias", "scale": "scale", "offset": "bias"}


def read_byol(found: Any, path: Path) -> Found:
    """Extracts the online network from the official experiment's state.

    Args:
      found: the result of `read_pickle`; the state is a named tuple of Haiku's trees.
      path: the file, for error messages.

    Raises:
      UserError: it contains no such trees.
    """
    trees = list(_haiku_trees(found))
    # The online network's trees come first.
    params, state = (
        next((t for t in trees if any(name.endswith(end) for name in t)), None)
        for end in ("initial_conv", "initial_batchnorm/mean_ema")
    )
    if params is None or state is None:
        raise UserError(f"{path} contains no parameters and state of BYOL's Haiku ResNet.")
    taken: dict[str, dict[str, np.ndarray]] = {"encoder": {}}  # by network and path
    stats: dict[str, dict[str, np.ndarray]] = {}
    left_out = []
    for name, leaves in {**params, **state}.items():
        module, _, statistic = name.removesuffix("_ema").rpartition("/")
        if not name.endswith(("/mean_ema", "/var_ema")):
            module, statistic = name, ""
        network, layer = _place(module)
        for leaf, value in leaves.items():
            if network and not statistic and leaf in _LEAVES:
                taken.setdefault(network, {})[f"{layer}/{_LEAVES[leaf]}"] = _vector(value)
            elif network and statistic and leaf == "average":
                stats.setdefault(network, {})[f"{layer}/{statistic}"] = _vector(value)
            elif leaf not in ("hidden", "counter"):
                left_out.append(f"{name}/{leaf}")
    return Found(
        "byol",
        {network: unflatten_dict(flat, sep="/") for network, flat in taken.items()},
        {network: unflatten_dict(stats.get(network, {}), sep="/") for network in taken},
        left_out=tuple(sorted(left_out)),
    )


def _place(module: str) -> tuple[str, str]:
    """The network and the layer's path in our tree of a Haiku module; "" for other modules."""
    head, _, layer = module.partition("/")
    if head in ("projector", "predictor") and layer in _HEAD_LAYERS:
        return head, _HEAD_LAYERS[layer]
    match = _ENCODER.match(module)
    if match is None:
        return "", ""
    initial, group, block, shortcut, layer, number = match.groups()
    if initial:
        return "encoder", f"stem/{_LAYERS[initial]}1"
    name = f"stage{int(group) + 1}_block{int(block) + 1}"
    if shortcut:
        return "encoder", f"{name}/proj_{_LAYERS[shortcut]}"
    return "encoder", f"{name}/{_LAYERS[layer]}{int(number) + 1}"


def _vector(value: Any) -> np.ndarray:
    """Flattens a BatchNorm's [1, 1, 1, c] to [c]; leaves kernels as they are."""
    value = np.asarray(value, np.float32)
    flattened: np.ndarray = (
        value.reshape(-1) if value.shape[:-1].count(1) == value.ndim - 1 else value
    )
    return flattened


def _haiku_trees(found: Any) -> Iterator[Tree]:
    """Yields the trees of modules in a state, in the order in which they are stored.

    Mappings of Haiku's versions are inert objects here, with a dict among their parts.
    """
    waiting, seen = [found], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict) and any("initial_" in key for key in value if _is_text(key)):
            plain = {k.replace("/~/", "/"): _arrays(v) for k, v in value.items() if _is_text(k)}
            yield {name: arrays for name, arrays in plain.items() if arrays}
        else:
            waiting += reversed(list(_parts(value)))


def _is_text(key: Any) -> bool:
    return isinstance(key, str)


def _arrays(module: Any) -> dict[str, np.ndarray]:
    """A module's arrays by name, from a dict or an object around one; {} if there are none."""
    waiting = [module]
    for value in waiting:
        if isinstance(value, dict):
            arrays = {k: v for k, v in value.items() if isinstance(v, np.ndarray | np.generic)}
            if arrays:
                return {str(name): np.asarray(array) for name, array in arrays.items()}
        waiting += itertools.islice(_parts(value), max(_MAX_PARTS - len(waiting), 0))
    return {}


def _parts(value: Any) -> Iterable[Any]:
    """The members of a container or an inert object; () for anything else."""
    if isinstance(value, Inert):
        return value.parts()
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()
