"""The evaluation at the end of a run, with the images for its report and for TensorBoard."""

import json

import jax
import numpy as np
import pytest
from tiny import random_source, tiny_config

from ssl_jax.config import run_schedule
from ssl_jax.data.arrays import ArraySource
from ssl_jax.errors import UserError
from ssl_jax.evals.evaluator import Evaluator, evaluated_variables
from ssl_jax.evals.knn import knn_classify
from ssl_jax.evals.results import read_evaluation
from ssl_jax.report import write_images, write_report
from ssl_jax.run.folder import FORMAT
from ssl_jax.spmd import make_spmd
from ssl_jax.step import Program


def evaluate(folder, train, test):
    """Evaluates an untrained encoder and writes its images; returns its features of both splits."""
    config = tiny_config(batch_size=32)
    config.data.num_classes = train.num_classes
    config.eval.at_end = True
    spmd = make_spmd()
    state = Program(config, run_schedule(config, train.num_examples), spmd).init()
    initial = jax.device_get(evaluated_variables(state))
    state = spmd.replicate(state)
    evaluator = Evaluator(config, spmd, train, test)
    write_images(folder, evaluator.finish(folder, initial, state), step=0)
    variables = evaluated_variables(state)
    return [evaluator.features(variables, split) for split in (train, test)]


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labeled")
    splits = random_source(96), random_source(40, seed=1)
    return folder, splits, evaluate(folder, *splits)


def saved_images(folder):
    with np.load(folder / "report_images.npz") as archive:
        return {name: archive[name] for name in archive.files}


def cosines(a, b):
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in map(np.float64, (a, b))]
    return unit[0] @ unit[1].T


def test_failures_are_all_images_whose_nearest_neighbor_has_a_different_class(labeled):
    folder, (train, test), (train_features, test_features) = labeled
    found = saved_images(folder)
    similarity = cosines(test_features, train_features)
    wrong = np.flatnonzero(train.labels[similarity.argmax(axis=1)] != test.labels)
    assert 0 < len(wrong) < 40
    assert (found["failures_count"], found["failures_queries"]) == (len(wrong), 40)
    order = wrong[np.argsort(-similarity[wrong].max(axis=1))][:24]
    np.testing.assert_array_equal(found["failures_query"], test.images[order])
    np.testing.assert_array_equal(found["failures_query_label"], test.labels[order])
    near = np.argsort(-similarity[order], axis=1)[:, :6]
    np.testing.assert_array_equal(found["failures_neighbor_label"][:, 0], train.labels[near[:, 0]])
    np.testing.assert_allclose(
        found["failures_similarity"], np.take_along_axis(similarity[order], near, 1), atol=1e-5
    )
    assert found["failures_neighbors"].shape == (len(order), 6, 8, 8, 3)


def test_map_has_every_held_out_image_with_its_neighbors_excluding_itself(labeled):
    folder, (_, test), (_, test_features) = labeled
    found = saved_images(folder)
    np.testing.assert_array_equal(found["map_images"], test.images)
    np.testing.assert_array_equal(found["map_label"], test.labels)
    similarity = cosines(test_features, test_features) - 9 * np.eye(40)
    best = np.sort(similarity, axis=1)[:, ::-1][:, :6]
    np.testing.assert_allclose(found["map_similarity"], best, atol=1e-5)
    reached = np.take_along_axis(similarity, found["map_neighbor"], axis=1)
    np.testing.assert_allclose(reached, best, atol=1e-5)
    assert found["map_positions"].shape == (40, 2) and np.isfinite(found["map_positions"]).all()


def test_projector_has_the_images_of_the_map(labeled):
    folder, (_, test), (_, test_features) = labeled
    unit = test_features / np.linalg.norm(test_features, axis=1, keepdims=True)
    written = np.loadtxt(folder / "projector" / "tensors.tsv")
    np.testing.assert_allclose(written, unit, atol=1e-5)
    names = (folder / "projector" / "metadata.tsv").read_text().split()
    assert names == [str(label) for label in test.labels]


def test_images_without_a_label_are_neither_neighbors_nor_scored(tmp_path):
    known = [np.arange(96) % 3 == 0, np.arange(40) % 2 == 0]
    whole = [random_source(96), random_source(40, seed=1)]
    splits = [
        ArraySource(source.images, np.where(mask, source.labels, -1), source.class_names)
        for source, mask in zip(whole, known, strict=True)
    ]
    features = evaluate(tmp_path, *splits)
    features = [x[mask] for x, mask in zip(features, known, strict=True)]
    labels = [source.labels[mask] for source, mask in zip(whole, known, strict=True)]
    predicted = knn_classify(features[0], labels[0], features[1], num_classes=4)
    evaluation = read_evaluation(tmp_path / "evaluation.json")
    assert evaluation.test_examples == 20
    assert evaluation.trained.single["knn"] == pytest.approx(np.mean(predicted == labels[1]))
    found = saved_images(tmp_path)
    np.testing.assert_array_equal(found["map_label"], labels[1])
    assert min(found["query_label"].min(), found["neighbor_label"].min()) >= 0
    # Five labels per class are too many for the smallest class, and the report says so.
    least = np.bincount(labels[0])
    evaluation = Evaluator(tiny_config(), make_spmd(), *splits)
    evaluation.config.eval.labels_per_class = (1, int(least.min()) + 1, int(least.max()) + 9)
    (note,) = evaluation._left_out()
    counts = f"{least.min() + 1} or {least.max() + 9} labels per class"
    name = whole[0].class_names[least.argmin()]
    assert note.startswith(f"No accuracy with {counts}: class '{name}' has only {least.min()} ")


def test_without_labels_map_has_one_color_and_no_failures_are_kept(tmp_path):
    splits = (ArraySource(random_source(n, seed=n).images) for n in (96, 40))
    evaluate(tmp_path, *splits)
    found = saved_images(tmp_path)
    assert not [name for name in found if name.startswith("failures") or "label" in name]
    assert found["map_positions"].shape == (40, 2)
    assert not (tmp_path / "projector" / "metadata.tsv").exists()
    config = {"format": FORMAT, "config": {"method": "simclr", "data": {"name": "arrays"}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    page = write_report(tmp_path).read_text()
    for words in ("training and held-out images have no labels", "no labels to color them by"):
        assert words in page


@pytest.mark.parametrize(
    "writes",
    [
        "numpy.savez_compressed",
        "ssl_jax.evals.evaluator.write_evaluation",
        "ssl_jax.report.map.write_projector",
    ],
)
def test_full_disk_at_the_end_raises_user_error(tmp_path, monkeypatch, writes):
    def full(*args, **arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writes, full)
    with pytest.raises(UserError, match=r"Cannot write .*\(No space left"):
        evaluate(tmp_path, random_source(40), random_source(24, seed=1))
