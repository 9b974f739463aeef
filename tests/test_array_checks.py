"""The array checks that conftest.py installs are active."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from ssl_jax import losses
from ssl_jax.data.augment import adjust_hue


@pytest.mark.parametrize(
    ("function", "arrays"),
    [
        # Without the check one target would be broadcast to all four predictions.
        (losses.normalized_mse, (jnp.ones((4, 8)), jnp.ones((1, 8)))),
        (losses.negative_cosine, (jnp.ones((4, 8)), jnp.ones((4, 8), int))),
        (adjust_hue, (jnp.ones((2, 5, 5, 3)), jnp.ones(3))),
    ],
)
def test_arrays_of_wrong_shape_or_dtype_are_refused(function, arrays):
    with pytest.raises(TypeCheckError, match=function.__name__):
        function(*arrays)


def test_implicit_rank_promotion_is_an_error():
    with pytest.raises(ValueError, match="numpy_rank_promotion"):
        jnp.ones((4, 3)) + jnp.ones(3)
