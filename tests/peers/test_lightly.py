"""`configs/*_cifar10.py:lightly` takes the steps of lightly's CIFAR-10 benchmark.

Methods that lightly doesn't have take those of torch code that is written from the papers.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ssl_jax.config import load_config, run_schedule
from ssl_jax.optim import learning_rate_schedule

torch = pytest.importorskip("torch", reason="torch is not installed here: make peers")
if not importlib.util.find_spec("lightly"):
    pytest.skip("lightly is not installed here: make peers", allow_module_level=True)

ROOT = Path(__file__).parents[2]
METHODS = ("simclr", "moco", "swav", "byol", "simsiam", "barlow", "dino")
OTHERS = ("vicreg", "mocov3", "supcon", "dino_official")  # not in its benchmark


@pytest.fixture(scope="module")
def differences():
    """Of a process of its own, in which ssl_jax computes in float64."""
    # Compiling in float64 takes most of the time, and these few steps are fast in any case.
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, str(Path(__file__).parent / "lightly_steps.py")]
    command += [*METHODS, *OTHERS]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | flags)
    assert done.returncode == 0, done.stderr[-2000:]
    found = map(json.loads, filter(lambda line: line.startswith("{"), done.stdout.splitlines()))
    return {each.pop("method"): each for each in found}


@pytest.mark.parametrize("method", [*METHODS, *OTHERS])
def test_ten_steps_equal_lightlys(method, differences):
    """DINO also with the official recipe: crops of two sizes, AdamW, clipping, all schedules."""
    found = differences[method]
    expected = {"loss", "gradient norm", "learning rate", "parameters", "statistics"}
    expected |= {"target"} if method in ("moco", "byol", "mocov3") or "dino" in method else set()
    expected |= {"center"} if "dino" in method else set()
    expected |= {"queue"} if method == "moco" else set()
    assert found.keys() == expected
    # Trees are compared in float32.
    assert max(found.values()) < 1e-6, found
    assert max(found["loss"], found["gradient norm"]) < 1e-10, found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("epochs", [200, 800])
def test_learning_rate_follows_torchs_cosine_per_epoch(method, epochs):
    config = load_config(f"{ROOT}/configs/{method}_cifar10.py:lightly", [f"epochs={epochs}"])
    schedule = run_schedule(config, 50_000)
    batches = 50_000 // 512  # a DataLoader with drop_last
    assert (schedule.steps_per_epoch, schedule.total_steps) == (batches, batches * epochs)
    peak = {"simsiam": 0.06, "swav": 4e-3}.get(method, 0.24)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    rate = learning_rate_schedule(config.optim, config.batch_size, schedule)
    steps = np.arange(schedule.total_steps, dtype=np.int32)
    np.testing.assert_allclose(rate(steps), np.repeat(rates, batches), rtol=1e-6)
