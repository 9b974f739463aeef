"""Faults of real processes: kills, a full disk, corrupt files, a read-only folder."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from images import noise_files
from tiny import leaves, share_steps

from ssl_jax.cli.main import pretrain_main
from ssl_jax.data.records import convert
from ssl_jax.interop.load import restore_state
from ssl_jax.run.log import read_metrics

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
STEPS = 240  # enough for twenty kills, each after at most two checkpoints of five steps
CONFIG = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from tiny import tiny_config, without_color

def get_config(variant=""):
    config = without_color(tiny_config(batch_size=64, steps={STEPS}, log_every=20))
    config.checkpoint.every_epochs = 0.25
    return config
"""
# Withholds batches from the given one on until the file named by GO exists, so that a run can't end
# before a slow machine disturbs it.
GATE = """
import os, time
from pathlib import Path
from ssl_jax.data.{module} import {source} as Source

def gated(self, steps, plain=Source.batches):
    for number, batch in enumerate(plain(self, steps)):
        while number >= {batch} and not Path(os.environ["GO"]).exists():
            time.sleep(0.01)
        yield batch

Source.batches = gated
"""
# At the place named by HELD_AT the process creates the file HELD and sleeps.
HOLD = """
from ssl_jax.run import checkpoint

def held(plain, here):
    def instead(*args):
        if here(*args):
            Path(os.environ["HELD"]).touch()
            time.sleep(3600)
        return plain(*args)
    return instead

if os.environ["HELD_AT"] == "its end":
    os.rename = held(os.rename, lambda name, final: Path(final).parent.name == "checkpoints")
if os.environ["HELD_AT"] == "its checksums":
    checkpoint._checksums = held(checkpoint._checksums, lambda folder: True)
"""
AHEAD = 11  # batches before the gate, with two checkpoints
MINUTES = 10  # for a busy machine to start a run and compile its step


def config_file(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("config") / "config.py"
    file.write_text(text)
    return file


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return config_file(tmp_path_factory, CONFIG)


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """The same config; its run waits after `AHEAD` batches."""
    gate = GATE.format(module="arrays", source="ArraySource", batch=AHEAD)
    return config_file(tmp_path_factory, CONFIG + gate)


@pytest.fixture(scope="module")
def holding(tmp_path_factory):
    """Like `gated`; the run may also be held while it writes a checkpoint."""
    gate = GATE.format(module="arrays", source="ArraySource", batch=AHEAD)
    return config_file(tmp_path_factory, CONFIG + gate + HOLD)


def arguments(config, workdir, *flags):
    return [f"--config={config}", f"--workdir={workdir}", *flags]


def command(config, workdir, *flags):
    return [sys.executable, str(ROOT / "run_pretrain.py"), *arguments(config, workdir, *flags)]


def run(config, workdir, **options):
    return subprocess.run(
        command(config, workdir),
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
        **options,
    )


@pytest.fixture
def run_here(capsys, monkeypatch):
    """Runs the same command in the tests' process to its end; returns its output."""
    share_steps(monkeypatch)

    def run_to_its_end(config, workdir, *flags):
        capsys.readouterr()
        code = pretrain_main(arguments(config, workdir, *flags))
        out, error = capsys.readouterr()
        assert code == 0, error
        return out

    return run_to_its_end


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        share_steps(patch)
        assert pretrain_main(arguments(config, workdir)) == 0
    return workdir


@pytest.fixture(scope="module")
def undisturbed(whole):
    """The leaves of its final state."""
    return leaves(restore_state(whole))


def assert_same(workdir, undisturbed):
    state = leaves(restore_state(workdir))
    assert state.keys() == undisturbed.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(value, undisturbed[name], err_msg=name)


def steps_in(workdir):
    return sorted(int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit())


def wait_until(reached, process, output):
    """Polls; fails with the run's output if it ends early or takes too long.

    Args:
      reached: returns whether to stop waiting.
      process: of the run.
      output: returns its output so far.
    """
    deadline = time.monotonic() + 60 * MINUTES
    while not reached():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"not reached, exit code {process.poll()}: {output()}")
        time.sleep(0.005)


