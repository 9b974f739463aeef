"""What an encoder is and how its images are prepared, in words that travel with it."""

from typing import Any

from ml_collections import ConfigDict

from ssl_jax.config import flat_views
from ssl_jax.data.device_crop import antialiased
from ssl_jax.models.resnet import architecture


def preprocessing(config: ConfigDict) -> dict[str, Any]:
    """How images are prepared for the encoder, as JSON types.

    Pixels are in [0, 1]; the central square of `crop_fraction` of the shorter side is resized to
    `size` (where the image isn't of that size already), a larger one averaged over what a pixel
    covers if `antialias`, else only sampled; then `mean` and `std` normalise each channel, empty
    for none.
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
    """Whether torchvision's and timm's own models load the encoder."""
    plain = {"width": 1.0, "sk": False, "stem": "imagenet", "padding": "symmetric"}
    return config.model.depth <= 152 and plain.items() <= architecture(config.model).items()
