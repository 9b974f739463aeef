"""Residual networks, version 1.5: torchvision's, SimCLR's wide and selective-kernel ones, BYOL's.

Parameters are named after torchvision's: `stem/conv1` is its `conv1`, `stage1_block1` its
`layer1.0`, `proj_conv` and `proj_bn` its `downsample.0` and `downsample.1`; all other names match.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from ssl_jax.errors import UserError, require_choice
from ssl_jax.models.conv import conv_general_dilated, max_pool
from ssl_jax.models.layers import KERNEL_INITS, Groups, batch_norm

STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
STEMS = ("imagenet", "cifar", "cifar_pad2", "cifar_no_relu")
# Of the convolutions, of the max pool.
PADDINGS = {
    "symmetric": ("symmetric", "symmetric"),
    "same": ("same", "same"),
    "simclr": ("symmetric", "same"),
}
SK_RATIO, SK_MIN = 16, 32

Layer = Callable[..., Any]  # makes a convolution or a BatchNorm; see ResNet.__call__


def architecture(model: Mapping[str, Any]) -> dict[str, Any]:
    """The config keys that determine what a ResNet computes from its weights.

    Args:
      model: `config.model`, or `config.distill`, which describes the teacher.

    Returns:
      Arguments of `ResNet`; `project_first` is False where it changes nothing.
    """
    keys = {key: model[key] for key in ("depth", "width", "sk", "stem", "padding")}
    return {**keys, "project_first": _projects_first(model)}


def _projects_first(model: Mapping[str, Any]) -> bool:
    """Whether the first block's shortcut is projected though its shape doesn't change."""
    return bool(model.get("project_first")) and model["depth"] < 50


def build(config: ConfigDict, axis_name: str | None, groups: Groups | None) -> "ResNet":
    """Builds a config's ResNet; see `models.register`."""
    return ResNet(
        **architecture(config.model),
        conv_init=config.model.conv_init,
        zero_init_residual=config.model.zero_init_residual,
        dtype=config.dtype,
        remat=config.remat,
        axis_name=axis_name,
        axis_index_groups=groups,
        bn_splits=config.model.bn_splits,
        bn_unbiased=config.model.bn_unbiased,
    )


def resnet_name(model: Mapping[str, Any]) -> str:
    """A network's name from the same keys, such as "ResNet-50 ×2 with selective kernels"."""
    width = f" ×{model['width']:g}" if model["width"] != 1 else ""
    extras = ["selective kernels"] if model["sk"] else []
    extras += ["a projected first shortcut"] if _projects_first(model) else []
    return f"ResNet-{model['depth']}{width}" + (f" with {' and '.join(extras)}" if extras else "")