def test_resume_is_bit_exact_after_twenty_sigkills(
    config, holding, undisturbed, run_here, tmp_path
):
    """Of five kills two come after a checkpoint, one in its rename, its checksums, anywhere."""
    workdir, out, rng = tmp_path / "run", tmp_path / "out", random.Random(0)
    steps, took = [0], 0.0
    for kill in range(20):
        held = tmp_path / f"held{kill}"
        at = {2: "its end", 3: "its checksums"}.get(kill % 5, "")
        environment = os.environ | {"GO": str(tmp_path / "never"), "HELD": str(held), "HELD_AT": at}
        with out.open("w") as file:
            began = time.monotonic()
            process = subprocess.Popen(
                command(holding, workdir), stdout=file, stderr=file, env=environment
            )
            if kill % 5 == 4:  # at any point: start, compilation, first steps, writing
                time.sleep(rng.uniform(0, took))
            elif at:
                wait_until(held.exists, process, out.read_text)
            else:  # after a new checkpoint, for progress; perhaps while writing the next
                before = steps[-1]
                wait_until(
                    lambda before=before: max(steps_in(workdir), default=0) > before,
                    process,
                    out.read_text,
                )
                took = time.monotonic() - began
                time.sleep(rng.uniform(0, 0.05))
            assert process.poll() is None, out.read_text()
            process.kill()
            process.wait()
        steps.append(max(steps_in(workdir)))
        if at == "its end":
            assert any(not p.name.isdigit() for p in workdir.glob("checkpoints/*"))
        if at == "its checksums":
            assert not (workdir / "checkpoints" / str(steps[-1]) / "checksums.json").exists()
    assert steps == sorted(steps) and steps[-1] < STEPS
    run_here(config, workdir)
    assert_same(workdir, undisturbed)
    logged = [r["step"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r]
    assert logged == list(range(20, STEPS + 1, 20))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_resume_is_bit_exact_after_sigterm_and_sigint(
    config, gated, undisturbed, run_here, tmp_path, number
):
    workdir, out, go = tmp_path / "run", tmp_path / "out", tmp_path / "go"
    with out.open("w") as file:
        # Background jobs ignore SIGINT by default.
        line = ["env", "--default-signal=INT", *command(gated, workdir)]
        environment = os.environ | {"GO": str(go)}
        process = subprocess.Popen(line, stdout=file, stderr=file, env=environment)
        wait_until(lambda: steps_in(workdir), process, out.read_text)
        process.send_signal(number)
        go.touch()
        expected = 0 if number == signal.SIGTERM else 130
        assert process.wait(60 * MINUTES) == expected, out.read_text()
    assert "the same command" in out.read_text()  # resumes the run
    assert "Resuming from step" in run_here(config, workdir)
    assert_same(workdir, undisturbed)


@pytest.mark.parametrize("how", ["a flipped bit", "cut short", "halved, without checksums"])
def test_resume_skips_a_corrupt_newest_checkpoint(
    config, whole, undisturbed, run_here, tmp_path, how
):
    workdir = Path(shutil.copytree(whole, tmp_path / "run"))
    steps = steps_in(workdir)
    newest = workdir / "checkpoints" / str(steps[-1])
    files = [f for f in newest.rglob("*") if f.is_file() and f.name != "checksums.json"]
    file = max(files, key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    cut = {"a flipped bit": len(data), "cut short": -9}.get(how, len(data) // 2)
    file.write_bytes(data[:cut])
    if how == "halved, without checksums":
        (newest / "checksums.json").unlink()
    out = run_here(config, workdir)
    assert f"warning: the checkpoint of step {steps[-1]} is corrupt" in out
    assert f"Resuming from step {steps[-2]} of {STEPS}" in out
    assert (workdir / "corrupt" / str(steps[-1])).is_dir()
    assert_same(workdir, undisturbed)


def in_own_mounts(script):
    """Runs a script that may mount file systems; skips where the system forbids it."""
    inside = ["unshare", "--map-root-user", "--mount"]
    probe = "mount -t tmpfs tmpfs /mnt"
    if (
        shutil.which("unshare") is None
        or subprocess.run([*inside, "sh", "-c", probe], capture_output=True).returncode
    ):
        pytest.skip("this system does not allow users to mount file systems")
    return subprocess.run([*inside, "sh", "-c", script], capture_output=True, text=True)


@pytest.mark.parametrize("kilobytes", [300, 420, 560, 700])
def test_full_disk_is_one_error_line_and_resume_is_bit_exact(
    config, undisturbed, run_here, tmp_path, kilobytes
):
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    go = " ".join(command(config, disk / "run"))
    script = f"""
    mount -t tmpfs -o size={kilobytes}k tmpfs {disk}
    {go} > {tmp_path}/out 2> {tmp_path}/err; echo $? > {tmp_path}/code
    cp -r {disk}/run {kept}
    """
    in_own_mounts(script)
    error = (tmp_path / "err").read_text()
    assert (tmp_path / "code").read_text() == "2\n", error
    # Threads of libraries may add lines of their own.
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert "(No space left on device)" in line and "rerun the same command to resume" in line
    steps = steps_in(kept)
    out = run_here(config, kept)  # on a disk with space
    if steps:
        assert f"Resuming from step {max(steps)} of" in out
    assert_same(kept, undisturbed)


def test_read_only_folder_is_one_error_line(config, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    go = " ".join(command(config, disk / "run"))
    script = f"""
    mount -t tmpfs tmpfs {disk}
    mount -o remount,ro {disk}
    {go} > {tmp_path}/out 2> {tmp_path}/err; echo $? > {tmp_path}/code
    """
    in_own_mounts(script)
    error = (tmp_path / "err").read_text()
    assert (tmp_path / "code").read_text() == "2\n" and error.count("\n") == 1
    assert f"Cannot write {disk / 'run'} (Read-only file system). " in error
    assert "choose another --workdir" in error


def test_clock_that_runs_backward_changes_nothing(config, undisturbed, tmp_path):
    """Each call of time.time() returns a minute less than the last."""
    (tmp_path / "sitecustomize.py").write_text(
        "import itertools, time\n"
        "now, back = time.time(), itertools.count()\n"
        "time.time = lambda: now - 60 * next(back)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = run(config, tmp_path / "run", env=environment)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", undisturbed)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert min(r["images_per_s"] for r in records if "images_per_s" in r) > 0


# Faults of images and of the thread that reads them


IMAGE_STEPS = 60
IMAGES = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from tiny import tiny_config, without_color

def get_config(variant=""):
    config = without_color(tiny_config(batch_size=32, steps={IMAGE_STEPS}, log_every=10))
    config.data.name = "folder"
    config.checkpoint.every_epochs = 5.0
    return config
"""


@pytest.fixture(scope="module")
def image_runs(tmp_path_factory):
    """A folder with 64 images and two configs, and the final state of an undisturbed run.

    With `gated.py` a run waits after 30 steps for the file named by GO.
    """
    pytest.importorskip("tensorflow", reason="images on disk are read by TensorFlow")
    root = tmp_path_factory.mktemp("images")
    gate = GATE.format(module="host", source="HostSource", batch=30)
    (root / "config.py").write_text(IMAGES)
    (root / "gated.py").write_text(IMAGES + gate)
    (root / "images").mkdir()
    noise_files(root / "images")
    flag = f"--config.data.dir={root / 'images'}"
    with pytest.MonkeyPatch.context() as patch:
        share_steps(patch)
        assert pretrain_main(arguments(root / "config.py", root / "run", flag)) == 0
    return root, leaves(restore_state(root / "run"))


def disturbed(line, tmp_path, workdir, disturb):
    """Runs a command to step 20, then disturbs it; returns exit code, output and errors."""
    out, err, go = (tmp_path / name for name in ("out", "err", "go"))
    with out.open("w") as output, err.open("w") as error:
        environment = os.environ | {"GO": str(go)}
        process = subprocess.Popen(line, stdout=output, stderr=error, env=environment)
        log = workdir / "metrics.jsonl"
        wait_until(lambda: any(r["step"] >= 20 for r in read_metrics(log)), process, err.read_text)
        disturb()
        go.touch()
        code = process.wait(60 * MINUTES)
    return code, out.read_text(), err.read_text()


@pytest.mark.parametrize("how", ["missing", "cut short"])
def test_image_that_breaks_during_a_run_is_named_and_resume_is_bit_exact(
    image_runs, run_here, tmp_path, how
):
    root, undisturbed = image_runs
    folder, workdir = tmp_path / "images", tmp_path / "run"
    shutil.copytree(root / "images", folder)
    flag, image = f"--config.data.dir={folder}", folder / "1" / "7.jpg"
    good = image.read_bytes()
    line = command(root / "gated.py", workdir, flag)
    spoil = image.unlink if how == "missing" else lambda: image.write_bytes(good[:60])
    code, _, error = disturbed(line, tmp_path, workdir, spoil)
    assert code == 2, error
    # libjpeg adds messages of its own.
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert str(image) in line and "Traceback" not in error
    if how == "cut short":  # follow the message's other advice
        (advice,) = re.findall(r"add (--config\S+),", line)
        skipping = Path(shutil.copytree(workdir, tmp_path / "skipping"))
        out = run_here(root / "config.py", skipping, flag, advice)
        assert "data.on_bad_image: fatal -> skip" in out and "Resuming from step" in out
    image.write_bytes(good)
    assert "Resuming from step" in run_here(root / "config.py", workdir, flag)
    assert_same(workdir, undisturbed)


def test_images_that_break_during_a_run_may_be_replaced_and_are_counted(image_runs, tmp_path):
    root, _ = image_runs
    folder, workdir = tmp_path / "images", tmp_path / "run"
    shutil.copytree(root / "images", folder)
    flags = [f"--config.data.dir={folder}", "--config.data.on_bad_image=skip"]
    line = command(root / "gated.py", workdir, *flags)

    def spoil():
        (folder / "0" / "2.jpg").write_bytes(b"")
        (folder / "1" / "7.jpg").write_bytes(b"no picture")

    code, out, error = disturbed(line, tmp_path, workdir, spoil)
    assert code == 0, error
    assert "2 unreadable images were replaced" in out
    assert int(restore_state(workdir).step) == IMAGE_STEPS


# Records stop being read after some hundred; a late image is reported soon.
STALL = """
import time
from ssl_jax.data import reader, records

reader._SLOW_S, left, plain = 0.5, [300], records.ArrayRecords._one

def one(self, number):
    left[0] -= 1
    if left[0] < 0:
        time.sleep(3600)
    return plain(self, number)

records.ArrayRecords._one = one
"""


@pytest.fixture
def stalled(image_runs, tmp_path):
    """A folder of records, and the arguments of a run that stalls while reading it."""
    convert(str(image_runs[0] / "images"), str(tmp_path / "records"), 4)
    (tmp_path / "config.py").write_text(IMAGES + STALL)
    flags = ["--config.data.name=records", f"--config.data.dir={tmp_path / 'records'}"]
    flags += ["--config.data.timeout_s=10"]
    return tmp_path / "records", command(tmp_path / "config.py", tmp_path / "run", *flags)


def test_stalled_records_end_the_run_with_an_error(stalled):
    """Python would wait at its exit for the threads of an executor."""
    done = subprocess.run(stalled[1], capture_output=True, text=True, timeout=60 * MINUTES)
    assert done.returncode == 2, done.stderr
    assert "warning: no images for 0.5 s" in done.stderr
    assert "error: Data loader timed out: no batch for 10 s" in done.stderr


def test_sigterm_ends_a_run_that_stalls_at_its_start(stalled, tmp_path):
    folder, line = stalled
    (folder / "index.npz").unlink()
    os.mkfifo(folder / "index.npz")  # opening it waits for a writer
    err = tmp_path / "err"
    with err.open("w") as error:
        process = subprocess.Popen(line, stdout=error, stderr=error)
        wait_until(lambda: "no images for 0.5 s" in err.read_text(), process, err.read_text)
        process.terminate()
        assert process.wait(60 * MINUTES) == -signal.SIGTERM


def test_error_in_the_reading_thread_ends_the_run_and_resume_is_bit_exact(
    config, undisturbed, run_here, tmp_path
):
    """An unexpected error, outside the loop's thread."""
    broken = tmp_path / "broken.py"
    broken.write_text(
        CONFIG
        + """
from ssl_jax.data.arrays import ArraySource
before = ArraySource.batches

def batches(self, steps):
    for number, batch in enumerate(before(self, steps)):
        if number == 60:
            raise RuntimeError("an unexpected error")
        yield batch

ArraySource.batches = batches
"""
    )
    workdir = tmp_path / "run"
    done = run(broken, workdir)
    assert done.returncode not in (0, 2) and "an unexpected error" in done.stderr
    assert "Resuming from step" in run_here(config, workdir)
    assert_same(workdir, undisturbed)
