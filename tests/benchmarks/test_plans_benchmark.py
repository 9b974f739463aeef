"""The tables of plans: which plans are made, with configs that exist, and a row for each."""

import importlib
from pathlib import Path

import pytest

from ssl_jax.config import load_config

ROOT = Path(__file__).parents[2]
MADE = {
    "seconds": {"compute": 0.01, "memory": 0.02, "interconnect": 0.001},
    "batch": 64,
    "microbatch": 0,
    "model_flops_of_an_image": 2e9,
    "batch_of_a_device": 8,
    "memory": {"peak": 2**30},
    "hbm_bytes": 2**34,
    "traced_flops": 1e12,
    "bytes_accessed": 1e9,
    "cycles": {"step": 2e7},
    "collectives": [{"kind": "all-reduce", "count": 3, "bytes": 1e6}],
    "hours": [1.0, 2.0],
    "chip_hours": [8.0, 16.0],
    "step_seconds": [0.02, 0.03],
    "fits": True,
    "views": 2,
}


@pytest.mark.parametrize("table", ["runs", "collectives", "scaling", "vits"])
def test_each_plan_has_a_row_and_a_config(monkeypatch, tmp_path, capsys, table):
    benchmark = importlib.import_module("plans")
    asked = set()

    def plan(config, topology, overrides, out):
        assert topology.count(":") == 1 and out == tmp_path
        asked.add((config, overrides))
        return MADE

    monkeypatch.setattr(benchmark, "plan", plan)
    getattr(benchmark, table)(tmp_path)
    header, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert len(rows) >= len(asked) and {row.count("|") for row in rows} == {header.count("|")}
    for config, overrides in asked:
        load_config(str(ROOT / "configs" / config), list(overrides))
