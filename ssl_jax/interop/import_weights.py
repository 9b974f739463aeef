"""Reads encoders trained by other code: torchvision, timm, the methods' official code, libraries.

The result is `Weights`: our tree, and a config with the network's padding and the preprocessing of
its images. Names that no network here has are listed in `left_out`; missing names and other shapes
are errors.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ssl_jax.errors import UserError, did_you_mean
from ssl_jax.files import local_path, reading
from ssl_jax.interop.byol import read_byol
from ssl_jax.interop.infer_architecture import Given, require_complete, to_weights
from ssl_jax.interop.pickled import may_be_pickled, read_pickle, read_torch
from ssl_jax.interop.simclr import checkpoint_prefix, read_checkpoint, read_simclr
from ssl_jax.interop.torch_state import KINDS as TORCH_KINDS
from ssl_jax.interop.torch_state import read_state
from ssl_jax.interop.weights import (
    FORMAT,
    Weights,
    parse_config,
    parse_weights,
    read_header,
    read_safetensors,
)
from ssl_jax.models import vit

_KNOWN = (
    "give a .safetensors file, a file written by torch.save, a pickle of BYOL's code, or the "
    "prefix of a TensorFlow checkpoint"
)
KINDS = ("byol", "simclr", *TORCH_KINDS)
# Keys of dicts that contain the state dict, in training checkpoints.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "classy_state_dict", "base_model")
_MAX_DEPTH = 4  # of state dicts in each other


def is_weights_file(path: str | Path) -> bool:
    """Whether a path is a file of weights or a TensorFlow checkpoint, not a run's workdir."""
    path = _in_folder(path)
    with reading(path):
        if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
            return False
        return path.is_file() or checkpoint_prefix(path) is not None


def _in_folder(path: str | Path) -> Path:
    """The file in a folder of timm or of `ssl-jax export --format=folder`; else the path itself."""
    path = local_path(path)
    names = ("ssl_jax.safetensors", "model.safetensors")
    with reading(path):
        if (path / "checkpoints").is_dir():  # a run, even if it contains such a file
            return path
        return next((path / name for name in names if (path / name).is_file()), path)


def read_weights(path: str | Path, kind: str = "", heads: int = 0, image_size: int = 0) -> Weights:
    """Reads the networks in a file of ssl_jax or of other code.

    Args:
      path: a `.safetensors` file of ssl_jax or with torchvision's names; a PyTorch file; the prefix
        of a TensorFlow checkpoint or the folder of a saved model (SimCLR); a pickle (BYOL).
      kind: the code that wrote it, one of `KINDS`; "" infers it from the names.
      heads: attention heads of a ViT; 0 infers them from its width.
      image_size: side of the images that a ViT's positions belong to; 0 infers it.

    Returns:
      The weights, for the official code with the heads that the file contains. The last file is
      cached in memory.

    Raises:
      UserError: the file doesn't exist, can't be read, or contains no supported network.
    """
    path = _in_folder(path)
    if kind and kind not in KINDS:
        raise UserError(f"Unknown kind of weights '{kind}'.{did_you_mean(kind, KINDS)}")
    with reading(path):
        prefix = checkpoint_prefix(path)
        file = Path(f"{prefix}.index") if prefix else path
        if not file.is_file():
            raise UserError(f"{path} is not a file of weights.")
        file.open("rb").close()
        if prefix is None and path.suffix != ".safetensors" and not may_be_pickled(path):
            raise UserError(f"{path} contains no weights: {_KNOWN}.")
        now = file.stat()
    return _read(path, prefix, kind, Given(heads, image_size), (now.st_mtime_ns, now.st_size))