class ResNet(nn.Module):
    """A residual network without its classifier (He et al., 2015, arXiv:1512.03385).

    Version 1.5: bottleneck blocks have their stride in the 3×3 convolution. Widths follow SimCLR
    (Chen et al., 2020, arXiv:2002.05709), selective kernels the official code of SimCLR v2
    (arXiv:2006.10029; Li et al., 2019, arXiv:1903.06586).

    Attributes:
      depth: 18, 34 (basic blocks), 50, 101, 152 or 200 (bottleneck blocks).
      width: multiplies all channels; 64·width must be an integer.
      sk: selective kernels in bottleneck blocks, and in networks of all depths the stem and
        shortcut of ResNet-D (He et al., 2018, arXiv:1812.01187).
      stem: "imagenet" is a 7×7 convolution with stride 2 (ResNet-D: three 3×3) and a 3×3 max pool
        with stride 2; "cifar" is one 3×3 convolution without stride or pool, also with `sk`. Two
        libraries differ: "cifar_pad2" pads two pixels and starts as PyTorch's default (solo-learn),
        "cifar_no_relu" has no ReLU (lightly's benchmarks).
      padding: "symmetric" as in PyTorch; "same" as in TensorFlow (BYOL), which pads strided layers
        less or not at all on the left and top; "simclr" is "same" for the max pool only.
      project_first: project the shortcut of the first block also where its shape doesn't change, at
        depths 18 and 34, as the official codes of SimCLR and BYOL do; torchvision doesn't.
      conv_init: "truncated_fan_in" (SimCLR), "fan_out_normal" (torchvision, MoCo, SwAV), "torch"
        (PyTorch's default, SimSiam) or "haiku" (BYOL).
      zero_init_residual: each block starts as its shortcut: γ = 0 in its last BatchNorm.
      dtype: of the computation, "float32" or "bfloat16". Parameters, BatchNorm's statistics and
        arithmetic, the final average and the features are float32.
      remat: keep only the blocks' inputs for the backward pass and recompute the blocks there.
      axis_name: mapped axis of the devices that share BatchNorm statistics, None for a single one.
      axis_index_groups: groups of device positions that share statistics, None for all.
      bn_splits: parts of a device's examples with statistics of their own; see
        `layers.batch_norm`.
      bn_unbiased: average running variances as PyTorch does; see `layers.batch_norm`.

    Raises:
      UserError: on construction, for a value that is not listed above.
    """

    depth: int
    width: float = 1
    sk: bool = False
    stem: str = "imagenet"
    padding: str = "symmetric"
    project_first: bool = False
    conv_init: str = "truncated_fan_in"
    zero_init_residual: bool = True
    dtype: Any = "float32"
    remat: bool = False
    axis_name: str | None = None
    axis_index_groups: Groups | None = None
    bn_splits: int = 1
    bn_unbiased: bool = False

    def __post_init__(self) -> None:
        require_choice("config.model.depth", self.depth, STAGES)
        require_choice("config.model.stem", self.stem, STEMS)
        require_choice("config.model.padding", self.padding, PADDINGS)
        require_choice("config.model.conv_init", self.conv_init, KERNEL_INITS)
        if not (self.width > 0 and (64 * self.width) % (2 if self.sk else 1) == 0):
            raise UserError(
                f"config.model.width is {self.width}: use a positive multiple of "
                f"{'1/32 with config.model.sk' if self.sk else '1/64'}, such as 0.25, 1 or 2."
            )
        super().__post_init__()

    @property
    def num_features(self) -> int:
        """D, the number of features per image."""
        last_stage = int(64 * self.width) * 2 ** (len(STAGES[self.depth]) - 1)
        return last_stage * (4 if self.depth >= 50 else 1)

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool) -> Float[Array, "n d"]:
        """Encodes images.

        Args:
          x: images of any size and number of channels, in the range and normalization of training.
          train: normalize by the batch statistics and update `batch_stats`, which must be mutable;
            if False, normalize by the running ones.

        Returns:
          float32 [n, `num_features`].
        """
        dtype = jnp.dtype(self.dtype)
        conv_padding, pool_padding = PADDINGS[self.padding]
        init = KERNEL_INITS[self.conv_init]
        conv = functools.partial(_conv, padding=conv_padding, kernel_init=init, dtype=dtype)
        # Flax's fast variance, E[x²] - E[x]², reads the activations once and takes one collective
        # instead of two. Its error in float32, about 1e-7·E[x]², is far below the variance of
        # convolutions' outputs; where it is not, in `SelectiveKernel` and the heads, it is off.
        norm = batch_norm(
            train,
            self.axis_name,
            self.axis_index_groups,
            self.bn_splits,
            unbiased=self.bn_unbiased,
            dtype=dtype,
        )
        block: Layer = BottleneckBlock if self.depth >= 50 else BasicBlock
        if self.remat:
            block = nn.remat(block)

        base = int(64 * self.width)
        x = Stem(base, self.stem, self.sk, pool_padding, conv, norm, name="stem")(x.astype(dtype))
        for stage, blocks in enumerate(STAGES[self.depth], start=1):
            for i in range(1, blocks + 1):
                x = block(
                    filters=base * 2 ** (stage - 1),
                    stride=2 if stage > 1 and i == 1 else 1,
                    sk=self.sk,
                    project=self.project_first and stage == i == 1,
                    zero_init=self.zero_init_residual,
                    conv=conv,
                    norm=norm,
                    name=f"stage{stage}_block{i}",
                )(x)
        return x.mean((1, 2), dtype=jnp.float32)


