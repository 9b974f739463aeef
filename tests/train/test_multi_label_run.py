"""A whole run on packed images of several classes each, and what its outputs say about them."""

import json

import numpy as np
import pytest
from pyarrow import parquet
from tiny import random_source, tiny_config, with_whole_images

from ssl_jax.cli import main as cli
from ssl_jax.errors import UserError
from ssl_jax.evals.results import read_evaluation
from ssl_jax.interop.card import model_card
from ssl_jax.interop.load import weights_at
from ssl_jax.train import pretrain

NAMES = ("a", "b", "even", "never")


def targets_of(labels):
    """Classes a and b, whether the grid's position is even, and a class without images."""
    targets = np.stack([labels == 0, labels == 1, labels % 2 == 0, labels < 0], axis=1)
    return targets.astype(np.int8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a step on a subset, evaluated at its end and by `ssl-jax linear`."""
    folder = tmp_path_factory.mktemp("several")
    config = with_whole_images(tiny_config(steps=1))
    config.eval.at_end = True
    for key, n in (("dir", 80), ("test_dir", 40)):
        source, file = random_source(n, seed=n), folder / f"{key}.npz"
        targets = targets_of(source.labels)
        targets[:3, 0] = -1
        np.savez(file, images=source.images, labels=targets, class_names=np.array(NAMES))
        config.data[key] = str(file)
    config.data.update(name="packed", subset=0.5)
    pretrain(config, folder / "run", verbosity="warnings")
    assert cli.main(["linear", f"--from={folder / 'run'}"]) == 0
    return folder / "run"


def test_run_measures_mean_average_precision_and_states_what_it_skips(run):
    evaluation = read_evaluation(run / "evaluation.json")
    assert len(evaluation.rows) >= 3 and evaluation.split.startswith("40 training images")
    for row in evaluation.rows:
        assert row.single.keys() == {"mean_ap"} and not row.trials
    notes = " ".join(evaluation.notes)
    assert "kNN and few labels per class" in notes and "mAP is without never" in notes


def test_report_and_model_card_show_mean_average_precision(run):
    page, card = (run / "report.html").read_text(), model_card(run, weights_at(run))
    assert "Linear probe, mAP" in page and "kNN and few labels per class" in page
    assert "Average precision by class: " in page and "Without never, which a split" in page
    assert '<tr><th scope="row">even</th>' in page
    assert "Linear probe, mAP" in card and "mAP by bootstrap" in card


def test_neighbors_are_shown_without_failures_which_need_one_class_per_image(run):
    with np.load(run / "report_images.npz", allow_pickle=False) as arrays:
        names = set(arrays.files)
    assert any("neighbor" in name for name in names)
    assert not any("failure" in name for name in names)


def test_features_files_have_the_targets(run, tmp_path, capsys):
    line = ["features", f"--from={run}", "--json", "--out"]
    assert cli.main([*line, str(tmp_path / "f.npz")]) == 0
    assert cli.main([*line, str(tmp_path / "f.parquet")]) == 0
    with np.load(tmp_path / "f.npz") as arrays:
        targets = np.concatenate([arrays["train_targets"], arrays["test_targets"]])
        assert arrays["class_names"].tolist() == list(NAMES) and "train_labels" not in arrays
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table["targets"].to_pylist() == targets.tolist() and len(targets) == 80
    assert (targets == -1).any() and set(table["label"].to_pylist()) == {None}
    assert json.loads(table.schema.metadata[b"class_names"]) == list(NAMES)


@pytest.mark.parametrize("method", ["supervised", "distill"])
def test_methods_that_need_one_class_per_image_are_refused(run, tmp_path, method):
    config = tiny_config(method=method)
    config.data.update(name="packed", dir=str(run.parent / "dir.npz"))
    if method == "distill":
        config.distill.labels = 0.5
        config.init_from.path = str(run)
    with pytest.raises(UserError, match=f"'{method}', but the training images have several"):
        pretrain(config, tmp_path / "new")
    assert not (tmp_path / "new" / "metrics.jsonl").exists()
