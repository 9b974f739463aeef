"""The benchmark of the train step at toy size: every program that a GPU's hour would run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("method", ["swav"])
def test_other_methods_and_microbatches_run_alone(method):
    done = run(
        *TINY,
        f"--config={ROOT / 'configs' / f'{method}_imagenet.py'}",
        *("--batches=4", "--microbatch=2", "--peers=bare,plain"),
        *(f"--config.views.{view}.size=32" for view in VIEWS[method]),
    )
    assert done.returncode == 0, done.stderr
    assert "plain Flax" not in done.stdout  # which is SimCLR's


VIEWS = {"swav": ("large", "small"), "byol": ("view1", "view2")}


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
