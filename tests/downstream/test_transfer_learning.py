"""Transfer of a tiny run to two datasets: settings chosen on held-out images, resumable."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from encoders import copy_run, random_encoder
from tiny import method_config, random_source, without_color

from ssl_jax.cli import main as cli
from ssl_jax.data.sources import held_out_ids
from ssl_jax.downstream import transfer_learning
from ssl_jax.errors import UserError
from ssl_jax.evals.linear import METRICS
from ssl_jax.interop.weights import Weights, write_weights
from ssl_jax.recipes import set_channels

WHOLE = "--config.views.view.crop.sampler=none"  # whole images, which compile faster than crops
BRIEF = ("--config.steps=4", "--config.batch_size=16", "--config.log_every=100", WHOLE)


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    return copy_run(finished_run, tmp_path_factory.mktemp("transfer") / "run")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Digits, and packed files of three classes of blobs, of which the second is rare."""
    folder = tmp_path_factory.mktemp("sets")
    for split, n in (("train", 120), ("test", 60)):
        source = random_source(n=n, seed=n, classes=3)
        kept = (source.labels != 1) | (np.arange(n) % 3 == 0)
        np.savez(
            folder / f"{split}.npz",
            images=source.images[kept],
            labels=source.labels[kept],
            class_names=np.array(["a", "b", "c"]),
        )
    packed = {"name": "packed", "dir": f"{folder}/train.npz", "test_dir": f"{folder}/test.npz"}
    file = folder / "sets.json"
    listed = {
        "blobs": {"metric": "mean_per_class", "data": packed},
        "digits": {"data": {"name": "digits", "test_fraction": 0.5}},
    }
    file.write_text(json.dumps(listed))
    return file


@pytest.mark.long
def test_transfer_chooses_on_held_out_images_reports_the_test_split_and_resumes(run, sets, capsys):
    line = ["transfer", f"--from={run}", f"--sets={sets}", "--rates=0.1,1e-9", "--decays=0"]
    assert cli.main([*line, *BRIEF]) == 0
    out, err = capsys.readouterr()
    rows = [row.split(" | ") for row in out.splitlines() if row.startswith("| ")]
    assert [row[:2] for row in rows[2:]] == [["| blobs", "mean per class"], ["| digits", "top1"]]
    folder = run / "transfer" / "blobs"
    tried = {}
    for rate in (0.1, 1e-9):
        one = folder / f"rate_{rate:g}_decay_0"
        metrics = json.loads((one / "evals" / "classifier.json").read_text())["metrics"]
        config = json.loads((one / "config.json").read_text())["config"]
        assert config["data"]["validation"] == 0.1 and config["optim"]["lr"] == rate
        tried[rate] = metrics["mean_per_class"]["value"]
    best = max(tried, key=tried.get)
    chosen = folder / f"chosen_rate_{best:g}_decay_0"
    config = json.loads((chosen / "config.json").read_text())["config"]
    assert config["data"]["validation"] == 0 and config["optim"]["nesterov"]
    with np.load(sets.with_name("train.npz")) as train, np.load(sets.with_name("test.npz")) as test:
        held = sum(round(0.1 * n) for n in np.bincount(train["labels"]))
        tests = len(test["labels"])
    assert metrics["examples"] == held
    record = json.loads((run / "evals" / "transfer_blobs_finetune.json").read_text())
    assert record["metrics"]["examples"] == tests and record["rate"] == best
    assert f"{100 * record['metrics']['mean_per_class']['value']:.1f} [" in rows[2][3]
    assert "blobs: fine-tuned, rate" in (run / "report.html").read_text()
    # The same command again trains nothing and prints the same.
    sizes = {f: f.stat().st_size for f in run.rglob("transfer/*/*/metrics.jsonl")}
    assert len(sizes) == 6
    assert cli.main([*line, *BRIEF]) == 0
    assert capsys.readouterr().out == out
    assert {f: f.stat().st_size for f in sizes} == sizes


