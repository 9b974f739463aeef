"""Whole runs, as processes of their own where they are to be killed."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import leaves, tiny_config

import ssl_jax
from ssl_jax import train as train_module
from ssl_jax.config import to_json
from ssl_jax.encoder import restore_state
from ssl_jax.errors import UserError
from ssl_jax.metrics import read_metrics
from ssl_jax.spmd import Spmd
from ssl_jax.train import pretrain

ROOT = Path(__file__).parent.parent
CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from tiny import tiny_config

def get_config(variant=""):
    return tiny_config(epochs=3.0, batch_size=160, checkpoint=dict(every_epochs=0.4, keep=2))
"""


@pytest.fixture(scope="module")
def command_for(tmp_path_factory):
    """run_pretrain.py on the digits: 8 steps an epoch, 24 in all, a checkpoint every 3."""
    config = tmp_path_factory.mktemp("config") / "config.py"
    config.write_text(CONFIG.format(tests=str(ROOT / "tests")))

    def make(workdir, *extra):
        script = [sys.executable, str(ROOT / "run_pretrain.py"), f"--config={config}"]
        return [*script, f"--workdir={workdir}", *extra]

    return make


@pytest.fixture
def command(command_for):
    return command_for


def environment():
    """As the tests', with two devices."""
    return os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


def run(command, **options):
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=300, **options
    )


def final_state(workdir):
    """Every leaf of the newest checkpoint: projector, optimiser and data position included."""
    state = restore_state(workdir)
    assert int(state.step) == 24
    return leaves(state)


@pytest.fixture(scope="module")
def undisturbed(command_for, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    result = run(command_for(workdir))
    assert result.returncode == 0, result.stderr
    return workdir


# Between two checkpoints (every 3 steps), and while one is being written.
@pytest.mark.parametrize("at", ["step 11/", "step 12/"])
def test_a_killed_run_ends_bit_identical_to_an_undisturbed_one(undisturbed, command, tmp_path, at):
    killed = subprocess.Popen(
        command(tmp_path), env=environment(), stdout=subprocess.PIPE, text=True
    )
    for line in killed.stdout:
        if line.startswith(at):
            killed.send_signal(signal.SIGKILL)
            break
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "evaluation.json").exists()
    again = run(command(tmp_path))
    assert again.returncode == 0, again.stderr
    assert "Continuing from step" in again.stdout
    first, second = final_state(undisturbed), final_state(tmp_path)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    losses = [
        {r["step"]: r["loss"] for r in read_metrics(w / "metrics.jsonl") if "loss" in r}
        for w in (undisturbed, tmp_path)
    ]
    assert losses[0] == losses[1] and sorted(losses[0]) == list(range(1, 25))


def test_a_finished_run_is_evaluated_and_reported(tmp_path, capsys):
    config = tiny_config(epochs=1.0, batch_size=320)
    config.eval.knn_every_epochs = 1.0
    config.checkpoint.every_epochs = 1.0
    config.data.test_fraction = 0.25
    state = pretrain(config, tmp_path, "the command")
    out = capsys.readouterr().out
    for part in ("raw pixels", "random init", "simclr", "full linear", "kNN", "report.html"):
        assert part in out
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["name"] for row in evaluation["rows"]] == ["raw pixels", "random init", "simclr"]
    assert len(evaluation["rows"][0]["labels_5"]["draws"]) == config.eval.draws
    assert evaluation["rows"][0]["linear"] > 0.9
    knn = [r["knn"] for r in read_metrics(tmp_path / "metrics.jsonl") if "knn" in r]
    assert knn[-1] == evaluation["rows"][2]["knn"]
    assert (tmp_path / "report.html").stat().st_size > 10_000
    encoder = ssl_jax.load(tmp_path)
    features = encoder.apply(np.zeros((2, 8, 8, 3), np.uint8))
    assert features.shape[0] == 2 and features.dtype == np.float32
    for bad in (np.zeros((8, 8, 3), np.uint8), np.zeros((2, 8, 8, 1), np.uint8)):
        with pytest.raises(UserError, match="takes images"):
            encoder.apply(bad)
    with pytest.raises(UserError, match="not int32"):
        encoder.apply(np.zeros((2, 8, 8, 3), np.int32))
    for a, b in zip(
        jax.tree.leaves(encoder.params), jax.tree.leaves(state.params["encoder"]), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    # The same command again trains nothing more and changes nothing.
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = pretrain(config, tmp_path, "the command")
    assert int(again.step) == int(state.step)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_another_config_changes_nothing_in_the_folder(tmp_path):
    config = tiny_config(epochs=1.0, batch_size=320)
    (tmp_path / "config.json").write_text(json.dumps({"config": to_json(config)}))
    config.optim.lr = 0.123
    with pytest.raises(UserError, match="optim.lr: 1.0 -> 0.123"):
        pretrain(config, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_the_loop_fetches_once_per_logged_step_and_transfers_only_batches(tmp_path, monkeypatch):
    placed = []
    place = Spmd.place_batch
    monkeypatch.setattr(Spmd, "place_batch", lambda self, b: placed.append(b) or place(self, b))
    config = tiny_config(epochs=2.0, batch_size=160, log_every=4)
    runs = []

    class GuardedRun(train_module.Run):
        def train(self):
            runs.append(self)
            with jax.transfer_guard_host_to_device("disallow"):
                return super().train()

    monkeypatch.setattr(train_module, "Run", GuardedRun)
    monkeypatch.setattr(train_module.Run, "measure", lambda self, step: None)
    monkeypatch.setattr("ssl_jax.evals.run.Evaluator.finish", lambda *a: [])
    pretrain(config, tmp_path)
    steps = 2 * (1347 // 160)
    assert runs[0].fetch.count == steps // 4
    assert len(placed) == steps
    assert all(b["id"].nbytes == 160 * 4 for b in placed)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.batchsize=3"], ["batchsize", "batch_size"]),
        (["--config.batch_size=161"], ["config.batch_size is 161", "2 devices", "160"]),
        (["--config.data.name=folder"], ["config.data.dir"]),
        (["--config.data.name=digit"], ["config.data.name", "digits"]),
        (["--config.method=simcl"], ["config.method", "simclr"]),
        (["--config.model.depth=19"], ["19"]),
        (["--config.optim.name=larz"], ["larz", "lars"]),
        (["--config.batch_size=4000"], ["config.batch_size is 4000", "1347 images"]),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(command, tmp_path, arguments, words):
    result = run(command(tmp_path / "run", *arguments))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    for word in words:
        assert word in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_second_start_on_a_workdir_is_refused(command, tmp_path):
    first = subprocess.Popen(
        command(tmp_path / "run", "--config.steps=100000"),
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(300):
            if (tmp_path / "run" / "config.json").exists():
                break
            time.sleep(0.1)
        second = run(command(tmp_path / "run"))
        assert second.returncode == 2
        assert f"process {first.pid} on" in second.stderr
    finally:
        first.kill()
        first.communicate()


@pytest.mark.parametrize("name", ["train.py", "step.py", "methods/simclr.py"])
def test_nothing_fetches_beside_the_counted_function(name):
    """A stray float(metric) would stall every step; a fetch has to be seen to be counted."""
    tree = ast.parse((ROOT / "ssl_jax" / name).read_text())
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    stalls = {"float", "int", "np.asarray", "np.array", "jax.device_get"}
    found = [c for c in calls if c in stalls or c.endswith((".item", ".tolist"))]
    # Once, before the first step: the untrained encoder to the host; a count of NumPy's labels.
    assert sorted(found) == (["int", "jax.device_get"] if name == "train.py" else [])
