import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ssl_jax.cli import main as cli
from ssl_jax.cli import sweep
from ssl_jax.config import load_config
from ssl_jax.errors import UserError
from ssl_jax.evals.results import LAST_FILE
from ssl_jax.run.folder import write_config

ROOT = Path(__file__).parents[2]
CONFIG = f"--config={ROOT / 'configs' / 'simclr_digits.py'}"
GRID = ("--grid=optim.lr=0.1,0.3", "--grid=seed=0,1")
NAMES = ["lr_0.1_seed_0", "lr_0.1_seed_1", "lr_0.3_seed_0", "lr_0.3_seed_1"]


def run(capsys, *arguments):
    code = cli.main(["sweep", CONFIG, *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.fixture
def runs(monkeypatch):
    """Replaces the runs: each writes a finished folder, unless its name is in `codes`."""
    started, codes = [], {}

    def wait(command, stop, log):
        arguments = command[command.index("pretrain") + 1 :]
        (workdir,) = (Path(a.partition("=")[2]) for a in arguments if a.startswith("--workdir="))
        overrides = [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]
        config = load_config(CONFIG.partition("=")[2], overrides)
        config.data.num_classes = 10  # filled in
        config.supervised.sigmoid = True  # the same
        started.append(workdir.name)
        if codes.get(workdir.name) is None:
            workdir.mkdir(parents=True, exist_ok=True)
            write_config(workdir, config, "")
            (workdir / LAST_FILE).write_text("")
        return codes.get(workdir.name) or 0

    monkeypatch.setattr(sweep, "_wait", wait)
    monkeypatch.setattr(sweep, "write_comparison", lambda found, out: f"{out} of {len(found)}")
    return started, codes


def test_sweep_runs_every_combination_and_skips_finished_ones_the_next_time(capsys, tmp_path, runs):
    started, codes = runs
    code, out, _ = run(capsys, f"--workdir={tmp_path}", *GRID)
    assert code == 0 and started == NAMES
    assert "run 2 of 4, lr_0.1_seed_1\n" in out
    assert f"Comparison: {tmp_path / 'comparison.html'} of 4\n" in out
    (tmp_path / NAMES[2] / LAST_FILE).unlink()
    started.clear()
    code, out, _ = run(capsys, f"--workdir={tmp_path}", *GRID)
    assert code == 0 and started == [NAMES[2]] and out.count(": has finished\n") == 3
    started.clear()  # other settings: the runs themselves refuse them
    codes |= dict.fromkeys(NAMES, 2)
    assert run(capsys, f"--workdir={tmp_path}", *GRID, "--config.batch_size=64")[0] == 2
    assert started == NAMES


def test_failed_run_is_reported_and_the_others_run(capsys, tmp_path, runs):
    started, codes = runs
    codes[NAMES[1]] = 2
    code, out, err = run(capsys, f"--workdir={tmp_path}", *GRID)
    assert code == 2 and started == NAMES
    assert f"{NAMES[1]} failed: exit code 2." in out and "comparison.html of 3\n" in out
    log = tmp_path / f"{NAMES[1]}.log"
    assert f"1 of 4 runs failed: {NAMES[1]} (exit code 2, see {log}). Correct" in err


@pytest.mark.parametrize("error", [UserError("It is full."), RuntimeError("It is broken.")])
def test_failed_runs_are_named_last_though_the_comparison_fails(
    capsys, tmp_path, runs, monkeypatch, error
):
    def write(found, out):
        raise error

    monkeypatch.setattr(sweep, "write_comparison", write)
    runs[1].update({NAMES[0]: -signal.SIGKILL, NAMES[2]: 1})
    code, _, err = run(capsys, f"--workdir={tmp_path}", *GRID)
    first, last = err.splitlines()[-2:]
    assert code == 2 and first == f"error: {error}"
    assert f"{NAMES[0]} (killed by SIGKILL, often for lack of memory, see {tmp_path}" in last
    assert f"{NAMES[2]} (exit code 1, see {tmp_path / NAMES[2]}.log)" in last


def test_failed_runs_are_named_when_a_later_one_is_stopped_or_interrupted(
    capsys, tmp_path, runs, monkeypatch
):
    runs[1].update({NAMES[0]: 2, NAMES[1]: 0})
    code, out, err = run(capsys, f"--workdir={tmp_path}", *GRID)
    assert code == 2 and f"Stopped at {NAMES[1]}." in out and f"failed: {NAMES[0]} (" in err
    wait = sweep._wait

    def interrupted(command, stop, log):
        if log.stem == NAMES[2]:
            raise KeyboardInterrupt
        return wait(command, stop, log)

    runs[1].pop(NAMES[1])
    monkeypatch.setattr(sweep, "_wait", interrupted)
    code, out, err = run(capsys, f"--workdir={tmp_path}", *GRID)
    assert code == 130 and f"failed: {NAMES[0]} (" in err and "same command to resume" in err
    monkeypatch.setattr(sweep, "_wait", wait)
    runs[1].clear()
    runs[0].clear()
    code, out, _ = run(capsys, f"--workdir={tmp_path}", *GRID)
    assert code == 0 and runs[0] == [NAMES[0], NAMES[2], NAMES[3]]
    assert out.count(": has finished") == 1


def test_data_of_every_setting_and_the_workdir_are_checked_before_anything_runs(
    capsys, tmp_path, runs
):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    file = tmp_path / "file"
    file.write_text("")
    data = f"--grid=data.dir={tmp_path / 'images'},{tmp_path / 'imagse'}"
    for arguments, words in (
        ([f"--workdir={tmp_path / 'new'}", "--config.data.name=folder", data], "imagse, which doe"),
        ([f"--workdir={file}", *GRID], "is a file. Choose another --workdir"),
        # With the runs' names it is longer than 4,095 bytes.
        ([f"--workdir={('/' + 'x' * 200) * 20}/{'x' * 65}", *GRID], "File name too long"),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 2 and words in err and runs[0] == []
    assert not (tmp_path / "new").exists()


def test_sweep_ends_with_a_run_that_was_stopped(capsys, tmp_path, runs):
    started, codes = runs
    codes[NAMES[1]] = 0  # it ends well but hasn't finished
    code, out, _ = run(capsys, f"--workdir={tmp_path}", *GRID)
    assert code == 0 and started == NAMES[:2]
    assert out.endswith(f"Stopped at {NAMES[1]}. Rerun the same command to resume.\n")


def test_commands_are_printed_one_per_line_and_are_those_of_pretrain(capsys, tmp_path, runs):
    extra = ("--config.data.dir=/a b", "--print")
    code, out, _ = run(capsys, f"--workdir={tmp_path / 'new'}", *GRID, *extra)
    assert code == 0 and runs[0] == [] and not (tmp_path / "new").exists()
    lines = [shlex.split(line) for line in out.splitlines()]
    assert [Path(line[3].partition("=")[2]).name for line in lines] == NAMES
    for line in lines:
        assert line[:3] == ["ssl-jax", "pretrain", CONFIG]
        overrides, rest = cli._split_overrides(line[1:])
        assert "data.dir=/a b" in overrides and cli._parser().parse_args(rest).workdir


@pytest.mark.parametrize("value", ["/a b", "it's", '"', "$(touch x)`y`", "a;b&&c|d>e", "*?[é]!#~"])
def test_printed_commands_are_safe_for_a_shell(capsys, tmp_path, runs, value):
    workdir = tmp_path / value.replace("/", "_")
    extra = (f"--config.data.dir={value}", f"--grid=wandb={value},plain", "--print")
    code, out, _ = run(capsys, f"--workdir={workdir}", *extra)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 2
    for line, wandb in zip(lines, (value, "plain"), strict=True):
        subprocess.run(["bash", "-n", "-c", line], check=True)
        # As a Slurm script of docs/sweeps.md does it.
        script = 'ssl-jax() { printf \'%s\\0\' "$@"; }; eval "$1"'
        done = subprocess.run(["bash", "-c", script, "-", line], capture_output=True, cwd=tmp_path)
        words = done.stdout.decode().split("\0")[:-1]
        assert words == shlex.split(line)[1:] and not done.stderr
        assert {f"--config.data.dir={value}", f"--config.wandb={wandb}"} <= set(words)
        assert any(word.startswith(f"--workdir={workdir}/wandb_") for word in words)
    assert list(tmp_path.iterdir()) == []


def test_value_with_a_line_break_is_not_printed(capsys, tmp_path, runs):
    code, out, err = run(capsys, f"--workdir={tmp_path}", "--grid=wandb=a\nb,c", "--print")
    assert code == 2 and "has a line break, but --print" in err and out == ""


def test_log_keeps_the_errors_of_a_failed_command_only(capfd, tmp_path):
    log = tmp_path / "new" / "a.log"
    for end in (3, 4, 0):
        child = f"import sys; sys.stderr.buffer.write(b'bad \\xff {end}\\n'); sys.exit({end})"
        assert sweep._wait([sys.executable, "-S", "-c", child], [], log) == end
        assert f" {end}\n" in capfd.readouterr().err
        assert not end or log.read_bytes() == b"bad \xff %d\n" % end
    assert not log.exists()


def test_warnings_of_a_command_are_printed_while_it_runs(monkeypatch, tmp_path):
    """The command ends once its warning, whose é it writes in two parts, has been printed."""
    seen = tmp_path / "seen"
    child = (
        "import os, sys, time\n"
        "os.write(2, b'caf\\xc3'); time.sleep(0.1); os.write(2, b'\\xa9\\n')\n"
        "end = time.monotonic() + 20\n"
        "while time.monotonic() < end and not os.path.exists(sys.argv[1]): time.sleep(0.02)\n"
        "sys.exit(not os.path.exists(sys.argv[1]))\n"
    )

    class Stderr(io.StringIO):
        def flush(self):
            if "\n" in self.getvalue():
                seen.touch()

    monkeypatch.setattr(sweep, "_PRINT_S", 0.02)
    monkeypatch.setattr(sys, "stderr", Stderr())
    assert sweep._wait([sys.executable, "-S", "-c", child, str(seen)], [], tmp_path / "log") == 0
    assert sys.stderr.getvalue() == "café\n"


def test_wait_passes_an_interrupt_on_that_only_the_sweep_has_received(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "_INTERRUPTED_S", 0.1)
    script = tmp_path / "child.py"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "def stop(*_): pathlib.Path(sys.argv[1]).touch(); sys.exit()\n"
        "signal.signal(15, stop)\n"
        "import os; os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-S", str(script), str(tmp_path / "stopped")]
    # As in a program of its own, whatever ran in this process before.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            sweep._wait(command, [], tmp_path / "log")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "stopped").exists()


def test_wait_passes_sigterm_on_and_returns_the_exit_code(tmp_path):
    child = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); time.sleep(60)"
    asked: list[int] = []
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    before = signal.getsignal(signal.SIGTERM)
    code = sweep._wait([sys.executable, "-S", "-c", child], asked, tmp_path / "log")
    timer.join()
    assert code in (7, -signal.SIGTERM) and asked == [signal.SIGTERM]  # before the child is ready
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.long
def test_sweep_trains_and_compares_runs_in_processes_of_their_own(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from tiny import tiny_config, with_whole_images\n"
        "def get_config(): return with_whole_images(tiny_config(steps=2, batch_size=64))\n"
    )
    line = ["sweep", f"--config={config}", f"--workdir={tmp_path / 'runs'}"]
    line += ["--grid=optim.lr=0.1,0.3", "--grid=microbatch=0,63"]  # not a divisor of 64
    command = [sys.executable, "-m", "ssl_jax.cli", *line]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2 and "microbatch is 63" in refused.stderr
    assert not (tmp_path / "runs").exists()
    command[-1] = "--grid=batch_size=64,60"  # which eight devices can't share
    for finished in (0, 2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 2 and "config.batch_size is 60" in done.stderr
        names = [f"lr_{lr}_batch_size_60" for lr in (0.1, 0.3)]
        shown = "; ".join(
            f"{name} (exit code 2, see {tmp_path / 'runs' / name}.log)" for name in names
        )
        assert f"2 of 4 runs failed: {shown}" in done.stderr
        assert done.stdout.count(": has finished") == finished
        assert "Comparison: " in done.stdout
    assert "optim.lr" in (tmp_path / "runs" / "comparison.html").read_text()
    records = [json.loads(f.read_text()) for f in (tmp_path / "runs").glob("*/config.json")]
    assert sorted(record["config"]["optim"]["lr"] for record in records) == [0.1, 0.3]
    assert all(shlex.split(record["command"])[:2] == ["ssl-jax", "pretrain"] for record in records)
