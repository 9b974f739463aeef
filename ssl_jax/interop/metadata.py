"""Preprocessing and architecture of an encoder, as exported files describe them."""

from typing import Any

from ml_collections import ConfigDict

from ssl_jax.config import flat_views
from ssl_jax.data.device_crop import antialiased
from ssl_jax.models.registry import encoder_name
from ssl_jax.models.resnet import architecture


def preprocessing(config: ConfigDict) -> dict[str, Any]:
    """The preprocessing of images for the encoder, as JSON types.

    Pixels are in [0, 1]. Unless the image already has that size, the central square of
    `crop_fraction` of the shorter side is resized to `size`, with antialiasing if `antialias`. Then
    `mean` and `std` normalize each channel; they are empty for no normalization.
    """
    one = flat_views(config)[0]
    return {
        "size": one.size,
        "crop_fraction": config.eval.crop_fraction,
        "interpolation": config.eval.interpolation,
        "antialias": antialiased(one),
        "range": [0, 1],
        "mean": list(one.mean),
        "std": list(one.std),
    }


def pixel_statistics(config: ConfigDict) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of pixels from 0 to 255, as detectors take them."""
    how = preprocessing(config)
    mean, std = how["mean"] or [0.0] * 3, how["std"] or [1.0] * 3
    # Rounded, as 0.485 * 255 is 123.67499999999998.
    return [round(255 * x, 6) for x in mean], [round(255 * x, 6) for x in std]


def is_torchvisions(config: ConfigDict) -> bool:
    """Whether torchvision's models load the encoder."""
    return not unlike_torchvisions(config)


def in_timm(config: ConfigDict) -> bool:
    """Whether `timm.create_model` builds the encoder: torchvision's ResNets, and ViTs."""
    return config.model.name == "vit" or is_torchvisions(config)


def has_torch_loader(config: ConfigDict) -> bool:
    """Whether `torch_encoder.py` loads the encoder: any ResNet without selective kernels."""
    return config.model.name == "resnet" and not config.model.sk


def unlike_torchvisions(config: ConfigDict) -> list[str]:
    """Lists what the encoder has that no ResNet of torchvision and timm has."""
    if config.model.name != "resnet":
        return [f"the encoder {encoder_name(config.model)}"]
    model = architecture(config.model)
    unlike = {
        f"depth {model['depth']}": model["depth"] > 152,
        f"width {model['width']:g}": model["width"] != 1,
        "selective kernels": model["sk"],
        f"the stem '{model['stem']}'": model["stem"] != "imagenet",
        "TensorFlow's padding": model["padding"] != "symmetric",
        "a projected first shortcut": model["project_first"],
    }
    return [name for name, has in unlike.items() if has]
