"""Finds the encoder and its heads in a PyTorch state dict, by the names that each code gives them.

Wrappers (`module.` of data parallelism, `_orig_mod.` of `torch.compile`) are dropped wherever they
occur, and the names of common attributes (`model.`, `backbone.`, `encoder.`, `net.`) may precede
those of any code.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.interop.infer_architecture import Found, Given
from ssl_jax.interop.torch_names import from_torch, from_torch_layout, sequential
from ssl_jax.interop.vit_state import read_vit, vit_kind, vit_prefixes

Arrays = Mapping[str, np.ndarray]
_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_WRAPPERS = {"module", "_orig_mod"}
_OUTER = {"model", "backbone", "encoder", "net"}
_MLP2 = {"0": "dense1", "2": "dense2"}
_MLP2_BN = {"0": "dense1", "1": "bn1", "3": "dense2"}
_MLP3_BN = {**_MLP2_BN, "4": "bn2", "6": "dense3", "7": "bn3"}


@dataclasses.dataclass(frozen=True)
class _Code:
    """Names in the state dict of a PyTorch code, without wrappers.

    Attributes:
      encoders: prefixes that the encoder's names may have.
      heads: by network: the prefix of the names, relative to the `encoder` or to its `outer`
        module, and ssl_jax's layers by the numbers of a `Sequential` of linear layers, BatchNorms
        and ReLUs.
    """

    encoders: tuple[str, ...]
    heads: Mapping[str, tuple[str, Mapping[str, str]]] = dataclasses.field(default_factory=dict)


_CODES = {
    "moco": _Code(("encoder_q.",), {"projector": ("{encoder}fc.", _MLP2)}),
    "moco_v3": _Code(
        ("base_encoder.",),
        {
            "projector": ("{encoder}fc.", {**_MLP2_BN, "4": "bn2"}),
            "predictor": ("{outer}predictor.", _MLP2_BN),
        },
    ),
    "vissl": _Code(("trunk._feature_blocks.", "_feature_blocks.")),
    "dino": _Code(("teacher.backbone.",)),
    "dinov2": _Code(("teacher.backbone.", "")),
    "mae": _Code(("",)),
    "simsiam": _Code(
        ("encoder.",),
        {"projector": ("{encoder}fc.", _MLP3_BN), "predictor": ("{outer}predictor.", _MLP2_BN)},
    ),
    "swav": _Code(("",), {"projector": ("{outer}projection_head.", _MLP2_BN)}),
    "supcontrast": _Code(("encoder.",)),
    "lightly": _Code(("backbone.",)),
    "solo": _Code(("backbone.", "encoder.")),
    "barlow_twins": _Code(("backbone.",)),
    "vicreg": _Code(("backbone.",)),
    "torchvision": _Code(("",)),
    "timm": _Code(("",)),
}
KINDS = tuple(_CODES)
# Codes that are recognized by their encoder's prefix only.
_OWN_PREFIX = ("moco", "moco_v3", "vissl", "dino")
# Codes whose ViTs are supported.
_VIT_KINDS = ("moco_v3", "dino", "dinov2", "mae", "timm")
# Codes whose names are used by other codes with a different small stem.
_COMMON = ("torchvision", "barlow_twins", "vicreg")


def read_state(state: Arrays, kind: str, path: Path, given: Given | None = None) -> Found:
    """Converts a state dict to ssl_jax's tree.

    Args:
      state: arrays by name.
      kind: the code that wrote it, one of `KINDS`; "" infers it from the names.
      path: the file, for error messages.
      given: what the user knows about a ViT.

    Raises:
      UserError: the names or shapes are ambiguous, or not those of a supported network.
    """
    if kind and kind not in _CODES:
        raise UserError(f"{path} is not a file of '{kind}': omit the kind, or give another.")
    original = _unwrapped(state, path)
    state = {name: state[stored] for name, stored in original.items()}
    prefixes, vits = _resnets(state), vit_prefixes(state)
    if vits and not prefixes:
        return _read_vit(state, original, kind, vits, path, given or Given())
    if kind in ("dinov2", "mae"):
        raise UserError(f"{path} contains no ViT, as files of {kind} do: omit the kind.")
    if given not in (None, Given()):
        raise UserError(f"{path} contains no ViT: omit --heads and --image-size.")
    kind = kind or _infer(state, prefixes, path)
    prefix, outer = _encoder_prefix(kind, prefixes, path)
    names = {k.removeprefix(prefix): k for k in state if k.startswith(prefix)}
    small = "2.0.conv1.weight" in names
    if any(re.match(r"\d+\.", name) for name in names):
        renamed = sequential(names)
        names = {renamed[name]: stored for name, stored in names.items()}
    encoder = {name: state[stored] for name, stored in names.items()}
    params, stats, unknown = from_torch(encoder, split=kind == "lightly")
    beyond = [name for name in unknown if re.match(r"layer\d\.", name)]
    if beyond:
        raise UserError(
            f"{path} is not a supported ResNet: {len(beyond)} names in its blocks are unknown, "
            f"such as {original[names[beyond[0]]]}."
        )
    found = Found(kind, {"encoder": params}, {"encoder": stats}, small_stem=small)
    taken = {stored for name, stored in names.items() if name not in unknown}
    for head, (start, layers) in _CODES[kind].heads.items():
        taken |= _head(found, head, state, start.format(encoder=prefix, outer=outer), layers)
    if kind in ("torchvision", "timm") and f"{prefix}fc.weight" in state:
        taken |= _head(found, "classifier", state, f"{prefix}fc.", {"": "Dense_0"})
    prototypes = f"{outer}prototypes.weight"
    if kind == "swav" and prototypes in state:
        found.params["prototypes"] = {"kernel": from_torch_layout(state[prototypes])}
        taken.add(prototypes)
    found.left_out = tuple(sorted(original[name] for name in set(state) - taken))
    return found


def _read_vit(
    state: Arrays,
    original: Mapping[str, str],
    kind: str,
    prefixes: list[str],
    path: Path,
    given: Given,
) -> Found:
    """Finds the ViT of a state dict, and converts it."""
    if kind and kind not in _VIT_KINDS:
        raise UserError(
            f"{path} contains a ViT, but the kind '{kind}' has ResNets only: omit the kind, or use "
            f"{', '.join(_VIT_KINDS[:-1])} or {_VIT_KINDS[-1]}."
        )
    kind = kind or next((k for k in ("moco_v3", "dino") if _matching(k, prefixes)), "")
    prefix, _ = _encoder_prefix(kind or "timm", prefixes, path)
    if kind in ("", "dino") and vit_kind(state, prefix) == "dinov2":
        kind = "dinov2"
    inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    found = read_vit(inner, kind or vit_kind(state, prefix), path, given)
    outside = [original[name] for name in state if not name.startswith(prefix)]
    left = [original[f"{prefix}{name}"] for name in found.left_out]
    found.left_out = tuple(sorted(outside + left))
    return found


def _unwrapped(names: Iterable[str], path: Path) -> dict[str, str]:
    """Maps names without wrappers to the names in the file."""
    found: dict[str, str] = {}
    for name in names:
        bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if bare in found:
            raise UserError(
                f"{path} has two tensors that differ in a wrapper only, {found[bare]} and {name}: "
                "save the state_dict of one of the two models."
            )
        found[bare] = name
    return found


def _resnets(names: Iterable[str]) -> list[str]:
    """Prefixes of the ResNets among names, those of the fewest parts first."""
    found = set()
    for name in names:
        parts = name.split(".")
        # layer1.0.conv1.weight, or the number of a Sequential in place of layer1
        if parts[-2:] == ["conv1", "weight"] and len(parts) > 3 and parts[-3].isdigit():
            if re.fullmatch(r"layer\d|\d+", parts[-4]):
                found.add("".join(f"{part}." for part in parts[:-4]))
    return sorted(found, key=lambda prefix: (prefix.count("."), prefix))


def _matching(kind: str, prefixes: Iterable[str]) -> list[tuple[str, str]]:
    """Prefixes that a code's encoder may have, and the part before the code's own."""
    found = []
    for prefix in prefixes:
        for own in _CODES[kind].encoders:
            outer = prefix.removesuffix(own)
            parts = outer.split(".")
            # "" or complete parts
            if prefix.endswith(own) and parts[-1] == "" and set(parts[:-1]) <= _OUTER:
                found.append((prefix, outer))
                break
    return found


def _encoder_prefix(kind: str, prefixes: list[str], path: Path) -> tuple[str, str]:
    """The encoder's prefix, and the part before the code's own."""
    found = _matching(kind, prefixes)
    if not found and "" in _CODES[kind].encoders and len(prefixes) < 2:
        # The only ResNet in the file, or none, which later checks explain.
        prefix = prefixes[0] if prefixes else ""
        return prefix, prefix
    if not found and prefixes and "" in _CODES[kind].encoders:
        raise UserError(
            f"{path} has several encoders, whose names start with {_listed(prefixes)}: save the "
            "state_dict of one."
        )
    if not found:
        raise UserError(
            f"{path} has no names that start with '{_CODES[kind].encoders[0]}', as files of {kind} "
            "do: omit the kind, or give another."
        )
    tied = [prefix for prefix, _ in found if prefix.count(".") == found[0][0].count(".")]
    if len(tied) > 1:
        raise UserError(
            f"{path} has several encoders, whose names start with {_listed(tied)}: save the "
            "state_dict of one."
        )
    return found[0]


def _listed(prefixes: list[str]) -> str:
    return ", ".join(f"'{prefix}'" for prefix in prefixes[:4])


def _infer(state: Arrays, prefixes: list[str], path: Path) -> str:
    """The code that wrote a state dict."""
    for kind in _OWN_PREFIX:
        if _matching(kind, prefixes):
            return kind
    prefix, _ = _encoder_prefix("torchvision", prefixes, path)
    if _siblings(state, prefix) & {"projection_head", "prototypes"}:
        return "swav"
    parts = prefix.split(".")[:-1]
    if not {"backbone", "encoder"} & set(parts):
        return "torchvision"
    kind = _by_heads(state, prefix, _siblings(state, prefix.removesuffix(f"{parts[-1]}.")))
    stem = state.get(f"{prefix}conv1.weight", state.get(f"{prefix}0.weight"))
    if kind in _COMMON and stem is not None and stem.shape[-1:] == (3,):
        raise UserError(
            f"{path} has a 3×3 stem and names that start with '{prefix}', which several codes use "
            "with different stems: run ssl-jax import with --kind=torchvision (one pixel of "
            "padding), --kind=solo (solo-learn, two pixels) or --kind=lightly."
        )
    return kind


def _siblings(names: Iterable[str], outer: str) -> set[str]:
    """The modules next to the encoder."""
    return {name.removeprefix(outer).split(".")[0] for name in names if name.startswith(outer)}


def _by_heads(state: Arrays, prefix: str, siblings: set[str]) -> str:
    """The code that wrote a state dict with a `backbone.` or an `encoder.`."""
    name = prefix.split(".")[-2]
    momentum = any(each.startswith("momentum_") for each in siblings)
    others = {"projector", "predictor", "prototypes", "head"} & siblings
    if f"{prefix}fc.0.weight" in state and "predictor" in siblings:
        return "simsiam"
    if name == "encoder" and "head" in siblings and not momentum and "classifier" not in siblings:
        return "supcontrast"
    numbered = any(re.match(r"\d+\.", each.removeprefix(prefix)) for each in state)
    if name == "backbone" and (numbered or _is_lightly(siblings)):
        return "lightly"
    # Its modules always have a classifier and another head.
    if momentum or "classifier" in siblings and others:
        return "solo"
    if name == "backbone" and "projector" in siblings:
        return "barlow_twins" if "bn" in siblings else "vicreg"
    return "torchvision"


def _is_lightly(siblings: set[str]) -> bool:
    known = ("projection_head", "prediction_head", "student_", "teacher_")
    return any(name.startswith(known) for name in siblings)


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
