"""The benchmark of the train step at toy size: every program that a GPU's hour would run."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from ssl_jax.config import Schedule, load_config
from ssl_jax.plan import model_flops
from ssl_jax.spmd import make_spmd
from ssl_jax.step import Program

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmarks" / "train_step.py"
TINY = ("--rounds=1", "--seconds=0.1", "--config.model.depth=18", "--config.model.width=0.0625")


def run(*arguments):
    command = [sys.executable, str(BENCHMARK), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_a_row_for_each_step_and_where_the_time_goes(tmp_path):
    done = run(
        *TINY,
        f"--config={ROOT / 'configs' / 'simclr_cifar10.py'}",
        *("--batches=4", "--peers=bare", "--split", f"--profile={tmp_path / 'kernels.txt'}"),
        f"--json={tmp_path / 'rows.json'}",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["step"] for row in rows] == ["ours", "ours, no augmentation"]
    assert all(row["images/s"] > 0 and row["GiB"] > 0 for row in rows)
    assert "| ours | 4 |" in done.stdout and "cpu, JAX" in done.stdout
    parts = {line.split()[0] for line in done.stderr.splitlines() if "%" in line}
    assert {"forward", "backward", "optimizer", "augment"} <= parts
    for part in ("augmentation", "forward ", "loss, both ways", "forward, loss, backward"):
        assert part in done.stderr
    kernels = (tmp_path / "kernels.txt").read_text()
    assert "transpose(jvp(forward))/ResNet/stage1_block1/conv1" in kernels
    assert (tmp_path / "kernels.hlo.gz").stat().st_size > 0


def test_other_methods_and_microbatches_run_alone():
    done = run(
        *TINY,
        f"--config={ROOT / 'configs' / 'swav_imagenet.py'}",
        *("--batches=4", "--microbatch=2", "--peers=bare,plain"),
        *(f"--config.views.{view}.size=32" for view in ("large", "small")),
    )
    assert done.returncode == 0, done.stderr
    assert "plain Flax" not in done.stdout  # which is SimCLR's


@pytest.mark.parametrize(
    ("method", "changed", "passes"),
    [
        ("simclr", {}, 6),  # two views, forward and twice as much backward
        ("simclr", {"microbatch": 2}, 6),  # recomputed, which doesn't count
        ("moco", {"moco.symmetric": False}, 4),  # one view, and one forward for the keys
        ("byol", {}, 8),  # two views, and both forward for the targets
    ],
)
def test_flops_are_those_of_all_passes(monkeypatch, method, changed, passes):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from train_step import step_flops

    keys = {"batch_size": 4, "model.bn_group": 0, "model.depth": 18} | changed
    overrides = [f"{key}={value}" for key, value in keys.items()]
    config = load_config(str(ROOT / "configs" / f"{method}_cifar10.py"), overrides)
    spmd = make_spmd(devices=jax.devices()[:1], batch_size=4)
    view = model_flops(Program(config, Schedule(1, 1), spmd)) / 6
    assert step_flops(config, spmd, {}) == pytest.approx(4 * passes * view, rel=0.05)


def test_a_profile_is_not_taken_beside_torch():
    done = run("--profile=kernels.txt", "--peers=bare,torch")
    assert done.returncode == 2 and "leave torch out of --peers" in done.stderr


def test_plain_flax_learns(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import numpy as np
    from step_peers import plain_flax_step

    views = [np.random.default_rng(i).integers(0, 256, (4, 16, 16, 3), np.uint8) for i in (0, 1)]
    step, state = plain_flax_step(18, "cifar", "float32", views)
    losses = []
    for _ in range(4):
        state, loss = step(state, views)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
