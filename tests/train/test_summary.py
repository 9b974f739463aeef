"""Summaries at a run's start and end, against numbers counted by hand."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import share_steps, tiny_config, with_whole_images

from ssl_jax.errors import UserError
from ssl_jax.train import pretrain, summary
from ssl_jax.train.setup import Setup


def test_start_summary_has_network_batch_and_devices():
    setup = Setup(tiny_config(batch_size=320, microbatch=160, epochs=2.0))
    params = jax.eval_shape(setup.program.init).params
    rows = dict(summary.start_rows(setup, params, Path("runs/a"), 0))
    assert rows["method"] == "simclr, ResNet-4 ×0.125, 2 views of 8 px, float32"
    # As in test_encoder. The projector maps 8 to 8 and 8 to 16, each followed by BatchNorm; the
    # last one has no shift.
    encoder = 9 * (3 * 8 + 2 * 8 * 8) + 2 * 3 * 8
    projector = 8 * 8 + 2 * 8 + 8 * 16 + 16
    trained = encoder + projector
    assert rows["parameters"] == (
        f"{encoder / 1000:.3g} thousand in the encoder, {trained / 1000:.3g} thousand trainable in "
        "total"
    )
    assert rows["images"] == "1,347 for training, 450 held out"
    assert rows["batch"] == ("320, 40 per device in microbatches of 160, BatchNorm over 160 images")
    assert rows["devices"] == f"8 × {jax.devices()[0].device_kind}"
    assert rows["steps"] == "8, 2 epochs of 4" and rows["workdir"] == "runs/a"
    rows = dict(summary.start_rows(setup, params, Path("runs/a"), 3))
    assert rows["steps"] == "8, 5 remaining, 2 epochs of 4"


def test_frozen_parameters_are_not_counted_as_trainable():
    config = tiny_config(method="supervised")
    config.supervised.freeze = True
    setup = Setup(config)
    rows = dict(summary.start_rows(setup, jax.eval_shape(setup.program.init).params, Path("a"), 0))
    assert rows["parameters"].endswith(", 90 trainable in total")  # 8 features to 10 classes


def test_step_is_traced_and_compiled_once_and_its_flops_are_counted():
    traces = []

    def step(state, batch):
        traces.append(1)
        return state + 1, batch @ jnp.ones((32, 64))

    arguments = (jnp.zeros((256, 1024)), jnp.ones((16, 32)))
    program, rows = summary.compiled(jax.jit(step), arguments, 4)
    assert isinstance(program, jax.stages.Compiled)
    state, product = program(*arguments)
    np.testing.assert_array_equal(product, np.full((16, 64), 32.0))
    assert float(state[0, 0]) == 1.0 and len(traces) == 1
    rows = dict(rows)
    flops = 2 * 16 * 32 * 64
    assert rows["FLOPs"].startswith(
        f"{flops / 1000:.1f} k per step, {flops / 4000:.1f} k per device ("
    )
    assert rows["compilation"].endswith("seconds")
    # A MiB goes in and one comes out.
    size, parts = re.fullmatch(r"([\d.]+) MiB per device \((.*)\)", rows["memory"]).groups()
    assert 2.0 <= float(size) < 2.2
    assert "state and data 1" in parts and "results 1" in parts


def test_step_that_changes_dtypes_of_the_state_is_refused():
    arguments = ({"queue": jnp.zeros((4, 2), jnp.int32)}, jnp.ones(3))

    def step(state, batch):
        return {"queue": state["queue"] + 0.5}, batch

    message = r"changes \['queue'\] of the state from int32 \[4, 2\] to float32 \[4, 2\]\. Make the"
    with pytest.raises(UserError, match=message):
        summary.compiled(jax.jit(step), arguments, 1)


@pytest.mark.parametrize("flag", ["jax_disable_jit", "jax_debug_nans"])
def test_step_is_not_compiled_ahead_under_jax_debugging_flags(flag):
    step = jax.jit(lambda state, batch: (state, batch))
    before = getattr(jax.config, flag)
    jax.config.update(flag, True)
    try:
        assert summary.compiled(step, (jnp.zeros(2), jnp.zeros(2)), 1) == (step, [])
    finally:
        jax.config.update(flag, before)


def test_step_that_cannot_be_traced_is_returned_unchanged():
    def step(state):  # like the step under pmap
        return state

    assert summary.compiled(step, (1,), 8) == (step, [])


def test_end_summary_has_time_speed_and_best_knn(tmp_path):
    records = [
        {"step": 1, "images_per_s": 100.0},
        {"step": 2, "images_per_s": 3000.0},
        {"step": 2, "knn": 0.875},
        {"step": 3, "images_per_s": 2500.0},
        {"step": 4, "knn": 0.8125},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(lines)
    rows = dict(summary.end_rows(tmp_path, 200.4, 0))
    assert rows == {
        "time": "3 minutes and 20.4 seconds",
        "speed": "2,500 img/s (median)",
        "kNN": "81.25% (best 87.50% at step 2)",
    }
    assert dict(summary.end_rows(tmp_path, 5.0, 3))["time"] == "5 seconds since step 3"
    assert "time" not in dict(summary.end_rows(tmp_path, 0.0, 4))
    assert not list(summary.end_rows(tmp_path / "none", 0.0, 0))


def test_changed_environment_is_noted_with_its_effect_on_losses():
    (note,) = summary.environment_notes(["devices.count: 8 -> 4"])
    assert "(devices.count: 8 -> 4)" in note and "up to floating-point rounding" in note
    (note,) = summary.environment_notes(["derived.batchnorm_images: 20 -> 40"])
    assert "losses will differ" in note and "rounding" not in note
    assert summary.environment_notes([]) == []


def test_evaluation_line_has_the_accuracies_that_were_measured():
    setup = Setup(tiny_config(steps=8))
    line = summary.evaluation_line(setup, 4, {"knn": 0.875, "rankme": 12.34})
    assert line == "step 4/8 | kNN 87.50% | RankMe 12.3"
    accuracies = {"test_accuracy": 0.5, "probe_accuracy": 0.25, "rankme": 1.0}
    line = summary.evaluation_line(setup, 8, accuracies)
    assert line == "step 8/8 | top-1 50.00% | probe 25.00% | RankMe 1.0"


def test_verbosity_of_a_run(tmp_path, capsys, monkeypatch):
    share_steps(monkeypatch)
    config = with_whole_images(tiny_config(steps=2, batch_size=64))
    config.optim.warmup_epochs = 1.0  # longer than the run
    pretrain(config, tmp_path / "quiet", verbosity="quiet")
    warning, report = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: the warmup of 21 steps")
    assert report == f"Report: {tmp_path / 'quiet' / 'report.html'}"
    pretrain(config, tmp_path / "all")
    lines = capsys.readouterr().out.splitlines()
    names = [line.partition(" ")[0] for line in lines]
    begin = ["method", "parameters", "images", "batch", "devices", "steps", "workdir", "warning:"]
    assert names[:12] == [*begin, "Compiling", "compilation", "FLOPs", "memory"]
    assert names[-4:] == ["time", "speed", "kNN", "Report:"]
    # A finished run that is part of a larger command prints nothing.
    pretrain(config, tmp_path / "all", verbosity="line")
    assert capsys.readouterr().out == ""
