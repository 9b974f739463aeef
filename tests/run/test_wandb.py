"""The real Weights & Biases package, offline: it writes its files and sends nothing."""

import contextlib
import importlib.machinery
import importlib.util
import json

import numpy as np
import pytest
import wandb
from tiny import share_steps, tiny_config, with_whole_images

from ssl_jax.errors import UserError
from ssl_jax.run.log import MetricsLog, read_metrics
from ssl_jax.run.wandb import WandbWriter, require_wandb
from ssl_jax.train import loop


@pytest.fixture
def offline(tmp_path, monkeypatch):
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / name))
    yield tmp_path / "run"
    wandb.teardown()


@pytest.mark.long
def test_resumed_run_resumes_the_same_wandb_run(offline):
    offline.mkdir()
    for step in (1, 2):
        writer = WandbWriter("tries", offline, {"optim": {"lr": 0.123}}, pytest.fail)
        log = MetricsLog(offline, step - 1, [writer])
        log.write(step, {"loss": 2.5, "of_processes": [1.0, 3.0]})
        log.picture(0, "views", np.zeros((8, 8, 3), np.uint8))
        log.close()
    wandb.teardown()  # as at the end of a process: flushes its files
    identity = (offline / "wandb_id").read_text().strip()
    files = list(offline.glob(f"wandb/offline-run-*/run-{identity}.wandb"))
    assert len(files) == 2
    for file in files:
        content = file.read_bytes()
        for part in (b"tries", b"loss", b"of_processes", b"0.123", b"views"):
            assert part in content, part
    assert list(offline.glob("wandb/offline-run-*/files/media/images/views*.png"))
    lines = (offline / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["of_processes"] for line in lines] == [[1.0, 3.0]] * 2


# Without the package, a folder `wandb/` that it created may be found instead.
@pytest.mark.parametrize("found", [None, importlib.machinery.ModuleSpec("wandb", None)])
def test_missing_package_is_refused_with_the_extra_to_install(monkeypatch, tmp_path, found):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    require_wandb("")
    for call in (lambda: require_wandb("tries"), lambda: WandbWriter("tries", tmp_path, {}, print)):
        with pytest.raises(UserError, match=r"config.wandb is 'tries'.*'\.\[wandb\]'"):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (wandb.errors.UsageError("no API key\nmore"), "no API key"),
        (wandb.errors.CommError(""), "CommError"),
        (ValueError("bad entity"), "bad entity"),
    ],
)
def test_wandb_errors_at_start_are_user_errors(monkeypatch, tmp_path, error, words):
    def refuse(**settings):
        raise error

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=rf"project 'tries' \({words}\)\. Check `wandb login`"):
        WandbWriter("tries", tmp_path, {}, print)


def test_link_in_place_of_the_wandb_folder_is_refused(monkeypatch, tmp_path):
    """A run's folder may come from someone else, and the package writes through links."""
    monkeypatch.setattr(wandb, "init", lambda **settings: pytest.fail("started"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "wandb").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="a link or a file in place of a folder"):
        WandbWriter("tries", tmp_path, {}, print)


class FakeRun:
    """A wandb run that records its calls, and raises an error in each."""

    def __init__(self, error=None):
        self.calls, self.error = [], error

    def define_metric(self, *args, **options):
        pass

    def log(self, values):
        self.calls.append(values["step"])
        if self.error:
            raise self.error

    def finish(self, exit_code):
        self.calls.append(f"exit {exit_code}")
        if self.error:
            raise self.error


@pytest.mark.parametrize("first", ["write", "picture", "close"])
def test_lost_service_warns_once(monkeypatch, tmp_path, first):
    run, warned = FakeRun(ConnectionResetError("Connection lost")), []
    monkeypatch.setattr(wandb, "init", lambda **settings: run)
    writer = WandbWriter("tries", tmp_path, {}, warned.append)
    if first == "picture":
        writer.picture(0, "views", np.zeros((8, 8, 3), np.uint8))
    elif first == "write":
        writer.write(0, {"loss": 1.0})
    writer.close()
    writer.write(1, {"loss": 1.0})
    writer.picture(1, "views", np.zeros((8, 8, 3), np.uint8))
    assert run.calls == ([0] if first != "close" else []) + ["exit 0"]
    (warning,) = warned
    assert "Weights & Biases has failed (Connection lost)" in warning


@pytest.mark.parametrize("place", ["train", "checkpoints", "nowhere"])
def test_failed_run_is_finished_as_failed(monkeypatch, tmp_path, place):
    run = FakeRun()
    monkeypatch.setattr(wandb, "init", lambda **settings: run)

    def fail(*args):
        raise UserError("No space.")

    if place == "checkpoints":
        monkeypatch.setattr("ssl_jax.run.checkpoint.Checkpoints.close", fail)
    monkeypatch.setattr(loop, "run_steps", fail if place == "train" else lambda *args: (None, 2))
    monkeypatch.setattr(loop, "finish", lambda *args: None)
    share_steps(monkeypatch)
    config = with_whole_images(tiny_config(steps=2, batch_size=320, wandb="tries"))
    with contextlib.nullcontext() if place == "nowhere" else pytest.raises(UserError, match="spac"):
        loop.pretrain(config, tmp_path)
    assert run.calls[-1] == ("exit 0" if place == "nowhere" else "exit 1")


def test_run_sends_its_metrics_and_a_finished_run_sends_nothing(offline, monkeypatch):
    monkeypatch.setattr(loop, "evaluate", lambda *args: None)
    monkeypatch.setattr("ssl_jax.evals.evaluator.Evaluator.finish", lambda *a: None)
    share_steps(monkeypatch)
    config = with_whole_images(tiny_config(steps=2, batch_size=320, wandb="tries"))
    for _ in range(2):
        loop.pretrain(config, offline)
    wandb.teardown()
    (file,) = offline.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    assert all(part in content for part in (b"embedding_std", b"learning_rate", b"views"))
    assert read_metrics(offline / "metrics.jsonl")[-1]["step"] == 2
