"""Encoders that other codes have trained: torchvision, timm, the official codes, two libraries.

What is read becomes `Weights`: our tree, and a config that says how the network pads and how its
images are prepared. Names that have no place are kept in `left_out`; what is missing, or of another
shape, is refused.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ssl_jax.config import did_you_mean
from ssl_jax.errors import UserError
from ssl_jax.interop.byol import read_byol
from ssl_jax.interop.infer_architecture import Found, require_whole, weights_of
from ssl_jax.interop.pickled import may_be_pickled, read_pickle, read_torch
from ssl_jax.interop.simclr import checkpoint_prefix, read_checkpoint, read_simclr
from ssl_jax.interop.torch_names import from_torch, from_torch_layout, sequential
from ssl_jax.interop.weights import FORMAT, Weights, own, own_config, read_header, read_safetensors

Arrays = Mapping[str, np.ndarray]
_KNOWN = (
    "give a .safetensors file, one that torch.save has written, a pickle of BYOL's code, or the "
    "beginning of a TensorFlow checkpoint's files"
)
KINDS = ("byol", "lightly", "moco", "simclr", "simsiam", "solo", "swav", "timm", "torchvision")


@dataclasses.dataclass(frozen=True)
class _Torch:
    """A PyTorch code: where its encoder is in the state dict, and its heads' linear layers.

    Heads are our networks' names to their layers, by the numbers of a `Sequential` of linear
    layers, BatchNorms and ReLUs.
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


def is_elsewhere(path: str | Path) -> bool:
    """Whether a path is a file of weights, or a checkpoint's beginning, and no run's workdir."""
    path = _in_folder(path)
    if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        return False
    return path.is_file() or checkpoint_prefix(path) is not None


def _in_folder(path: str | Path) -> Path:
    """The file in a folder of `ssl-jax export --format=folder`, or of timm's; else the path."""
    path = Path(path).expanduser()
    names = ("ssl_jax.safetensors", "model.safetensors")
    if (path / "checkpoints").is_dir():  # a run, whatever else was put there
        return path
    return next((path / name for name in names if (path / name).is_file()), path)


def read_weights(path: str | Path, kind: str = "") -> Weights:
    """Reads the networks in a file, of ours or of another code.

    Args:
      path: a `.safetensors` file of ours or with torchvision's names; a PyTorch file; the beginning
        of a TensorFlow checkpoint's files, or a saved model's folder (SimCLR); a pickle (BYOL).
      kind: whose it is, one of `KINDS`; "": as the names tell.

    Returns:
      The weights. The networks beside the encoder are there where the official code's are. The file
      read last is kept in memory.

    Raises:
      UserError: nothing there, it can't be read, or it doesn't hold a network that is known here.
    """
    path = _in_folder(path)
    if kind and kind not in KINDS:
        raise UserError(f"There is no kind '{kind}' of weights.{did_you_mean(kind, KINDS)}")
    prefix = checkpoint_prefix(path)
    file = Path(f"{prefix}.index") if prefix else path
    if not file.is_file():
        raise UserError(f"There is no file of weights {path}.")
    if prefix is None and path.suffix != ".safetensors" and not may_be_pickled(path):
        raise UserError(f"{path} holds no weights: {_KNOWN}.")
    now = file.stat()
    return _read(path, prefix, kind, (now.st_mtime_ns, now.st_size))


@functools.lru_cache(maxsize=1)
def _read(path: Path, prefix: Path | None, kind: str, state: tuple[int, int]) -> Weights:
    """Reads a file, again only when it is another one or has changed."""
    if prefix is not None:
        if kind not in ("", "simclr"):
            raise UserError(f"{path} is a TensorFlow checkpoint, SimCLR's: leave the kind out.")
        return weights_of(read_simclr(read_checkpoint(prefix), path), path)
    if path.suffix == ".safetensors":
        arrays, header = read_safetensors(path)
        if "ssl_jax" in header:
            if kind:
                raise UserError(f"{path} is a file of ssl_jax's own: leave the kind out.")
            weights = own(path, arrays, header)
            require_whole(weights, path)
            return weights
        weights = weights_of(_torch(arrays, kind, path), path)
        return _as_exported(weights, path, header) if "ssl_jax_config" in header else weights
    if kind == "byol" or not kind and path.suffix in (".pkl", ".pickle"):
        return weights_of(read_byol(read_pickle(path), path), path)
    return weights_of(_torch(_state_dict(read_torch(path), path), kind, path), path)


def _as_exported(weights: Weights, path: Path, header: Mapping[str, str]) -> Weights:
    """Of our own export with torchvision's names: the header tells padding and preparation."""
    known = own_config(path, {"ssl_jax": FORMAT, "config": header["ssl_jax_config"]})
    config = weights.config
    config.model.update(known.model.to_dict())
    with config.unlocked():
        config.views = known.views
    config.eval.update(known.eval.to_dict())
    config.data.update({**known.data.to_dict(), "num_classes": config.data.num_classes})
    config.eval.projector_layer = 0
    # How it was trained isn't in `config`.
    return dataclasses.replace(weights, config=config, source=f"{known.method}: {path.name}")


