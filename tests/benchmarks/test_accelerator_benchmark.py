"""The agenda of an accelerator at toy size: it resumes, and its table is written."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_jax.data.packed import pack

ROOT = Path(__file__).parents[2]


def run(*arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / "accelerator.py"), "--toy", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def noise(folder):
    """Sixteen images of two classes, of CIFAR's size."""
    rng = np.random.default_rng(0)
    for i in range(16):
        (folder / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i % 2}" / f"{i}.png")


def test_steps_run_once_and_fill_the_table(tmp_path):
    out = f"--out={tmp_path}"
    done = run(out, "--only=cached,loss")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["cached: done", "loss: done"]
    results = (tmp_path / "results.md").read_text()
    for expected in ("## cached", "| ours | 4 |", "## loss", "dense JAX"):
        assert expected in results
    assert "cached: done before" in run(out, "--only=cached").stdout
    assert "The time is over" in run(out, "--only=sweep", "--minutes=0.1").stdout


def test_cifar_runs_are_trained_and_told(tmp_path):
    packed = []
    for split in ("train", "test"):
        noise(tmp_path / split)
        packed.append(tmp_path / f"{split}.npz")
        pack(tmp_path / split, packed[-1])
    files = (f"--train={packed[0]}", f"--test={packed[1]}")
    done = run(f"--out={tmp_path / 'out'}", *files, "--only=cifar_simclr")
    assert "cifar_simclr: done" in done.stdout, (tmp_path / "out" / "cifar_simclr.log").read_text()
    results = (tmp_path / "out" / "results.md").read_text()
    assert "| simclr | " in results and "CIFAR-10" in results
