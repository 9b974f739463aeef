"""Reads encoders trained by other code: torchvision, timm, the methods' official code, libraries.

The result is `Weights`: our tree, and a config with the network's padding and the preprocessing of
its images. Names that no network here has are listed in `left_out`; missing names and other shapes
are errors.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ssl_jax.errors import UserError, did_you_mean
from ssl_jax.files import local_path
from ssl_jax.interop.byol import read_byol
from ssl_jax.interop.infer_architecture import Found, require_complete, to_weights
from ssl_jax.interop.pickled import may_be_pickled, read_pickle, read_torch
from ssl_jax.interop.simclr import checkpoint_prefix, read_checkpoint, read_simclr
from ssl_jax.interop.torch_names import from_torch, from_torch_layout, sequential
from ssl_jax.interop.weights import (
    FORMAT,
    Weights,
    parse_config,
    parse_weights,
    read_header,
    read_safetensors,
)

Arrays = Mapping[str, np.ndarray]
_KNOWN = (
    "give a .safetensors file, a file written by torch.save, a pickle of BYOL's code, or the "
    "prefix of a TensorFlow checkpoint"
)
_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
KINDS = ("byol", "lightly", "moco", "simclr", "simsiam", "solo", "swav", "timm", "torchvision")


@dataclasses.dataclass(frozen=True)
class _Torch:
    """Names in the state dict of a PyTorch code.

    Attributes:
      prefix: of the encoder's names.
      heads: by the prefix of their names, the projector first: our layers by the numbers of a
        `Sequential` of linear layers, BatchNorms and ReLUs.
    """

    prefix: str
    heads: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)


_MLP2 = {"0": "dense1", "2": "dense2"}
_MLP2_BN = {"0": "dense1", "1": "bn1", "3": "dense2"}
_MLP3_BN = {**_MLP2_BN, "4": "bn2", "6": "dense3", "7": "bn3"}
_TORCH = {
    "moco": _Torch("module.encoder_q.", {"module.encoder_q.fc.": _MLP2}),
    "simsiam": _Torch(
        "module.encoder.", {"module.encoder.fc.": _MLP3_BN, "module.predictor.": _MLP2_BN}
    ),
    "swav": _Torch("module.", {"module.projection_head.": _MLP2_BN}),
    "lightly": _Torch("backbone."),
    "solo": _Torch("backbone."),
    "torchvision": _Torch(""),
    "timm": _Torch(""),
}


def is_weights_file(path: str | Path) -> bool:
    """Whether a path is a file of weights or a TensorFlow checkpoint, not a run's workdir."""
    path = _in_folder(path)
    if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        return False
    return path.is_file() or checkpoint_prefix(path) is not None


def _in_folder(path: str | Path) -> Path:
    """The file in a folder of timm or of `ssl-jax export --format=folder`; else the path itself."""
    path = local_path(path)
    names = ("ssl_jax.safetensors", "model.safetensors")
    if (path / "checkpoints").is_dir():  # a run, even if it contains such a file
        return path
    return next((path / name for name in names if (path / name).is_file()), path)


def read_weights(path: str | Path, kind: str = "") -> Weights:
    """Reads the networks in a file of ssl_jax or of other code.

    Args:
      path: a `.safetensors` file of ssl_jax or with torchvision's names; a PyTorch file; the prefix
        of a TensorFlow checkpoint or the folder of a saved model (SimCLR); a pickle (BYOL).
      kind: the code that wrote it, one of `KINDS`; "" infers it from the names.

    Returns:
      The weights, for the official code with the heads that the file contains. The last file is
      cached in memory.

    Raises:
      UserError: the file doesn't exist, can't be read, or contains no supported network.
    """
    path = _in_folder(path)
    if kind and kind not in KINDS:
        raise UserError(f"Unknown kind of weights '{kind}'.{did_you_mean(kind, KINDS)}")
    prefix = checkpoint_prefix(path)
    file = Path(f"{prefix}.index") if prefix else path
    if not file.is_file():
        raise UserError(f"{path} is not a file of weights.")
    if prefix is None and path.suffix != ".safetensors" and not may_be_pickled(path):
        raise UserError(f"{path} contains no weights: {_KNOWN}.")
    now = file.stat()
    return _read(path, prefix, kind, (now.st_mtime_ns, now.st_size))


@functools.lru_cache(maxsize=1)
def _read(path: Path, prefix: Path | None, kind: str, state: tuple[int, int]) -> Weights:
    """Reads a file; the last result is cached until the file changes."""
    if prefix is not None:
        if kind not in ("", "simclr"):
            raise UserError(f"{path} is a TensorFlow checkpoint of SimCLR: omit the kind.")
        return to_weights(read_simclr(read_checkpoint(prefix), path), path)
    if path.suffix == ".safetensors":
        arrays, header = read_safetensors(path)
        if "ssl_jax" in header:
            if kind:
                raise UserError(f"{path} was written by ssl_jax: omit the kind.")
            weights = parse_weights(path, arrays, header)
            require_complete(weights, path)
            return weights
        weights = to_weights(_torch(arrays, kind, path), path)
        return _as_exported(weights, path, header) if "ssl_jax_config" in header else weights
    if kind == "byol" or not kind and path.suffix in (".pkl", ".pickle"):
        return to_weights(read_byol(read_pickle(path), path), path)
    return to_weights(_torch(_state_dict(read_torch(path), path), kind, path), path)


