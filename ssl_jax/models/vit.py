"""Vision transformers (Dosovitskiy et al., 2020, arXiv:2010.11929).

Parameters are named after timm's: `blocks_0` is its `blocks.0`, `patch_embed` its
`patch_embed.proj`, `ls1/scale` its `ls1.gamma`; all other names match.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from ssl_jax.config import flat_views, view_size
from ssl_jax.errors import UserError, require_choice
from ssl_jax.models.layers import KERNEL_INITS, Groups

POOLS = ("class", "mean")
POSITIONS = ("learned", "sincos")
# Width and depth of the usual sizes, whose heads have 64 features each.
_SIZES = {(192, 12): "Ti", (384, 12): "S", (768, 12): "B", (1024, 24): "L"}
_NORMAL = nn.initializers.normal(0.02)


def _xavier(layers: int = 1) -> Initializer:
    """Xavier's uniform initialization of linear layers next to each other in a kernel [..., out].

    All axes but the last are inputs, also those of the patch projection, a convolution.
    """

    def init(key: Array, shape: Any, dtype: Any = jnp.float32) -> Array:
        bound = math.sqrt(6 / (math.prod(shape[:-1]) + shape[-1] // layers))
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


_XAVIER, _TINY = _xavier(), nn.initializers.normal(1e-6)
# Of the patch projection, the class token, the layers of a block, and query, key and value.
WEIGHT_INITS: dict[str, tuple[Initializer, ...]] = {
    "normal": (KERNEL_INITS["torch"], _NORMAL, _NORMAL, _NORMAL),
    "xavier": (_XAVIER, _TINY, _XAVIER, _xavier(3)),
}


def architecture(model: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `config.model.vit` that determine what a ViT computes from its weights."""
    of_training = ("drop_path", "weight_init")
    return {key: value for key, value in model["vit"].items() if key not in of_training}


def build(config: ConfigDict, axis_name: str | None, groups: Groups | None) -> "ViT":
    """Builds a config's ViT; see `models.register`.

    Raises:
      UserError: a view's size is not a multiple of the patch size.
    """
    options = config.model.vit
    for name, view in config.views.items():
        if any(side % options.patch for side in view_size(view)):
            raise UserError(
                f"config.views.{name}.size is {view.size}, but config.model.vit.patch is "
                f"{options.patch}: use a multiple of it, or a smaller patch."
            )
    keys = dict(options) | {"image_size": image_size(config)}
    return ViT(**keys, dtype=config.dtype, remat=config.remat)


def image_size(config: ConfigDict) -> int:
    """Side of the images that the positions of a config's ViT belong to."""
    size: int = config.model.vit.image_size or max(view_size(flat_views(config)[0]))
    return size


def vit_name(model: Mapping[str, Any]) -> str:
    """A network's name from `config.model`, such as "ViT-S/16 with 12 heads"."""
    keys = model["vit"]
    width, depth, heads = keys["width"], keys["depth"], keys["heads"]
    size = _SIZES.get((width, depth))
    name = f"ViT-{size}" if size else f"ViT of {depth} blocks of width {width}"
    extras = [f"{heads} heads"] if not size or 64 * heads != width else []
    extras += [f"{keys['registers']} registers"] if keys["registers"] else []
    return f"{name}/{keys['patch']}" + (f" with {' and '.join(extras)}" if extras else "")


