"""The comparison of learning curves: which runs are made, and their table and pictures."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from images import packed_colors
from PIL import Image

from ssl_jax.config import load_config
from ssl_jax.evals.results import LAST_FILE

EPOCHS, STEPS, BATCH = 5, 2, 16
PEER = f"--peer-python={sys.executable}"


@pytest.fixture
def benchmark():
    return importlib.import_module("curves")


@pytest.fixture
def packed(tmp_path):
    return packed_colors(tmp_path)


def arguments(command):
    return dict(word.removeprefix("--").split("=", 1) for word in command if "=" in word)


def pretend_ssl_jax(command):
    """Checks the config and writes the metrics of a run."""
    given = arguments(command)
    overrides = [word.removeprefix("--config.") for word in command if word.startswith("--config.")]
    config = load_config(given["config"], overrides)
    assert (config.epochs, config.batch_size, config.eval.knn_every_epochs) == (EPOCHS, BATCH, 1)
    assert (config.model.width, config.model.stem, config.dtype) == (0.25, "imagenet", "float32")
    assert (config.eval.knn_k, config.eval.knn_temperature) == (200, 0.1)
    assert Path(config.data.dir).name == "train.npz" and not config.eval.at_end
    workdir = Path(given["workdir"])
    workdir.mkdir()
    records = []
    for step in range(1, EPOCHS * STEPS + 1):
        rate = {"images_per_s": 32.0} if step > 1 else {}
        records.append({"step": step, "loss": 1.0 - step / 100, **rate})
        if step % STEPS == 0:
            records.append({"step": step, "knn": 0.5 + config.seed / 10, "rankme": 3.0})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    (workdir / LAST_FILE).touch()
    return f"ssl_jax {config.method} {config.seed}"


def pretend_lightly(command):
    """Writes the records and the features of a run; one test image of each class is odd."""
    given = arguments(command)
    assert (given["every"], given["batch"]) == ("1", str(BATCH))
    workdir = Path(given["out"])
    workdir.mkdir()
    labels = np.arange(20) % 2
    test = np.eye(2, dtype=np.float32)[np.where(np.arange(20) < 2, 1 - labels, labels)]
    train = np.eye(2, dtype=np.float32)[np.load(given["train"])["labels"]]
    lines = []
    for epoch in range(1, EPOCHS + 1):
        np.savez(workdir / f"features_{epoch}.npz", train=train, test=test)
        lines.append({"epoch": epoch, "loss": -0.25, "seconds": 4.0, "images": 32})
    (workdir / "epochs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return f"lightly {given['method']} {given['seed']}"


@pytest.fixture
def pictures():
    """The arguments of each picture, instead of drawing it."""
    return []


@pytest.fixture
def run(benchmark, packed, pictures, tmp_path, monkeypatch, capsys):
    made = []

    def execute(command, environment=None):
        pretend = pretend_lightly if "curves_peer.py" in command[1] else pretend_ssl_jax
        made.append(pretend(command))

    monkeypatch.setattr(benchmark.runs, "execute", execute)
    monkeypatch.setattr(benchmark, "draw", lambda *drawn: pictures.append(drawn))

    def run(*more):
        """Returns the runs that were made, and the table."""
        made.clear()
        options = [f"--workdir={tmp_path / 'out'}", f"--epochs={EPOCHS}", f"--batch={BATCH}"]
        benchmark.main([*packed, *options, "--images=32", *more])
        return list(made), capsys.readouterr().out

    return run


def test_sides_alternate_and_finished_runs_are_kept(run, pictures, tmp_path):
    made, _ = run("--methods=byol", "--seeds=1")
    assert made == ["ssl_jax byol 0"]
    made, printed = run(PEER, "--methods=byol,moco", "--seeds=2")
    assert made == [
        *("lightly byol 0", "ssl_jax moco 0", "lightly moco 0"),
        *("lightly byol 1", "ssl_jax byol 1", "lightly moco 1", "ssl_jax moco 1"),
    ]
    assert run(PEER, "--methods=byol,moco", "--seeds=2") == ([], printed)
    out = tmp_path / "out"
    assert (out / "curves.md").read_text() == printed
    panels, file, x_label = pictures[-1]
    assert (file, x_label) == (out / "curves.png", "epoch")
    counts = {title: [len(runs) for runs in panel.values()] for title, panel in panels.items()}
    assert counts == {"BYOL": [2, 2], "MoCo": [2, 2]}
    assert panels["BYOL"]["lightly"][0]["knn"] == ([1, 2, 3, 4, 5], [90] * 5)
    assert not list(out.glob("*/features_*"))
    with np.load(out / "train.npz") as chosen:
        assert np.bincount(chosen["labels"]).tolist() == [16, 16]
    with pytest.raises(SystemExit, match="holds runs with"):
        run("--config.optim.lr=1")


def test_refused_setting_can_be_corrected(run, benchmark, tmp_path, monkeypatch):
    """A run that is refused, such as for a wrong config key, leaves an empty folder at most."""
    with monkeypatch.context() as refusing:
        refusing.setattr(benchmark.runs, "execute", lambda *_: sys.exit("unknown key"))
        with pytest.raises(SystemExit, match="unknown key"):
            run("--methods=byol", "--seeds=1", "--images=16", "--config.optim.rl=1")
    made, _ = run("--methods=byol", "--seeds=1")
    assert made == ["ssl_jax byol 0"]
    with np.load(tmp_path / "out" / "train.npz") as chosen:
        assert len(chosen["labels"]) == 32  # not the 16 of the refused setting


def test_table_has_means_with_intervals_over_seeds(run):
    _, printed = run(PEER, "--methods=byol", "--seeds=2")
    header, _, own, peer = printed.splitlines()
    assert header.startswith("|  |  | seeds | kNN, epoch 1 |")
    # Seeds 0 and 1 measure 50 and 60 %: Student's t with one degree of freedom is 12.71.
    assert own.startswith("| BYOL | ssl_jax | 2 | 55.0 ± 63.5 | ")
    # The last epoch's losses are .91 and .90. Nine timed steps of half a second.
    assert own.endswith("| -35.0 ± 63.5 | 0.905 ± 0.000 | 0.1 | 32 |")
    # BYOL's losses are reported as 1 - cos.
    assert peer == f"| BYOL | lightly | 2 |{' 90.0 ± 0.0 |' * 5}  | 0.750 ± 0.000 | 0.3 | 8 |"


def test_record_of_a_stopped_run_is_not_written(benchmark, packed, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def stopped(command, environment=None):
        pretend_ssl_jax(command)
        (out / "byol_0_ssl_jax" / LAST_FILE).unlink()

    monkeypatch.setattr(benchmark.runs, "execute", stopped)
    words = [f"--workdir={out}", f"--epochs={EPOCHS}", f"--batch={BATCH}", "--images=32"]
    with pytest.raises(SystemExit, match="byol_0_ssl_jax was stopped"):
        benchmark.main([*packed, *words, "--methods=byol", "--seeds=1"])
    assert not list(out.glob("*.jsonl"))


def test_epochs_without_a_time_have_no_rate(benchmark):
    """Epochs of a single step: the first step of a run has no time."""
    lines = [{"epoch": 1, "loss": 1.0, "seconds": 0.0, "images": 0, "knn": 0.5}]
    lines += [{"epoch": 2, "loss": 1.0, "seconds": 2.0, "images": 16, "knn": 0.5}]
    table = benchmark.table({"simclr": {"ssl_jax": {0: lines}}})
    assert table.endswith("| 1.000 | 0.0 | 8 |")


def test_more_images_than_there_are_end_the_benchmark(run):
    with pytest.raises(SystemExit, match="--images=9000 takes 4500 of each class, but .* has "):
        run("--methods=byol", "--images=9000")


def test_invalid_arguments_end_the_benchmark(benchmark, packed, capsys):
    for wrong, expected in {
        "--epochs=7": "not a multiple of 5",
        "--methods=dino": "--methods: dino",
        "--sedes=2": "unrecognized",
        "--test=nowhere.npz": "--test=nowhere.npz is not a file",
        "--peer-python=nowhere/python": "--peer-python=nowhere/python is not a program",
    }.items():
        with pytest.raises(SystemExit):
            benchmark.parse_arguments([*packed, wrong])
        assert expected in capsys.readouterr().err


def test_picture_of_a_run_has_a_row_per_metric(benchmark, tmp_path, monkeypatch):
    picture = importlib.import_module("curves_picture")
    config = {"config": {"method": "simclr", "simclr": {"layers": 3}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    records = [{"step": step, "loss": 2.0, "embedding_std": 0.5} for step in range(1, 1001)]
    records.append({"step": 1000, "knn": 0.25, "rankme": 20.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    curve = picture.read_run(tmp_path)
    assert list(curve) == ["loss", "knn", "embedding_std", "rankme"]
    steps, losses = curve["loss"]
    assert len(steps) == 250 <= picture.POINTS  # groups of four
    assert steps[0] == 2.5 and (losses == 2).all() and curve["knn"][1] == [25]
    assert picture.title(tmp_path) == "SimCLR v2"
    out = tmp_path / "curves.png"
    monkeypatch.setattr(sys, "argv", ["curves_picture.py", f"--out={out}", str(tmp_path)])
    picture.main()
    with Image.open(out) as drawn:
        assert drawn.height > 3 * drawn.width / 2 and len(drawn.getcolors()) > 10
        width = drawn.width
    again = tmp_path / "again"
    again.mkdir()
    for file in ("config.json", "metrics.jsonl"):
        (again / file).write_text((tmp_path / file).read_text())
    monkeypatch.setattr(sys, "argv", [*sys.argv, str(again)])  # of the same method
    picture.main()
    with Image.open(out) as drawn:
        assert drawn.width > 1.5 * width
    monkeypatch.setattr(sys, "argv", [*sys.argv, str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit):
        picture.main()
    picture.draw({"BYOL": {"ssl_jax": [curve, curve], "lightly": [curve]}}, out, "epoch")
    with Image.open(out) as drawn:
        colors = {color for _, color in drawn.convert("RGB").getcolors(1 << 20)}
    orange = np.array([0xE3, 0x9C, 0x37])
    assert min(np.abs(np.array(color) - orange).max() for color in colors) < 16
