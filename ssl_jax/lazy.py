"""Modules as attributes of their package, imported on first use."""

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any


def module_attributes(
    package: str, path: Iterable[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package that imports none of its modules itself.

    Args:
      package: its `__name__`.
      path: its `__path__`.
    """
    names = [module.name for module in pkgutil.iter_modules(path)]

    def get(name: str) -> Any:
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module '{package}' has no attribute '{name}'")

    return get, lambda: sorted(names)
