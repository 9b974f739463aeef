"""The evaluation at the end of a run, with the images for its report and for TensorBoard."""

import json
import types
import zipfile

import jax
import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from tiny import random_source, tiny_config

from ssl_jax import diagnostics, memory
from ssl_jax.config import run_schedule
from ssl_jax.data.arrays import ArraySource
from ssl_jax.data.index import fixed_sample
from ssl_jax.data.labels import Targets
from ssl_jax.errors import UserError
from ssl_jax.evals import evaluator as module
from ssl_jax.evals.evaluator import Evaluator, evaluated_variables, pixels
from ssl_jax.evals.knn import knn_classify
from ssl_jax.evals.results import (
    FINE_TUNED,
    Evaluation,
    Row,
    end_settings,
    has_results,
    read_evaluation,
    write_evaluation,
    write_result,
)
from ssl_jax.report import evaluation_table, images_settings, write_images, write_report
from ssl_jax.run.folder import FORMAT
from ssl_jax.spmd import make_spmd
from ssl_jax.step import Program


def evaluator_of(train, test, batch_size=64, knn_k=200):
    config = tiny_config(batch_size=32)
    config.eval.update(batch_size=batch_size, knn_k=knn_k)
    config.data.num_classes = train.num_classes
    config.eval.at_end = True
    return Evaluator(config, make_spmd(), train, test)


def untrained(train, test, batch_size=64):
    """An evaluator, and the state of an untrained encoder."""
    evaluator, spmd = evaluator_of(train, test, batch_size), make_spmd()
    schedule = run_schedule(evaluator.config, train.num_examples)
    return evaluator, spmd.replicate(Program(evaluator.config, schedule, spmd).init())


def evaluate(folder, train, test):
    """Evaluates an untrained encoder and writes its images; returns its features of both splits."""
    evaluator, state = untrained(train, test)
    variables = evaluated_variables(evaluator._method, state)
    write_images(folder, evaluator.finish(folder, jax.device_get(variables), state), step=0)
    return [evaluator.features(variables, split) for split in (train, test)]


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labeled")
    splits = random_source(96), random_source(40, seed=1)
    return folder, splits, evaluate(folder, *splits)


def is_done(evaluator, folder):
    return evaluator.is_done(folder, images_settings(folder))


def images_of_the_end(evaluator, images):
    settings = end_settings(evaluator.config, evaluator._held_out)
    return {"originals": images, "settings": np.array(settings)}


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
    (note,) = evaluation._notes()
    counts = f"{least.min() + 1} and {least.max() + 9} labels per class"
    name = whole[0].class_names[least.argmin()]
    assert note.startswith(f"Not measured: {counts}, as class '{name}' has only {least.min()} ")


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


def test_diagnostics_and_views_are_of_a_sample_of_all_classes(monkeypatch):
    """In a source that is sorted by class, the first ids are of one class."""
    train = random_source(96)
    order = np.argsort(train.labels, kind="stable")
    train = ArraySource(train.images[order], train.labels[order])
    monkeypatch.setattr(module, "_SAMPLED", 16)
    monkeypatch.setattr(module, "_ALIGNED", 16)
    assert len(set(train.labels[:16])) == 1 and len(set(train.labels[fixed_sample(96, 16)])) == 4
    found = {}
    for labels in ("with", "without"):
        source = train if labels == "with" else ArraySource(train.images)
        evaluator, state = untrained(source, random_source(24, seed=1), batch_size=6)
        found[labels] = evaluator.measure(state)
    views = evaluator._views(state, fixed_sample(96, 16))
    variables = evaluated_variables(evaluator._method, state)
    encoded = [evaluator.features(variables, ArraySource(pixels(view))) for view in views]
    features = evaluator.features(variables, train)
    expected = diagnostics.rankme(features[fixed_sample(96, 16)])
    assert expected > 1.01 * diagnostics.rankme(features[:16])
    for measured in found.values():
        assert 0 < measured["eval_data_wait"] < 1
        assert measured["rankme"] == pytest.approx(expected, rel=1e-3)
        uniform = diagnostics.uniformity(features[fixed_sample(96, 8)])
        assert measured["uniformity"] == pytest.approx(uniform, rel=1e-2)
        aligned = diagnostics.alignment(*encoded)
        assert measured["alignment"] == pytest.approx(aligned, rel=1e-3)
    pictures = evaluator._view_pictures(state)
    np.testing.assert_array_equal(pictures["originals"], train.images[fixed_sample(96, 12)])


def test_one_class_is_evaluated_as_unlabeled(tmp_path):
    splits = [random_source(n, seed=n, classes=1) for n in (96, 40)]
    evaluator = evaluator_of(*splits)
    plan = "Evaluating nearest neighbors and a map only. All training images are of one class (0)."
    assert evaluator.plan().startswith(plan)
    evaluate(tmp_path, *splits)
    assert is_done(evaluator, tmp_path)
    assert not (tmp_path / "evaluation.json").exists()
    assert "map_label" not in saved_images(tmp_path)


