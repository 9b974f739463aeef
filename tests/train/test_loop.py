"""Whole runs; those that are killed have a process of their own."""

import ast
import contextlib
import functools
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import types
import weakref
from pathlib import Path
from unittest.mock import MagicMock

import jax
import numpy as np
import pytest
from images import noise_files
from tiny import leaves, random_source, share_steps, tiny_config, with_whole_images

import ssl_jax
from ssl_jax.cli.main import pretrain_main
from ssl_jax.errors import UserError
from ssl_jax.evals import evaluator as eval_run
from ssl_jax.evals.results import LAST_FILE, read_evaluation
from ssl_jax.interop.load import restore_state
from ssl_jax.report import write_report
from ssl_jax.run.folder import write_config
from ssl_jax.run.log import Progress, read_metrics
from ssl_jax.run.nonfinite import COUNT, STEP
from ssl_jax.run.processes import Stop
from ssl_jax.spmd import Spmd
from ssl_jax.train import loop, pretrain, setup, start

ROOT = Path(__file__).parents[2]
CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from tiny import tiny_config, without_color

def get_config(variant=""):
    config = tiny_config(epochs=3.0, batch_size=160, checkpoint=dict(every_epochs=0.4, keep=2))
    return config if variant == "color" else without_color(config)
"""


@pytest.fixture(scope="module")
def command_for(tmp_path_factory):
    """Makes commands on the digits: 8 steps per epoch, 24 in total, a checkpoint every 3."""
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
    """The tests' environment, with two devices."""
    return os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=2")}


def run(command, **options):
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=300, **options
    )


def final_state(workdir):
    """Every leaf of the newest checkpoint, including projector, optimizer and data position."""
    state = restore_state(workdir)
    assert int(state.step) == 24
    return leaves(state)


@pytest.fixture(scope="module")
def extras(tmp_path_factory):
    """Arguments for digits, kept on the devices, and for image files read by tf.data."""
    images = noise_files(tmp_path_factory.mktemp("images"))
    options = {"data.name": "folder", "data.dir": images, "data.test_dir": images}
    options |= {"batch_size": 32, "epochs": 12, "checkpoint.every_epochs": 1.5}
    return {"digits": [], "folder": [f"--config.{key}={v}" for key, v in options.items()]}


@pytest.fixture(scope="module")
def undisturbed(command_for, extras, tmp_path_factory):
    """Makes workdirs of uninterrupted runs, by the name of the data, each on its first use."""

    @functools.cache
    def make(data):
        workdir = tmp_path_factory.mktemp(f"undisturbed_{data}")
        assert pretrain_main(command_for(workdir, *extras[data])[2:]) == 0
        return workdir

    return make


# Killed while a checkpoint is written (one every 3 steps), and between two checkpoints.
@pytest.mark.long
@pytest.mark.parametrize("data, at", [("digits", "step 12/"), ("folder", "step 11/")])
def test_resume_is_bit_exact_after_sigkill(
    undisturbed, extras, command, tmp_path, data, at, monkeypatch, capsys
):
    """Only the killed run needs a process of its own."""
    share_steps(monkeypatch)
    killed = subprocess.Popen(command(tmp_path, *extras[data]), stdout=subprocess.PIPE, text=True)
    for line in killed.stdout:
        if line.startswith(at):
            killed.send_signal(signal.SIGKILL)
            break
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / LAST_FILE).exists()
    assert pretrain_main(command(tmp_path, *extras[data])[2:]) == 0
    assert "Resuming from step" in capsys.readouterr().out
    assert (tmp_path / LAST_FILE).exists()
    first, second = final_state(undisturbed(data)), final_state(tmp_path)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    losses = [
        {r["step"]: r["loss"] for r in read_metrics(w / "metrics.jsonl") if "loss" in r}
        for w in (undisturbed(data), tmp_path)
    ]
    assert losses[0] == losses[1] and sorted(losses[0]) == list(range(1, 25))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run with its evaluation: config, folder, final state and printed output."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    config = with_whole_images(tiny_config(epochs=1.0, batch_size=320))
    config.eval.update(knn_every_epochs=1.0, at_end=True)
    config.checkpoint.every_epochs = 1.0
    config.data.test_fraction = 0.25
    before = os.umask(0o022)  # the usual default
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            state = pretrain(config, workdir, "the command").state
    finally:
        os.umask(before)
    return config, workdir, jax.device_get(state), out.getvalue()


