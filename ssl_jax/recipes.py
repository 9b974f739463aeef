"""The views of each method's official code, and the settings that experiments share.

Sources: google-research/simclr, facebookresearch/moco, /moco-v3, /simsiam, /swav, /barlowtwins,
/vicreg and /dino, deepmind/deepmind-research/byol, HobbitLong/SupContrast. A config file starts
from these and changes keys.
"""

from typing import Any

from ml_collections import ConfigDict

from ssl_jax.config import default_config, rgb_keys, view

Size = int | tuple[int, int]  # side, or height and width, in pixels

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.247, 0.2435, 0.2616)}
CIFAR10_SUPCONTRAST = {"mean": CIFAR10["mean"], "std": (0.2023, 0.1994, 0.201)}  # in its code
# SwAV's code has .228 for red.
IMAGENET_SWAV = {"mean": (0.485, 0.456, 0.406), "std": (0.228, 0.224, 0.225)}

# The official code's network: TensorFlow's padding of the max-pool, a projection in the first block
# of ResNet-18 and 34, which torchvision's networks don't have.
SIMCLR_MODEL = {"padding": "simclr", "project_first": True}


def set_channels(config: ConfigDict, channels: int) -> None:
    """Sets the number of channels, and adapts the views to it.

    Unless there are three, saturation, hue and grayscale are turned off, which are defined for RGB
    only, and so is normalization: set each view's `mean` and `std` to a value per channel to
    normalize. Crops, flips, blur, solarization, noise, brightness and contrast stay.

    Args:
      config: changed in place.
      channels: 1 to 16.
    """
    config.data.channels = channels
    if channels == 3:
        return
    for each in config.views.values():
        each.update_from_flattened_dict(dict.fromkeys(rgb_keys(each), 0.0))
        if len(each.mean) != channels:
            each.mean = each.std = ()


def simclr_views(size: Size = 224, strength: float = 1.0, blur: bool = True) -> dict[str, Any]:
    """SimCLR: TensorFlow's crops, jitter in random order, inputs in [0, 1]."""
    one = view(
        size=size,
        jitter={
            "brightness": 0.8 * strength,
            "contrast": 0.8 * strength,
            "saturation": 0.8 * strength,
            "hue": 0.2 * strength,
        },
        blur={"prob": 0.5 if blur else 0.0},
    )
    return {"view1": one, "view2": one}


def moco_v1_views(size: Size = 224) -> dict[str, Any]:
    """MoCo v1: grayscale before the jitter, which every image gets; no blur."""
    one = view(
        size=size,
        crop=_torchvision((0.2, 1.0)),
        jitter=_jitter(0.4, 0.4, 0.4, 0.4, prob=1.0),
        gray_first=True,
        blur={"prob": 0.0},
        **IMAGENET,
    )
    return {"view1": one, "view2": one}


def moco_v2_views(size: Size = 224, blur: bool = True) -> dict[str, Any]:
    """MoCo v2 and SimSiam: weaker jitter of the hue, blur."""
    one = view(
        size=size,
        crop=_torchvision((0.2, 1.0)),
        jitter=_jitter(0.4, 0.4, 0.4, 0.1),
        blur={"prob": 0.5 if blur else 0.0},
        **IMAGENET,
    )
    return {"view1": one, "view2": one}


def swav_views(large: Size = 224, small: Size = 96, small_crops: int = 6) -> dict[str, Any]:
    """SwAV: two large crops and cheap small ones; without small crops the area starts at .08."""

    def crops(size: Size, count: int, area: tuple[float, float]) -> ConfigDict:
        return view(
            size=size,
            count=count,
            crop=_torchvision(area),
            jitter=_jitter(0.8, 0.8, 0.8, 0.2),
            **IMAGENET_SWAV,
        )

    if not small_crops:
        return {"large": crops(large, 2, (0.08, 1.0))}
    return {
        "large": crops(large, 2, (0.14, 1.0)),
        "small": crops(small, small_crops, (0.05, 0.14)),
    }


