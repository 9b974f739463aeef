"""Infers the config of imported networks from their shapes, and checks them against it."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from ssl_jax.config import Schedule, default_config, flat_views, view, view_shape
from ssl_jax.data.values import MAX_CHANNELS
from ssl_jax.errors import UserError
from ssl_jax.files import read_regular
from ssl_jax.interop.weights import Pytree, Weights
from ssl_jax.methods import make_method
from ssl_jax.methods.base import init_networks
from ssl_jax.models.resnet import STAGES, ResNet
from ssl_jax.recipes import CIFAR10, CIFAR10_SUPCONTRAST, IMAGENET, IMAGENET_SWAV, set_channels
from ssl_jax.schema import MAX_PIXELS

# The methods whose heads are read, by the code that wrote the file.
_METHODS = {name: name for name in ("moco", "simsiam", "swav", "simclr", "byol")}
_METHODS["moco_v3"] = "mocov3"
_MAX_LISTED = 12  # names in an error message


@dataclasses.dataclass
class Found:
    """The contents of an imported file, in our tree.

    Attributes:
      kind: the code that wrote it, one of `import_weights.KINDS`.
      params, batch_stats: by network.
      small_stem: whether it is lightly's small ResNet as a `Sequential` of its children, which
        omits the stem's ReLU.
      left_out: names in the file that no network here has.
      model: keys of `config.model` that the reader has inferred; None to infer a ResNet's.
    """

    kind: str
    params: Pytree
    batch_stats: Pytree
    small_stem: bool = False
    left_out: tuple[str, ...] = ()
    model: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Given:
    """What the user knows about a ViT, as its weights don't determine it; 0 to infer.

    Attributes:
      heads: attention heads.
      image_size: side of the images that the positions belong to.
    """

    heads: int = 0
    image_size: int = 0


def to_weights(found: Found, path: Path) -> Weights:
    """Infers the config, and checks that the networks are complete.

    Args:
      found: the file's contents.
      path: the file, for error messages and timm's `config.json` next to it.

    Raises:
      UserError: the file contains no supported encoder, or an incomplete one.
    """
    config = default_config()
    config.model.update(found.model or _model(found, path))
    try:
        _heads(config, found)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{path} has heads that differ from those of {found.kind} ({error})."
        ) from error
    _preprocessing(config, found.kind, path)
    encoder = found.params["encoder"]
    first = encoder["patch_embed"] if config.model.name == "vit" else encoder["stem"]["conv1"]
    channels = int(first["kernel"].shape[2])
    if not 1 <= channels <= MAX_CHANNELS:
        raise UserError(
            f"{path} has an encoder of images of {channels} channels. ssl_jax reads images of 1 to "
            f"{MAX_CHANNELS}."
        )
    set_channels(config, channels)
    source = f"{found.kind}: {path.name}"
    weights = Weights(config, found.params, found.batch_stats, 0, source, found.left_out)
    require_complete(weights, path)
    return weights


def require_complete(weights: Weights, path: Path) -> None:
    """Checks that the networks have all names and shapes that their config requires.

    Args:
      weights: the networks, which must include the encoder.
      path: the file, for error messages.

    Raises:
      UserError: the encoder or a name is missing, a name is unknown, a shape differs, or a value is
        not finite.
    """
    method = make_method(weights.config, Schedule(1, 1))
    # The shapes of a ResNet don't depend on the image.
    config = weights.config
    *size, channels = view_shape(config, flat_views(config)[0])
    size = [32, 32] if isinstance(method.encoder, ResNet) else size
    image = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, stats = jax.eval_shape(lambda k, x: init_networks(method.networks, k, x), key, image)
    if "encoder" not in weights.params:
        raise UserError(f"{path} contains no encoder.")
    require_finite(weights, path)
    for name in weights.params:
        if name not in params:
            continue  # prototypes, which are not a network
        _check(f"parameters of the {name}", weights.params[name], params[name], path)
        kept = weights.batch_stats.get(name, {})
        _check(f"running statistics of the {name}", kept, stats[name], path)


def require_finite(weights: Weights, path: str | Path) -> None:
    """Checks that no weight is NaN or infinite, and no running variance negative.

    Args:
      weights: of a run or a file.
      path: for the error message.

    Raises:
      UserError: naming the tensor.
    """
    for kind, tree in (("parameters", weights.params), ("running statistics", weights.batch_stats)):
        for name, value in flatten_dict(tree, sep="/").items():
            require_finite_array(value, f"{name} of its {kind}", path)
            if tree is weights.batch_stats and name.endswith("var") and np.any(value < 0):
                raise UserError(
                    f"{path} has negative variances in {name} of its {kind}, so the file is "
                    "damaged. Download or export it again."
                )


def require_finite_array(value: Any, name: str, path: str | Path) -> None:
    """Raises a UserError, with name and path, if an array of numbers has NaN or infinite values."""
    wrong = np.count_nonzero(~np.isfinite(np.asarray(value, np.float32)))
    if wrong:
        raise UserError(
            f"{path} has {wrong:,} NaN or infinite values in {name}, as of a run that diverged. "
            "Use an earlier checkpoint, or download the file again."
        )


def _check(what: str, tree: Pytree, expected: Pytree, path: Path) -> None:
    """Compares names and shapes; `what` names the tree in error messages."""
    actual, needed = (
        {name: value.shape for name, value in flatten_dict(part, sep="/").items()}
        for part in (tree, expected)
    )
    missing = sorted(needed.keys() - actual.keys())
    if missing:
        raise UserError(f"{path} lacks {len(missing)} of {len(needed)} {what}: {_listed(missing)}.")
    unknown = sorted(actual.keys() - needed.keys())
    if unknown:
        raise UserError(f"{path} has {len(unknown)} unknown {what}: {_listed(unknown)}.")
    for name, shape in needed.items():
        if actual[name] != shape:
            raise UserError(
                f"{path} is not a supported network: {name} in {what} has the shape "
                f"{list(actual[name])}, not {list(shape)}."
            )


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _model(found: Found, path: Path) -> dict[str, Any]:
    """Infers all but the padding from names and shapes, the padding from the kind of file."""
    encoder = found.params["encoder"]
    stem = encoder.get("stem", {})
    kernel = stem.get("conv1", {}).get("kernel")
    counted = [sum(f"stage{s}_block" in name for name in encoder) for s in range(1, 5)]
    blocks = tuple(count for count in counted if count)
    bottleneck = "conv3" in encoder.get("stage1_block1", {})
    depth = next((d for d, n in STAGES.items() if n == blocks and (d >= 50) == bottleneck), None)
    if kernel is None and depth is not None:
        raise UserError(
            f"{path} is not a supported ResNet: its stem is not a single convolution, conv1."
        )
    if kernel is None or kernel.ndim != 4 or depth is None:
        raise UserError(
            f"{path} contains no ResNet-{', '.join(map(str, STAGES))}: its stages have "
            f"{', '.join(map(str, counted))} blocks."
        )
    last = max(stem, key=lambda name: name.startswith("conv") and int(name[4:]))
    sk = "sk" in encoder.get("stage1_block1", {}) or len(stem) > 2
    small = kernel.shape[0] == 3 and len(stem) == 2
    kind = "imagenet"
    if small:
        kind = "cifar_no_relu" if found.small_stem else "cifar"
        if found.kind == "solo":
            kind = "cifar_pad2"
    padding = {"simclr": "simclr", "byol": "same"}.get(found.kind, "symmetric")
    width = stem[last]["kernel"].shape[-1] / 64
    # A first block without bottleneck has the stem's width, so only some codes project its input.
    projected = not bottleneck and "proj_conv" in encoder.get("stage1_block1", {})
    found_model = {"depth": depth, "width": width, "sk": sk, "stem": kind, "padding": padding}
    return {**found_model, "project_first": projected}


def _heads(config: ConfigDict, found: Found) -> None:
    """Sets the method and the sizes of its heads; "supervised" for a file without heads."""
    projector = found.params.get("projector")
    config.method = _METHODS.get(found.kind, "supervised") if projector else "supervised"
    if config.method == "supervised":
        classifier = found.params.get("classifier")
        config.data.num_classes = classifier["Dense_0"]["kernel"].shape[1] if classifier else 1000
        return
    layers = sorted(name for name in projector if name.startswith("dense"))
    options = config[config.method]
    options.out = int(projector[layers[-1]]["kernel"].shape[1])
    if len(layers) > 1:
        options.hidden = int(projector[layers[0]]["kernel"].shape[1])
    if "layers" in options:
        options.layers = len(layers)
    predictor = found.params.get("predictor")
    if config.method == "simsiam" and predictor:
        options.predictor_hidden = int(predictor["dense1"]["kernel"].shape[1])
    if "prototypes" in found.params:
        options.prototypes = int(found.params["prototypes"]["kernel"].shape[1])


def _preprocessing(config: ConfigDict, kind: str, path: Path) -> None:
    """Sets the preprocessing that the code evaluates with, and the likely dataset."""
    small = config.model.stem != "imagenet"
    normalization = {"simclr": {}, "swav": IMAGENET_SWAV, "supcontrast": CIFAR10_SUPCONTRAST}.get(
        kind, IMAGENET
    )
    if small and kind in ("solo", "torchvision", "timm"):
        normalization = CIFAR10
    # The sampler decides how images are downscaled; the crops of training are unknown.
    sampler = {"simclr": "tf", "byol": "byol"}.get(kind, "torchvision")
    vit = config.model.name == "vit"
    size = config.model.vit.image_size if vit else 32 if small else 224
    _set_views(config, size, sampler, normalization)
    bicubic = kind in ("simclr", "byol", "timm", "dino", "dinov2", "mae")
    config.eval.interpolation = "bicubic" if bicubic else "bilinear"
    # Bare names of a ViT are timm's, but also those of DINO, whose crop is the default.
    if kind == "timm" and not vit:
        config.eval.crop_fraction = 0.95
    if small:
        config.eval.crop_fraction = 1.0
    if kind in ("torchvision", "timm"):
        _timm_preprocessing(config, path)
    config.data.update(name="tfds", dataset="cifar10" if small else "imagenet2012")
    config.data.test_split = "test" if small else "validation"


def _set_views(
    config: ConfigDict, size: int, sampler: str, normalization: Mapping[str, Any]
) -> None:
    one = view(size=size, crop={"sampler": sampler}, **normalization)
    with config.unlocked():
        config.views = {"view1": one, "view2": ConfigDict(one)}


def timm_config(path: Path) -> dict[str, Any]:
    """Reads timm's `config.json` next to the weights; {} if there is none, or an invalid one."""
    try:
        found = json.loads(read_regular(path.with_name("config.json")))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _timm_preprocessing(config: ConfigDict, path: Path) -> None:
    """Takes the preprocessing from timm's `config.json` next to the weights, if it is valid."""
    try:
        timm = timm_config(path)["pretrained_cfg"]
        mean, std = tuple(map(float, timm["mean"])), tuple(map(float, timm["std"]))
        size, fraction = int(timm["input_size"][-1]), float(timm["crop_pct"])
        interpolation = timm["interpolation"]
    except (ValueError, LookupError, TypeError, OverflowError):
        return
    if interpolation not in ("bicubic", "bilinear") or not 0 < fraction <= 1:
        return
    if not 1 <= size <= math.isqrt(MAX_PIXELS):
        return
    if len(mean) != 3 or len(std) != 3 or not all(0 < s < math.inf for s in std):
        return
    identity = mean == (0.0,) * 3 and std == (1.0,) * 3
    _set_views(config, size, "torchvision", {} if identity else {"mean": mean, "std": std})
    config.eval.update(interpolation=interpolation, crop_fraction=fraction)
