"""The methods: one protocol, one file per method."""

import dataclasses
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from ssl_jax.config import Schedule, register_options
from ssl_jax.errors import UserError, require_choice
from ssl_jax.methods.barlow import BarlowTwins
from ssl_jax.methods.base import Method
from ssl_jax.methods.byol import BYOL
from ssl_jax.methods.dino import DINO
from ssl_jax.methods.distill import Distill
from ssl_jax.methods.moco import MoCo
from ssl_jax.methods.mocov3 import MoCoV3
from ssl_jax.methods.simclr import SimCLR
from ssl_jax.methods.simsiam import SimSiam
from ssl_jax.methods.supcon import SupCon
from ssl_jax.methods.supervised import Supervised
from ssl_jax.methods.swav import SwAV
from ssl_jax.methods.vicreg import VICReg


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method of the package.

    Attributes:
      method: its class.
      title: its name in reports and model cards.
      paper: authors and year; "" if there is no single paper.
      arxiv: the paper's arXiv identifier.
    """

    method: type[Method]
    title: str
    paper: str = ""
    arxiv: str = ""

    @property
    def citation(self) -> str:
        """Authors, year and arXiv identifier, or ""."""
        return f"{self.paper}, arXiv:{self.arxiv}" if self.paper else ""


METHODS = {
    "simclr": Entry(SimCLR, "SimCLR", "Chen et al., 2020", "2002.05709"),
    "moco": Entry(MoCo, "MoCo", "He et al., 2019", "1911.05722"),
    "swav": Entry(SwAV, "SwAV", "Caron et al., 2020", "2006.09882"),
    "byol": Entry(BYOL, "BYOL", "Grill et al., 2020", "2006.07733"),
    "simsiam": Entry(SimSiam, "SimSiam", "Chen & He, 2020", "2011.10566"),
    "dino": Entry(DINO, "DINO", "Caron et al., 2021", "2104.14294"),
    "mocov3": Entry(MoCoV3, "MoCo v3", "Chen, Xie & He, 2021", "2104.02057"),
    "supcon": Entry(SupCon, "SupCon", "Khosla et al., 2020", "2004.11362"),
    "barlow": Entry(BarlowTwins, "Barlow Twins", "Zbontar et al., 2021", "2103.03230"),
    "vicreg": Entry(VICReg, "VICReg", "Bardes et al., 2021", "2105.04906"),
    "supervised": Entry(Supervised, "Supervised"),
    "distill": Entry(Distill, "Distillation", "Chen et al., 2020", "2006.10029"),
}
_REGISTERED: dict[str, type[Method]] = {}  # from outside the package


def title(name: str) -> str:
    """Returns a method's name in reports: "SimCLR" for "simclr"; unknown names are unchanged."""
    return METHODS[name].title if name in METHODS else name


def register(name: str, **options: Any) -> Callable[[type[Method]], type[Method]]:
    """A class decorator that makes a method available as `config.method = name`.

    Your own file, such as a config file, may register one (see docs/new_method.md). Registering a
    name again replaces the earlier method.

    Args:
      name: the method's name in configs.
      **options: defaults of the keys `config.<name>.<option>`, set and checked like all others.

    Returns:
      The decorator, which returns the class unchanged.

    Raises:
      UserError: the name is a method of ssl_jax or another key of the schema.
    """
    if name in METHODS:
        raise UserError(f"'{name}' is a method of ssl_jax. Register another name.")
    register_options(name, options)

    def add(method: type[Method]) -> type[Method]:
        _REGISTERED[name] = method
        return method

    return add


def method_class(name: str) -> type[Method]:
    """Returns the method of that name, of the package or registered.

    Raises:
      UserError: an unknown method.
    """
    methods = {name: entry.method for name, entry in METHODS.items()} | _REGISTERED
    require_choice("config.method", name, methods)
    return methods[name]


def make_method(
    config: ConfigDict,
    schedule: Schedule,
    axis_name: str | None = None,
    groups: tuple[tuple[int, ...], ...] | None = None,
) -> Method:
    """Makes the method that a config names.

    Args:
      config: the run's config.
      schedule: the run's length, for schedules inside the method.
      axis_name: mapped axis of the devices; None on a single device.
      groups: groups of devices that share BatchNorm statistics; None for a single group.

    Returns:
      The method, ready for `init`.

    Raises:
      UserError: an unknown method, or options that it doesn't support.
    """
    method = method_class(config.method)(config, schedule, axis_name, groups)
    method.check_projector_layer(config.eval.projector_layer)
    method.network_name()  # refuses one that the method doesn't have
    return method