class Stem(nn.Module):
    """The layers before the blocks; see `ResNet.stem`."""

    filters: int
    kind: str
    deep: bool
    pool_padding: str
    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Computes the input of the first block from images."""
        small, conv = self.kind.startswith("cifar"), self.conv
        if self.kind == "cifar_pad2":
            x = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])  # the convolution pads the other pixel
            # solo-learn puts it into torchvision's network, which has been initialized by then.
            conv = functools.partial(conv, kernel_init=KERNEL_INITS["torch"])
        if small:
            layers = [(self.filters, 3, 1)]
        elif self.deep:
            layers = [(self.filters // 2, 3, 2), (self.filters // 2, 3, 1), (self.filters, 3, 1)]
        else:
            layers = [(self.filters, 7, 2)]
        for i, (filters, size, stride) in enumerate(layers, start=1):
            x = conv(filters, size, stride, name=f"conv{i}")(x)
            x = self.norm(name=f"bn{i}")(x)
            x = x if self.kind == "cifar_no_relu" else nn.relu(x)
        return x if small else max_pool(x, _pads(3, self.pool_padding))


class Block(nn.Module):
    """What the two kinds of residual block share."""

    filters: int
    stride: int
    sk: bool
    project: bool
    zero_init: bool
    conv: Layer
    norm: Layer

    def last_norm(self, name: str) -> Any:
        """The BatchNorm before the sum."""
        init = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        return self.norm(name=name, scale_init=init)

    def shortcut(self, x: Array, features: int) -> Array:
        """The block's input, projected where its shape changes or `project` is set."""
        stride = self.stride
        if stride == 1 and x.shape[-1] == features and not self.project:
            return x
        if self.sk:
            # ResNet-D's average pool in SimCLR's form: each window extends right and down, also
            # without stride; beyond the border, zeros count with stride and are left out without.
            x = nn.avg_pool(
                x, (2, 2), (stride, stride), [(0, 1), (0, 1)], count_include_pad=stride > 1
            )
            stride = 1
        return self.norm(name="proj_bn")(self.conv(features, 1, stride, name="proj_conv")(x))


class BasicBlock(Block):
    """Two 3×3 convolutions."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[n, h, w, c] to [n, h / stride, w / stride, filters], sizes rounded up."""
        y = self.conv(self.filters, 3, self.stride, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = self.conv(self.filters, 3, name="conv2")(y)
        y = self.last_norm("bn2")(y)
        return nn.relu(y + self.shortcut(x, self.filters))


class BottleneckBlock(Block):
    """1×1, 3×3 and 1×1 convolutions; with `sk`, two 3×3 convolutions in parallel."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[n, h, w, c] to [n, h / stride, w / stride, 4 filters], sizes rounded up."""
        y = self.conv(self.filters, 1, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = self.conv(self.filters * (2 if self.sk else 1), 3, self.stride, name="conv2")(y)
        y = nn.relu(self.norm(name="bn2")(y))
        if self.sk:
            y = SelectiveKernel(self.conv, self.norm, name="sk")(y)
        y = self.conv(4 * self.filters, 1, name="conv3")(y)
        y = self.last_norm("bn3")(y)
        return nn.relu(y + self.shortcut(x, 4 * self.filters))


class SelectiveKernel(nn.Module):
    """Mixes two streams per channel, with weights computed from their sum.

    Li et al., 2019 (arXiv:1903.06586) in the form of SimCLR v2's official code: both streams are
    3×3 without dilation, computed as one convolution of twice the channels, first stream first::

        s = mean over pixels of (x₁ + x₂)
        a = softmax over the two streams of W₂ relu(BN(W₁ s))
        y = a₁ x₁ + a₂ x₂
    """

    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[n, h, w, 2 filters] to [n, h, w, filters]."""
        streams = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
        filters = streams.shape[-1]
        pooled = streams.mean((1, 2), keepdims=True, dtype=jnp.float32).sum(-2)
        y = self.conv(max(filters // SK_RATIO, SK_MIN), 1, name="conv1")(pooled)
        # Pooled vectors of different images are nearly equal, which needs the exact variance; for
        # one vector per image it is cheap.
        y = nn.relu(self.norm(name="bn", use_fast_variance=False)(y))
        y = self.conv(2 * filters, 1, name="conv2")(y)
        mixing = nn.softmax(y.reshape(-1, 1, 1, 2, filters).astype(jnp.float32), axis=-2)
        return (streams * mixing.astype(x.dtype)).sum(-2)


def _conv(features: int, size: int, stride: int = 1, *, padding: str, **options: Any) -> nn.Conv:
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=_pads(size, padding),
        use_bias=False,
        conv_general_dilated=conv_general_dilated,
        **options,
    )


def _pads(size: int, padding: str) -> str | tuple[tuple[int, int], ...]:
    return "SAME" if padding == "same" else ((size // 2, size // 2),) * 2