def test_finished_run_is_evaluated_and_reported(finished):
    config, workdir, _, out = finished
    record = json.loads((workdir / "config.json").read_text())
    assert "BatchNorm over 320 images" in out
    # Patience is one epoch: 1347 images in batches of 320.
    assert record["derived"] == {"batchnorm_images": 320, "trivial_loss": None, "patience": 4}
    parts = ("raw pixels", "random init", "SimCLR", "Linear probe", "kNN", "report.html")
    for part in (*parts, "Evaluating SimCLR: features", "Evaluating raw pixels: classifiers"):
        assert part in out
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    assert [row["name"] for row in evaluation["rows"]] == ["raw pixels", "random init", "simclr"]
    assert len(evaluation["rows"][0]["labels_5"]["trials"]) == config.eval.trials
    assert evaluation["rows"][0]["linear"] > 0.9
    knn = [r["knn"] for r in read_metrics(workdir / "metrics.jsonl") if "knn" in r]
    assert knn[-1] == evaluation["rows"][2]["knn"]
    assert (workdir / "report.html").stat().st_size > 10_000


def test_load_returns_the_encoder_of_a_finished_run(finished):
    _, workdir, state, _ = finished
    encoder = ssl_jax.load(workdir)
    features = encoder.apply(np.zeros((2, 8, 8, 3), np.uint8))
    assert features.shape[0] == 2 and features.dtype == np.float32
    for bad in (np.zeros((8, 8, 3), np.uint8), np.zeros((2, 8, 8, 1), np.uint8)):
        with pytest.raises(UserError, match=r"not \[n, H, W, 3\]"):
            encoder.apply(bad)
    for kind in ("int32", "int64"):
        with pytest.raises(UserError, match=f"are {kind}, not uint8"):
            encoder.apply(np.zeros((2, 8, 8, 3), kind))
    with pytest.raises(UserError, match="maximum is 255: divide them by 255"):
        encoder.apply(np.full((2, 8, 8, 3), 255.0, np.float32))
    for a, b in zip(
        jax.tree.leaves(encoder.params), jax.tree.leaves(state.params["encoder"]), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_rerunning_a_finished_run_trains_no_further(finished, tmp_path):
    config, done, state, _ = finished
    workdir = Path(shutil.copytree(done, tmp_path / "run"))
    before = (workdir / "metrics.jsonl").read_bytes()
    again = pretrain(config, workdir, "the command")
    assert again.finished and again.step == int(state.step) == int(again.state.step)
    assert repr(again) == f"PretrainResult(workdir={workdir!r}, step=4, finished=True)"
    last = [r for r in read_metrics(workdir / "metrics.jsonl") if r["step"] == 4]
    assert again.metrics == {k: v for r in last for k, v in r.items() if k != "step"}
    assert again.encoder.step == 4 and again.encoder is again.encoder
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_files_of_a_run_are_not_writable_by_others(finished):
    """With the usual umask; a looser one is the user's choice."""
    workdir = finished[1]
    files = [workdir, *workdir.rglob("*")]
    names = {file.name for file in files}
    assert {"config.json", "report.html", "metrics.jsonl", "evaluation.json"} <= names
    for file in files:
        assert not stat.S_IMODE(file.stat().st_mode) & 0o022, file


def test_run_interrupted_before_its_first_checkpoint_restarts_from_step_0(
    tmp_path, capsys, monkeypatch
):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "run_steps", interrupted)
    restarted = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pretrain(with_whole_images(tiny_config(steps=1, batch_size=320)), tmp_path)
        out = capsys.readouterr().out
        restarted.append("No checkpoint found; restarting from step 0." in out)
    assert restarted == [False, True]


