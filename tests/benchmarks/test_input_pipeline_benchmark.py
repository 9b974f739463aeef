"""The input pipeline benchmark, at toy size and without the peers."""

import importlib
import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tensorflow")

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "input_pipeline.py"
BATCH = 4


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 256, (40 + number, 50, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.JPEG")
    return tmp_path


@pytest.fixture
def benchmark(monkeypatch):
    module = importlib.import_module("input_pipeline")
    real = module.make_config

    def small(method, images, *changes):
        config = real(method, images, *changes)
        for view in config.views.values():
            view.size = {224: 16, 96: 8}[view.size]
            view.blur.kernel_size = 3
        return config

    monkeypatch.setattr(module, "make_config", small)
    return module


def run(*arguments):
    command = [sys.executable, str(BENCHMARK), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_own_rows_are_measured_relative_to_decoding(benchmark, photos):
    requested = ["decode", "decode_fast", "simclr", "moco_device", "lightly_simclr"]
    rates = benchmark.measure(requested, photos, BATCH, 1, 0.1, "")
    assert list(rates) == requested[:-1]
    assert all(value > 0 for values in rates.values() for value in values)
    rows = benchmark.rate_table(rates)
    assert {len(row) for row in rows} == {len(benchmark.COLUMNS)}
    assert rows[0][-1] == "100%"


def test_rates_are_relative_to_lightlys_row(benchmark):
    rates = {"decode": [100.0], "swav": [30.0, 20.0, 70.0], "lightly_swav": [15.0]}
    _, own, lightly = benchmark.rate_table(rates)
    assert own[1:] == ["2×224 + 6×96", "30", "2.00", "30%"]
    assert lightly[1:] == ["2×224 + 6×96", "15", "1.00", "15%"]


def test_rate_uses_the_given_clock(benchmark, monkeypatch):
    now = 0.0

    def batches():
        nonlocal now
        while True:
            now += 0.01
            yield 3

    def clock():
        return now

    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=clock))
    assert benchmark.rate(batches(), 0.2, clock) == pytest.approx(300)
    ticks = itertools.count()
    assert benchmark.rate(batches(), 0.1, lambda: next(ticks)) in (30, 33)  # in one tick


def test_profile_has_all_stages_and_their_times_add_up(benchmark, photos):
    stages = benchmark.profile("simclr", photos, BATCH, 1, 0.05)
    assert list(stages) == [
        "feeding ids and names",
        "read",
        "decode",
        "sample seeds and boxes",
        "cut and resize 2×16",
        "stack into batches",
        "the source's own pipeline",
    ]
    totals = [total for _, total in stages.values()]
    assert sum(own for own, _ in stages.values()) == pytest.approx(totals[-1])
    assert len(benchmark.profile_table(stages)) == len(stages)


def test_device_rows_report_the_share_of_the_step(benchmark, monkeypatch):
    # The network takes longest to compile; the large-batch benchmark builds the same step.
    monkeypatch.setattr(benchmark, "step_flops", lambda config: 0.0)
    config = benchmark.make_config("simclr", Path(), "batch_size=4", "dtype=float32")
    rows = benchmark.device_rows(config, 4, 1)
    assert [name for name, _ in rows] == [
        "ms for 8 views",
        "ms for 8 views, blur fused with its input",
        "GFLOP of the device half, 4 images",
        "GFLOP of the train step, 4 images",
        "share of the step",
    ]
    half, step = float(rows[2][1]), float(rows[3][1])
    # The step gains three iterations of the jitter loop, which is most of the device half.
    assert 0 < half / 2 < step < half


def test_wait_share_and_memory_are_measured_with_the_prefetcher(benchmark, photos):
    assert 0 <= benchmark.wait_share(photos, BATCH, busy=0.01, warmup=1, steps=3) < 1
    device_data = benchmark.resident_mib(photos, BATCH, (1, 3))
    assert list(device_data) == [1, 3] and all(mib > 10 for mib in device_data.values())


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [((), "--images"), (("--images=.", "--only=torchvision"), "--peer-python")],
)
def test_missing_arguments_are_usage_errors(arguments, missing):
    done = run(*arguments)
    assert done.returncode == 2 and missing in done.stderr
