"""Runtime checks of array annotations, which conftest.py adds to the package."""

from collections.abc import Callable
from typing import Any, get_args

import jax
import numpy as np
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

# JAX puts shapes, shardings and other objects into the fields of pytrees.
UNCHECKED = {"TrainState.__init__"}
_ARRAYS = (AbstractArray, jax.Array, np.ndarray)

# Accept an int where a float is annotated, as type checkers do (PEP 484).
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function with checks of the arguments and results annotated as arrays.

    Used by `jaxtyping.install_import_hook`, which passes functions that have the package's
    signatures and no body. Annotations without arrays are left to mypy.
    """
    hints = {name: hint for name, hint in function.__annotations__.items() if _has_array(hint)}
    # A nested function would be decorated again at every call of the outer function.
    nested = "<locals>" in function.__qualname__
    if not hints or nested or function.__qualname__ in UNCHECKED:
        return function
    function.__annotations__ = hints
    return _beartype(function)


def _has_array(hint: Any) -> bool:
    parts = get_args(hint)
    if parts:
        return any(map(_has_array, parts))
    return isinstance(hint, type) and issubclass(hint, _ARRAYS)