def byol_views(size: Size = 224) -> dict[str, Any]:
    """BYOL: additive brightness; the views differ in blur and solarization."""
    both = {
        "size": size,
        "crop": {"sampler": "byol", "area": (0.08, 1.0)},
        "jitter": {
            **{"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
            "brightness_mode": "add",
        },
        **IMAGENET,
    }
    return {
        "view1": view(**both, blur={"prob": 1.0}, solarize={"prob": 0.0}),
        "view2": view(**both, blur={"prob": 0.1}, solarize={"prob": 0.2}),
    }


def dino_views(
    large: Size = 224,
    small: Size = 96,
    small_crops: int = 8,
    areas: tuple[tuple[float, float], tuple[float, float]] = ((0.4, 1.0), (0.05, 0.4)),
) -> dict[str, Any]:
    """DINO: BYOL's blur and solarization of the two large crops, and small crops.

    Args:
      large: size of the two large crops.
      small: size of the small crops.
      small_crops: their number.
      areas: of large and small crops, as shares of the image.
    """

    def crop(size: Size, area: tuple[float, float], blur: float, **changes: Any) -> ConfigDict:
        return view(
            size=size,
            crop={**_torchvision(area), "interpolation": "bicubic"},
            jitter=_jitter(0.4, 0.4, 0.2, 0.1),
            blur={"prob": blur},
            **changes,
            **IMAGENET,
        )

    views = {
        "large1": crop(large, areas[0], 1.0),
        "large2": crop(large, areas[0], 0.1, solarize={"prob": 0.2}),
    }
    if small_crops:
        views["small"] = crop(small, areas[1], 0.5, count=small_crops)
    return views


def mocov3_views(size: Size = 224, smallest: float = 0.2) -> dict[str, Any]:
    """MoCo v3: BYOL's strengths with torchvision's definitions.

    Args:
      size: of both views.
      smallest: area of the smallest crop, as a share of the image; ViT: 0.08.
    """
    return _blurred_and_solarized(size, _torchvision((smallest, 1.0)))


def supcontrast_views(size: Size = 32) -> dict[str, Any]:
    """SupContrast's CIFAR-10 views: weaker colors than SimCLR's, no blur."""
    one = view(
        size=size,
        crop=_torchvision((0.2, 1.0)),
        jitter=_jitter(0.4, 0.4, 0.4, 0.1),
        blur={"prob": 0.0},
        **CIFAR10_SUPCONTRAST,
    )
    return {"view1": one, "view2": one}


def barlow_views(size: Size = 224) -> dict[str, Any]:
    """Barlow Twins and VICReg: BYOL's views with torchvision's operators."""
    crop = {**_torchvision((0.08, 1.0)), "interpolation": "bicubic"}
    return _blurred_and_solarized(size, crop)


def imagenet_config(interpolation: str = "bicubic") -> ConfigDict:
    """Common settings on ImageNet: TFDS's `imagenet2012`, ResNet-50, bfloat16.

    `tfds build imagenet2012` prepares the dataset once; --config.data.dir=PATH is its data_dir.
    For folders of images, set --config.data.name=folder --config.data.dir=PATH/train
    --config.data.test_dir=PATH/val; for sharded records of `ssl-jax data convert`, the same with
    --config.data.name=records.

    Args:
      interpolation: used to resize the central square of evaluated images.
    """
    config = default_config()
    config.data.update(name="tfds", dataset="imagenet2012", test_split="validation")
    config.data.num_classes = 1000
    config.dtype = "bfloat16"
    config.eval.interpolation = interpolation
    return config


def cifar10_config() -> ConfigDict:
    """Common settings on CIFAR-10: packed images on the devices, ResNet-18, no evaluation crop.

    `ssl-jax data pack` writes the files for --config.data.dir and --config.data.test_dir from
    folders of images; --config.data.name=folder reads the folders directly (needs TensorFlow).
    """
    config = default_config()
    config.data.update(name="packed", num_classes=10)
    config.dtype = "bfloat16"
    config.log_every = 50
    config.model.update(depth=18, stem="cifar")
    config.eval.update(crop_fraction=1.0, knn_k=200, knn_temperature=0.1)
    return config


def lightly_cifar10_config(
    smallest: float = 0.08, saturation: float = 0.4, solarize: float = 0.0
) -> ConfigDict:
    """Settings of lightly's CIFAR-10 benchmark: batch 512, 200 epochs, SGD .06·B/128.

    Its variants are --config.batch_size=128 (with --config.moco.queue=4096) and
    --config.epochs=800. The cosine schedule moves once per epoch, without warmup. The network is
    lightly's, whose first layer has no ReLU. Difference: bfloat16 (--config.dtype=float32 turns it
    off), which changed kNN of the SimCLR runs of docs/curves.md by -0.2 ± 0.7 points (three seeds).

    Args:
      smallest: smallest crop, as a share of the image; the default is that of SimCLR and MoCo.
      saturation: strength of that jitter.
      solarize: probability of solarizing the second view.
    """
    config = cifar10_config()
    config.batch_size = 512
    config.epochs = 200.0
    one = view(
        size=32,
        crop=_torchvision((smallest, 1.0)),
        jitter=_jitter(0.4, 0.4, saturation, 0.1),
        blur={"prob": 0.0},
        **IMAGENET,
    )
    config.views = {"view1": one, "view2": one.copy_and_resolve_references()}
    config.views.view2.solarize.prob = solarize
    config.model.update(stem="cifar_no_relu", conv_init="torch", zero_init_residual=False)
    config.model.update(head_init="torch", bn_unbiased=True)
    config.optim.update(name="sgd", lr=0.12, weight_decay=5e-4, decay_norm_bias=True)
    config.optim.update(warmup_epochs=0.0, per_epoch=True)
    return config


def solo_cifar10_config(
    jitter: tuple[float, float, float, float], blur: float = 0.5, solarize: float = 0.0
) -> ConfigDict:
    """Settings of solo-learn's CIFAR-10 scripts: batch 256, 1,000 epochs, warmup 10, cosine.

    Its stem pads two pixels, giving 34×34 maps, and is initialized unlike the other convolutions;
    its warmup ends at the peak. Difference: bfloat16 (--config.dtype=float32 turns it off).

    Args:
      jitter: strengths of brightness, contrast, saturation and hue.
      blur: probability.
      solarize: probability of solarizing the second view.
    """
    config = cifar10_config()
    config.batch_size = 256
    config.epochs = 1000.0
    one = view(
        size=32,
        crop={**_torchvision((0.08, 1.0)), "interpolation": "bicubic"},
        jitter=_jitter(*jitter),
        blur={"prob": blur},
        **CIFAR10,
    )
    config.views = {"view1": one, "view2": one.copy_and_resolve_references()}
    config.views.view2.solarize.prob = solarize
    config.model.update(stem="cifar_pad2", conv_init="fan_out_normal", zero_init_residual=False)
    config.model.update(head_init="torch", bn_unbiased=True)
    config.optim.update(name="lars_clipped", trust_coefficient=0.02)
    config.optim.update(warmup_start=3e-5, warmup_inclusive=True)
    return config


def cpu_cifar10_config() -> ConfigDict:
    """Common settings of the `cpu` variants: a try of CIFAR-10 in minutes on two cores, no result.

    A quarter-width ResNet-18 with the stem for large images, 20 times faster than full width;
    4 epochs, batch 256, SimCLR's CIFAR views (no blur) for every method, float32. The last
    BatchNorm of a block starts at γ = 1, as in `digits_config`.
    """
    config = cifar10_config()
    config.batch_size = 256
    config.epochs = 4.0
    config.dtype = "float32"
    config.views = simclr_views(size=32, strength=0.5, blur=False)
    config.model.update(width=0.25, stem="imagenet", zero_init_residual=False)
    config.optim.update(lr=2.0, weight_decay=1e-6, warmup_epochs=1.0)
    config.eval.update(knn_every_epochs=2.0, linear_images=10_000)
    config.checkpoint.every_epochs = 1.0
    return config


def digits_config() -> ConfigDict:
    """Common settings on scikit-learn's digits: data, views, network, length.

    1,797 scans of 8×8 pixels. They have no color to distort, so the views are affine crops with
    brightness, contrast and noise; no flip, because digits are not symmetric. The last BatchNorm of
    a block starts at γ = 1: with γ = 0 an untrained network of this size sees only one corner of
    the image and would be a poor baseline of random features.
    """
    config = default_config()
    config.batch_size = 256
    config.epochs = 160.0
    config.log_every = 20
    config.data.name = "digits"
    one = digits_view()
    config.views = {"view1": one, "view2": one}
    config.model.update(depth=18, width=0.25, stem="cifar", zero_init_residual=False)
    config.optim.update(name="sgd", lr=0.1, weight_decay=1e-4, decay_norm_bias=True)
    config.optim.warmup_epochs = 10.0
    config.eval.update(knn_every_epochs=40.0, knn_k=20, crop_fraction=1.0)
    config.checkpoint.every_epochs = 40.0
    return config


def digits_view(**changes: Any) -> ConfigDict:
    """A view of an 8×8 scan; `changes` are keys of `config.view`."""
    options: dict[str, Any] = {
        "size": 8,
        "crop": {"sampler": "torchvision", "area": (0.4, 1.0), "interpolation": "bilinear"},
        "affine": {"degrees": 15.0, "translate": 0.1},
        "flip": 0.0,
        "jitter": {"prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.0, "hue": 0.0},
        "gray": 0.0,
        "blur": {"prob": 0.0},
        "noise": 0.05,
    }
    return view(**{**options, **changes})


def _blurred_and_solarized(size: Size, crop: dict[str, Any]) -> dict[str, Any]:
    """BYOL's strengths, blur and solarization with torchvision's operators."""
    both = {"size": size, "crop": crop, "jitter": _jitter(0.4, 0.4, 0.2, 0.1), **IMAGENET}
    return {
        "view1": view(**both, blur={"prob": 1.0}),
        "view2": view(**both, blur={"prob": 0.1}, solarize={"prob": 0.2}),
    }


def _torchvision(area: tuple[float, float]) -> dict[str, Any]:
    return {"sampler": "torchvision", "area": area, "interpolation": "bilinear"}


def _jitter(
    brightness: float, contrast: float, saturation: float, hue: float, prob: float = 0.8
) -> dict[str, Any]:
    return {
        "prob": prob,
        "brightness": brightness,
        "contrast": contrast,
        "saturation": saturation,
        "hue": hue,
        "style": "torchvision",
    }
