"""BYOL's checkpoint: a pickle of its experiment's state, with Haiku's trees, read as data."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from ssl_jax.errors import UserError
from ssl_jax.interop.infer_architecture import Found
from ssl_jax.interop.pickled import Inert
from ssl_jax.interop.weights import Pytree

_HAIKU = re.compile(
    r"\w+/(?:initial_(conv|batchnorm)|block_group_(\d)/block_(\d+)/"
    r"(?:shortcut_(conv|batchnorm)|(conv|batchnorm)_(\d)))(?:/(mean|var)_ema)?$"
)
_HAIKU_LEAVES = {"w": "kernel", "b": "bias", "scale": "scale", "offset": "bias"}


def read_byol(found: Any, path: Path) -> Found:
    """The online network of the official experiment's state, a named tuple of Haiku's trees.

    Args:
      found: of `read_pickle`.
      path: told in errors.

    Raises:
      UserError: no such trees are in it.
    """
    try:
        trees = list(_haiku_trees(found, set()))
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be BYOL's.") from None
    params = next((t for t in trees if any(n.endswith("initial_conv") for n in t)), None)
    states = next(
        (t for t in trees if any(n.endswith("initial_batchnorm/mean_ema") for n in t)), None
    )
    if params is None or states is None:
        raise UserError(f"{path} holds no parameters and state of BYOL's Haiku ResNet.")
    ours: dict[str, np.ndarray] = {}
    stats: dict[str, np.ndarray] = {}
    left_out = set()
    for name, leaves in {**params, **states}.items():
        match = _HAIKU.match(name)
        for leaf, value in leaves.items():
            if match and match[7] is None and leaf in _HAIKU_LEAVES:
                ours[f"{_haiku_place(match)}/{_HAIKU_LEAVES[leaf]}"] = _vector(value)
            elif match and match[7] and leaf == "average":
                stats[f"{_haiku_place(match)}/{match[7]}"] = _vector(value)
            elif leaf not in ("hidden", "counter"):
                left_out.add(f"{name}/{leaf}")
    result = Found(
        "byol",
        {"encoder": unflatten_dict(ours, sep="/")},
        {"encoder": unflatten_dict(stats, sep="/")},
    )
    for head in ("projector", "predictor"):
        left_out -= _haiku_head(result, head, params, states)
    result.left_out = tuple(sorted(left_out))
    return result


def _vector(value: Any) -> np.ndarray:
    """A BatchNorm's [1, 1, 1, c] as [c]; kernels as they are."""
    value = np.asarray(value, np.float32)
    flattened: np.ndarray = (
        value.reshape(-1) if value.shape[:-1].count(1) == value.ndim - 1 else value
    )
    return flattened


def _haiku_place(match: re.Match[str]) -> str:
    initial, group, block, shortcut, layer, number, _ = match.groups()
    if initial:
        return f"stem/{'conv1' if initial == 'conv' else 'bn1'}"
    name = f"stage{int(group) + 1}_block{int(block) + 1}"
    if shortcut:
        return f"{name}/proj_{'conv' if shortcut == 'conv' else 'bn'}"
    return f"{name}/{'conv' if layer == 'conv' else 'bn'}{int(number) + 1}"


def _haiku_head(found: Found, head: str, params: Pytree, states: Pytree) -> set[str]:
    """Linear, BatchNorm, ReLU, linear."""
    layers: dict[str, np.ndarray] = {}
    stats: dict[str, np.ndarray] = {}
    taken = set()
    for theirs, layer in (("linear", "dense1"), ("batch_norm", "bn1"), ("linear_1", "dense2")):
        for leaf, value in params.get(f"{head}/{theirs}", {}).items():
            if leaf not in _HAIKU_LEAVES:
                continue
            layers[f"{layer}/{_HAIKU_LEAVES[leaf]}"] = _vector(value)
            taken.add(f"{head}/{theirs}/{leaf}")
        for kind in ("mean", "var"):
            state = states.get(f"{head}/{theirs}/{kind}_ema", {}).get("average")
            if state is not None:
                stats[f"{layer}/{kind}"] = _vector(state)
                taken.add(f"{head}/{theirs}/{kind}_ema/average")
    if layers:
        found.params[head], found.batch_stats[head] = (
            unflatten_dict(layers, sep="/"),
            unflatten_dict(stats, sep="/"),
        )
    return taken


def _haiku_trees(value: Any, seen: set[int]) -> Iterator[dict[str, dict[str, np.ndarray]]]:
    """The trees of modules in a state, {module: {name: array}}, in the order in which they stand.

    Whatever mapping a version of Haiku had is here inert, with a dict among its parts.
    """
    if id(value) in seen or isinstance(value, np.ndarray):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        plain = {str(k).replace("/~/", "/"): _plain(v) for k, v in value.items()}
        modules = {k: v for k, v in plain.items() if v}
        if any("initial_" in name for name in modules):
            yield modules
            return
        parts: Any = value.values()
    elif isinstance(value, Inert):
        parts = value.parts()
    elif isinstance(value, list | tuple):
        parts = value
    else:
        return
    for part in parts:
        yield from _haiku_trees(part, seen)


def _plain(value: Any, depth: int = 4) -> dict[str, np.ndarray]:
    """A module's arrays by name, from a dict, or from what is around one; else nothing."""
    if isinstance(value, dict):
        arrays = {str(k): v for k, v in value.items() if isinstance(v, np.ndarray | np.generic)}
        if arrays:
            return {name: np.asarray(array) for name, array in arrays.items()}
    parts: Any = ()
    if isinstance(value, Inert):
        parts = value.parts()
    elif isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, tuple | list):
        parts = value
    inner = (_plain(part, depth - 1) for part in parts) if depth else iter(())
    return next((found for found in inner if found), {})