class ViT(nn.Module):
    """A vision transformer without its classifier, with LayerNorm before each branch.

    Attributes:
      width: features per token, a multiple of `heads`; with "sincos", of 4, too.
      depth: number of blocks.
      heads: attention heads.
      patch: side of the patches in pixels.
      image_size: side of the images that the positions belong to; for other images they are
        interpolated.
      pool: "class", the output at a learned class token; or "mean", over the patches, before the
        last LayerNorm as in timm, and without a class token.
      positions: "learned" (bicubic interpolation, antialiased), or "sincos", fixed: sines and
        cosines of the column, then of the row, as in MAE (MoCo v3 has the row first).
      registers: learned tokens that are not read out (Darcet et al., 2023, arXiv:2309.16588).
      layer_scale: initial scale per feature of each branch (Touvron et al., 2021,
        arXiv:2103.17239); 0 for none.
      drop_path: probability that the last block drops a branch for an image in training; it
        increases linearly from 0 in the first block (Huang et al., 2016, arXiv:1603.09382).
      weight_init: "normal", N(0, 0.02²), and for the patches PyTorch's default; or "xavier",
        uniform by fans in and out, with query, key and value as layers of their own, and a class
        token of N(0, 1e-6²), as in MoCo v3.
      dtype: of the computation, "float32" or "bfloat16". Parameters, softmax, the statistics of
        LayerNorm and the features are float32.
      remat: keep only the blocks' inputs for the backward pass and recompute the blocks there.

    Raises:
      UserError: on construction, for a value that is not listed above.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 16
    image_size: int = 224
    pool: str = "class"
    positions: str = "learned"
    registers: int = 0
    layer_scale: float = 0.0
    drop_path: float = 0.0
    weight_init: str = "normal"
    dtype: Any = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        require_choice("config.model.vit.pool", self.pool, POOLS)
        require_choice("config.model.vit.positions", self.positions, POSITIONS)
        require_choice("config.model.vit.weight_init", self.weight_init, WEIGHT_INITS)
        if self.width % self.heads:
            raise UserError(
                f"config.model.vit.width is {self.width}, which config.model.vit.heads, "
                f"{self.heads}, does not divide. Use a multiple, such as {64 * self.heads}."
            )
        if self.positions == "sincos" and self.width % 4:
            raise UserError(
                f"config.model.vit.width is {self.width}: with positions 'sincos', use a multiple "
                "of 4."
            )
        if self.image_size % self.patch:
            raise UserError(
                f"config.model.vit.image_size is {self.image_size}: use a multiple of "
                f"config.model.vit.patch, {self.patch}."
            )
        super().__post_init__()

    @property
    def num_features(self) -> int:
        """D, the number of features per image."""
        return self.width

    @property
    def uses_keys(self) -> bool:
        """Whether training takes a random key per image."""
        return self.drop_path > 0

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], train: bool, keys: Array | None = None
    ) -> Float[Array, "n d"]:
        """Encodes images.

        Args:
          x: images whose sides are multiples of `patch`, in the range and normalization of
            training.
          train: drop branches, if `keys` are given.
          keys: a random key per image; None drops none, as in the target network of DINO.

        Returns:
          float32 [n, `num_features`].
        """
        n, dtype = x.shape[0], jnp.dtype(self.dtype)
        patch_init, token_init, *block_inits = WEIGHT_INITS[self.weight_init]
        x = nn.Conv(
            self.width,
            (self.patch, self.patch),
            (self.patch, self.patch),
            padding="VALID",
            kernel_init=patch_init,
            dtype=dtype,
            name="patch_embed",
        )(x)
        grid = (x.shape[1], x.shape[2])
        positions, class_position = self._positions(grid)
        x = x.reshape(n, -1, self.width) + positions.astype(dtype)
        prefix = []
        if self.pool == "class":
            token = self.param("cls_token", token_init, (1, 1, self.width))
            prefix.append(token + class_position)
        if self.registers:
            prefix.append(self.param("reg_token", _NORMAL, (1, self.registers, self.width)))
        tokens = [jnp.broadcast_to(t, (n, *t.shape[1:])).astype(dtype) for t in prefix]
        x = jnp.concatenate([*tokens, x], axis=1)

        kept = None
        if train and keys is not None and self.drop_path:
            kept = _kept_branches(keys, jnp.linspace(0.0, self.drop_path, self.depth))
        block = nn.remat(Block) if self.remat else Block
        for i in range(self.depth):
            of_block = None if kept is None else kept[:, i]
            options = (self.heads, self.layer_scale, dtype, *block_inits)
            x = block(*options, name=f"blocks_{i}")(x, of_block)
        norm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=jnp.float32)
        if self.pool == "class":
            return jnp.asarray(norm(name="norm")(x[:, 0]))
        patches = x[:, self.registers :]
        return jnp.asarray(norm(name="fc_norm")(patches.mean(1, dtype=jnp.float32)))

    def _positions(self, grid: tuple[int, int]) -> tuple[Array, Array]:
        """Embeddings of positions: of the patches [1, N, D], and of the class token [1, 1, D].

        As in timm, registers leave the class token without a position of its own.
        """
        side, class_position = self.image_size // self.patch, jnp.zeros((1, 1, self.width))
        if self.positions == "sincos":
            return sincos_positions(grid, side, self.width)[None], class_position
        extra = int(self.pool == "class" and not self.registers)
        table = self.param("pos_embed", _NORMAL, (1, extra + side * side, self.width))
        if extra:
            class_position, table = table[:, :1], table[:, 1:]
        if grid != (side, side):
            square = table.reshape(side, side, self.width)
            table = jax.image.resize(square, (*grid, self.width), "cubic")
        return table.reshape(1, -1, self.width), class_position


class Block(nn.Module):
    """Attention and a perceptron with one hidden layer, each added to its input."""

    heads: int
    layer_scale: float
    dtype: Any
    kernel_init: Initializer
    qkv_init: Initializer

    @nn.compact
    def __call__(
        self, x: Float[Array, "n t d"], kept: Float[Array, "n 2"] | None
    ) -> Float[Array, "n t d"]:
        """Computes the tokens of the next block.

        Args:
          x: tokens.
          kept: factors of the two branches by image, 0 for a dropped one; None to keep all.
        """
        norm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
        inits = (self.kernel_init, self.qkv_init)
        attention = Attention(self.heads, self.dtype, *inits, name="attn")
        x = x + self._scaled(attention(norm(name="norm1")(x)), 0, kept)
        mlp = MLP(self.dtype, self.kernel_init, name="mlp")
        return x + self._scaled(mlp(norm(name="norm2")(x)), 1, kept)

    def _scaled(self, y: Array, branch: int, kept: Array | None) -> Array:
        if self.layer_scale:
            y = LayerScale(self.layer_scale, name=f"ls{branch + 1}")(y)
        return y if kept is None else y * kept[:, branch, None, None].astype(y.dtype)


class LayerScale(nn.Module):
    """A learned factor per feature."""

    initial: float

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        """Scales the last axis."""
        scale = self.param("scale", nn.initializers.constant(self.initial), x.shape[-1:])
        return x * scale.astype(x.dtype)[None, None]


class Attention(nn.Module):
    """Multi-head self-attention, by JAX's `dot_product_attention`."""

    heads: int
    dtype: Any
    kernel_init: Initializer
    qkv_init: Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        """Attends over the tokens of an image."""
        n, t, d = x.shape
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        qkv = dense(3 * d, kernel_init=self.qkv_init, name="qkv")(x)
        qkv = qkv.reshape(n, t, 3, self.heads, d // self.heads)
        # By default, JAX (0.10 and before) writes out products and softmax for XLA on all devices.
        # "cudnn", its only fused implementation, doesn't compute float32 or run elsewhere.
        y = jax.nn.dot_product_attention(*jnp.unstack(qkv, axis=2))
        project = dense(d, kernel_init=self.kernel_init, name="proj")
        return jnp.asarray(project(y.reshape(n, t, d)))


class MLP(nn.Module):
    """A layer of four times the width, exact GELU, and a layer of the width."""

    dtype: Any
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        """Maps each token."""
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=self.kernel_init)
        y = nn.gelu(dense(4 * x.shape[-1], name="fc1")(x), approximate=False)
        return jnp.asarray(dense(x.shape[-1], name="fc2")(y))


def sincos_positions(
    grid: tuple[int, int], side: int, width: int, temperature: float = 10_000.0
) -> Float[Array, "t d"]:
    """Fixed positions of patches, in rows.

    Args:
      grid: rows and columns of patches.
      side: rows and columns that the coordinates belong to; those of another grid lie within the
        same square, as in interpolation.
      width: D, a multiple of 4.
      temperature: ratio of the longest wavelength to the shortest, nearly.

    Returns:
      sin and cos of the column, then of the row, D / 4 frequencies each.
    """
    rows, columns = ((jnp.arange(n) + 0.5) * (side / n) - 0.5 for n in grid)
    frequencies = temperature ** (-jnp.arange(width // 4) / (width // 4))
    y, x = jnp.meshgrid(rows, columns, indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies[None] for axis in (x, y)]
    return jnp.concatenate([f(a) for a in angles for f in (jnp.sin, jnp.cos)], axis=1)


def _kept_branches(keys: Array, rates: Float[Array, " depth"]) -> Float[Array, "n depth 2"]:
    """Factors of the branches of each image's blocks: 0, or 1 / (1 - rate)."""
    keep = jnp.stack([1 - rates] * 2, axis=1)
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep))(keys)
    return kept / keep[None]
