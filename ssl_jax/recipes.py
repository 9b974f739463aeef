"""The augmentation of each method's official code as data, and the setting of the digits runs.

Sources: google-research/simclr, facebookresearch/moco, /simsiam and /swav,
deepmind/deepmind-research/byol. A config takes what it needs and changes what it must.
"""

from typing import Any

from ml_collections import ConfigDict

from ssl_jax.config import default_config, view

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# SwAV's file has .228 for red.
IMAGENET_SWAV = {"mean": (0.485, 0.456, 0.406), "std": (0.228, 0.224, 0.225)}


def simclr_views(size: int = 224, strength: float = 1.0, blur: bool = True) -> dict[str, Any]:
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


def moco_v1_views(size: int = 224) -> dict[str, Any]:
    """MoCo v1: grayscale first, then jitter always; no blur."""
    one = view(
        size=size,
        crop=_torchvision((0.2, 1.0)),
        jitter=_jitter(0.4, 0.4, 0.4, 0.4, prob=1.0),
        gray_first=True,
        blur={"prob": 0.0},
        **IMAGENET,
    )
    return {"view1": one, "view2": one}


def moco_v2_views(size: int = 224, blur: bool = True) -> dict[str, Any]:
    """MoCo v2 and SimSiam."""
    one = view(
        size=size,
        crop=_torchvision((0.2, 1.0)),
        jitter=_jitter(0.4, 0.4, 0.4, 0.1),
        blur={"prob": 0.5 if blur else 0.0},
        **IMAGENET,
    )
    return {"view1": one, "view2": one}


def swav_views(large: int = 224, small: int = 96, small_crops: int = 6) -> dict[str, Any]:
    """SwAV: two large crops and cheap small ones; without small ones the area starts at .08."""

    def crops(size: int, count: int, area: tuple[float, float]) -> ConfigDict:
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


def byol_views(size: int = 224) -> dict[str, Any]:
    """BYOL: additive brightness; the views differ in blur and solarisation."""
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


def digits_config() -> ConfigDict:
    """What all methods share on scikit-learn's digits: data, views, network, length.

    1,797 scans of 8×8. There is no colour to distort, so the views are affine crops with
    brightness, contrast and noise; no flip, for digits are not symmetric. The last BatchNorm of a
    block starts at γ = 1: with γ = 0 an untrained network of this size sees one corner of the image
    only and would make a poor baseline of random features.
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
    """A view of an 8×8 scan."""
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
