import re
import subprocess
import sys
from pathlib import Path

import pytest
from images import fill

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_memory_of_each_process_is_measured(tmp_path):
    images = fill(tmp_path / "images")
    command = [sys.executable, str(ROOT / "benchmarks/processes.py"), f"--images={images}"]
    command += ["--counts=2", "--batch=8", "--size=32", "--steps=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    row = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"\| 2 \| 4 \| \d[\d,]*, \d[\d,]* \|", row), done.stdout
