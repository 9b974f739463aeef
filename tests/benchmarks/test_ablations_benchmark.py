"""The ablations are configs that change what they say, and their table shows what came of them."""

import importlib
import json
import runpy
from pathlib import Path

from ssl_jax.config import flat_views, load_config

FILE = Path(__file__).parents[2] / "configs" / "ablations.py"


def test_a_collapse_is_said_and_the_unchanged_run_stands_in_its_place(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FILE.parents[1] / "benchmarks"))
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


def test_every_variant_is_a_config_that_changes_what_it_says():
    groups = runpy.run_path(str(FILE))["ABLATIONS"]
    made = {n: load_config(f"{FILE}:{n}") for names in groups.values() for n in names}
    assert len(made) == sum(map(len, groups.values()))
    assert made["head-none"].simclr.layers == 0 and made["head-mlp3"].simclr.layers == 3
    assert made["ema-decay-1"].byol.ema_decay == made["momentum-1"].byol.ema_decay_end == 1
    assert not made["no-shuffle-and-bn-per-device"].moco.shuffle
    assert made["no-shuffle-and-bn-per-device"].model.bn_group_size == 1
    for name, crops, colors in (
        ("crop-and-color", True, True),
        ("crop", True, False),
        ("color", False, True),
        ("flip-only", False, False),
    ):
        for view in flat_views(made[name]):
            assert (view.crop.sampler != "none") == crops
            assert (view.jitter.prob > 0) == (view.gray > 0) == colors
