"""Every method over several steps: golden numbers, equal states on all devices, exact resume."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from test_step import ONE, SOME_METHODS
from tiny import (
    METHODS,
    assert_replicated,
    leaves,
    make_step,
    method_config,
    norm_of,
    random_source,
    unaugmented,
    with_two_stages,
)

from ssl_jax.config import flat_views, run_schedule
from ssl_jax.data.index import Index
from ssl_jax.data.sources import digits
from ssl_jax.evals.evaluator import evaluated_variables
from ssl_jax.methods import make_method
from ssl_jax.run.checkpoint import Checkpoints
from ssl_jax.spmd import make_spmd

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())


def take_steps(step, state, device_data, spmd, source, config, numbers):
    """Steps with those numbers, each on its own batch; the state and the last metrics."""
    index = Index(source.num_examples, config.batch_size, config.seed)
    for number in numbers:
        ids = index.ids(number)
        batch = spmd.place_batch({"id": ids, "label": source.labels[ids]})
        state, metrics = step(state, batch, device_data)
        assert_replicated(state)
    return state, metrics


@pytest.mark.parametrize("method", METHODS)
def test_golden_metrics_replicated_state_evaluated_network_and_bit_exact_resume(method, tmp_path):
    """Renew golden.json when a method, its defaults or the augmentation change on purpose.

    The message of a failure prints what to paste; any other change that moves it is a mistake.
    """
    config, source = with_two_stages(method_config(method)), random_source(256)
    spmd = make_spmd()
    config.epochs = 2.0  # of 4 steps: SwAV's queue fills from step 4
    config.optim.warmup_epochs = 0.0
    config.model.bn_group_size = 1  # each device its own statistics: what would diverge
    made, step, state, device_data = make_step(config, spmd, source)
    args = (device_data, spmd, source, config)
    state, metrics = take_steps(step, state, *args, [0])
    assert metrics.pop("nonfinite_steps") == metrics.pop("nonfinite_step") == 0
    golden = {name: float(value) for name, value in metrics.items()}
    golden["parameter_norm"] = norm_of(state.params)
    assert_evaluates(made, state, "target" if method == "dino" else "online")
    # SwAV's queue of 128 holds a batch when it is saved, and is in use when it is restored.
    state, _ = take_steps(step, state, *args, range(1, 6))
    with_queue = {"queue" in name for name in state.method_state}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(6, state, None)
    checkpoints.close()
    undisturbed, _ = take_steps(step, state, *args, [6, 7])
    _, _, fresh, _ = make_step(config, spmd, source)
    again = Checkpoints(tmp_path / "checkpoints", keep=1)
    restored = again.restore(6, fresh)
    again.close()
    resumed, _ = take_steps(step, restored, *args, [6, 7])
    expected, actual = leaves(undisturbed), leaves(resumed)
    assert expected.keys() == actual.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)
    if method in ("moco", "swav", "simclr_memory"):
        assert True in with_queue
    expected = GOLDEN.get(method, {})
    message = f"if that is meant, renew golden.json: {json.dumps({method: golden})}"
    assert golden.keys() == expected.keys(), message
    for name, value in golden.items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-3, atol=1e-5, err_msg=message)


def assert_evaluates(method, state, network):
    """Checks which network is evaluated by default and that the other one differs."""
    stats = state.method_state["batch_stats"]
    networks = {"online": (state.params, stats)}
    if "target" in state.method_state:
        networks["target"] = (state.method_state["target"], stats["target"])
    assert networks.keys() == ({"online", "target"} if method.target_networks else {"online"})
    assert method.network_name() == network
    found = {name: leaves(evaluated_variables(method, state, name)) for name in ("", *networks)}
    for name, (params, own) in networks.items():
        expected = {"params": {"encoder": params["encoder"]}}
        expected = leaves(expected | {"batch_stats": {"encoder": own["encoder"]}})
        for each in {name, ""} if name == network else {name}:
            assert found[each].keys() == expected.keys()
            for path, leaf in expected.items():
                np.testing.assert_array_equal(found[each][path], leaf)
    for name in networks.keys() - {network}:
        assert any(not np.array_equal(found[name][path], found[""][path]) for path in found[""])


def noisy_views(images, config, rng):
    """Views by NumPy: the digit moved by up to a pixel, brighter or darker, with noise.

    Drawn by the step they would be most of what it compiles and computes.
    """
    views = []
    for each in flat_views(config):
        moved = np.stack([np.roll(x, rng.integers(-1, 2, 2), (0, 1)) for x in images / 255])
        bright = rng.uniform(0.6, 1.4, (len(images), 1, 1, 1))
        noise = rng.normal(0, 0.1, moved.shape)
        views.append((moved * bright + noise)[:, : each.size, : each.size].astype("float32"))
    return tuple(views)


def losses_on_digits(method, steps):
    """Metrics of each step, and the config."""
    config = method_config(method)
    source, _ = digits(config)
    config.data.num_classes = 10
    config.batch_size, config.epochs = 64, steps / 21
    config.optim.update(name="adamw", lr_scaling="none", warmup_epochs=0.0)
    rates = {"moco": 0.003, "swav": 0.01, "supervised": 0.02, "mocov3": 0.01}
    config.optim.lr = rates.get(method, 0.005)
    config.optim.frozen_steps = 0
    config.moco.update(queue=512, ema_decay=0.95, ema_decay_end=0.95)
    config.mocov3.update(ema_decay=0.9, ema_decay_end=0.9)
    # Many more prototypes than dimensions, or embeddings find a direction equally far from all.
    config.swav.update(queue=0, prototypes=48, out=6, hidden=32, epsilon=0.02, temperature=0.2)
    config.simclr.memory_bank = 512 if method == "simclr_memory" else 0
    config.dino.update(prototypes=48, out=6, hidden=32, ema_decay=0.9, head_bn=True, block_size=0)
    spmd = make_spmd(devices=ONE)
    _, step, state, _ = make_step(config, spmd, source, unaugmented)
    index = Index(source.num_examples, config.batch_size, config.seed)
    series, rng = [], np.random.default_rng(0)
    for number in range(steps):
        ids = index.ids(number)
        views = noisy_views(source.images[ids], config, rng)
        batch = spmd.place_batch({"id": ids, "label": source.labels[ids], "views": views})
        state, metrics = step(state, batch, {})
        series.append(metrics)
    series = [{name: float(value) for name, value in m.items()} for m in jax.device_get(series)]
    return series, config


def plateau(config):
    """The loss of a network that tells no images apart, from the method's definition."""
    batch = config.batch_size
    return {
        "simclr": np.log(2 * batch - 1),
        "simclr_memory": np.log(2 * batch - 1 + 512),
        "swav": np.log(config.swav.prototypes),
        "byol": 4.0,  # predictions and targets at right angles
        "simsiam": 0.0,
        "dino": np.log(config.dino.prototypes),
        "barlow": config.barlow.out,
        "vicreg": 0.99 * config.vicreg.variance_weight,
        "supervised": np.log(10),
        "mocov3": 4 * config.mocov3.temperature * np.log(batch),
        "supcon": np.log(2 * batch - 1) * config.supcon.temperature / 0.07,
    }