def weights_config(path: str | Path) -> ConfigDict:
    """The config of `read_weights`; of a file of ours only the header is read for it."""
    path = _in_folder(path)
    header = read_header(path) if path.suffix == ".safetensors" else {}
    return own_config(path, header) if "ssl_jax" in header else read_weights(path).config


def _state_dict(found: Any, path: Path) -> dict[str, np.ndarray]:
    """The arrays by name in what `torch.save` wrote: a state dict, or one among other things."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    arrays = found.items() if isinstance(found, dict) else ()
    state = {k: v for k, v in arrays if isinstance(k, str) and isinstance(v, np.ndarray)}
    if not state:
        raise UserError(f"{path} holds no weights by name: save a model's state_dict.")
    return state


def _torch(state: Arrays, kind: str, path: Path) -> Found:
    kind = kind or _recognise(state, path)
    code = _TORCH.get(kind)
    if code is None:
        raise UserError(f"{path} is no file of '{kind}': leave the kind out, or give another.")
    prefix = code.prefix
    if kind in ("torchvision", "timm") and all(name.startswith("module.") for name in state):
        prefix = "module."
    elif kind == "solo" and any(name.startswith("encoder.") for name in state):
        prefix = "encoder."  # of its first versions
    names = {k.removeprefix(prefix): k for k in state if k.startswith(prefix)}
    if not names:
        raise UserError(f"{path} has no names that begin with '{prefix}', as those of {kind} do.")
    small = "2.0.conv1.weight" in names
    if any(re.match(r"\d+\.", name) for name in names):
        renamed = sequential(names)
        names = {renamed[name]: theirs for name, theirs in names.items()}
    encoder = {name: state[theirs] for name, theirs in names.items()}
    params, stats, unknown = from_torch(encoder, split=kind == "lightly")
    beyond = [name for name in unknown if re.match(r"layer\d\.", name)]
    if beyond:
        raise UserError(
            f"{path} has {len(beyond)} names in its blocks that no ResNet here has, such as "
            f"{names[beyond[0]]}: it is another network."
        )
    found = Found(kind, {"encoder": params}, {"encoder": stats}, small_stem=small)
    taken = {theirs for name, theirs in names.items() if name not in unknown}
    for number, (start, layers) in enumerate(code.heads.items()):
        head = ("projector", "predictor")[number]
        taken |= _head(found, head, state, start, layers)
    if kind == "swav" and "module.prototypes.weight" in state:
        kernel = from_torch_layout(state["module.prototypes.weight"])
        found.params["prototypes"] = {"kernel": kernel}
        taken.add("module.prototypes.weight")
    if kind in ("torchvision", "timm") and f"{prefix}fc.weight" in state:
        taken |= _linear(found, "classifier", "Dense_0", state, f"{prefix}fc")
    found.left_out = tuple(sorted(set(state) - taken))
    return found


def _recognise(state: Arrays, path: Path) -> str:
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
        # Its first versions; SimSiam's heads are in `encoder.fc` and `predictor`.
        if not has("projector.") and not has("classifier."):
            raise UserError(
                f"{path} has names that begin with 'encoder.', which don't tell whose they are: "
                "say it with --kind=solo, or keep the encoder alone, under torchvision's names."
            )
        return "solo"
    if has("backbone."):
        # A `Sequential`, which solo-learn never has.
        numbered = any(re.match(r"backbone\.\d+\.", name) for name in state)
        others = any(map(has, ("projection_head", "prediction_head.", "student_", "teacher_")))
        if numbered or others:
            return "lightly"
        if solos:
            return "solo"
        first = state.get("backbone.conv1.weight")
        if first is not None and first.shape[-1:] == (3,):
            raise UserError(
                f"{path} has names that don't tell whether it is solo-learn's or lightly's, whose "
                "small stems differ: say it with --kind=solo or --kind=lightly."
            )
        return "lightly"
    return "torchvision"


def _head(
    found: Found, head: str, state: Arrays, start: str, layers: Mapping[str, str]
) -> set[str]:
    """Takes a head's layers; a head of one layer has no number."""
    taken = set()
    if f"{start}weight" in state:
        layers = {"": "dense1"}
    for number, layer in layers.items():
        taken |= _linear(found, head, layer, state, f"{start}{number}".removesuffix("."))
    return taken


def _linear(found: Found, head: str, layer: str, state: Arrays, name: str) -> set[str]:
    """Takes a linear layer or a BatchNorm, with what it has of weights and statistics."""
    taken = set()
    places = {"weight": "kernel" if layer.lower().startswith("dense") else "scale", "bias": "bias"}
    for theirs, ours in places.items():
        value = state.get(f"{name}.{theirs}")
        if value is not None:
            node = found.params.setdefault(head, {}).setdefault(layer, {})
            node[ours] = from_torch_layout(value)
            taken.add(f"{name}.{theirs}")
    for theirs, ours in (("running_mean", "mean"), ("running_var", "var")):
        value = state.get(f"{name}.{theirs}")
        if value is not None:
            node = found.batch_stats.setdefault(head, {}).setdefault(layer, {})
            node[ours] = np.asarray(value, np.float32)
            taken.add(f"{name}.{theirs}")
    if f"{name}.num_batches_tracked" in state:
        taken.add(f"{name}.num_batches_tracked")
    return taken
