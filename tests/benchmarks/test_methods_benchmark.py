"""The table of methods: finished runs, with differences paired over trials."""

import importlib.util
import json
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "methods.py"


def load():
    spec = importlib.util.spec_from_file_location("methods_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(name, trials):
    few = {"mean": sum(trials) / len(trials), "trials": trials}
    return {"name": name, "labels_5": few, "labels_10": few, "linear": 0.9, "knn": 0.8}


def test_table_compares_each_run_with_its_own_baselines(tmp_path):
    rows = [
        row("raw pixels", [0.80, 0.90]),
        row("random init", [0.60, 0.62]),
        row("online network", [0.81, 0.91]),
        row("byol", [0.83, 0.93]),
    ]
    (tmp_path / "evaluation.json").write_text(json.dumps({"rows": rows}))
    lines = [
        {"step": 1, "loss": 1.0, "embedding_std": 0.5, "images_per_s": 10.0},
        {"step": 2, "loss": 1.0, "embedding_std": 0.6, "images_per_s": 30.0},
        {"step": 2, "rankme": 12.34},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = load().table({"byol": tmp_path, "moco": tmp_path / "not_run"}).splitlines()
    assert [line.count("|") for line in table] == [11] * 6
    assert "| random init | 61.0 | -24.0 ± 50.8 |  |" in table[3]
    # The differences are 3 points in both trials.
    assert "| BYOL, online network | 86.0 | +1.0 ± 0.0 | +25.0 ±" in table[4]
    assert "| BYOL | 88.0 | +3.0 ± 0.0 | +27.0 ±" in table[5]
    assert "| 0.60 | 12.3 | 20 |" in table[5]
