"""The benchmark of the losses runs at toy size and prints its table."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "loss.py"


def run(*arguments):
    command = [sys.executable, str(BENCHMARK), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARK.parents[1])


def test_it_prints_a_row_for_each_implementation(tmp_path):
    file = tmp_path / "rows.json"
    toy = ("--sizes=8,16", "--large=32", "--info-nce=4x16", "--sinkhorn=16x5")
    toy += ("--statistics=8x16", "--rounds=1")
    done = run(*toy, f"--json={file}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert lines[0] == "| loss | size | implementation | seconds | time / ssl_jax | MiB |"
    assert len(lines) == 2 + 2 * 3 + 1 + 2 + 2 + 2 * 3
    rows = json.loads(file.read_text())
    assert [(row["size"], row["implementation"]) for row in rows[:3]] == [
        ("8", "ssl_jax"),
        ("8", "dense JAX"),
        ("8", "optax"),
    ]
    assert [row["loss"] for row in rows[-6:]] == ["Barlow Twins"] * 3 + ["VICReg"] * 3
    assert all(row["seconds"] > 0 for row in rows)


def test_a_peer_needs_an_interpreter():
    done = run("--peer=lightly")
    assert done.returncode == 2
    assert "--peer-python" in done.stderr
