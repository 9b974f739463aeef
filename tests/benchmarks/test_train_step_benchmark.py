"""The benchmark of the train step at toy size: every program that a GPU's hour would run."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny  # noqa: F401 - it knows ResNets of depth 4 and 6

from ssl_jax.config import Schedule, load_config
from ssl_jax.plan.flops import model_flops
from ssl_jax.spmd import make_spmd
from ssl_jax.step import Program

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmarks" / "train_step.py"
TINY = ("--rounds=1", "--seconds=0.01", "--config.model.depth=4", "--config.model.width=0.0625")
# Random numbers are most of the compilation.
PLAIN = ("jitter.prob=0", "blur.prob=0", "flip=0", "gray=0", "crop.sampler=none")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # main() adds to it
    module = importlib.import_module("train_step")
    monkeypatch.setattr(module, "PACKED", 64)
    return module


@pytest.mark.long
def test_a_row_for_each_step_and_where_the_time_goes(benchmark, tmp_path, capsys):
    benchmark.main(
        [
            *TINY,
            f"--config={ROOT / 'configs' / 'simclr_cifar10.py'}",
            *(f"--config.views.{view}.{key}" for view in ("view1", "view2") for key in PLAIN),
            "--config.dtype=float32",
            *("--batches=4", "--peers=bare", "--split", f"--profile={tmp_path / 'kernels.txt'}"),
            f"--json={tmp_path / 'rows.json'}",
        ]
    )
    out, err = capsys.readouterr()
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["step"] for row in rows] == ["ssl_jax", "ssl_jax, no augmentation"]
    assert all(row["images/s"] > 0 and row["GiB"] > 0 for row in rows)
    assert "| ssl_jax | 4 |" in out and "cpu, JAX" in out
    parts = {line.split()[0] for line in err.splitlines() if "%" in line}
    assert {"forward", "backward", "optimizer", "augment"} <= parts
    for part in ("augmentation", "forward ", "loss, both ways", "forward, loss, backward"):
        assert part in err
    kernels = (tmp_path / "kernels.txt").read_text()
    assert "transpose(jvp(forward))/ResNet/stage1_block1/conv1" in kernels
    assert (tmp_path / "kernels.hlo.gz").stat().st_size > 0
    # An unknown flag would end the process that the benchmark is otherwise.
    assert benchmark.NAMED_KERNELS in os.environ["XLA_FLAGS"]
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], check=True)


@pytest.mark.long
def test_other_methods_and_microbatches_run_alone(benchmark, capsys):
    benchmark.main(
        [
            *TINY,
            f"--config={ROOT / 'configs' / 'swav_imagenet.py'}",
            *("--batches=4", "--microbatch=2", "--peers=bare,plain"),
            *(f"--config.views.{view}.{key}" for view in ("large", "small") for key in PLAIN),
            *("--config.views.large.size=32", "--config.views.small.size=16"),
            *("--config.views.small.count=1", "--config.dtype=float32"),
            *("--config.swav.prototypes=12", "--config.swav.hidden=16"),
        ]
    )
    out = capsys.readouterr().out
    assert "| ssl_jax | 4 |" in out and "plain Flax" not in out  # which is SimCLR's


@pytest.mark.parametrize(
    ("method", "changed", "passes"),
    [
        ("simclr", {}, 6),  # two views, forward and twice as much backward
        ("simclr", {"microbatch": 2}, 6),  # recomputed, which doesn't count
        # One view, and one forward for the keys.
        ("moco", {"moco.symmetric": False, "moco.shared_queue": False}, 4),
        ("byol", {}, 8),  # two views, and both forward for the targets
    ],
)
def test_flops_are_those_of_all_passes(benchmark, method, changed, passes):
    keys = {
        "batch_size": 4,
        "model.bn_group_size": 0,
        "model.bn_splits": 1,
        "model.depth": 6,
    } | changed
    overrides = [f"{key}={value}" for key, value in keys.items()]
    config = load_config(str(ROOT / "configs" / f"{method}_cifar10.py"), overrides)
    spmd = make_spmd(devices=jax.devices()[:1], batch_size=4)
    program = Program(config, Schedule(1, 1), spmd)
    view = model_flops(program) / 6
    assert benchmark.step_flops(program, {}) == pytest.approx(4 * passes * view, rel=0.02)


def test_a_profile_is_not_taken_beside_torch():
    """As it is typed."""
    command = [sys.executable, str(BENCHMARK), "--profile=kernels.txt", "--peers=bare,torch"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "leave torch out of --peers" in done.stderr


@pytest.mark.long
def test_plain_flax_learns(monkeypatch):
    step_peers = importlib.import_module("step_peers")
    monkeypatch.setitem(step_peers.BLOCKS, 6, (1, 1))
    views = [np.random.default_rng(i).integers(0, 256, (4, 16, 16, 3), np.uint8) for i in (0, 1)]
    step, state = step_peers.plain_flax_step(6, "cifar", "float32", views)
    losses = []
    for _ in range(4):
        state, loss = step(state, views)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
