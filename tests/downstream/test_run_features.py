"""Commands on the features of a tiny run, and the results that they keep."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from classifier_runs import command
from images import fill
from pyarrow import parquet
from tiny import random_source

from ssl_jax.cli import evals
from ssl_jax.cli import main as cli
from ssl_jax.downstream.features import Features, require_format
from ssl_jax.downstream.keeping import result_name, results_of, source_of
from ssl_jax.errors import UserError
from ssl_jax.evals.evaluator import Evaluator
from ssl_jax.evals.results import read_results, write_result
from ssl_jax.interop.load import newest_step


@pytest.mark.long
def test_commands_on_features_print_and_keep_their_results(run, capsys, tmp_path):
    out = command(capsys, "knn", f"--from={run}", "--k=5", "--majority")
    step = newest_step(run)
    assert f"5 nearest neighbors, majority, step {step}: top-1 " in out and "Report: " in out
    found = json.loads(command(capsys, "linear", f"--from={run}", "--json"))
    assert found["metrics"]["examples"] == 450 and found["penalty"] > 0
    assert 0.1 < found["metrics"]["top1"]["low"] < found["metrics"]["top1"]["high"] < 1
    file = tmp_path / "features.npz"
    written = json.loads(command(capsys, "features", f"--from={run}", f"--out={file}", "--json"))
    with np.load(file, allow_pickle=False) as arrays:
        assert arrays["train"].shape == (written["train"], written["width"])
        assert arrays["test_labels"].shape == (450,) and len(arrays["class_names"]) == 10
        assert arrays["test_names"][449] == "449" and not len(arrays["skipped"])
    layer = json.loads(
        command(
            capsys, "features", f"--from={run}", f"--out={file}", "--json", "--projector-layer=2"
        )
    )
    assert (written["width"], layer["width"]) == (8, 24)
    subset = ["--config.data.subset=0.1", "--projector-layer=1", "--json"]
    few = json.loads(command(capsys, "knn", f"--from={run}", *subset))
    assert few["k"] == 200 and few["metrics"]["examples"] == 450
    expected = f"130 nearest neighbors, temperature 0.1, step {step}, projector layer 1"
    assert few["what"] == f"{expected}, data.subset=0.1"
    command(capsys, "knn", f"--from={run}", "--k=200", "--config.eval.batch_size=32")
    # Other settings get a file of their own; the batch size of the encoder is not one of them.
    files = {file.name for file in (run / "evals").glob("knn*.json")}
    assert len(files) == 3 and "knn.json" in files
    assert (run / "evals" / "linear_lbfgs.json").exists()
    page = (run / "report.html").read_text()
    assert few["what"] in page and f"5 nearest neighbors, majority, step {step}" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("knn", "--config.data.names=x"), "config.data has no key 'names'"),
        (("linear", "--recipe=mocco"), "--recipe=mocco. Did you mean 'moco'"),
        (("features", "--out=/nowhere/f.npz"), "no folder /nowhere"),
        (("features", "--out=/proc/f.npz"), "Cannot write /proc/f.npz .* choose another path"),
        (("features", "--out=f.csv"), "--out is f.csv. Give it a name that ends in .npz or .parq"),
        (("knn", "--step=7"), "no checkpoint of step 7"),
        (("knn", "--temperature=nan"), "--temperature=nan is not positive"),
        (("knn", "--majority", "--temperature=0.1"), "--majority has no temperature"),
        (("knn", "--majority", "--config.eval.knn_temperature=1"), "--majority has no temperature"),
        (
            ("knn", "--config.model.padding=same"),
            "config.model.padding doesn't apply to a frozen enc",
        ),
        (("knn", "--config.eval.trials=3"), "config.eval.trials doesn't apply to a frozen"),
        (("knn", "--config.views.view2.size=9"), r"view2.size doesn't apply .* views.view1.size"),
        (("linear", "--config.epochs=5"), "config.epochs doesn't apply to a frozen"),
        (("linear", "--config.eval.knn_k=5"), "config.eval.knn_k doesn't apply to a frozen"),
        (("features", "--out=f.npz", "--config.seed=1"), "config.seed doesn't apply to a frozen"),
    ],
)
def test_evaluation_commands_refuse_bad_input(run, capsys, arguments, message):
    name, *rest = arguments
    assert cli.main([name, f"--from={run}", *rest]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_knn_without_a_held_out_split_is_refused_and_features_are_written(
    run, tmp_path, capsys, monkeypatch
):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    fill(tmp_path / "images", per_class=4)
    flags = ("--config.data.name=folder", f"--config.data.dir={tmp_path / 'images'}")
    assert cli.main(["features", f"--from={other}", *flags, f"--out={tmp_path / 'f.npz'}"]) == 0
    with np.load(tmp_path / "f.npz") as arrays:
        assert "test" not in arrays.files
        assert arrays["train_names"][[0, 11]].tolist() == ["cat/0.png", "emu/3.png"]
        assert arrays["train_labels"][[0, 11]].tolist() == [0, 2]
    monkeypatch.setattr(Evaluator, "features", lambda *args: 1 / 0)  # missing labels come first
    assert cli.main(["knn", f"--from={other}", *flags]) == 2
    assert "There are no held-out images. Set config.data.test_dir" in capsys.readouterr().err
    flat = (flags[0], f"--config.data.dir={tmp_path / 'images' / 'cat'}")
    assert cli.main(["linear", f"--from={other}", *flat]) == 2
    both = "There are no held-out images and the training images have no labels."
    assert both in capsys.readouterr().err


def test_knn_counts_labeled_images_only(run, tmp_path, capsys):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    source = random_source(60)
    some = np.where(np.arange(60) % 3 == 0, source.labels, -1)
    for name, labels in (("whole", source.labels), ("some", some), ("few", source.labels[::3])):
        images = source.images[::3] if name == "few" else source.images
        arrays = {"images": images, "labels": labels, "class_names": source.class_names}
        np.savez(tmp_path / f"{name}.npz", **arrays)

    def knn(train, test):
        dirs = (f"dir={tmp_path}/{train}.npz", f"test_dir={tmp_path}/{test}.npz", "name=packed")
        flags = [f"--config.data.{each}" for each in dirs]
        return json.loads(command(capsys, "knn", f"--from={other}", "--k=5", "--json", *flags))

    expected, found = knn("few", "few"), knn("some", "some")
    assert found["metrics"] == expected["metrics"] and found["metrics"]["examples"] == 20


def test_read_results_skips_temporary_files_and_reports_corrupt_ones(tmp_path):
    file = write_result(tmp_path, "knn", "kNN", {"examples": 4})
    (file.parent / ".knn.123.json").write_text("{")
    (file.parent / "lin.json").write_text("{")
    found, corrupt = read_results(tmp_path)
    assert [record["what"] for record in found] + corrupt == ["kNN", "lin.json"]


EVALUATIONS = ("knn", "linear", "linear --recipe=moco", "finetune", "distill", "transfer")


@pytest.mark.parametrize("line", EVALUATIONS)
def test_results_that_cannot_be_written_are_refused_before_anything_is_computed(
    run, tmp_path, capsys, monkeypatch, line
):
    """A file in place of the folder, as root may write everywhere."""
    other = tmp_path / "run"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("evals", "checkpoints"))
    (other / "evals").write_text("")
    (tmp_path / "sets.json").write_text('{"digits": {"data": {"name": "digits"}}}')
    more = [f"--sets={tmp_path}/sets.json"] if line == "transfer" else []
    assert cli.main([*line.split(), f"--from={other}", *more]) == 2
    message = f"Cannot write {other}/evals .* Move it away, or keep the results in .* --results=DIR"
    assert re.search(message, capsys.readouterr().err)


def test_results_of_a_run_that_may_only_be_read_are_kept_elsewhere(run, tmp_path, capsys):
    other, kept = tmp_path / "run", tmp_path / "results"
    shutil.copytree(run, other)
    before = {file: file.stat().st_mtime_ns for file in other.rglob("*")}
    out = command(capsys, "knn", f"--from={other}", f"--results={kept}")
    assert "top-1" in out and "Report" not in out
    assert read_results(kept)[0][0]["what"].startswith("200 nearest neighbors")
    assert {file: file.stat().st_mtime_ns for file in other.rglob("*")} == before


def test_results_of_several_encoders_are_kept_in_one_folder_but_not_in_another_run(
    run, tmp_path, capsys
):
    other, kept = tmp_path / "other", tmp_path / "results"
    shutil.copytree(run, other)
    names = {result_name("knn", source_of(path, kept)) for path in (run, other)}
    assert len(names) == 2 and "knn" not in names
    assert result_name("knn", source_of(run, results_of(run, run))) == "knn"
    for line in ("knn", "finetune"):
        assert cli.main([line, f"--from={run}", f"--results={other}"]) == 2
        assert "so it is another run, whose report would show" in capsys.readouterr().err


def test_link_in_place_of_the_results_of_a_file_of_weights_is_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"")
    (tmp_path / "a.safetensors_evals").symlink_to(tmp_path)
    with pytest.raises(UserError, match="a.safetensors_evals is a link"):
        results_of(tmp_path / "a.safetensors")


def test_result_is_printed_before_it_is_stored(run, capsys, monkeypatch):
    def full(*args, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evals, "write_result", full)
    assert cli.main(["knn", f"--from={run}"]) == 2
    out, err = capsys.readouterr()
    assert "top-1" in out and "No space left on device" in err


def a_few_features():
    train, test = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    labels, names = np.int32([1, 0, 1]), ("a/x.png", "b/y.png", "b/z.png")
    return Features(train, labels, test, None, ("a", "b"), 7, names, ("4", "5", "6"), ("b/w.png",))


def test_features_have_a_parquet_row_for_each_image(tmp_path):
    features, file = a_few_features(), tmp_path / "features.parquet"
    features.save(file)
    table = parquet.read_table(file)
    assert table.column_names == ["split", "row", "name", "label", "class", "targets", "features"]
    about = {b"step": b"7", b"skipped": b'["b/w.png"]', b"class_names": b'["a", "b"]'}
    assert table.schema.metadata == about
    rows = table.to_pylist()
    assert [row["split"] for row in rows] == 3 * ["train"] + 3 * ["test"]
    names = [*features.train_names, *features.test_names]
    assert [(row["row"], row["name"]) for row in rows] == [*zip(2 * [0, 1, 2], names, strict=True)]
    assert [(row["label"], row["class"]) for row in rows[:4]] == [
        *((1, "b"), (0, "a"), (1, "b"), (None, None))
    ]
    found = np.float32([row["features"] for row in rows])
    np.testing.assert_array_equal(found, np.concatenate([features.train, features.test]))


def test_parquet_without_pyarrow_is_refused_with_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"package pyarrow.*\[parquet\].*or write an .npz"):
        require_format(Path("f.parquet"))