def test_class_names_that_are_not_utf_8_are_escaped(tmp_path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    images = random_source(16).images
    source = ArraySource(images, np.arange(16) % 2, ["tea", name])
    assert source.class_names == ("tea", "caf\\udce9")
    arrays = {"map_features": np.eye(16, dtype=np.float32), "map_label": source.labels}
    arrays |= {"map_images": images, "class_names": np.array(source.class_names)}
    write_images(tmp_path, arrays, step=0)
    assert "udce9" in (tmp_path / "projector" / "metadata.tsv").read_text()


ROWS = '{"rows": [{"name": "simclr", "knn": 0.5}], "test_examples": '
HUGE = [f"{ROWS}{count}}}" for count in ("1e300", 10**400)]
CORRUPT = ["", "{", "[]", '{"rows": [], "test_examples": 1}', "[" * 9999, *HUGE]


@pytest.mark.parametrize("content", CORRUPT)
def test_run_with_a_corrupt_evaluation_is_not_done_and_prints_other_results(tmp_path, content):
    train = random_source(24)
    evaluator = evaluator_of(train, train)
    write_images(tmp_path, images_of_the_end(evaluator, train.images[:2]), step=0)
    assert not is_done(evaluator, tmp_path)
    (tmp_path / "evaluation.json").write_text(content)
    assert not is_done(evaluator, tmp_path)
    metric = {"value": 0.5, "low": 0.4, "high": 0.6}
    write_result(tmp_path, "knn", "kNN", {"examples": 4, "top1": metric})
    first, second = evaluation_table(tmp_path)
    assert "evaluation.json is corrupt" in first and second.startswith("kNN: top-1 50.00")


@pytest.mark.parametrize(
    ("key", "value", "done"),
    [
        *(("crop_fraction", 0.3, False), ("knn_k", 3, False), ("trials", 3, False)),
        *(("batch_size", 8, True), ("knn_every_epochs", 2.0, True), ("at_end", False, True)),
    ],
)
def test_run_is_evaluated_again_if_settings_of_its_results_change(tmp_path, key, value, done):
    evaluator = evaluator_of(random_source(24), None)
    write_images(tmp_path, images_of_the_end(evaluator, random_source(2).images), step=0)
    evaluator.config.eval[key] = value
    assert is_done(evaluator, tmp_path) == done


def test_end_of_a_run_records_its_settings_and_held_out_images(labeled):
    folder, (train, test), _ = labeled
    assert is_done(evaluator_of(train, test), folder)
    assert not is_done(evaluator_of(train, random_source(40, seed=2)), folder)


def test_labeled_held_out_images_can_replace_unlabeled_ones_after_the_end(tmp_path):
    """As the run advises when it can't measure accuracies."""
    train, test = random_source(24), random_source(24, seed=1)
    evaluator = evaluator_of(train, ArraySource(test.images))
    assert "Give labels" in evaluator.plan()
    write_images(tmp_path, images_of_the_end(evaluator, train.images[:2]), step=0)
    assert is_done(evaluator, tmp_path) and not has_results(tmp_path)  # so the data may change
    assert not is_done(evaluator_of(train, test), tmp_path)
    row = Row("simclr", {}, {"linear": 0.7})
    write_evaluation(tmp_path, Evaluation([row], 24, ""))
    assert has_results(tmp_path)


def flipped(data, place):
    """The data with one byte changed."""
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_run_without_its_images_is_not_done(tmp_path):
    evaluator = evaluator_of(random_source(24), None)
    assert not is_done(evaluator, tmp_path)
    images = random_source(2).images
    write_images(tmp_path, images_of_the_end(evaluator, images), step=0)
    assert is_done(evaluator, tmp_path)
    file = tmp_path / "report_images.npz"
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:  # an array's data follows its header of about 60 bytes
        places = [each.header_offset + 60 + each.compress_size // 2 for each in archive.infolist()]
    for damaged in (b"", *(flipped(whole, place) for place in places)):
        file.write_bytes(damaged)
        assert not is_done(evaluator, tmp_path)
    assert evaluator.plan().startswith("Not evaluated. There are no held-out images.")


def test_notes_explain_missing_columns_and_encoders_that_have_seen_labels(tmp_path):
    images = random_source(24).images
    train = ArraySource(images, np.minimum(np.arange(24) // 8, 2), list("abcd"))
    train.labels[16:] = np.where(np.arange(8) < 3, 3, 0)  # no image is of class 2
    evaluator = evaluator_of(train, train)
    missing = "Not measured: 5 labels per class, as class 'd' has only 3 in the training images."
    assert evaluator._notes() == (missing,)
    evaluator.config.data.subset = 0.25
    (few, _) = evaluator._notes()
    assert (
        few == "Linear probe and kNN learn from the 24 labeled images of config.data.subset=0.25."
    )
    evaluator.config.data.subset = 1.0
    evaluator._needs_labels = True
    seen, _ = evaluator._notes()
    assert seen.startswith("The encoder itself was trained with labels")
    row = Row("simclr", {1: np.array([0.5, 0.6])}, {"linear": 0.7})
    write_evaluation(tmp_path, Evaluation([row], 24, "", 1, (seen, missing)))
    assert read_evaluation(tmp_path / "evaluation.json").notes == (seen, missing)
    assert evaluation_table(tmp_path)[2:] == [seen, missing]


def test_encoder_of_a_fine_tuned_run_is_called_so():
    train = random_source(24)
    evaluator = evaluator_of(train, train)
    assert evaluator.plan() == "Evaluating the features of the frozen encoder and two baselines."
    evaluator.config.method, evaluator.config.init_from.path = "supervised", "runs/a"
    assert "features of the fine-tuned encoder" in evaluator.plan()
    assert Row(FINE_TUNED, {}, {}).trained


def test_features_that_cannot_fit_in_memory_are_refused_at_the_start(monkeypatch):
    train = random_source(24)
    size = 4 * 48 * 8  # 48 images with 8 features, float32
    monkeypatch.setattr(memory, "host_memory", lambda: size)
    evaluator_of(train, train, knn_k=4)
    with pytest.raises(UserError, match=r"5 neighbors of 24 images take 1.9 KiB.*eval.knn_k"):
        evaluator_of(train, train, knn_k=5)
    monkeypatch.setattr(memory, "host_memory", lambda: size - 1)
    with pytest.raises(UserError, match=r"take 1.5 KiB, but this machine has 1.5 KiB.*subset"):
        evaluator_of(train, train, knn_k=2)


def several(source):
    """The source's images with two classes each: their own, and whether it is even."""
    targets = np.eye(4, dtype=np.int8)[source.labels]
    even = (source.labels % 2 == 0).astype(np.int8)[:, None]
    names = ("a", "b", "c", "d", "even")
    return ArraySource(source.images, np.concatenate([targets, even], axis=1), names)


def test_several_labels_per_image_are_measured_by_mean_average_precision(tmp_path):
    splits = several(random_source(96)), several(random_source(40, seed=1))
    evaluate(tmp_path, *splits)
    evaluation = read_evaluation(tmp_path / "evaluation.json")
    for row in evaluation.rows:
        low, high = row.intervals["mean_ap"]
        assert row.single.keys() == {"mean_ap"} and not row.trials
        assert 0 <= low <= row.single["mean_ap"] <= high <= 1
    assert evaluation.find("raw pixels").single["mean_ap"] > 0.9
    assert any("kNN and few labels per class" in note for note in evaluation.notes)
    assert "Linear probe, mAP" in evaluation_table(tmp_path)[0]
    evaluator = evaluator_of(*splits)
    assert "mean average precision is measured" in evaluator.plan()
    absent = ArraySource(splits[1].images, np.zeros((40, 5), np.int8), splits[1].targets.names)
    assert "No class has an image in both" in evaluator_of(splits[0], absent).plan()


def test_sample_without_a_class_of_the_held_out_images_leaves_out_average_precision(tmp_path):
    train, test = random_source(96), several(random_source(40, seed=1))
    targets = several(train).targets.values
    targets[fixed_sample(96, 5)] = 0
    splits = ArraySource(train.images, targets, test.targets.names), test
    evaluator, state = untrained(*splits)
    assert "mean average precision is measured" in evaluator.plan()
    config = evaluator.config
    config.eval.linear_images = 5
    evaluator = Evaluator(config, make_spmd(), *splits)
    said = "No class has an image both among the 5 training images that the linear probe learns"
    assert evaluator.plan().startswith("Evaluating nearest neighbors and a map only. " + said)
    pictures = evaluator.finish(
        tmp_path, jax.device_get(evaluated_variables(evaluator._method, state)), state
    )
    assert said in str(pictures["not_scored"]) and "neighbors" in pictures
    assert not (tmp_path / "evaluation.json").exists()


def test_classifier_of_several_labels_is_measured_on_the_classes_of_both_splits():
    rng = np.random.default_rng(0)
    logits, values = rng.normal(size=(30, 3)), rng.integers(0, 2, (30, 3)).astype(np.int8)
    learned = Targets(np.array([[1, 1, 0]], np.int8), ("a", "b", "unseen"))
    splits = [types.SimpleNamespace(targets=learned)]
    splits.append(types.SimpleNamespace(targets=Targets(values, ("b", "new", "unseen"))))
    found = module._precisions(logits, *module._both_targets(*splits))
    (only,) = found["classes"]
    assert only["name"] == "b" and found["excluded"] == ["a", "unseen", "new"]
    assert only["mean_ap"] == pytest.approx(average_precision_score(values[:, 0], logits[:, 1]))