def test_different_config_is_refused_and_leaves_the_folder_unchanged(tmp_path):
    config = tiny_config(epochs=1.0, batch_size=320)
    write_config(tmp_path, config, "")
    config.optim.lr = 0.123
    with pytest.raises(UserError, match="optim.lr: 1.0 -> 0.123"):
        pretrain(config, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_run_refused_before_it_starts_leaves_a_folder_for_the_corrected_config(
    tmp_path, monkeypatch
):
    def refused(*_):
        assert (tmp_path / "config.json").exists()
        raise UserError("damaged weights")

    monkeypatch.setattr(loop, "start_run", refused)
    for seed in (0, 1):
        with pytest.raises(UserError, match="damaged weights"):
            pretrain(tiny_config(seed=seed), tmp_path)
        assert not (tmp_path / "config.json").exists()
        (tmp_path / "metrics.jsonl").touch()  # opened before the first images are read
    run = types.SimpleNamespace(closing=contextlib.nullcontext)
    monkeypatch.setattr(loop, "start_run", lambda *_: (run, None))
    monkeypatch.setattr(loop, "run_steps", refused)
    with pytest.raises(UserError, match="damaged weights"):
        pretrain(tiny_config(), tmp_path)
    assert (tmp_path / "config.json").exists()


def test_loop_fetches_once_per_logged_step_and_transfers_only_batches(tmp_path, monkeypatch):
    placed = []
    place = Spmd.place_batch
    monkeypatch.setattr(Spmd, "place_batch", lambda self, b: placed.append(b) or place(self, b))
    config = with_whole_images(tiny_config(epochs=2.0, batch_size=160, log_every=4))
    runs, plain = [], loop.run_steps

    def guarded(run, *args):
        runs.append(run)
        with jax.transfer_guard_host_to_device("disallow"):
            return plain(run, *args)

    monkeypatch.setattr(loop, "run_steps", guarded)
    monkeypatch.setattr(loop, "evaluate", lambda *args: None)
    monkeypatch.setattr("ssl_jax.evals.evaluator.Evaluator.finish", lambda *a: [])
    pretrain(config, tmp_path)
    steps = 2 * (1347 // 160)
    assert runs[0].fetch.count == steps // 4
    assert len(placed) == steps
    assert all(b["id"].nbytes == 160 * 4 for b in placed)


def test_at_most_two_steps_are_in_flight(monkeypatch):
    """Metrics are fetched only at the end, so that nothing else waits for the devices."""
    config, running, most = tiny_config(log_every=100, batch_size=160), [], []

    class Metric:
        def block_until_ready(self):
            if self in running:
                del running[: running.index(self) + 1]  # steps end in order

    def step(state, batch, device_data):
        running.append(Metric())
        most.append(len(running))
        return state, dict.fromkeys(("loss", COUNT, STEP), running[-1])

    monkeypatch.setattr(loop, "_compiled", lambda *args: step)
    monkeypatch.setattr(loop, "evaluate", lambda *args: None)
    built = setup.Setup(config)
    run = MagicMock(setup=built, start=0, device_data={})
    with Stop() as stop:
        loop.run_steps(run, None, stop)
    assert len(most) == 16 and most == [1, 1] + [2] * 14
    assert run.log_step.call_count == 1


def test_devices_hold_two_batches(monkeypatch):
    """That of the running step and the next one, which is what a plan counts."""
    config, alive, most = tiny_config(log_every=100, batch_size=160), weakref.WeakSet(), []

    class OnDevice(dict):
        __hash__ = object.__hash__

    class Metric:
        def __init__(self, batch):
            self.batch = batch  # as a device keeps it until its step ends

        def block_until_ready(self):
            self.batch = None

    built = setup.Setup(config)

    def place_batch(batch):
        alive.add(placed := OnDevice(batch))
        most.append(len(alive))
        return placed

    def step(state, batch, device_data):
        time.sleep(0.05)  # in which the next batches are read
        return state, {"loss": Metric(batch)}

    monkeypatch.setattr(built, "place_batch", place_batch)
    monkeypatch.setattr(loop, "_compiled", lambda *args: step)
    monkeypatch.setattr(loop, "evaluate", lambda *args: None)
    with Stop() as stop:
        loop.run_steps(MagicMock(setup=built, start=0, device_data={}), None, stop)
    assert len(most) == 16 and max(most) == 2


def packed(path, source):
    names = np.array(source.class_names)
    np.savez(path, images=source.images, labels=source.labels, class_names=names)
    return str(path)


def four_steps(images):
    """A config on a packed file, which is written, with a checkpoint every two steps."""
    config = with_whole_images(tiny_config(steps=4, batch_size=32))
    config.checkpoint.every_epochs = 1.0
    config.data.update(name="packed", dir=packed(images, random_source(64)))
    return config


@pytest.mark.long
def test_run_resumes_with_changed_settings_moved_data_and_renamed_source(
    finished, tmp_path, monkeypatch, capsys
):
    share_steps(monkeypatch)
    source, workdir, moved = tmp_path / "source", tmp_path / "run", tmp_path / "scratch"
    shutil.copytree(finished[1], source)
    moved.mkdir()
    config = four_steps(tmp_path / "images.npz")
    config.init_from.path = str(source)
    state = pretrain(config, workdir).state
    shutil.rmtree(workdir / "checkpoints" / "4")
    source.rename(tmp_path / "renamed")
    (tmp_path / "images.npz").rename(moved / "images.npz")
    config.init_from.path = str(tmp_path / "renamed")
    config.data.dir = str(moved / "images.npz")
    config.data.test_dir = packed(moved / "test.npz", random_source(8, seed=2))
    config.log_every, config.eval.knn_every_epochs = 3, 5.0
    capsys.readouterr()
    again = pretrain(config, workdir).state
    out = capsys.readouterr().out
    assert "Resuming from step 2 of 4." in out
    (line,) = [line for line in out.splitlines() if line.startswith("Settings changed (")]
    for key in (
        "data.dir: ",
        "the held-out data: none -> 8 images",
        "eval.knn_every_epochs: 0.0 -> 5.0",
        "log_every: 1 -> 3",
    ):
        assert key in line
    assert "The run keeps its weights" in line
    for name, leaf in leaves(state).items():
        np.testing.assert_array_equal(leaf, leaves(again)[name], err_msg=name)
    shutil.copytree(tmp_path / "renamed", tmp_path / "other")
    (sums,) = (tmp_path / "other" / "checkpoints").glob("*/checksums.json")
    sums.write_text('{"params": [1, 2]}')
    config.init_from.path = str(tmp_path / "other")
    with pytest.raises(UserError, match="renamed -> .*other, which has other weights"):
        pretrain(config, workdir)
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(UserError, match="other, step .* of which can't be read to compare them"):
        pretrain(config, workdir)
    config.init_from.path = str(tmp_path / "renamed")
    shutil.rmtree(workdir / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "renamed")  # the same command needs the source no more
    assert int(pretrain(config, workdir).step) == 4
    config.data.dir = packed(moved / "other.npz", random_source(64, seed=1))
    with pytest.raises(UserError, match="other training images \\(64 images, with other"):
        pretrain(config, workdir)


def test_run_whose_folder_is_renamed_stops_and_is_not_split(tmp_path, monkeypatch):
    config = four_steps(tmp_path / "images.npz")
    workdir, renamed = tmp_path / "run", tmp_path / "renamed"
    plain = loop.is_due

    def rename_after_a_checkpoint(step, every):
        if step == 3 and workdir.exists():
            while not (workdir / "checkpoints" / "2" / "checksums.json").exists():
                time.sleep(0.01)
            workdir.rename(renamed)
        return plain(step, every)

    monkeypatch.setattr(loop, "is_due", rename_after_a_checkpoint)
    share_steps(monkeypatch)
    with pytest.raises(UserError, match="run was renamed or removed .* pass its new path as --wo"):
        pretrain(config, workdir)
    assert not workdir.exists()
    monkeypatch.setattr(loop, "is_due", plain)
    assert int(pretrain(config, renamed).step) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.batchsize=3"], ["batchsize", "batch_size"]),
        (["--config.batch_size=161"], ["config.batch_size is 161", "8 devices", "160"]),
        (["--config.data.name=folder"], ["config.data.dir"]),
        (["--config.data.name=digit"], ["config.data.name", "digits"]),
        (["--config.method=simcl"], ["config.method", "simclr"]),
        (["--config.model.depth=19"], ["19"]),
        (["--config.optim.name=larz"], ["larz", "lars"]),
        (["--config.batch_size=4000"], ["config.batch_size is 4000", "1347 images"]),
    ],
)
def test_bad_input_prints_one_line_and_creates_nothing(command, tmp_path, arguments, words, capsys):
    code = pretrain_main(command(tmp_path / "run", *arguments)[2:])
    stderr = capsys.readouterr().err
    assert code == 2
    assert stderr.count("\n") == 1 and stderr.startswith("error: ")
    for word in words:
        assert word in stderr
    assert not (tmp_path / "run").exists()


