"""Non-finite steps stop the run before it saves anything, or are skipped without effect."""

import json
import warnings

import jax
import numpy as np
import pytest
from tiny import (
    assert_replicated,
    leaves,
    make_step,
    method_config,
    random_source,
    ready_views,
    share_steps,
    tiny_config,
    unaugmented,
    with_whole_images,
)

from ssl_jax.data.index import Index
from ssl_jax.errors import UserError
from ssl_jax.interop.load import restore_state
from ssl_jax.run.log import read_metrics
from ssl_jax.spmd import make_spmd
from ssl_jax.train import pretrain


def poisoned(config, ids, step, at):
    """Augmented views; at some steps a pixel of one image is NaN."""
    views = ready_views(config, ids)
    if step in at:
        views[0][3, 0, 0] = np.nan
    return views


def stepped(name, at, max_nonfinite_steps, steps=4):
    config = method_config(name)
    config.max_nonfinite_steps = max_nonfinite_steps
    source, spmd = random_source(), make_spmd()
    _, step, state, device_data = make_step(config, spmd, source, augment_fn=unaugmented)
    ids = np.arange(64, dtype=np.int32)
    states, counted = [jax.device_get(state)], []
    for number in range(steps):
        batch = {"id": ids, "views": poisoned(config, ids, number, at), "label": source.labels[ids]}
        state, metrics = step(state, spmd.place_batch(batch), device_data)
        assert_replicated(state)
        states.append(jax.device_get(state))
        counted.append((float(metrics["nonfinite_steps"]), float(metrics["nonfinite_step"])))
    return states, counted


def without_counts(state):
    names = leaves(state)
    return {k: v for k, v in names.items() if k not in (".step", ".nonfinite")}


@pytest.mark.parametrize("name", ["moco", "byol"])
def test_skipped_step_changes_only_the_step_count(name):
    states, counted = stepped(name, at=(1, 2), max_nonfinite_steps=5)
    assert counted == [(0, 0), (1, 2), (2, 3), (2, 3)]
    assert [int(state.step) for state in states] == [0, 1, 2, 3, 4]
    for before, after, same in zip(states, states[1:], (False, True, True, False), strict=False):
        pairs = [
            np.array_equal(value, without_counts(after)[name])
            for name, value in without_counts(before).items()
        ]
        assert all(pairs) == same
    assert all(np.isfinite(value).all() for value in without_counts(states[-1]).values())


def test_nonfinite_steps_are_counted_if_none_may_be_skipped():
    states, counted = stepped("simclr", at=(1,), max_nonfinite_steps=0)
    # Later steps are not finite either; the first one is reported.
    assert counted == [(0, 0), (1, 2), (1, 2), (1, 2)]
    assert not np.isfinite(
        leaves(states[-1].params)["['encoder']['stem']['conv1']['kernel']"]
    ).all()


@pytest.fixture
def steps_shared(monkeypatch):
    share_steps(monkeypatch)


def diverging(**changes):
    """SimCLR at a learning rate at which weights overflow within a few steps."""
    config = with_whole_images(tiny_config(batch_size=160, steps=60, **changes))
    config.optim.update(name="sgd", lr=1e9, warmup_epochs=1.0, weight_decay=1.0)
    config.checkpoint.every_epochs = 0.13  # every step, as an epoch has eight
    return config


def test_run_stops_before_saving_and_records_the_images(tmp_path, steps_shared):
    config = diverging(log_every=7)
    with warnings.catch_warnings(), pytest.raises(UserError) as caught:
        warnings.simplefilter("ignore", RuntimeWarning)
        pretrain(config, tmp_path)
    record = json.loads((tmp_path / "nonfinite.json").read_text())
    at = record["step"]
    message = f"not finite at step {at}; the checkpoint of step {at - 1} is unaffected"
    assert message in str(caught.value)
    expected = Index(1347, 160, 0).local_ids(at - 1, np.arange(160))
    assert record["ids"] == expected.tolist()
    state = restore_state(tmp_path)
    assert int(state.step) == at - 1
    assert all(np.isfinite(value).all() for value in leaves(state).values())
    losses = [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]
    assert np.isfinite(losses).all()
    # Rerunning stops at the same step.
    with pytest.raises(UserError, match=f"not finite at step {at};"):
        pretrain(config, tmp_path)


@pytest.mark.long
def test_limited_number_of_steps_is_skipped_with_warnings(tmp_path, capsys, steps_shared):
    config = diverging(log_every=1, max_nonfinite_steps=2)
    with pytest.raises(UserError, match="not finite at step"):
        pretrain(config, tmp_path)
    warned = [line for line in capsys.readouterr().out.splitlines() if "was skipped" in line]
    assert len(warned) == 2
    assert warned[0].endswith("(1 of at most 2 such steps, config.max_nonfinite_steps).")
    record = json.loads((tmp_path / "nonfinite.json").read_text())
    state = restore_state(tmp_path)
    assert int(state.step) == record["step"] - 1 and int(state.nonfinite[0]) == 2
    assert all(np.isfinite(value).all() for value in without_counts(state).values())


@pytest.mark.long
def test_first_nonfinite_step_is_reported_however_rarely_metrics_are_logged(tmp_path, steps_shared):
    at = set()
    for log_every in (1, 20):
        config = diverging(log_every=log_every)
        config.checkpoint.every_epochs = 0.0
        config.eval.knn_every_epochs = 0.0
        with pytest.raises(UserError, match="nothing is saved yet"):
            pretrain(config, tmp_path / str(log_every))
        at.add(json.loads((tmp_path / str(log_every) / "nonfinite.json").read_text())["step"])
    assert len(at) == 1


@pytest.mark.long
def test_limit_may_be_raised_when_the_run_resumes(tmp_path, steps_shared):
    config = diverging(log_every=1)
    with pytest.raises(UserError, match="Skip such steps with config.max_nonfinite_steps"):
        pretrain(config, tmp_path)
    config.max_nonfinite_steps = 2
    with pytest.raises(UserError, match="not finite at step"):
        pretrain(config, tmp_path)
    assert int(restore_state(tmp_path).nonfinite[0]) == 2
