import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    make_step,
    method_config,
    random_source,
    ready_views,
    unaugmented,
    with_whole_images,
)

from ssl_jax import losses
from ssl_jax.config import Schedule
from ssl_jax.errors import UserError
from ssl_jax.methods import make_method
from ssl_jax.spmd import make_spmd
from ssl_jax.step import example_batch


def swav(**options):
    config = with_whole_images(method_config("swav"))
    config.swav.update(options)
    return make_method(config, Schedule(1, 10))


def test_prototypes_are_unit_vectors_and_frozen_for_exactly_frozen_steps():
    config, spmd = with_whole_images(method_config("swav")), make_spmd(devices=jax.devices()[:1])
    source = random_source()
    config.epochs = 10.0
    config.optim.update(frozen_steps=2, weight_decay=0.1)
    _, step, state, _ = make_step(config, spmd, source, unaugmented)
    initial = np.asarray(state.params["prototypes"]["kernel"])
    ids = np.arange(64, dtype=np.int32)
    views = ready_views(config, ids)
    for number in range(4):
        batch = spmd.place_batch({"id": ids, "label": source.labels[ids], "views": views})
        state, _ = step(state, batch, {})
        kernel = np.asarray(state.params["prototypes"]["kernel"])
        np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 1, rtol=1e-5)
        assert np.allclose(kernel, initial, atol=1e-6) == (number < 2)


def test_queue_fills_from_its_epoch_newest_first():
    method = swav(queue=128, queue_from_epoch=2.0)
    params, method_state = jax.jit(method.init)(jax.random.key(0), example_batch(method.config))
    for step in range(5):
        outputs = {"projection": jnp.full((64, 4, 8), float(step))}
        _, method_state = method.update(params, outputs, method_state, jnp.int32(step))
        assert int(method_state["queued"]) == min(128, 64 * max(0, step - 1))
    blocks = np.asarray(method_state["queue"])[0].reshape(2, 64, 8)
    assert [np.unique(b).tolist() for b in blocks] == [[4.0], [3.0]]


def test_queue_of_another_run_is_kept_up_to_date_before_its_epoch():
    method = swav(queue=128, queue_from_epoch=2.0)
    state = {"queue": jnp.zeros((2, 128, 8)), "queued": jnp.int32(128)}
    outputs = {"projection": jnp.ones((64, 4, 8))}
    params = {"prototypes": {"kernel": jnp.ones((8, 16))}}
    _, state = method.update(params, outputs, state, jnp.int32(0))
    assert np.asarray(state["queue"]).mean((0, 2)).tolist() == [1.0] * 64 + [0.0] * 64


def test_full_queue_is_used_without_the_current_batch():
    method = swav(queue=128)
    params, method_state = jax.jit(method.init)(jax.random.key(0), example_batch(method.config))
    kernel = params["prototypes"]["kernel"]
    rng = np.random.default_rng(0)
    z = losses.normalize(jnp.float32(rng.normal(size=(64, 4, 8))))
    queue = losses.normalize(jnp.float32(rng.normal(size=(2, 128, 8))))
    scores = z @ kernel
    sinkhorn = jax.jit(losses.sinkhorn)
    alone = sinkhorn(scores[:, 1])
    together = sinkhorn(jnp.concatenate([scores[:, 1], queue[1] @ kernel]))[:64]
    assign = jax.jit(method.assign)
    for queued, expected in [(0, alone), (127, alone), (128, together)]:
        state = {**method_state, "queue": queue, "queued": jnp.int32(queued)}
        assigned = assign(scores, params["prototypes"], state)
        np.testing.assert_allclose(assigned[:, 1], expected, rtol=1e-4)
    assert not np.allclose(alone, together, rtol=1e-2)


def test_assignments_are_float32_in_bfloat16_runs():
    assert losses.sinkhorn(jnp.ones((4, 3), jnp.bfloat16)).dtype == jnp.float32


def test_crops_of_one_size_share_one_forward_pass():
    method = swav()
    batch = example_batch(method.config)
    params, method_state = jax.jit(method.init)(jax.random.key(0), batch)
    calls = str(
        jax.make_jaxpr(lambda: method.forward(params, method_state, batch, jax.random.key(0)))()
    ).count("conv_general_dilated")
    single = str(
        jax.make_jaxpr(
            lambda: method.forward(
                params, method_state, {**batch, "views": batch["views"][:2]}, jax.random.key(0)
            )
        )()
    ).count("conv_general_dilated")
    assert len(batch["views"]) == 4
    assert calls == 2 * single > 0


def test_prototypes_used_counts_distinct_prototypes():
    method = swav(queue=0)
    batch = example_batch(method.config)
    params, method_state = jax.jit(method.init)(jax.random.key(0), batch)
    rng = np.random.default_rng(0)
    z = losses.normalize(jnp.float32(rng.normal(size=(64, 4, 8))))
    step = jnp.int32(0)
    loss_of = jax.jit(lambda z: method.loss(params, {"projection": z}, method_state, batch, step))
    _, logs = loss_of(z)
    assert 9 < float(logs["prototypes_used"]) <= 12.001
    assert method.trivial_loss == pytest.approx(np.log(12))
    same = jnp.broadcast_to(z[:1, :1], z.shape)
    loss, logs = loss_of(same)
    assert float(logs["prototypes_used"]) == pytest.approx(1, abs=1e-4)
    # Constant outputs: balanced assignments against one prediction.
    assert float(loss) >= method.trivial_loss - 1e-3


def test_prototypes_of_trained_length_start_as_torchs_linear_and_stay_as_trained():
    """PyTorch's weight_norm: rows w = length·v / |v|, here with a bias."""
    method = swav(prototype_norm="weight_norm", prototype_bias=True, queue=0)
    params, state = jax.jit(method.init)(jax.random.key(0), example_batch(method.config))
    v, length, bias = (np.asarray(params["prototypes"][k]) for k in ("kernel", "length", "bias"))
    z = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    np.testing.assert_allclose(method.scores(z, params["prototypes"]), z @ v + bias, atol=1e-5)
    for uniform in (v, bias):
        assert 0.25 < np.abs(uniform).max() < 8**-0.5
    longer = {"kernel": 3 * v, "length": length, "bias": bias}
    np.testing.assert_allclose(method.scores(z, longer), z @ v + bias, atol=1e-5)
    updated, _ = method.update({**params, "prototypes": longer}, {}, state, jnp.int32(0))
    np.testing.assert_array_equal(updated["prototypes"]["kernel"], 3 * v)
    assert set(method.param_groups(params)["prototypes"].values()) == {"frozen_until"}


def test_queue_that_is_no_multiple_of_the_batch_is_refused():
    with pytest.raises(UserError, match="config.swav.queue is 100"):
        swav(queue=100)