def test_bad_input_exits_with_code_2(command, tmp_path):
    result = run(command(tmp_path / "run", "--config.method=simcl"))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "config.method" in result.stderr


def test_second_run_in_a_workdir_is_refused(command, tmp_path, capsys):
    first = subprocess.Popen(
        command(tmp_path / "run", "--config.steps=100000"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "run" / "config.json").exists():
            if first.poll() is not None or time.monotonic() > deadline:
                first.kill()
                pytest.fail(f"the first run never started: {first.communicate()[0]}")
            time.sleep(0.1)
        assert pretrain_main(command(tmp_path / "run")[2:]) == 2
        assert f"process {first.pid} on" in capsys.readouterr().err
    finally:
        first.kill()
        first.communicate()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train/loop.py", []),
        ("train/start.py", ["jax.device_get"]),  # the untrained encoder, before the first step
        ("step.py", ["np.asarray"]),  # the key of the seed, once at the start
        ("methods/simclr.py", []),
    ],
)
def test_hot_path_copies_to_the_host_only_through_the_counted_fetch(name, expected):
    """A stray float(metric) would stall every step."""
    tree = ast.parse((ROOT / "ssl_jax" / name).read_text())
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    stalls = {"float", "int", "np.asarray", "np.array", "jax.device_get"}
    assert [c for c in calls if c in stalls or c.endswith((".item", ".tolist"))] == expected


