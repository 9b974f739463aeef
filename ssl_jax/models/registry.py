"""Encoders by name: those of the package, and those that users register."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from ssl_jax.config import register_encoder
from ssl_jax.errors import UserError, require_choice
from ssl_jax.models import resnet, vit
from ssl_jax.models.layers import Groups

# Makes an encoder from the run's config, the mapped axis of the devices, and the groups of devices
# that share BatchNorm statistics; the last two are None outside the train step.
Builder = Callable[[ConfigDict, str | None, Groups | None], nn.Module]

_BUILT_IN: dict[str, Builder] = {"resnet": resnet.build, "vit": vit.build}
_REGISTERED: dict[str, Builder] = {}  # from outside the package


def register(name: str, **options: Any) -> Callable[[Builder], Builder]:
    """A decorator that makes an encoder available as `config.model.name = name`.

    Your own file, such as a config file, may register one (see docs/new_encoder.md). Registering a
    name again replaces the earlier encoder.

    Args:
      name: the encoder's name in configs.
      **options: defaults of the keys `config.model.<name>.<option>`, set and checked like all
        others. Weights are loaded only into an encoder with the same values.

    Returns:
      The decorator of a function or class. It is called with the config, the mapped axis of the
      devices and the groups of devices that share BatchNorm statistics, and returns a Flax module
      that is called as `module(images, train=...)`, returns features [n, D], and has D as its
      attribute or property `num_features`. The decorator returns it unchanged.

    Raises:
      UserError: the name is an encoder of ssl_jax or a key of `config.model`.
    """
    register_encoder(name, options)

    def add(builder: Builder) -> Builder:
        _REGISTERED[name] = builder
        return builder

    return add


def make_encoder(
    config: ConfigDict, axis_name: str | None = None, groups: Groups | None = None
) -> nn.Module:
    """Builds a config's encoder.

    Args:
      config: the run's config.
      axis_name: mapped axis of the devices; None on a single device and outside the train step.
      groups: groups of devices that share BatchNorm statistics; None for a single group.

    Returns:
      The module, which has `num_features`.

    Raises:
      UserError: an unknown name, options that the encoder doesn't support, or a registered encoder
        that is not a Flax module with `num_features`.
    """
    name = config.model.name
    builders = _BUILT_IN | _REGISTERED
    require_choice("config.model.name", name, builders)
    module = builders[name](config, axis_name, groups)
    features = getattr(module, "num_features", None)
    if not (isinstance(module, nn.Module) and isinstance(features, int)):
        raise UserError(
            f"The encoder '{name}' (config.model.name) is of type {type(module).__name__}. Return "
            "a flax.linen.Module with an integer num_features, the number of features per image."
        )
    return module


def encoder_name(model: Mapping[str, Any]) -> str:
    """An encoder's name in reports and cards, such as "ResNet-50 ×2", from `config.model`."""
    names = {"resnet": resnet.resnet_name, "vit": vit.vit_name}
    name: str = model.get("name", "resnet")  # reports show runs of versions without the key
    return names[name](model) if name in names else name


def architecture(model: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that determine what an encoder computes from its weights.

    Args:
      model: `config.model`.

    Returns:
      Values by the keys' dotted names in `config.model`, including "name".
    """
    name = model["name"]
    if name == "resnet":
        return {"name": name, **resnet.architecture(model)}
    keys = vit.architecture(model) if name == "vit" else model[name]
    return {"name": name, **{f"{name}.{key}": value for key, value in keys.items()}}