@functools.lru_cache(maxsize=1)
def _read(
    path: Path, prefix: Path | None, kind: str, given: Given, state: tuple[int, int]
) -> Weights:
    """Reads a file; the last result is cached until the file changes."""
    header: dict[str, str] = {}
    arrays: dict[str, np.ndarray] = {}
    if prefix is None and path.suffix == ".safetensors":
        arrays, header = read_safetensors(path)
    own = {"ssl_jax", "ssl_jax_config"} & header.keys()
    binary = prefix is not None or kind == "byol"
    if given != Given() and (own or binary):
        raise UserError(f"{path} needs no --heads and --image-size: omit them.")
    if prefix is not None:
        if kind not in ("", "simclr"):
            raise UserError(f"{path} is a TensorFlow checkpoint of SimCLR: omit the kind.")
        return to_weights(read_simclr(read_checkpoint(prefix), path), path)
    if path.suffix == ".safetensors":
        if "ssl_jax" in header:
            if kind:
                raise UserError(f"{path} was written by ssl_jax: omit the kind.")
            weights = parse_weights(path, arrays, header)
            require_complete(weights, path)
            return weights
        if "ssl_jax_config" in header:
            return _as_exported(arrays, kind, path, header)
        return to_weights(read_state(arrays, kind, path, given), path)
    if kind == "byol" or not kind and path.suffix in (".pkl", ".pickle"):
        return to_weights(read_byol(read_pickle(path), path), path)
    return to_weights(read_state(_state_dict(read_torch(path), path), kind, path, given), path)


def _as_exported(
    arrays: Mapping[str, np.ndarray], kind: str, path: Path, header: Mapping[str, str]
) -> Weights:
    """Takes all that names don't have from the header of `ssl-jax export --format=torch`."""
    known = parse_config(path, {"ssl_jax": FORMAT, "config": header["ssl_jax_config"]})
    is_vit = known.model.name == "vit"
    given = Given(known.model.vit.heads, vit.image_size(known)) if is_vit else None
    weights = to_weights(read_state(arrays, kind, path, given), path)
    if is_vit and known.model.vit.positions == "sincos":  # exported as a table, for timm
        weights.params["encoder"].pop("pos_embed", None)
    config = weights.config
    config.model.update(known.model.to_dict())
    with config.unlocked():
        config.views = known.views
    config.eval.update(known.eval.to_dict())
    config.data.update({**known.data.to_dict(), "num_classes": config.data.num_classes})
    config.eval.update(projector_layer=0, network="default")
    # With a source, the config is not taken for the recipe that trained the weights.
    source = f"ssl_jax ({known.method}): {path.name}"
    weights = dataclasses.replace(weights, config=config, source=source)
    require_complete(weights, path)
    return weights


def read_weights_config(path: str | Path) -> ConfigDict:
    """The config of `read_weights`; for a file of ssl_jax only the header is read."""
    path = _in_folder(path)
    header = read_header(path) if path.suffix == ".safetensors" else {}
    return parse_config(path, header) if "ssl_jax" in header else read_weights(path).config


def read_network(path: str | Path) -> str:
    """Which network of its run a file has, "online" or "target"; only the header is read."""
    path = _in_folder(path)
    header = read_header(path) if path.suffix == ".safetensors" else {}
    return header.get("network") or "online"


def _state_dict(found: Any, path: Path) -> dict[str, np.ndarray]:
    """Finds the state dict in an object that `torch.save` wrote.

    The names of nested state dicts, as of VISSL's `trunk` or DINO's `teacher`, are joined.
    """
    for _ in _CONTAINERS:
        inner = found if isinstance(found, dict) else {}
        found = next((inner[key] for key in _CONTAINERS if isinstance(inner.get(key), dict)), found)
    state = _arrays(found, "", set()) if isinstance(found, dict) else {}
    if not state:
        raise UserError(f"{path} contains no named weights: save a model's state_dict.")
    return state


def _arrays(container: dict[Any, Any], prefix: str, seen: set[int]) -> dict[str, np.ndarray]:
    """The arrays in dicts whose keys are strings, by their names joined by dots."""
    seen.add(id(container))
    found: dict[str, np.ndarray] = {}
    for key, value in container.items():
        if isinstance(key, str) and isinstance(value, np.ndarray):
            found[f"{prefix}{key}"] = value
        elif isinstance(key, str) and isinstance(value, dict) and id(value) not in seen:
            if prefix.count(".") < _MAX_DEPTH:
                found |= _arrays(value, f"{prefix}{key}.", seen)
    return found
