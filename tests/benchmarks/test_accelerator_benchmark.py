"""The accelerator benchmarks at toy size: resuming, and the table of results."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_jax.data.packed import pack

ROOT = Path(__file__).parents[2]


# Loads the config of the same file name in configs/, and changes it to compile fast.
CONFIG = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
from tiny import with_whole_images
from ssl_jax.config import load_config

def get_config(variant=""):
    file = "{ROOT}/configs/" + Path(__file__).name
    config = with_whole_images(load_config(f"{{file}}:{{variant}}" if variant else file))
    config.dtype = "float32"
    return config
"""


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """The module; its subprocesses train the smallest network."""
    module = importlib.import_module("accelerator")
    configs = tmp_path / "configs"
    configs.mkdir()
    for config in module.CONFIGS.glob("*_*.py"):
        (configs / config.name).write_text(CONFIG)
    monkeypatch.setattr(module, "CONFIGS", configs)
    small = tuple(word.replace("depth=18", "depth=4") for word in module.SMALL)
    monkeypatch.setattr(module, "SMALL", small)
    return module


@pytest.fixture
def run(benchmark, capsys):
    def run(*arguments):
        """Returns the exit code, stdout and stderr."""
        capsys.readouterr()
        try:
            benchmark.main(["--toy", *arguments])
        except SystemExit as ended:
            return ended.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


def noise(folder):
    rng = np.random.default_rng(0)
    for i in range(16):
        (folder / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i % 2}" / f"{i}.png")


def test_invalid_arguments_are_rejected(run, tmp_path):
    out = f"--out={tmp_path}"
    for wrong, expected in {
        "--only=cifar_simclr": "--train is required",
        "--only=stepp": "--only=stepp is not a step",
        "--train=nowhere.npz": "--train=nowhere.npz is not a file",
    }.items():
        code, _, err = run(out, wrong)
        assert code == 2 and expected in err


def test_run_stopped_before_its_first_record_has_a_row(benchmark, tmp_path):
    for method, steps in (("moco", 0), ("simclr", 97 * 20)):
        workdir = tmp_path / f"cifar_{method}"
        workdir.mkdir()
        (workdir / "config.json").write_text(json.dumps({"config": {"batch_size": 512}}))
        record = {"step": steps, "knn": 0.636, "images_per_s": 49_664.0}
        (workdir / "metrics.jsonl").write_text(json.dumps(record) * (steps > 0))
    benchmark.write_results(tmp_path)
    results = (tmp_path / "results.md").read_text()
    assert "| moco | 0 |" in results and "| simclr | 20 | 63.6 |  | 0.3 |" in results


def test_cifar10_is_skipped_without_its_files(benchmark, run, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "measure", lambda *_: "already done")
    code, printed, _ = run(f"--out={tmp_path}")
    assert code == 0 and "cifar_byol: skipped: requires --train and --test" in printed


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Arguments for 16 training and 16 test images of CIFAR's size, in two classes."""
    root = tmp_path_factory.mktemp("packed")
    for split in ("train", "test"):
        noise(root / split)
        pack(root / split, root / f"{split}.npz")
    return f"--train={root}/train.npz", f"--test={root}/test.npz"


@pytest.mark.long
def test_cifar10_run_stops_when_the_time_is_up_and_resumes(
    benchmark, run, packed, tmp_path, monkeypatch
):
    workdir = tmp_path / "out" / "cifar_simclr"
    monkeypatch.setattr(benchmark, "SHORT", (*benchmark.SHORT, "--config.epochs=400"))
    benchmark.SHORT += ("--config.log_every=1", "--config.eval.knn_every_epochs=400")

    class Popen(subprocess.Popen):
        """A program whose time is up once the run has a record."""

        def wait(self, timeout=None):
            metrics = workdir / "metrics.jsonl"
            while timeout != benchmark.SAVING_S and self.poll() is None:
                if metrics.exists() and metrics.read_text().count("\n") > 2:
                    raise subprocess.TimeoutExpired("run_pretrain.py", timeout)
                time.sleep(0.01)
            return super().wait(timeout)

    words = (f"--out={tmp_path / 'out'}", *packed, "--only=cifar_simclr", "--budget-minutes=9")
    with monkeypatch.context() as patched:
        patched.setattr(benchmark.subprocess, "Popen", Popen)
        code, printed, _ = run(*words)
    assert code == 3 and "cifar_simclr: stopped, resumes next time" in printed
    (checkpoint,) = (workdir / "checkpoints").glob("[0-9]*")
    code, printed, _ = run(*words)
    assert code == 0 and "cifar_simclr: done" in printed
    log = (tmp_path / "out" / "cifar_simclr.log").read_text()
    assert f"Resuming from step {checkpoint.name} of 400" in log


@pytest.mark.long
def test_all_steps_run_once_and_fill_the_table(run, packed, tmp_path):
    out = f"--out={tmp_path}"
    code, printed, _ = run(out, *packed, "--budget-minutes=30")
    assert code == 0, [file.read_text()[-2000:] for file in tmp_path.glob("*.log")]
    *steps, path = printed.splitlines()
    assert len(steps) == 16 and all(line.endswith(": done") for line in steps)
    assert path == f"{tmp_path}/results.md"
    results = Path(path).read_text()
    expected = ["## cached", "| ssl_jax | 4 |", "## loss", "dense JAX", "plain Flax", "CIFAR-10"]
    expected += ["| split | ms |", "| profile | ms |", "optimizer", "| simclr | ", "| swav | "]
    assert [text for text in expected if text not in results] == []
    command = [sys.executable, str(ROOT / "benchmarks" / "accelerator.py"), "--toy", out]
    done = subprocess.run([*command, "--only=cached"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "cached: already done" in done.stdout, done.stderr
    (tmp_path / "sweep.json").unlink()
    code, printed, _ = run(out, "--only=sweep", "--budget-minutes=0.1")
    assert code == 3 and "sweep: left for the next run" in printed
