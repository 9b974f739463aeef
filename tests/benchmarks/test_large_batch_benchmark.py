"""The benchmark of large batches measures memory and time, here of a tiny network."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import method_config, shared, with_whole_images

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "large_batch.py"


@pytest.fixture
def benchmark(monkeypatch):
    module = importlib.import_module("large_batch")

    def tiny(size, batch, microbatch, remat, large):
        config = with_whole_images(method_config("simclr", microbatch=microbatch, remat=remat))
        config.batch_size = batch
        return config

    def built(config, plain=module.build):
        return shared(lambda: plain(config), config, "large_batch")

    monkeypatch.setattr(module, "make_config", tiny)
    monkeypatch.setattr(module, "build", built)  # a step is traced once for all that is asked of it
    monkeypatch.setattr(module, "resident_mib", module.inside)
    return module


@pytest.mark.long
def test_memory_of_the_microbatched_step_is_less_than_of_the_plain_one(benchmark, monkeypatch):
    rows = {row[0]: row[1:] for row in benchmark.memory_rows(1024)}
    assert len(rows) == 5
    compiled = {name: float(cells[0].replace(",", "")) for name, cells in rows.items()}
    assert compiled["batch 1024, microbatch 64"] < compiled["plain, batch 1024"] / 2


def test_peak_begins_at_the_memory_held_now(benchmark):
    held = bytearray(64 * benchmark.MIB)
    held[:] = b"1" * len(held)
    before = benchmark.peak_mib()
    del held
    benchmark.reset_peak()
    assert benchmark.peak_mib() < before - 60


@pytest.mark.long
def test_times_are_compared_with_the_plain_step(benchmark):
    rows = benchmark.time_rows(64, rounds=1)
    assert [row[0] for row in rows] == [
        "plain",
        "remat",
        "microbatch 16",
        "microbatch 16, remat",
    ]
    assert rows[0][2] == "1.00" and all(float(row[2]) > 0 for row in rows)


def test_the_command_says_what_it_takes():
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--large" in done.stdout
