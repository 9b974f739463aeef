"""Preprocessing and architecture of an encoder, as exported files describe them."""

from typing import Any

from ml_collections import ConfigDict

from ssl_jax.config import flat_views
from ssl_jax.data.device_crop import antialiased
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


def is_torchvisions(config: ConfigDict) -> bool:
    """Whether the models of torchvision and timm load the encoder."""
    plain = {"width": 1.0, "sk": False, "stem": "imagenet", "padding": "symmetric"}
    return config.model.depth <= 152 and plain.items() <= architecture(config.model).items()