# Of the plateau, how much must be gone after 80 steps.
DROP = {
    "simclr": 0.2,
    "simclr_memory": 0.5,
    "swav": 0.1,
    "byol": 1.0,
    "simsiam": 0.2,
    "dino": 0.2,
    "barlow": 10.0,
    "vicreg": 2.0,
    "supervised": 0.2,
    "mocov3": 0.2,
    "supcon": 0.5,
}


@pytest.mark.parametrize("method", SOME_METHODS)
def test_training_on_digits_lowers_the_loss_below_its_plateau(method):
    series, config = losses_on_digits(method, 80)
    loss = [m["loss"] for m in series]
    end = np.mean(loss[-10:])
    if method == "moco":
        # Keys are nearly the queries at first and the queue is noise: low, up, then down again.
        top = int(np.argmax(loss))
        assert loss[0] < max(loss) - 0.5 and 2 < top < 70
        assert end < max(loss) - 0.1
    else:
        assert end < plateau(config)[method] - DROP[method]
    assert series[-1]["embedding_std"] > 0.1
    if "prototypes_used" in series[-1]:  # or DINO's teacher has one for all images, and no loss
        assert series[-1]["prototypes_used"] > 3


def test_golden_run_schedules_match_their_config():
    config = method_config("swav")
    config.epochs = 2.0
    schedule = run_schedule(config, 256)
    assert schedule.total_steps == 8
    assert make_method(config, schedule).queue_from == 4


def test_simclr_step_all_gathers_each_embedding_once():
    config, source, spmd = method_config("simclr"), random_source(), make_spmd()
    _, step, state, device_data = make_step(config, spmd, source)
    ids = np.arange(64, dtype=np.int32)
    batch = spmd.place_batch({"id": ids, "label": source.labels[ids]})
    program = step.lower(state, batch, device_data).compile().as_text()
    gathers = [line for line in program.splitlines() if re.search(r" all-gather(-start)?\(", line)]
    # The embeddings [2, 64, 16] and their log-sum-exps [2, 64].
    shapes = sorted(re.search(r"f32\[([\d,]+)\]", line)[1] for line in gathers)
    assert shapes == ["2,64", "2,64,16"]
