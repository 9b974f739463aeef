"""From what a foreign file holds to `Weights`: the config it comes to, and the check against it."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from ssl_jax.config import Schedule, default_config, view
from ssl_jax.errors import UserError
from ssl_jax.interop.weights import Pytree, Weights
from ssl_jax.methods import make_method
from ssl_jax.methods.base import init_networks
from ssl_jax.models.resnet import STAGES
from ssl_jax.recipes import CIFAR10, IMAGENET, IMAGENET_SWAV

_METHODS = ("moco", "simsiam", "swav", "simclr", "byol")
_SAID = 12  # names that a sentence lists


@dataclasses.dataclass
class Found:
    """What a file holds, in our tree.

    Attributes:
      kind: whose it is.
      params, batch_stats: by network.
      small_stem: lightly's small ResNet as a `Sequential` of its children, which leaves out the
        stem's ReLU.
      left_out: names in the file that were not taken.
    """

    kind: str
    params: Pytree
    batch_stats: Pytree
    small_stem: bool = False
    left_out: tuple[str, ...] = ()


def weights_of(found: Found, path: Path) -> Weights:
    """Makes the config and checks that each network has all that it needs, in its shapes.

    Raises:
      UserError: what is there is no ResNet of `ssl_jax`, or not all of one.
    """
    config = default_config()
    config.model.update(_model(found, path))
    try:
        _heads(config, found)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{path} has heads that are not those of {found.kind} ({error})."
        ) from error
    _preparation(config, found.kind, path)
    source = f"{found.kind}: {path.name}"
    weights = Weights(config, found.params, found.batch_stats, 0, source, found.left_out)
    require_whole(weights, path)
    return weights


def require_whole(weights: Weights, path: Path) -> None:
    """Checks that each network that is there has all that it needs, in its shapes.

    Raises:
      UserError: the encoder isn't there, something is missing, of another shape, or too much.
    """
    method, size = make_method(weights.config, Schedule(1, 1)), 32
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, stats = jax.eval_shape(lambda k, x: init_networks(method.networks, k, x), key, image)
    if "encoder" not in weights.params:
        raise UserError(f"{path} holds no encoder.")
    for name in weights.params:
        if name not in params:
            continue  # prototypes, which are no network
        _check(f"parameters of the {name}", weights.params[name], params[name], path)
        kept = weights.batch_stats.get(name, {})
        _check(f"running statistics of the {name}", kept, stats[name], path)


def _check(what: str, mine: Pytree, expected: Pytree, path: Path) -> None:
    there, needed = (
        {name: value.shape for name, value in flatten_dict(tree, sep="/").items()}
        for tree in (mine, expected)
    )
    missing = sorted(needed.keys() - there.keys())
    if missing:
        raise UserError(f"{path} lacks {len(missing)} of {len(needed)} {what}: {_listed(missing)}.")
    beyond = sorted(there.keys() - needed.keys())
    if beyond:
        raise UserError(
            f"{path} has {len(beyond)} {what} that no ResNet here has: {_listed(beyond)}."
        )
    for name, shape in needed.items():
        if there[name] != shape:
            raise UserError(
                f"{path}: {name} of {what} has the shape {list(there[name])}, and it should be "
                f"{list(shape)}: it is another network."
            )


def _listed(names: list[str]) -> str:
    more = len(names) - _SAID
    return ", ".join(names[:_SAID]) + (f" and {more} more" if more > 0 else "")


def _model(found: Found, path: Path) -> dict[str, Any]:
    """Depth, width and stem as the shapes tell; padding as the code has it."""
    encoder = found.params["encoder"]
    stem = encoder.get("stem", {})
    kernel = stem.get("conv1", {}).get("kernel")
    counted = [sum(f"stage{s}_block" in name for name in encoder) for s in range(1, 5)]
    blocks = tuple(count for count in counted if count)
    bottleneck = "conv3" in encoder.get("stage1_block1", {})
    depth = next((d for d, n in STAGES.items() if n == blocks and (d >= 50) == bottleneck), None)
    if kernel is None and depth is not None:
        raise UserError(
            f"{path} holds no ResNet-{', '.join(map(str, STAGES))} that is known here: its stem "
            "isn't one convolution, conv1, but a deeper one, or none."
        )
    if kernel is None or kernel.ndim != 4 or depth is None:
        raise UserError(
            f"{path} holds no ResNet-{', '.join(map(str, STAGES))}: its stages have "
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
    return {"depth": depth, "width": width, "sk": sk, "stem": kind, "padding": padding}


def _heads(config: ConfigDict, found: Found) -> None:
    """The method with the sizes of its heads; without heads, a classifier's."""
    projector = found.params.get("projector")
    config.method = found.kind if found.kind in _METHODS and projector else "supervised"
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


def _preparation(config: ConfigDict, kind: str, path: Path) -> None:
    """Images as the code evaluates them, and the data set that it is likely of."""
    small = config.model.stem != "imagenet"
    normalised = {"simclr": {}, "swav": IMAGENET_SWAV}.get(kind, IMAGENET)
    if small and kind in ("solo", "torchvision", "timm"):
        normalised = CIFAR10
    # Whose way it is to make images smaller; the crops themselves are not known.
    sampler = {"simclr": "tf", "byol": "byol"}.get(kind, "torchvision")
    one = view(size=32 if small else 224, crop={"sampler": sampler}, **normalised)
    with config.unlocked():
        config.views = {"view1": one, "view2": ConfigDict(one)}
    config.eval.interpolation = "bicubic" if kind in ("simclr", "byol", "timm") else "bilinear"
    if kind == "timm":
        config.eval.crop_fraction = 0.95
    if small:
        config.eval.crop_fraction = 1.0
    if kind in ("torchvision", "timm"):
        _timms_own(config, path)
    config.data.update(name="tfds", dataset="cifar10" if small else "imagenet2012")
    config.data.test_split = "test" if small else "validation"


def _timms_own(config: ConfigDict, path: Path) -> None:
    """Takes the preparation from timm's `config.json`, where it lies beside the weights."""
    try:
        told = json.loads(path.with_name("config.json").read_text())["pretrained_cfg"]
        mean, std = tuple(map(float, told["mean"])), tuple(map(float, told["std"]))
        size, fraction = int(told["input_size"][-1]), float(told["crop_pct"])
        interpolation = told["interpolation"]
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return
    if interpolation not in ("bicubic", "bilinear") or not 0 < fraction <= 1 or size < 1:
        return
    if len(mean) != 3 or len(std) != 3 or not all(0 < s < math.inf for s in std):
        return
    plain = mean == (0.0,) * 3 and std == (1.0,) * 3
    normalised = {} if plain else {"mean": mean, "std": std}
    one = view(size=size, crop={"sampler": "torchvision"}, **normalised)
    with config.unlocked():
        config.views = {"view1": one, "view2": ConfigDict(one)}
    config.eval.update(interpolation=interpolation, crop_fraction=fraction)
