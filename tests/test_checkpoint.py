import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.checkpoint import Checkpoints
from ssl_jax.errors import UserError
from ssl_jax.spmd import make_spmd


def state_of(value):
    return {"step": jnp.int32(value), "w": jnp.full((4,), value, jnp.float32), "extra": {}}


def test_a_state_comes_back_bit_for_bit_with_its_placement(tmp_path):
    spmd = make_spmd()
    state = spmd.replicate({"w": np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)})
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(7, state)
    checkpoints.close()
    again = Checkpoints(tmp_path / "c")
    assert again.latest_step == 7
    like = jax.tree.map(jnp.zeros_like, state)
    like = spmd.replicate(like)
    restored = again.restore(7, like)
    np.testing.assert_array_equal(restored["w"], state["w"])
    assert restored["w"].sharding == like["w"].sharding
    again.close()


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step, knn in [(1, 0.5), (2, 0.9), (3, 0.6), (4, None), (5, 0.7), (6, 0.1)]:
        checkpoints.save(step, state_of(step), knn)
    checkpoints.wait()
    assert checkpoints.steps == [2, 5, 6]
    checkpoints.close()


def test_no_checkpoint_is_no_step(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.latest_step is None and checkpoints.steps == []
    checkpoints.close()


def test_a_checkpoint_of_other_shapes_is_refused_in_one_sentence(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, state_of(1))
    checkpoints.wait()
    with pytest.raises(UserError, match="checkpoint of step 1 .* can't be read") as caught:
        checkpoints.restore(1, {"step": jnp.int32(0), "other": jnp.zeros(3)})
    assert "\n" not in str(caught.value)
    checkpoints.close()
