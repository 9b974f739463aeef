import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import leaves, random_source, share_steps, tiny_config, with_whole_images

from ssl_jax.config import run_schedule, to_json
from ssl_jax.errors import UserError
from ssl_jax.evals.results import EVALUATION, LAST_FILE, set_aside_results
from ssl_jax.run.folder import note_resumption, read_record, write_config
from ssl_jax.run.log import read_metrics
from ssl_jax.train import pretrain
from ssl_jax.train.extension import require_longer, schedule_change

IMAGES = 64  # two steps per epoch


def setup_of(config):
    """The parts of a `Setup` that an extension reads."""
    source = SimpleNamespace(num_examples=IMAGES)
    return SimpleNamespace(config=config, train=source, schedule=run_schedule(config, IMAGES))


def started(workdir, **changes):
    write_config(workdir, tiny_config(epochs=4.0, **changes), "")
    (workdir / "checkpoints" / "8").mkdir(parents=True)


@pytest.mark.parametrize(
    ("length", "words"),
    [
        ({"epochs": 4.0}, r"config.epochs=4 makes 8 steps, but the run in .* is 8 steps long"),
        (
            {"epochs": 3.0},
            "config.epochs=3 makes 6 steps.* Set a larger --config.epochs, or remove",
        ),
        ({"epochs": 4.1}, "config.epochs=4.1 makes 8 steps"),
        ({"epochs": 4.0, "steps": 7}, "config.steps=7 makes 7 .* Set a larger --config.steps"),
    ],
)
def test_extension_to_a_length_that_is_not_larger_is_refused(tmp_path, length, words):
    started(tmp_path)
    with pytest.raises(UserError, match=words):
        require_longer(setup_of(tiny_config(**length)), tmp_path)


@pytest.mark.parametrize("length", [{"epochs": 5.0}, {"epochs": 4.0, "steps": 9}])
def test_same_extension_again_is_accepted_and_a_shorter_one_is_refused(tmp_path, length):
    started(tmp_path)
    longer = tiny_config(**length)
    require_longer(setup_of(longer), tmp_path)
    note_resumption(tmp_path, 8, longer, extended_from=8)
    require_longer(setup_of(longer), tmp_path)
    with pytest.raises(UserError, match="config.epochs=4 makes 8 steps"):
        require_longer(setup_of(tiny_config(epochs=4.0)), tmp_path)


def cosine(step, total, peak, warmup):
    return peak * (1 + np.cos(np.pi * (step - warmup) / (total - warmup))) / 2


@pytest.mark.parametrize(("start", "warned"), [(8, True), (6, False)])
def test_change_of_the_schedule_is_described_and_a_finished_cosine_is_warned_of(start, warned):
    config = tiny_config(epochs=8.0, batch_size=32)
    note, warnings = schedule_change(setup_of(config), before=8, start=start)
    peak = config.optim.lr * 32 / 256
    old, new = cosine(start - 1, 8, peak, 2), cosine(start, 16, peak, 2)
    assert f"from 8 to 16 steps. From step {start + 1} on" in note
    assert f"the learning rate goes from {old:.3g} to {new:.3g}." in note
    assert [f"rises again from {old:.3g} to {new:.3g}" in text for text in warnings] == [
        True
    ] * warned


@pytest.mark.parametrize("schedule", ["constant", "step"])
def test_schedules_that_do_not_reach_an_end_are_not_warned_of(schedule):
    config = tiny_config(epochs=8.0)
    config.optim.schedule = schedule
    assert schedule_change(setup_of(config), before=8, start=8)[1] == []


def test_results_of_an_extended_run_are_moved_and_those_of_an_unfinished_one_stay(tmp_path):
    (tmp_path / "report.html").write_text("")
    assert not set_aside_results(tmp_path, 8)
    for name in (EVALUATION, LAST_FILE):
        (tmp_path / name).write_text("")
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "knn.json").write_text("")
    assert set_aside_results(tmp_path, 8) and not set_aside_results(tmp_path, 8)
    moved = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    names = (EVALUATION, LAST_FILE, "report.html", "evals/knn.json")
    assert moved == {f"earlier/8/{name}" for name in names}