def test_fine_tuning_is_chosen_by_the_metric_of_the_data_set(run, sets, tmp_path, monkeypatch):
    """The higher rate is best by top-1, the lower one by the mean per class."""
    trained = []

    def train(config, workdir, command, verbosity):
        trained.append((str(workdir.relative_to(tmp_path)), config.optim.weight_decay))
        top1, of_class = (0.9, 0.2) if config.optim.lr == 0.1 else (0.4, 0.6)
        found = {"top1": top1, "mean_per_class": of_class}
        return None, {name: {"value": x, "low": x, "high": x} for name, x in found.items()}

    monkeypatch.setattr(transfer_learning, "train_classifier", train)
    grid = {"rates": (0.1, 0.01), "decays": (0.5,), "overrides": ("batch_size=16",)}
    rows = transfer_learning.transfer(run, transfer_learning.read_sets(sets), tmp_path, **grid)
    assert trained == [
        (f"{name}/{trial}_decay_0.5", 0.5)
        for name, best in (("blobs", "0.01"), ("digits", "0.1"))
        for trial in ("rate_0.1", "rate_0.01", f"chosen_rate_{best}")
    ]
    blobs, digits = [line.split(" | ") for line in transfer_learning.table(rows)[2:]]
    assert [blobs[i] for i in (0, 1, 4)] == ["| blobs", "mean per class", "0.01, 0.5 |"]
    assert [digits[i] for i in (0, 1, 4)] == ["| digits", "top1", "0.1, 0.5 |"]
    assert (blobs[3], digits[3]) == ("60.0 [60.0, 60.0]", "90.0 [90.0, 90.0]")


def test_transfer_without_fine_tuning_starts_no_run(run, sets, capsys):
    before = set((run / "transfer").glob("*/*"))
    line = ["transfer", f"--from={run}", f"--sets={sets}", "--no-finetune", "--json"]
    assert cli.main(line) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["dataset"] for row in rows] == ["blobs", "digits"]
    assert all(set(row) == {"dataset", "metric", "linear"} for row in rows)
    assert rows[1]["linear"]["examples"] == 899  # half of the digits
    assert set((run / "transfer").glob("*/*")) == before


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("[", "Cannot read the list"),
        ("{}", "(write "),
        ('{"a": 1}', 'a needs a group "data"'),
        ('{"a/b": {"data": {}}}', "'a/b' can't be the name of a folder"),
        ('{"a": {"data": {"nam": "x"}}}', "config.data.nam. Did you mean 'name'"),
        ('{"a": {"data": {"threads": "x"}}}', "config.data.threads is 'x'. Give a value like 0"),
        ('{"a": {"data": {}, "metric": "top2"}}', "metric is 'top2'. Did you mean 'top1'"),
        ('{"a": {"data": {}, "metric": 5}}', "metric is '5'. Use one of"),
        ('{"a": {"data": {"dir": 5}}}', "config.data.dir is 5. Give a value like ''"),
        ('{"a": {"data": {"subset": 2}}}', "a: config.data.subset is 2.0: it must be above 0"),
        ('{"a": {"data": {"validation": 0.1}}}', "a: config.data.validation."),
        ('{"a": {"data": {}, "metrics": "x"}}', "a has no key 'metrics'. Did you mean 'metric'"),
    ],
)
def test_read_sets_refuses_bad_lists(tmp_path, listed, message):
    file = tmp_path / "sets.json"
    file.write_text(listed)
    with pytest.raises(UserError, match=re.escape(message)):
        transfer_learning.read_sets(file)


def test_a_device_is_no_list_of_datasets():
    with pytest.raises(UserError, match="/dev/zero"):
        transfer_learning.read_sets("/dev/zero")