def test_batchnorm_group_is_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "evaluate", lambda *args: None)
    monkeypatch.setattr("ssl_jax.evals.evaluator.Evaluator.finish", lambda *a: [])
    config = with_whole_images(tiny_config(steps=1, batch_size=320, microbatch=160))
    config.model.bn_group_size = 1
    pretrain(config, tmp_path)
    out = capsys.readouterr().out
    assert "in microbatches of 160, BatchNorm over 20 images" in out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.num_classes": 3}, "config.data.num_classes is 3, but .* are of 10 classes"),
        ({"microbatch": 8, "model.bn_group_size": 1}, "BatchNorm would see one image at a time"),
    ],
)
def test_config_that_does_not_fit_data_or_devices_is_refused(changes, words, tmp_path):
    config = tiny_config()
    for key, value in changes.items():
        group, _, name = key.rpartition(".")
        (config[group] if group else config)[name] = value
    with pytest.raises(UserError, match=words):
        pretrain(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("halved", [False, True])
def test_out_of_memory_in_the_step_suggests_options(tmp_path, monkeypatch, halved):
    """By injection: a CPU has no memory of its own to fill."""
    numbers = "bfloat16" if halved else "float32"
    config = with_whole_images(tiny_config(batch_size=64, remat=halved, dtype=numbers))

    def full(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory, 9 bytes.\n  at")

    class Full(setup.Program):
        def __init__(self, *args):
            super().__init__(*args)
            self.step = full

    monkeypatch.setattr(setup, "Program", Full)
    with pytest.raises(UserError) as caught:
        pretrain(config, tmp_path)
    message = str(caught.value)
    assert "Out of memory, 9 bytes.). Try --config.microbatch=32" in message
    assert ("remat" in message) == ("bfloat16" in message) == (not halved)
    assert "`ssl-jax plan`" in message and "\n" not in message


@pytest.mark.long
def test_out_of_memory_in_an_evaluation_suggests_its_batch_size(tmp_path, monkeypatch):
    """By injection; the trained run is saved, and is evaluated again with the suggestion."""
    share_steps(monkeypatch)
    config = with_whole_images(tiny_config(batch_size=64, steps=2))
    config.eval.batch_size, config.checkpoint.every_epochs = 64, 1.0

    def full(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory, 9 bytes.\n  at")

    with monkeypatch.context() as patched:
        patched.setattr(eval_run, "extract_features", full)
        with pytest.raises(UserError) as caught:
            pretrain(config, tmp_path)
    assert "A batch of the evaluation doesn't fit" in str(caught.value)
    assert "9 bytes.). Try --config.eval.batch_size=32." in str(caught.value)
    assert int(restore_state(tmp_path).step) == 2
    assert not any("rankme" in r for r in read_metrics(tmp_path / "metrics.jsonl"))
    config.eval.batch_size = 32
    assert int(pretrain(config, tmp_path).step) == 2
    measured = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "rankme" in r]
    assert [record["step"] for record in measured] == [2]


@pytest.mark.long
def test_failed_final_evaluation_leaves_a_run_that_is_reported_and_evaluated_again(
    finished, tmp_path, monkeypatch, capsys
):
    config, done, *_ = finished
    workdir = Path(shutil.copytree(done, tmp_path / "run"))
    (workdir / "evaluation.json").write_text("")
    monkeypatch.setattr(loop, "write_images", lambda *args: 1 / 0)
    monkeypatch.setattr(eval_run.Evaluator, "_row", lambda self, name, *args: rows[name])
    rows = {row.name: row for row in read_evaluation(done / "evaluation.json").rows}
    with pytest.raises(ZeroDivisionError):
        pretrain(config, workdir)
    assert "trained and its checkpoint saved, but its evaluation failed" in capsys.readouterr().out
    assert write_report(workdir).exists() and ssl_jax.load(workdir).step == 4
    (workdir / "evaluation.json").write_text("{")
    monkeypatch.setattr(loop, "write_images", lambda *args: None)
    pretrain(config, workdir)
    assert (workdir / "evaluation.json").read_text() == (done / "evaluation.json").read_text()


@pytest.mark.long
def test_collapse_detector_remembers_the_spread_of_embeddings_after_a_resume(tmp_path):
    config = with_whole_images(tiny_config(batch_size=64, steps=4))
    config.checkpoint.every_epochs = 0.05
    pretrain(config, tmp_path)
    seen = [r["embedding_std"] for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]
    run, _ = start.start_run(setup.Setup(config), tmp_path, Progress())
    with run.closing():
        halved = {"embedding_std": max(seen) * 0.49}
        warnings = run.detector.check(5, halved) + run.detector.check(6, halved)
    assert len(warnings) == 1 and "has halved" in warnings[0]