def config_of(images, epochs, schedule):
    config = with_whole_images(tiny_config(epochs=epochs, method="moco"))
    config.checkpoint.every_epochs = 1.0
    config.data.update(name="packed", dir=str(images), test_dir=str(images))
    config.moco.update(queue=64, out=8)
    config.optim.update(schedule=schedule, warmup_epochs=0.0)
    config.eval.at_end = True
    return config


def losses(workdir):
    return {r["step"]: r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r}


@pytest.mark.long
def test_run_at_a_constant_rate_extended_twice_equals_a_longer_one_bit_for_bit(
    tmp_path, monkeypatch, capsys
):
    """Once after it was stopped, then after it had finished, and killed in between."""
    share_steps(monkeypatch)
    source, images = random_source(IMAGES), tmp_path / "images.npz"
    np.savez(images, images=source.images, labels=source.labels, class_names=["a", "b", "c", "d"])
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    expected = pretrain(config_of(images, 6.0, "constant"), whole)
    pretrain(config_of(images, 2.0, "constant"), workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")  # as if stopped after two steps
    pretrain(config_of(images, 3.0, "constant"), workdir, extend=True)
    last, out = config_of(images, 6.0, "constant"), capsys.readouterr().out
    assert "Extending the run from 4 to 6 steps. From step 3 on" in out
    assert json.loads((workdir / EVALUATION).read_text())["step"] == 6
    pretrain(last, workdir, extend=True)
    assert "results of step 6 are in earlier/6." in capsys.readouterr().out
    shutil.rmtree(workdir / "checkpoints" / "12")
    actual = pretrain(last, workdir, extend=True)  # the same command resumes
    assert actual.finished and actual.step == 12
    first, second = leaves(expected.state), leaves(actual.state)
    assert first.keys() == second.keys() and any("queue" in name for name in first)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert losses(whole) == losses(workdir) and sorted(losses(whole)) == list(range(1, 13))
    record = read_record(workdir)
    assert record["config"] == to_json(actual.encoder.config)
    extended = [each for each in record["resumed"] if "extended_from" in each]
    assert [(each["step"], each["extended_from"]) for each in extended] == [(2, 4), (6, 6)]
    assert json.loads((workdir / EVALUATION).read_text())["step"] == 12
    assert (workdir / "earlier" / "6" / LAST_FILE).exists()
    assert (
        "Dashed line: extended at step 6, planned for 6 steps."
        in (workdir / "report.html").read_text()
    )


@pytest.mark.long
def test_extended_cosine_is_that_of_the_longer_run_from_the_next_step_on(
    tmp_path, monkeypatch, capsys
):
    share_steps(monkeypatch)
    source, images = random_source(IMAGES), tmp_path / "images.npz"
    np.savez(images, images=source.images, labels=source.labels, class_names=["a", "b", "c", "d"])
    config, workdir = config_of(images, 2.0, "cosine"), tmp_path / "run"
    pretrain(config, workdir)
    config.epochs = 5.0
    with pytest.raises(UserError, match="pass --extend if it is to be longer"):
        pretrain(config, workdir)
    capsys.readouterr()
    state = pretrain(config, workdir, extend=True).state
    assert "warning: The cosine schedule had reached its end" in capsys.readouterr().out
    assert int(jax.device_get(state.step)) == 10
    logged = read_metrics(workdir / "metrics.jsonl")
    rates = [r["learning_rate"] for r in logged if "learning_rate" in r]
    peak = config.optim.lr * 32 / 256
    planned = [cosine(step, 4 if step < 4 else 10, peak, 0) for step in range(10)]
    np.testing.assert_allclose(rates, planned, rtol=1e-5, atol=1e-9)
