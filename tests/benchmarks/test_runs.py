"""The runs that benchmarks start: how they end."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_jax.evals.results import LAST_FILE

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def runs():
    return importlib.import_module("runs")


def test_failed_and_stopped_runs_end_the_benchmark(runs, tmp_path, monkeypatch):
    """A stopped run ends with code 0, like a finished one, but without its last file."""
    program = tmp_path / "program.py"
    monkeypatch.setattr(runs, "PROGRAM", program)
    program.write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match="exit code 3"):
        runs.pretrain(tmp_path, [])
    program.write_text("")
    with pytest.raises(SystemExit, match=f"The run in {tmp_path} was stopped"):
        runs.pretrain(tmp_path, [])
    last = f"open(os.path.join(os.environ['FOLDER'], '{LAST_FILE}'), 'w')"
    program.write_text(f"import os, sys; assert '--x=1' in sys.argv; {last}")
    before = signal.getsignal(signal.SIGTERM)
    runs.pretrain(tmp_path, ["--x=1"], {"FOLDER": str(tmp_path)})
    assert signal.getsignal(signal.SIGTERM) == before and "FOLDER" not in os.environ


def test_sigterm_ends_the_command_too():
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import runs, sys; runs.execute([sys.executable, '-c', {child!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", parent], cwd=BENCHMARKS, stdout=subprocess.PIPE, text=True
    ) as process:
        pid = int(process.stdout.readline())
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
