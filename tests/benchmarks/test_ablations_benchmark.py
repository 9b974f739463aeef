"""The ablations: their configs and the table of results."""

import importlib
import json
import runpy
from pathlib import Path

from ssl_jax.config import flat_views, load_config

FILE = Path(__file__).parents[2] / "configs" / "ablations.py"


def test_table_reports_collapse_and_sorts_the_unchanged_run_by_its_value(tmp_path):
    table = importlib.import_module("ablations").table
    for name, std in (("temperature-0.1", 0.5), ("temperature-1", 0.001), ("head-mlp2", 0.6)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "report_images.npz").touch()
        row = {"labels_5": {"trials": [0.8, 0.9]}, "linear": 0.95, "knn": 0.9}
        (folder / "evaluation.json").write_text(json.dumps({"rows": [row]}))
        lines = [{"step": step, "embedding_std": std, "rankme": 9.0} for step in (10, 20, 30)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    rows = table("temperature", tmp_path).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| temperature-0.1",
        "| temperature-0.2",
        "| temperature-1",
    ]
    assert rows[0].endswith("| 0.50 | 9.0 | no |") and "| 85.0 ± " in rows[0]
    assert rows[2].endswith("| 0.00 | 9.0 | since step 10 |")


def test_every_ablation_is_a_config_that_changes_what_its_name_states():
    groups = runpy.run_path(str(FILE))["ABLATIONS"]
    configs = {n: load_config(f"{FILE}:{n}") for names in groups.values() for n in names}
    assert len(configs) == sum(map(len, groups.values()))
    assert configs["head-none"].simclr.layers == 0 and configs["head-mlp3"].simclr.layers == 3
    assert configs["ema-decay-1"].byol.ema_decay == configs["ema-decay-1"].byol.ema_decay_end == 1
    assert not configs["no-shuffle-and-bn-per-device"].moco.shuffle
    assert configs["no-shuffle-and-bn-per-device"].model.bn_group_size == 1
    for name, crops, colors in (
        ("crop-and-color", True, True),
        ("crop", True, False),
        ("color", False, True),
        ("flip-only", False, False),
    ):
        for view in flat_views(configs[name]):
            assert (view.crop.sampler != "none") == crops
            assert (view.jitter.prob > 0) == (view.gray > 0) == colors