def test_missing_data_is_refused_before_any_training(run, tmp_path, capsys):
    file = tmp_path / "sets.json"
    packed = {"name": "packed", "dir": "/nowhere.npz"}
    file.write_text(json.dumps({"digits": {"data": {}}, "b": {"data": packed}}))
    line = ["transfer", f"--from={run}", f"--sets={file}", f"--workdir={tmp_path / 'w'}"]
    assert cli.main(line) == 2
    assert "/nowhere.npz" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--config.optim.lr=1",), "config.optim.lr is set by transfer. Use --rates"),
        (("--config.init_from.step=1",), "config.init_from.step is set by transfer"),
        (("--rates=0.1,-0.1",), "digits: config.optim.lr is -0.1: it must be"),
        (("--config.batch_size=5000",), "digits: config.batch_size is 5000 but the training set"),
        (("--step=77",), "no checkpoint of step 77"),
        (("--no-finetune", "--rates=0.1"), "--rates is for fine-tuning"),
        (
            ("--no-finetune", "--config.optim.momentum=0.5"),
            "config.optim.momentum applies only to fine-t",
        ),
        (
            ("--no-finetune", "--config.batch_size=16"),
            "config.batch_size applies only to fine-tuning",
        ),
    ],
)
def test_bad_settings_are_refused_before_any_training(run, tmp_path, capsys, flags, message):
    file = tmp_path / "sets.json"
    file.write_text(json.dumps({"digits": {"data": {}}}))
    line = ["transfer", f"--from={run}", f"--sets={file}"]
    if "--no-finetune" not in flags:
        line.append(f"--workdir={tmp_path / 'w'}")
    assert cli.main([*line, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_classes_too_small_to_hold_images_out_are_refused_with_several_settings(
    run, sets, tmp_path, capsys
):
    file, few = tmp_path / "sets.json", tmp_path / "few.npz"
    with np.load(sets.with_name("train.npz")) as train:
        ids = np.concatenate([np.flatnonzero(train["labels"] == c)[:4] for c in range(3)])
        arrays = {name: train[name][ids] for name in ("images", "labels")}
        np.savez(few, class_names=train["class_names"], **arrays)
    data = {"name": "packed", "dir": str(few), "test_dir": str(few)}
    file.write_text(json.dumps({"few": {"data": data}}))
    line = ["transfer", f"--from={run}", f"--sets={file}", f"--workdir={tmp_path / 'w'}"]
    assert cli.main([*line, "--config.batch_size=4"]) == 2
    assert "few: The classes are too small to hold a tenth out" in capsys.readouterr().err


def test_fine_tuning_overrides_need_not_fit_the_evaluated_run(tmp_path, capsys):
    config = without_color(method_config("moco"))  # whose queue is no multiple of the new batch
    config.steps = 1
    config.data.num_classes = 0
    encoder = random_encoder(config)
    networks = ({"encoder": encoder[kind]} for kind in ("params", "batch_stats"))
    moco, file = tmp_path / "moco.safetensors", tmp_path / "sets.json"
    write_weights(Weights(config, *networks), moco)
    file.write_text(json.dumps({"digits": {"data": {}}}))
    line = ["transfer", f"--from={moco}", f"--sets={file}", "--rates=0.1", "--decays=0", WHOLE]
    assert cli.main([*line, "--config.epochs=0.05", "--config.batch_size=48", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["rate"] == 0.1 and row["finetune"]["examples"] == 450
    (trained,) = tmp_path.glob("moco.safetensors_evals/transfer/digits/*/config.json")
    assert json.loads(trained.read_text())["config"]["steps"] == 0  # replaced by epochs


def test_kept_linear_result_is_reused_for_the_same_weights_only(tmp_path, monkeypatch):
    config = without_color(method_config("simclr"))
    config.data.num_classes = 0
    sets = tmp_path / "sets.json"
    sets.write_text(json.dumps({"digits": {"data": {}}}))
    measured = []

    def measure(path, **settings):
        measured.append(path)
        return path

    def linear(features, metric):
        value = {"value": len(measured) / 10, "low": 0.0, "high": 1.0}
        return {"top1": value, "examples": 9}, 1.0

    monkeypatch.setattr(transfer_learning, "run_features", measure)
    monkeypatch.setattr(transfer_learning, "linear_metrics", linear)

    def write(name, seed):
        encoder = random_encoder(config, seed)
        networks = ({"encoder": encoder[kind]} for kind in ("params", "batch_stats"))
        write_weights(Weights(config, *networks), tmp_path / name)

    def transferred(name, results):
        listed = transfer_learning.read_sets(sets)
        path = tmp_path / name
        (row,) = transfer_learning.transfer(path, listed, results=results, rates=())
        return row.linear["top1"]["value"]

    write("a.safetensors", 0)
    write("b.safetensors", 1)
    for results in (None, tmp_path / "results"):
        measured.clear()
        names = ("a.safetensors", "b.safetensors", "a.safetensors")
        assert [transferred(name, results) for name in names] == [0.1, 0.2, 0.1]
    write("a.safetensors", 2)
    assert transferred("a.safetensors", None) == 0.3


@pytest.mark.parametrize("named", [{}, {"num_classes": 10}])
def test_encoder_of_a_classifier_is_transferred_to_other_classes(tmp_path, named):
    config = without_color(method_config("supervised"))
    config.data.num_classes = 7
    encoder = random_encoder(config)
    networks = ({"encoder": encoder[kind]} for kind in ("params", "batch_stats"))
    classifier, file = tmp_path / "classifier.safetensors", tmp_path / "sets.json"
    write_weights(Weights(config, *networks), classifier)
    file.write_text(json.dumps({"digits": {"data": named}}))
    sets = transfer_learning.read_sets(file)
    (row,) = transfer_learning.transfer(classifier, sets, rates=())
    assert row.linear["examples"] == 450


def test_read_sets_reads_the_list_in_configs():
    listed = transfer_learning.read_sets(Path(__file__).parents[2] / "configs" / "transfer.json")
    assert {data_set.metric for data_set in listed} == {*METRICS, "mean_ap_11_point"}
    assert len(listed) == 10


def write_several(folder, kept=3):
    """Packed files of images with several labels each, of which only some classes have images."""
    for split, n in (("train", 90), ("test", 40)):
        source = random_source(n=n, seed=n, classes=3)
        targets = np.eye(3, dtype=np.int8)[source.labels]
        targets[:5, 0] = -1
        targets[:, kept:] = 0
        file, names = folder / f"{split}.npz", np.array(["a", "b", "c"])
        np.savez(file, images=source.images, labels=targets, class_names=names)
    return {"name": "packed", "dir": f"{folder}/train.npz", "test_dir": f"{folder}/test.npz"}


def test_several_labels_per_image_are_measured_by_mean_average_precision(run, tmp_path, capsys):
    packed, file = write_several(tmp_path), tmp_path / "sets.json"
    line = ["transfer", f"--from={run}", f"--sets={file}", f"--results={tmp_path / 'kept'}"]
    file.write_text(json.dumps({"voc": {"data": packed}}))
    assert cli.main([*line, "--no-finetune"]) == 2
    assert "voc: The metric is top1, but the images have several labels" in capsys.readouterr().err
    file.write_text(json.dumps({"voc": {"metric": "mean_ap_11_point", "data": packed}}))
    assert cli.main([*line, "--no-finetune"]) == 0
    assert "| voc | mean ap 11 point | " in capsys.readouterr().out
    data = [f"--config.data.{key}={value}" for key, value in packed.items()]
    assert cli.main(["knn", f"--from={run}", *data]) == 2
    assert "The images have several labels each" in capsys.readouterr().err
    assert cli.main(["linear", f"--from={run}", f"--results={tmp_path}", *data, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["examples"] == 40 and len(metrics["classes"]) == 3
    assert metrics["mean_ap"]["low"] <= metrics["mean_ap"]["value"] <= metrics["mean_ap"]["high"]


def test_fine_tuning_on_several_labels_is_chosen_by_mean_average_precision(
    run, tmp_path, monkeypatch
):
    packed, file = write_several(tmp_path), tmp_path / "sets.json"
    listed = {"metric": "mean_ap", "data": packed}
    file.write_text(json.dumps({"voc": listed}))
    trained = []

    def train(config, workdir, command, verbosity):
        trained.append((config.optim.lr, config.data.validation))
        found = {"mean_ap": config.optim.lr, "mean_ap_11_point": 1 - config.optim.lr}
        return None, {name: {"value": x, "low": x, "high": x} for name, x in found.items()}

    monkeypatch.setattr(transfer_learning, "train_classifier", train)
    grid = {"rates": (0.1, 0.01), "decays": (0.0,), "overrides": ("batch_size=16",)}
    (row,) = transfer_learning.transfer(run, transfer_learning.read_sets(file), tmp_path, **grid)
    assert trained == [(0.1, 0.1), (0.01, 0.1), (0.1, 0.0)] and row.rate == 0.1
    assert "| 10.0 [10.0, 10.0] | 0.1, 0 |" in transfer_learning.table([row])[2]
    # A tenth of the images need not have a class that others have.
    with np.load(packed["dir"]) as arrays:
        changed = dict(arrays)
    changed["labels"][held_out_ids(None, 90, 0.1)] = 0
    np.savez(packed["dir"], **changed)
    with pytest.raises(UserError, match="voc: The classes are too small to hold a tenth out"):
        transfer_learning.transfer(run, transfer_learning.read_sets(file), tmp_path, **grid)


@pytest.mark.long
def test_fine_tuned_row_of_several_labels_is_measured_on_the_test_split(run, tmp_path, capsys):
    file = tmp_path / "sets.json"
    listed = {"metric": "mean_ap", "data": write_several(tmp_path)}
    file.write_text(json.dumps({"voc": listed}))
    line = ["transfer", f"--from={run}", f"--sets={file}", f"--results={tmp_path / 'kept'}"]
    assert cli.main([*line, "--rates=0.1", "--decays=0", *BRIEF, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["finetune"]["examples"] == 40 and len(row["finetune"]["classes"]) == 3
    assert 0 < row["finetune"]["mean_ap"]["value"] <= 1


def test_images_of_other_channels_than_the_encoders_are_refused(run, tmp_path, capsys):
    file, images = tmp_path / "sets.json", tmp_path / "gray.npz"
    pixels = random_source(n=40, classes=2).images[..., :1]
    np.savez(images, images=pixels, labels=np.arange(40) % 2, class_names=["a", "b"])
    data = {"name": "packed", "dir": str(images), "test_dir": str(images)}
    line = ["transfer", f"--from={run}", f"--sets={file}", f"--results={tmp_path / 'kept'}"]
    file.write_text(json.dumps({"gray": {"data": data | {"channels": 1}}}))
    for flags in (["--no-finetune"], ["--rates=0.1", "--config.batch_size=16"]):
        assert cli.main([*line, *flags]) == 2
        words = "gray: config.data.channels is 1, but the encoder was trained on images of 3 chann"
        assert words in capsys.readouterr().err
    file.write_text(json.dumps({"gray": {"data": data}}))
    assert cli.main([*line, "--no-finetune"]) == 2
    assert "images of 1 channel, but config.data.channels is 3" in capsys.readouterr().err


def test_channels_are_those_of_the_encoder_unless_the_list_names_them(tmp_path):
    config = without_color(method_config("simclr"))
    set_channels(config, 1)
    config.data.num_classes = 0
    encoder, file = random_encoder(config), tmp_path / "gray.safetensors"
    networks = ({"encoder": encoder[kind]} for kind in ("params", "batch_stats"))
    write_weights(Weights(config, *networks), file)
    sets = tmp_path / "sets.json"
    sets.write_text(json.dumps({"digits": {"data": {"range": [0, 200]}}}))
    (listed,) = transfer_learning.read_sets(sets)
    changed = transfer_learning.transfer_config(file, listed.overrides)
    assert changed.data.channels == 1 and changed.data.range == (0, 200)
