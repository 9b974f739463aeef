"""Conversion between our ViT's tree and the names of timm, DINO, DINOv2, MAE and MoCo v3."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from ssl_jax.config import flat_views, view_size
from ssl_jax.interop.torch_names import from_torch_layout, to_torch_layout
from ssl_jax.interop.weights import Pytree
from ssl_jax.models.vit import image_size, sincos_positions

# The second number of DINOv2's chunked blocks counts all blocks.
_BLOCK = re.compile(
    r"blocks\.(?:\d{1,4}\.)?(\d{1,4})\.(norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12]|ls[12])"
    r"\.(weight|bias|gamma)$"
)
_OTHER = re.compile(r"(patch_embed\.proj|norm|fc_norm)\.(weight|bias)$")
TOKENS = ("cls_token", "pos_embed", "reg_token", "register_tokens")
_TIMM = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large"}


def vit_place(name: str) -> str | None:
    """Looks up the path of a tensor in our ViT's tree.

    Args:
      name: timm's, or DINOv2's of a chunked block.

    Returns:
      The path, such as `blocks_0/attn/qkv/kernel`, or None for tensors of other networks. Tokens
      and positions have none, as their layout depends on each other.
    """
    block = _BLOCK.match(name)
    match = block or _OTHER.match(name)
    if not match:
        return None
    layer, leaf = match.groups()[-2:]
    scale = "norm" in layer or layer.startswith("ls")
    if (leaf == "gamma") != layer.startswith("ls"):
        return None
    ours = "bias" if leaf == "bias" else "scale" if scale else "kernel"
    layer = "patch_embed" if layer == "patch_embed.proj" else layer.replace(".", "/")
    return f"blocks_{int(block[1])}/{layer}/{ours}" if block else f"{layer}/{ours}"


def vit_from_torch(state: Mapping[str, np.ndarray]) -> tuple[Pytree, list[str]]:
    """Converts all of a state dict but tokens and positions to our ViT's tree.

    Args:
      state: arrays by name, without prefixes.

    Returns:
      Parameters, float32, and the names without a place there.
    """
    params: dict[str, np.ndarray] = {}
    unknown = []
    for name, value in state.items():
        path = vit_place(name)
        if path is None or path in params:
            unknown.append(name)
        else:
            params[path] = from_torch_layout(value)
    return unflatten_dict(params, sep="/"), [name for name in unknown if name not in TOKENS]


def vit_to_torch(params: Pytree, config: ConfigDict) -> dict[str, np.ndarray]:
    """Converts a ViT to a state dict with timm's names.

    Args:
      params: of the encoder.
      config: of the run. Fixed positions are written as a table, which timm learns, for images of
        the first view's size: for others timm interpolates the table, and our ViT computes it.

    Returns:
      float32 arrays in PyTorch's layout.
    """
    found: dict[str, np.ndarray] = {}
    for name, value in flatten_dict(params, sep="/").items():
        if name in TOKENS:
            found[name] = value
            continue
        path = name.replace("blocks_", "blocks.").replace("patch_embed/", "patch_embed/proj/")
        layer, _, leaf = path.rpartition("/")
        scale = "gamma" if layer.split("/")[-1].startswith("ls") else "weight"
        leaf = {"kernel": "weight", "scale": scale}.get(leaf, leaf)
        found[f"{layer}.{leaf}".replace("/", ".")] = to_torch_layout(value)
    options = config.model.vit
    if options.positions == "sincos":
        rows, columns = (size // options.patch for size in _table_size(config))
        side = image_size(config) // options.patch
        table = np.asarray(sincos_positions((rows, columns), side, options.width), np.float32)[None]
        if options.pool == "class" and not options.registers:
            table = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
        found["pos_embed"] = table
    return found


def _table_size(config: ConfigDict) -> tuple[int, int]:
    """Height and width of the images that an exported table of positions belongs to."""
    if config.model.vit.positions == "sincos":
        return view_size(flat_views(config)[0])
    side = image_size(config)
    return side, side


def timm_arguments(config: ConfigDict) -> tuple[str, dict[str, Any]]:
    """The name and the other arguments of `timm.create_model` for a config's ViT.

    Returns:
      A name that timm knows, and arguments that replace those of the name; without `num_classes`.
    """
    options = config.model.vit
    height, width = _table_size(config)
    name = f"vit_{_TIMM.get((options.width, options.depth), 'base')}_patch16_224"
    arguments = {
        "img_size": height if height == width else (height, width),
        "patch_size": options.patch,
        "embed_dim": options.width,
        "depth": options.depth,
        "num_heads": options.heads,
        "dynamic_img_size": True,
    }
    if config.data.channels != 3:
        arguments["in_chans"] = config.data.channels
    if options.layer_scale:
        arguments["init_values"] = options.layer_scale
    if options.registers:
        arguments |= {"reg_tokens": options.registers, "no_embed_class": True}
    if options.pool == "mean":
        arguments |= {"global_pool": "avg", "class_token": False}
    return name, arguments
