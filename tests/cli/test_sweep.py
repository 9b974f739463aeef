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

    def wait(command, stop):
        arguments = command[command.index("pretrain") + 1 :]
        (workdir,) = (Path(a.partition("=")[2]) for a in arguments if a.startswith("--workdir="))
        overrides = [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]
        config = load_config(CONFIG.partition("=")[2], overrides)
        config.data.num_classes = 10  # filled in
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
    assert f"{NAMES[1]} failed with exit code 2." in out and "comparison.html of 3\n" in out
    assert f"1 of 4 runs failed ({NAMES[1]}); their errors" in err


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


def test_wait_passes_sigterm_on_and_returns_the_exit_code():
    child = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); time.sleep(60)"
    asked: list[int] = []
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    before = signal.getsignal(signal.SIGTERM)
    code = sweep._wait([sys.executable, "-S", "-c", child], asked)
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
        assert "2 of 4 runs failed (lr_0.1_batch_size_60, lr_0.3_batch_size_60)" in done.stderr
        assert done.stdout.count(": has finished") == finished
        assert "Comparison: " in done.stdout
    assert "optim.lr" in (tmp_path / "runs" / "comparison.html").read_text()
    records = [json.loads(f.read_text()) for f in (tmp_path / "runs").glob("*/config.json")]
    assert sorted(record["config"]["optim"]["lr"] for record in records) == [0.1, 0.3]
    assert all(shlex.split(record["command"])[:2] == ["ssl-jax", "pretrain"] for record in records)
