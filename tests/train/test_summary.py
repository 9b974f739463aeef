"""What a run tells at its start and end, against what is counted by hand."""

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


def test_a_start_tells_network_batch_and_devices():
    setup = Setup(tiny_config(batch_size=320, microbatch=160, epochs=2.0))
    params = jax.eval_shape(setup.program.init).params
    rows = dict(summary.start_rows(setup, params, Path("runs/a"), 0))
    assert rows["run"] == "simclr, ResNet-4 ×0.125, 2 views of 8 pixels, float32"
    # As in test_encoder; the projector is 8 to 8 and 8 to 16, with a BatchNorm after each, of
    # which the last has no shift.
    encoder = 9 * (3 * 8 + 2 * 8 * 8) + 2 * 3 * 8
    projector = 8 * 8 + 2 * 8 + 8 * 16 + 16
    trained = encoder + projector
    assert rows["parameters"] == f"{encoder:,} in the encoder, {trained:,} trained in all"
    assert rows["images"] == "1,347, 450 held out"
    assert rows["batch"] == ("320, 40 per device in microbatches of 160, BatchNorm over 160 images")
    assert rows["devices"] == f"8 × {jax.devices()[0].device_kind}"
    assert rows["steps"] == "8, 2 epochs of 4" and rows["folder"] == "runs/a"
    rows = dict(summary.start_rows(setup, params, Path("runs/a"), 3))
    assert rows["steps"] == "8, 5 of them left, 2 epochs of 4"


def test_what_is_frozen_is_not_trained():
    config = tiny_config(method="supervised")
    config.supervised.freeze = True
    setup = Setup(config)
    rows = dict(summary.start_rows(setup, jax.eval_shape(setup.program.init).params, Path("a"), 0))
    assert rows["parameters"].endswith(", 90 trained in all")  # 8 features to 10 classes


def test_a_step_is_traced_and_compiled_once_and_its_products_are_counted():
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
    assert rows["FLOPs"].startswith(f"{flops:,} a step, {flops // 4:,} per device: ")
    # A MiB goes in and one comes out.
    size, parts = re.fullmatch(
        r"([\d.]+) MiB per device \((.*)\); as compiled in .* m?s", rows["memory"]
    ).groups()
    assert 2.0 <= float(size) < 2.2
    assert "state and data 1" in parts and "results 1" in parts


def test_a_step_that_changes_what_the_state_is_is_refused():
    arguments = ({"queue": jnp.zeros((4, 2), jnp.int32)}, jnp.ones(3))

    def step(state, batch):
        return {"queue": state["queue"] + 0.5}, batch

    told = r"\['queue'\] of the state float32 \[4, 2\], which was int32 \[4, 2\]: let the method's"
    with pytest.raises(UserError, match=told):
        summary.compiled(jax.jit(step), arguments, 1)


@pytest.mark.parametrize("flag", ["jax_disable_jit", "jax_debug_nans"])
def test_where_jax_looks_into_the_step_it_is_left_to_it(flag):
    step = jax.jit(lambda state, batch: (state, batch))
    before = getattr(jax.config, flag)
    jax.config.update(flag, True)
    try:
        assert summary.compiled(step, (jnp.zeros(2), jnp.zeros(2)), 1) == (step, [])
    finally:
        jax.config.update(flag, before)


def test_a_function_that_can_not_be_traced_apart_is_left_as_it_is():
    def step(state):  # as under pmap
        return state

    assert summary.compiled(step, (1,), 8) == (step, [])


def test_the_end_tells_time_speed_and_the_best_knn(tmp_path):
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
        "time": "3 min 20 s",
        "speed": "2,500 images/s (median)",
        "kNN": "81.25 %; the best 87.50 % at step 2",
    }
    assert dict(summary.end_rows(tmp_path, 5.0, 3))["time"] == "5 s since step 3"
    assert "time" not in dict(summary.end_rows(tmp_path, 0.0, 4))
    assert not list(summary.end_rows(tmp_path / "none", 0.0, 0))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.1234, "0.123 s"),
        (59.4, "59.4 s"),
        (61.0, "1 min 1 s"),
        (3600.0, "1 h 0 min"),
        (26 * 3600.0 + 59, "1 d 2 h"),
    ],
)
def test_times_are_said_in_two_units(seconds, said):
    assert summary.duration(seconds) == said


def test_counts_have_three_digits_and_a_unit():
    said = [summary.large(n) for n in (850, 123_456, 23_508_032, 999_600_000, 4.09e9, 1.5e12, 2e15)]
    assert said == ["850", "123,456", "23.5 M", "1 G", "4.09 G", "1.5 T", "2 P"]


def test_a_quiet_run_tells_where_its_report_is_and_a_whole_one_all(tmp_path, capsys, monkeypatch):
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
    begin = ["run", "parameters", "images", "batch", "devices", "steps", "folder", "warning:"]
    assert names[:10] == [*begin, "Compiling", "FLOPs"] and names[10] == "memory"
    assert names[-4:] == ["time", "speed", "kNN", "Report:"]
    # Of a run that is done little is told, and of one among many nothing.
    pretrain(config, tmp_path / "all", verbosity="line")
    assert capsys.readouterr().out == ""
