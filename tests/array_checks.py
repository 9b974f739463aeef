"""The checks of annotations that conftest.py adds to the package: arrays against their shapes."""

from collections.abc import Callable
from typing import Any, get_args

import jax
import numpy as np
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

# Its fields are annotated as arrays. In their place JAX puts shapes, shardings and more, as in
# every pytree.
UNCHECKED = {"TrainState.__init__"}
_ARRAYS = (AbstractArray, jax.Array, np.ndarray)

# An int is accepted where a float is annotated, as type checkers do (PEP 484).
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that checks the arguments and the result whose annotations name an array.

    For `jaxtyping.install_import_hook`, which calls it with functions that have the signatures of
    the package's, and no body. Annotations without arrays are left to mypy.
    """
    hints = {name: hint for name, hint in function.__annotations__.items() if _has_array(hint)}
    # A function inside another one would be decorated again at each call of that one.
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
