"""That the checks of arrays which conftest.py turns on are on."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from ssl_jax import losses
from ssl_jax.data.augment import adjust_hue


@pytest.mark.parametrize(
    ("function", "arrays"),
    [
        # Without the check one target would be taken for all four predictions.
        (losses.normalized_mse, (jnp.ones((4, 8)), jnp.ones((1, 8)))),
        (losses.negative_cosine, (jnp.ones((4, 8)), jnp.ones((4, 8), int))),
        (adjust_hue, (jnp.ones((2, 5, 5, 3)), jnp.ones(3))),
    ],
)
def test_the_package_refuses_arrays_of_other_shapes_or_dtypes(function, arrays):
    with pytest.raises(TypeCheckError, match=function.__name__):
        function(*arrays)


def test_a_vector_is_not_added_to_a_matrix_unsaid():
    with pytest.raises(ValueError, match="numpy_rank_promotion"):
        jnp.ones((4, 3)) + jnp.ones(3)
