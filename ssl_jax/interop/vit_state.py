"""Reads ViTs from PyTorch state dicts, and infers their architecture from names and shapes."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.interop.infer_architecture import Found, Given, timm_config
from ssl_jax.interop.torch_names import from_torch_layout
from ssl_jax.interop.vit_names import TOKENS, vit_from_torch

Arrays = Mapping[str, np.ndarray]
# Parts of other ViTs, by their names.
_UNSUPPORTED = {
    r"mlp\.(w1|w2|w3|w12|fc1_g|fc1_x)\.": "a SwiGLU perceptron, as in DINOv2's giant",
    r"attn\.(q_norm|k_norm)\.": "normalized queries and keys",
    r"(^|\.)rope": "rotary positions, as in DINOv3",
    r"bias_mask$|^storage_tokens$": "DINOv3's attention and storage tokens",
    r"rel(ative)?_pos": "relative positions",
    r"attn\.[qkv]_bias$": "separate biases of queries and values, as in BEiT",
    r"^norm_pre\.": "a LayerNorm before the blocks, as in CLIP",
    r"^attn_pool\.": "attention pooling, as in SigLIP",
    r"^dist_token$": "a distillation token, as in DeiT's distilled networks",
    r"^patch_embed\.proj\.\d": "a convolutional stem, as in MoCo v3's vit_conv",
    r"^patch_embed\.norm\.": "a LayerNorm of the patches",
}
_HEADS = {1280: 16}  # ViT-H; the others have 64 features per head
_LAYER_SCALE = 1e-5  # the usual initial value, which imported scales have left


def vit_prefixes(names: Arrays) -> list[str]:
    """Prefixes of the ViTs among names, those of the fewest parts first."""
    ends = re.compile(r"(.*\.)?patch_embed\.proj\.(?:0\.)?weight$")
    found = {match[1] or "" for match in map(ends.match, names) if match}
    return sorted(found, key=lambda prefix: (prefix.count("."), prefix))


def vit_kind(state: Arrays, prefix: str) -> str:
    """The code that wrote a ViT whose prefix doesn't determine it."""
    names = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    if any(name.startswith("decoder_") for name in names):
        return "mae"
    return "dinov2" if names & {"mask_token", "register_tokens"} else "timm"


def read_vit(state: Arrays, kind: str, path: Path, given: Given) -> Found:
    """Converts a ViT and its classifier.

    Args:
      state: arrays by name, without prefixes.
      kind: the code that wrote it.
      path: the file, for error messages and timm's `config.json` next to it.
      given: what the user knows about the network.

    Returns:
      The contents; `left_out` has names without prefixes.

    Raises:
      UserError: the network is not a supported ViT, or its shapes leave several possibilities.
    """
    for pattern, what in _UNSUPPORTED.items():
        name = next((name for name in state if re.search(pattern, name)), None)
        if name:
            raise UserError(f"{path} is not a supported ViT: it has {what} ({name}).")
    params, unknown = vit_from_torch(state)
    beyond = [name for name in unknown if name.startswith("blocks.")]
    if beyond:
        raise UserError(
            f"{path} is not a supported ViT: {len(beyond)} names in its blocks are unknown or "
            f"repeated, such as {beyond[0]}."
        )
    timm = timm_config(path) if kind == "timm" else {}
    width, patch = _patches(state["patch_embed.proj.weight"], path)
    depth = _depth(params, path)
    pool = _pool(params, state, timm, path)
    tokens = _tokens(state, width, path)
    extras = {0, sum(x.shape[1] for name, x in tokens.items() if name != "pos_embed")}
    if "register_tokens" in state:  # DINOv2 adds them after the positions
        extras = {int("cls_token" in state)}
    extra, side = _grid(tokens["pos_embed"].shape[1], extras, patch, given.image_size, timm, path)
    table, registers = _positions(tokens, pool, extra)
    found = Found(kind, {"encoder": {**params, **table}}, {})
    weight = state.get("head.weight") if kind in ("timm", "mae") else None
    if weight is not None and weight.ndim == 2:
        head = {"kernel": from_torch_layout(weight)}
        if "head.bias" in state:
            head["bias"] = from_torch_layout(state["head.bias"])
        found.params["classifier"] = {"Dense_0": head}
        unknown = [name for name in unknown if name not in ("head.weight", "head.bias")]
    scaled = any("ls1" in block for block in params.values())
    found.model = {
        "name": "vit",
        "vit": {
            **{"width": width, "depth": depth, "heads": _heads(width, kind, given, timm, path)},
            **{"patch": patch, "image_size": side * patch, "pool": pool, "positions": "learned"},
            **{"registers": registers, "layer_scale": _LAYER_SCALE if scaled else 0.0},
        },
    }
    found.left_out = tuple(unknown)
    return found


def _patches(kernel: np.ndarray, path: Path) -> tuple[int, int]:
    """Width and patch size."""
    shape = kernel.shape
    if len(shape) != 4 or shape[2] != shape[3] or not all(shape):
        raise UserError(
            f"{path} is not a supported ViT: patch_embed.proj.weight has the shape {list(shape)}, "
            "not [width, 3, patch, patch]."
        )
    return shape[0], shape[2]


def _depth(params: Mapping[str, Any], path: Path) -> int:
    """The number of blocks, of which none may be missing."""
    blocks = sorted(int(name[7:]) for name in params if name.startswith("blocks_"))
    if not blocks:
        raise UserError(f"{path} contains no ViT: it has patch_embed.proj, but no block blocks.0.")
    if blocks != list(range(len(blocks))):
        first = next(i for i, number in enumerate(blocks) if i != number)
        raise UserError(
            f"{path} lacks block {first} of its ViT, but has block {blocks[-1]}: download or save "
            "it again."
        )
    return len(blocks)


