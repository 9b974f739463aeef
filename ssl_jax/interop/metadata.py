"""Preprocessing and architecture of an encoder, as exported files describe them."""

from typing import Any

from ml_collections import ConfigDict

from ssl_jax.config import flat_views, view_size
from ssl_jax.data.device_crop import antialiased
from ssl_jax.data.values import largest_value
from ssl_jax.errors import counted
from ssl_jax.models.registry import encoder_name
from ssl_jax.models.resnet import architecture


def preprocessing(config: ConfigDict) -> dict[str, Any]:
    """The preprocessing of images for the encoder, as JSON types.

    Pixels are in [0, 1]. Unless the image already has that size, the central square of
    `crop_fraction` of the shorter side is resized to `size`, with antialiasing if `antialias`. Of a
    size that is a list, height and width, it is the central rectangle of that aspect. Then `mean`
    and `std` normalize each of `channels`; they are empty for no normalization.
    """
    one = flat_views(config)[0]
    height, width = view_size(one)
    return {
        "size": height if height == width else [height, width],
        "channels": config.data.channels,
        "crop_fraction": config.eval.crop_fraction,
        "interpolation": config.eval.interpolation,
        "antialias": antialiased(one),
        "range": [0, 1],
        # The integers that become 0 and 1.
        "values": list(config.data.range or (0, largest_value(config.data.bits))),
        "mean": list(one.mean),
        "std": list(one.std),
    }


def pixel_statistics(config: ConfigDict) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of pixels from 0 to 255, as detectors take them."""
    how = preprocessing(config)
    channels = how["channels"]
    mean, std = how["mean"] or [0.0] * channels, how["std"] or [1.0] * channels
    # Detectors read 8 bits, so of 16 bits the whole range is 0 to 255.
    low, high = how["values"] if how["values"][1] <= 255 else (0, 255)
    scale = high - low
    # Rounded, as 0.485 * 255 is 123.67499999999998.
    return [round(low + scale * x, 6) for x in mean], [round(scale * x, 6) for x in std]


def in_timm(config: ConfigDict) -> bool:
    """Whether `timm.create_model` builds the encoder: ViTs and torchvision's ResNets.

    Both with any number of channels.
    """
    return config.model.name == "vit" or not set(unlike_torchvisions(config)) - {_channels(config)}


def has_torch_loader(config: ConfigDict) -> bool:
    """Whether `torch_encoder.py` loads the encoder: any ResNet without selective kernels."""
    return config.model.name == "resnet" and not config.model.sk


def unlike_torchvisions(config: ConfigDict) -> list[str]:
    """Lists what the encoder has that no ResNet of torchvision has."""
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
        _channels(config): config.data.channels != 3,
    }
    return [name for name, has in unlike.items() if has]


def _channels(config: ConfigDict) -> str:
    return f"input of {counted(config.data.channels, 'channel')}"
