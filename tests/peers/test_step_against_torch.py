"""The train step benchmark against torch, at toy size."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed here: make peers")

ROOT = Path(__file__).parents[2]


def test_benchmark_reports_torch():
    command = [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), "--batches=4"]
    command += [f"--config={ROOT / 'configs' / 'simclr_cifar10.py'}", "--peers=torch"]
    command += ["--no-compile", "--rounds=1", "--seconds=0.1", "--config.simclr.layers=2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "| torch, no augmentation | 4 |" in done.stdout
