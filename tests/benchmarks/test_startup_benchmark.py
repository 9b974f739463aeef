"""The benchmark of the start-up at toy size."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = ("--config.model.depth=18", "--config.model.width=0.0625")


@pytest.mark.long
def test_seconds_until_the_first_line_and_step_and_the_slowest_imports():
    command = [sys.executable, str(ROOT / "benchmarks/startup.py"), "--rounds=1", "--batch=8"]
    command += ["--size=8", *TINY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "| seconds (median) | first line | first step |"
    for line, name in zip(
        lines[2:4], ("digits, ResNet-18", "ImageNet, ResNet-50, 8×8"), strict=True
    ):
        _, found, first_line, first_step, _ = line.split("|")
        assert found.strip() == name and 0 < float(first_line) < float(first_step)
    assert len(re.findall(r"^Imports of .*: [\d,]+ modules, \d+\.\d\d s$", done.stdout, re.M)) == 2
    assert len(re.findall(r"^\| ssl_jax \| \d\.\d{3} \|$", done.stdout, re.M)) == 2