def _pool(params: Mapping[str, Any], state: Arrays, timm: Mapping[str, Any], path: Path) -> str:
    """How features are pooled, by the last LayerNorm."""
    norms = [name for name in ("norm", "fc_norm") if name in params]
    if norms == ["fc_norm"]:
        return "mean"
    if norms == ["norm"] and "cls_token" in state and timm.get("global_pool") in (None, "token"):
        return "class"
    reason = {
        (): "it has no norm or fc_norm",
        ("norm", "fc_norm"): "it normalizes both before and after pooling (norm and fc_norm)",
        ("norm",): "its features are not the output at a class token, but it has no fc_norm, the "
        "LayerNorm of averaged patches",
    }[tuple(norms)]
    raise UserError(f"{path} is not a supported ViT: {reason}.")


def _tokens(state: Arrays, width: int, path: Path) -> dict[str, np.ndarray]:
    """Class token, registers ("reg_token") and positions, with checked shapes."""
    found = {}
    for name in TOKENS:
        if name in state:
            shape = np.shape(state[name])
            wrong = len(shape) != 3 or shape[0] != 1 or shape[2] != width or not shape[1]
            if wrong or name == "cls_token" and shape[1] != 1:
                count = "1" if name == "cls_token" else "tokens"
                raise UserError(
                    f"{path} is not a supported ViT: {name} has the shape {list(shape)}, not "
                    f"[1, {count}, {width}]."
                )
            key = "reg_token" if name == "register_tokens" else name
            found[key] = np.array(state[name], np.float32)
    if "pos_embed" not in found:
        raise UserError(f"{path} is not a supported ViT: it has no table of positions, pos_embed.")
    return found


def _positions(
    tokens: Mapping[str, np.ndarray], pool: str, extra: int
) -> tuple[dict[str, np.ndarray], int]:
    """Our tokens and positions, and the number of registers.

    Positions of class token and registers are added to the tokens, where our ViT has none for them.
    Under a mean over patches, a class token is one more register.
    """
    table, width = tokens["pos_embed"], tokens["pos_embed"].shape[2]
    empty = np.zeros((1, 0, width), np.float32)
    token, registers = tokens.get("cls_token", empty), tokens.get("reg_token", empty)
    prefix = np.concatenate([token, registers], axis=1)
    of_prefix, table = np.zeros_like(prefix), table[:, extra:]
    of_prefix[:, :extra] = tokens["pos_embed"][:, :extra]
    if pool == "class" and not registers.size:
        positions = np.concatenate([of_prefix, table], axis=1)
        return {"cls_token": token, "pos_embed": positions}, 0
    prefix = prefix + of_prefix
    found = {"pos_embed": table}
    if pool == "class":
        found["cls_token"], prefix = prefix[:, :1], prefix[:, 1:]
    if prefix.size:
        found["reg_token"] = prefix
    return found, prefix.shape[1]


def _grid(
    count: int, extras: set[int], patch: int, given: int, timm: Mapping[str, Any], path: Path
) -> tuple[int, int]:
    """The number of other tokens that have positions, and the side of the grid of patches."""
    options, named = {}, _timm_size(timm, path)
    for extra in sorted(extras):
        side = math.isqrt(max(count - extra, 0))
        if side and side * side == count - extra:
            options[extra] = side
    if not options:
        besides = " or ".join(str(extra) for extra in sorted(extras))
        raise UserError(
            f"{path} is not a supported ViT: it has positions (pos_embed) of {count} tokens, but "
            f"without {besides} of them for other tokens, they are not those of a square image."
        )
    sizes = " or ".join(str(side * patch) for side in options.values())
    known = given or named if len(options) > 1 else given
    fitting = {extra: side for extra, side in options.items() if side * patch == known}
    if given and not fitting:
        raise UserError(
            f"--image-size is {given}, but the positions in {path} are those of {sizes} pixels."
        )
    options = fitting or options
    if len(options) > 1:
        raise UserError(
            f"The positions in {path} are those of images of {sizes} pixels, as its class token "
            "and registers may have positions or not: run ssl-jax import with --image-size."
        )
    return next(iter(options.items()))


def _timm_size(timm: Mapping[str, Any], path: Path) -> int:
    """The size of the images in timm's `config.json`; 0 if it has none."""
    arguments, known = (timm.get(key) for key in ("model_args", "pretrained_cfg"))
    size = arguments.get("img_size") if isinstance(arguments, dict) else None
    if isinstance(size, list) and size:
        if len(set(map(str, size))) > 1:
            raise UserError(
                f"{path} is not a supported ViT: its positions are those of images of {size} "
                "pixels (model_args in config.json), which are not square."
            )
        size = size[0]
    if size is None and isinstance(known, dict):
        shape = known.get("input_size")
        size = shape[-1] if isinstance(shape, list) and shape else None
    return size if isinstance(size, int) else 0


def _heads(width: int, kind: str, given: Given, timm: Mapping[str, Any], path: Path) -> int:
    """The number of attention heads, which no shape contains."""
    arguments = timm.get("model_args")
    heads = arguments.get("num_heads") if isinstance(arguments, dict) else None
    if given.heads:
        heads = given.heads
    elif not isinstance(heads, int):
        # MoCo v3's ViT-S has 12 heads of 32 features.
        heads = 12 if kind == "moco_v3" and width == 384 else _HEADS.get(width)
        if heads is None and width % 64 == 0:
            heads = width // 64
    if heads is None:
        raise UserError(
            f"The number of attention heads of the ViT in {path}, of width {width}, can't be "
            "inferred: run ssl-jax import with --heads."
        )
    if heads < 1 or width % heads:
        raise UserError(f"{heads} heads (--heads) don't divide the width of {path}, {width}.")
    return heads