def _as_exported(weights: Weights, path: Path, header: Mapping[str, str]) -> Weights:
    """Takes padding and preprocessing from the header of `ssl-jax export --format=torch`."""
    known = parse_config(path, {"ssl_jax": FORMAT, "config": header["ssl_jax_config"]})
    config = weights.config
    config.model.update(known.model.to_dict())
    with config.unlocked():
        config.views = known.views
    config.eval.update(known.eval.to_dict())
    config.data.update({**known.data.to_dict(), "num_classes": config.data.num_classes})
    config.eval.projector_layer = 0
    # With a source, the config is not taken for the recipe that trained the weights.
    return dataclasses.replace(weights, config=config, source=f"{known.method}: {path.name}")


def read_weights_config(path: str | Path) -> ConfigDict:
    """The config of `read_weights`; for a file of ssl_jax only the header is read."""
    path = _in_folder(path)
    header = read_header(path) if path.suffix == ".safetensors" else {}
    return parse_config(path, header) if "ssl_jax" in header else read_weights(path).config


def _state_dict(found: Any, path: Path) -> dict[str, np.ndarray]:
    """Finds the state dict in an object that `torch.save` wrote."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    arrays = found.items() if isinstance(found, dict) else ()
    state = {k: v for k, v in arrays if isinstance(k, str) and isinstance(v, np.ndarray)}
    if not state:
        raise UserError(f"{path} contains no named weights: save a model's state_dict.")
    return state


def _torch(state: Arrays, kind: str, path: Path) -> Found:
    kind = kind or _infer_kind(state, path)
    code = _TORCH.get(kind)
    if code is None:
        raise UserError(f"{path} is not a file of '{kind}': omit the kind, or give another.")
    prefix = code.prefix
    if kind in ("torchvision", "timm") and all(name.startswith("module.") for name in state):
        prefix = "module."
    elif kind == "solo" and any(name.startswith("encoder.") for name in state):
        prefix = "encoder."  # in its first versions
    names = {k.removeprefix(prefix): k for k in state if k.startswith(prefix)}
    if not names:
        raise UserError(
            f"{path} has no names that start with '{prefix}', as files of {kind} do: omit the "
            "kind, or give another."
        )
    small = "2.0.conv1.weight" in names
    if any(re.match(r"\d+\.", name) for name in names):
        renamed = sequential(names)
        names = {renamed[name]: theirs for name, theirs in names.items()}
    encoder = {name: state[theirs] for name, theirs in names.items()}
    params, stats, unknown = from_torch(encoder, split=kind == "lightly")
    beyond = [name for name in unknown if re.match(r"layer\d\.", name)]
    if beyond:
        raise UserError(
            f"{path} is not a supported ResNet: {len(beyond)} names in its blocks are unknown, "
            f"such as {names[beyond[0]]}."
        )
    found = Found(kind, {"encoder": params}, {"encoder": stats}, small_stem=small)
    taken = {theirs for name, theirs in names.items() if name not in unknown}
    for head, (start, layers) in zip(("projector", "predictor"), code.heads.items(), strict=False):
        taken |= _head(found, head, state, start, layers)
    if kind in ("torchvision", "timm") and f"{prefix}fc.weight" in state:
        taken |= _head(found, "classifier", state, f"{prefix}fc.", {"": "Dense_0"})
    if kind == "swav" and "module.prototypes.weight" in state:
        kernel = from_torch_layout(state["module.prototypes.weight"])
        found.params["prototypes"] = {"kernel": kernel}
        taken.add("module.prototypes.weight")
    found.left_out = tuple(sorted(set(state) - taken))
    return found


def _head(
    found: Found, head: str, state: Arrays, start: str, layers: Mapping[str, str]
) -> set[str]:
    """Adds a head to `found`, and returns the names that it has taken."""
    if f"{start}weight" in state and "" not in layers:  # one layer, without a number
        layers = {"": "dense1"}

    def place(name: str) -> tuple[str, str] | None:
        number, _, leaf = name.removeprefix(start).rpartition(".")
        return (layers[number], leaf) if number in layers and leaf in _LEAVES else None

    names = {name: value for name, value in state.items() if name.startswith(start)}
    params, stats, unknown = from_torch(names, place)
    if params:
        found.params[head] = params
    if stats:
        found.batch_stats[head] = stats
    return set(names) - set(unknown)


def _infer_kind(state: Arrays, path: Path) -> str:
    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in state)

    if has("module.encoder_q."):
        return "moco"
    if has("module.encoder.") and has("module.predictor."):
        return "simsiam"
    if has("module.prototypes.") or has("module.projection_head."):
        return "swav"
    solos = any(map(has, ("projector.", "classifier.", "momentum_", "predictor.", "prototypes.")))
    if has("encoder.conv1."):
        # solo-learn's first versions; SimSiam's heads are in `encoder.fc` and `predictor`.
        if not has("projector.") and not has("classifier."):
            raise UserError(
                f"{path} has names that start with 'encoder.', which several codes use: give "
                "--kind=solo, or save only the encoder, with torchvision's names."
            )
        return "solo"
    if has("backbone."):
        # A `Sequential`, which solo-learn never saves.
        numbered = any(re.match(r"backbone\.\d+\.", name) for name in state)
        others = any(map(has, ("projection_head", "prediction_head.", "student_", "teacher_")))
        if numbered or others:
            return "lightly"
        if solos:
            return "solo"
        first = state.get("backbone.conv1.weight")
        if first is not None and first.shape[-1:] == (3,):
            raise UserError(
                f"{path} has names of both solo-learn and lightly, whose small stems differ: "
                "give --kind=solo or --kind=lightly."
            )
        return "lightly"
    return "torchvision"
