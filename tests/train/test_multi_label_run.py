"""A whole run on packed images of several classes each, and what its outputs say about them."""

import json

import numpy as np
import pytest
from pyarrow import parquet
from sklearn.metrics import average_precision_score
from tiny import random_source, tiny_config, with_whole_images

from ssl_jax import load
from ssl_jax.cli import main as cli
from ssl_jax.data.labels import Targets
from ssl_jax.downstream.distillation import distill_config
from ssl_jax.errors import UserError
from ssl_jax.evals.results import read_evaluation, read_result
from ssl_jax.interop.card import model_card
from ssl_jax.interop.initial_weights import resolve_initial_weights
from ssl_jax.interop.load import restore_state, weights_at
from ssl_jax.run.folder import read_config
from ssl_jax.run.log import read_metrics
from ssl_jax.train import pretrain
from ssl_jax.train.setup import Setup, _targets_by_id

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


def test_distillation_with_labels_needs_one_class_per_image(run, tmp_path):
    config = tiny_config(method="distill")
    config.data.update(name="packed", dir=str(run.parent / "dir.npz"))
    config.distill.labels = 0.5
    config.init_from.path = str(run)
    with pytest.raises(UserError, match="'distill', but the training images have several"):
        pretrain(config, tmp_path / "new")
    assert not (tmp_path / "new" / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def tuned(run):
    """The run's encoder, fine-tuned on several labels per image for a step."""
    flags = ["epochs=0.0", "steps=1", "batch_size=32", "views.view.crop.sampler=none"]
    line = ["finetune", f"--from={run}", *(f"--config.{flag}" for flag in flags)]
    assert cli.main([*line, "--config.eval.at_end=False"]) == 0
    return run / "finetune_1"


def test_fine_tuned_classifier_is_measured_by_mean_average_precision(run, tuned):
    config = read_config(tuned)
    assert config.supervised.sigmoid and config.data.num_classes == 4
    metrics = json.loads((tuned / "evals" / "classifier.json").read_text())["metrics"]
    assert metrics["excluded"] == ["never"] and metrics["examples"] == 40
    assert [each["name"] for each in metrics["classes"]] == ["a", "b", "even"]
    with np.load(run.parent / "test_dir.npz") as test:
        images, targets = test["images"], test["labels"]
    encoder = load(tuned)
    dense = restore_state(tuned).params["classifier"]["Dense_0"]
    logits = np.asarray(encoder.apply(images)) @ dense["kernel"] + dense["bias"][None]
    for column, each in zip((0, 1, 2), metrics["classes"], strict=True):
        known = targets[:, column] >= 0
        expected = average_precision_score(targets[known, column], logits[known, column])
        assert each["mean_ap"] == pytest.approx(expected, abs=1e-6)
    logged = [r for r in read_metrics(tuned / "metrics.jsonl") if "test_mean_ap" in r]
    assert logged[-1]["test_mean_ap"] == pytest.approx(metrics["mean_ap"]["value"])
    assert "fine-tuned on 100 % of the images" in (run / "report.html").read_text()
    assert read_result(run, "finetune_1")["metrics"] == metrics
    assert "Classifier mAP, held out" in (tuned / "report.html").read_text()


def test_fine_tuning_resumes_and_teaches_no_softmax(run, tuned, tmp_path):
    before = (tuned / "metrics.jsonl").read_text()
    flags = ["epochs=0.0", "steps=1", "batch_size=32", "views.view.crop.sampler=none"]
    line = ["finetune", f"--from={run}", *(f"--config.{flag}" for flag in flags)]
    assert cli.main([*line, "--config.eval.at_end=False"]) == 0
    assert (tuned / "metrics.jsonl").read_text() == before
    config = distill_config(tuned)
    with pytest.raises(UserError, match="has a sigmoid per class, for images with several labels"):
        resolve_initial_weights(config)


def test_linear_recipe_learns_several_labels(run, capsys):
    flags = ["epochs=0.0", "steps=1", "batch_size=32", "views.view.crop.sampler=none"]
    line = ["linear", f"--from={run}", "--recipe=simclr", "--json"]
    assert cli.main([*line, *(f"--config.{flag}" for flag in flags)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"]["excluded"] == ["never"] and "mean_ap_11_point" in found["metrics"]


def test_number_of_classes_must_be_that_of_the_columns(run):
    config = tiny_config(method="supervised")
    config.data.update(name="packed", dir=str(run.parent / "dir.npz"))
    for given in (3, 5):
        config.data.num_classes = given
        with pytest.raises(UserError, match=f"num_classes is {given}, but .* of 4 classes"):
            Setup(config)
    config.data.update(name="digits", num_classes=0)
    config.supervised.sigmoid = True
    with pytest.raises(UserError, match="config.supervised.sigmoid is True, but only"):
        Setup(config)


def test_batches_have_the_targets_of_the_images_that_replace_unreadable_ones():
    source, values = random_source(8), np.eye(8, dtype=np.int8)
    source.targets = Targets(values, tuple("abcdefgh"))
    of = _targets_by_id(source)
    np.testing.assert_array_equal(of(np.array([3, 0])), values[[3, 0]])
    source.targets = Targets(values[::-1], source.targets.names)
    np.testing.assert_array_equal(of(np.array([3])), values[[3]])  # kept
    source.bad.append("image 3")
    np.testing.assert_array_equal(of(np.array([3])), values[[4]])
