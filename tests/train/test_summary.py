"""Summaries at a run's start and end, against numbers counted by hand."""

import json
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from images import config_of, fill
from tiny import method_config, random_source, share_steps, tiny_config, with_whole_images

from ssl_jax.config import apply_overrides
from ssl_jax.data.arrays import ArraySource
from ssl_jax.data.sources import make_sources
from ssl_jax.errors import UserError
from ssl_jax.spmd import make_spmd
from ssl_jax.train import pretrain, summary
from ssl_jax.train.setup import Setup

ONE = jax.devices()[:1]


def test_start_summary_has_network_batch_and_devices():
    setup = Setup(tiny_config(batch_size=320, microbatch=160, epochs=2.0))
    params = jax.eval_shape(setup.program.init).params
    rows = dict(summary.start_rows(setup, params, Path("runs/a"), 0))
    assert rows["method"] == "simclr, ResNet-4 ×0.125, 2 views of 8 px, float32"
    # As in test_encoder. The projector maps 8 to 8 and 8 to 16, each followed by BatchNorm; the
    # last one has no shift.
    encoder = 9 * (3 * 8 + 2 * 8 * 8) + 2 * 3 * 8
    projector = 8 * 8 + 2 * 8 + 8 * 16 + 16
    trained = encoder + projector
    assert rows["parameters"] == (
        f"{encoder / 1000:.3g} thousand in the encoder, {trained / 1000:.3g} thousand trainable in "
        "total"
    )
    assert rows["images"] == "1,347 for training, 8×8 px"
    assert rows["classes"].startswith("10 (0 133, 1 136, ")
    assert rows["classes"].endswith("; labels: scikit-learn")
    assert rows["held out"] == "450 images, 8×8 px"
    assert rows["batch"] == ("320, 40 per device in microbatches of 160, BatchNorm over 160 images")
    assert rows["devices"] == f"8 × {jax.devices()[0].device_kind}"
    assert rows["steps"] == "8, 2 epochs of 4 steps" and rows["workdir"] == "runs/a"
    rows = dict(summary.start_rows(setup, params, Path("runs/a"), 3))
    assert rows["steps"] == "8, 5 remaining, 2 epochs of 4 steps"


def test_one_view_and_one_epoch_are_singular():
    config = tiny_config(method="supervised", batch_size=320, epochs=1.0)
    with config.unlocked():
        config.views = {"view": config.views.view1}
    setup = Setup(config)
    rows = dict(summary.start_rows(setup, jax.eval_shape(setup.program.init).params, Path("a"), 0))
    assert ", 1 view of 8 px, " in rows["method"] and rows["steps"] == "4, 1 epoch of 4 steps"


def of_data(train, test=None, **data):
    """What is said of data, without a run."""
    config = tiny_config()
    config.data.update(data)
    setup = types.SimpleNamespace(train=train, test=test, config=config)
    return dict(summary.data_rows(setup)), summary.data_warnings(setup)


def test_start_summary_says_what_was_understood_of_the_labels():
    images = np.zeros((6, 8, 9, 3), np.uint8)
    names, labels = [f"c{i}" for i in range(12)], [0, 0, 1, -1, -1, -1]
    some = ArraySource(images, labels, names, labels_from="some.npz")
    rows, warnings = of_data(some, ArraySource(images), validation=0.5)
    assert rows["images"] == "6 for training, 8×9 px" and not warnings
    first = ", ".join(["c0 2", "c1 1", *(f"c{i} 0" for i in range(2, 10))])
    expected = f"12 ({first}, …); 3 images have no label; labels: some.npz"
    assert rows["classes"] == expected
    share = "0.5 of the training images (config.data.validation)"
    assert rows["held out"] == f"6 images, 8×9 px, no labels, {share}"
    rows, warnings = of_data(ArraySource(images))
    assert (rows["classes"], rows["held out"]) == ("unknown, no labels", "none") and not warnings


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["test", "train"], "called test and train. If they are splits, set"),
        (["Train"], "called Train. If they are splits"),
        (["all"], "All training images are of one class (all)"),
        (["plane", "train"], ""),
    ],
)
def test_classes_that_are_probably_not_meant_are_warned_of(names, words):
    images = np.zeros((4, 8, 8, 3), np.uint8)
    source = ArraySource(images, np.arange(4) % len(names), names)
    _, warnings = of_data(source, source)
    assert words in " ".join(warnings) if words else not warnings


def test_classifier_with_more_outputs_than_classes_is_warned_of():
    source = random_source()
    _, warnings = of_data(source, source, num_classes=1000)
    assert not warnings  # no classifier is trained
    config = tiny_config(method="supervised")
    config.data.num_classes = 1000
    setup = types.SimpleNamespace(train=source, test=source, config=config)
    (warning,) = summary.data_warnings(setup)
    assert "1,000 outputs (config.data.num_classes) for 4 classes" in warning


def test_sizes_of_image_files_are_read_from_their_headers(tmp_path):
    pytest.importorskip("tensorflow")
    fill(tmp_path, per_class=3)
    config = config_of(tmp_path)
    rows, _ = of_data(make_sources(config)[0], **config.data)
    assert rows["images"] == "9 for training, 36×30 to 36×40 px"
    assert rows["classes"] == f"3 (cat 3, dog 3, emu 3); labels: subfolders of {tmp_path}"


def test_frozen_parameters_are_not_counted_as_trainable():
    config = tiny_config(method="supervised")
    config.supervised.freeze = True
    setup = Setup(config)
    rows = dict(summary.start_rows(setup, jax.eval_shape(setup.program.init).params, Path("a"), 0))
    assert rows["parameters"].endswith(", 90 trainable in total")  # 8 features to 10 classes


def test_step_is_traced_and_compiled_once_and_its_flops_are_counted():
    traces = []

    def step(state, batch):
        traces.append(1)
        return state + 1, batch @ jnp.ones((32, 64))

    arguments = (jnp.zeros((256, 1024)), jnp.ones((16, 32)))
    program, rows = summary.compiled(jax.jit(step), arguments, 4)
    assert isinstance(program, jax.stages.Compiled)
    state, product = program(*arguments)
    np.testing.assert_array_equal(product, np.full((16, 64), 32.0))
    assert float(state[0, 0]) == 1.0 and len(traces) == 1
    rows = dict(rows)
    flops = 2 * 16 * 32 * 64
    assert rows["FLOPs"].startswith(
        f"{flops / 1000:.1f} k per step, {flops / 4000:.1f} k per device ("
    )
    assert rows["compilation"].endswith("seconds")
    # A MiB goes in and one comes out.
    size, parts = re.fullmatch(r"([\d.]+) MiB per device \((.*)\)", rows["memory"]).groups()
    assert 2.0 <= float(size) < 2.2
    assert "state and data 1" in parts and "results 1" in parts


def test_step_that_changes_dtypes_of_the_state_is_refused():
    arguments = ({"queue": jnp.zeros((4, 2), jnp.int32)}, jnp.ones(3))

    def step(state, batch):
        return {"queue": state["queue"] + 0.5}, batch

    message = r"changes \['queue'\] of the state from int32 \[4, 2\] to float32 \[4, 2\]\. Make the"
    with pytest.raises(UserError, match=message):
        summary.compiled(jax.jit(step), arguments, 1)


@pytest.mark.parametrize("flag", ["jax_disable_jit", "jax_debug_nans"])
def test_step_is_not_compiled_ahead_under_jax_debugging_flags(flag):
    step = jax.jit(lambda state, batch: (state, batch))
    before = getattr(jax.config, flag)
    jax.config.update(flag, True)
    try:
        assert summary.compiled(step, (jnp.zeros(2), jnp.zeros(2)), 1) == (step, [])
    finally:
        jax.config.update(flag, before)


def test_step_that_cannot_be_traced_is_returned_unchanged():
    def step(state):  # like the step under pmap
        return state

    assert summary.compiled(step, (1,), 8) == (step, [])


def test_end_summary_has_time_speed_and_best_knn(tmp_path):
    records = [
        {"step": 1, "images_per_s": 100.0},
        {"step": 2, "images_per_s": 3000.0},
        {"step": 2, "knn": 0.875},
        {"step": 3, "images_per_s": 2500.0},
        {"step": 4, "knn": 0.8125},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(lines)
    rows = dict(summary.end_rows(tmp_path, 200.4, 0))
    assert rows == {
        "time": "3 minutes and 20.4 seconds",
        "speed": "2,500 img/s (median)",
        "kNN": "81.25% (best 87.50% at step 2)",
    }
    assert dict(summary.end_rows(tmp_path, 5.0, 3))["time"] == "5 seconds since step 3"
    assert "time" not in dict(summary.end_rows(tmp_path, 0.0, 4))
    assert not list(summary.end_rows(tmp_path / "none", 0.0, 0))


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        (
            "moco",
            {"moco.queue": 1408},
            r"moco.queue is 1,408, .* 1,347 tr.* --config.moco.queue=640",
        ),
        ("swav", {"swav.queue": 1408}, "--config.swav.queue=640"),
        ("simclr", {"simclr.memory_bank": 2816}, "--config.simclr.memory_bank=1280"),
        (
            "moco",
            {"batch_size": 64, "model.bn_group_size": 1},
            "only 8 .*: increase config.batch_size, or set config.model.bn_group_size=0.$",
        ),
        ("simclr", {"batch_size": 8}, "only 8 images.*: increase config.batch_size.$"),
        ("simclr", {"microbatch": 8}, "only 8 images.*: increase config.microbatch.$"),
        (
            "simclr",
            {"batch_size": 8, "microbatch": 8},
            "increase config.batch_size and config.microbatch.$",
        ),
        ("moco", {"moco.queue": 1280}, ""),
        ("simclr", {"optim.warmup_epochs": 9.0}, "warmup of 90 steps"),
    ],
)
def test_start_warns_of_settings_that_learn_less_and_its_advice_is_accepted(method, changes, words):
    config = method_config(method)
    config.data.num_classes = 10
    config.update_from_flattened_dict({"batch_size": 128, **changes})
    warnings = list(summary.start_warnings(Setup(config)))
    assert len(warnings) == bool(words) and re.search(words, "".join(warnings))
    if advice := re.findall(r"--config\.(\S+=\d+)", "".join(warnings)):
        assert not list(summary.start_warnings(Setup(apply_overrides(config, advice))))


def test_start_summary_says_that_shuffling_has_no_effect_on_one_device(monkeypatch):
    monkeypatch.setattr("ssl_jax.train.setup.make_spmd", lambda *a, **k: make_spmd(devices=ONE))
    for method, shuffle in (("moco", True), ("moco", False), ("simclr", True)):
        config = method_config(method)
        config.data.num_classes, config.moco.shuffle = 10, shuffle
        setup = Setup(config)
        params = jax.eval_shape(setup.program.init).params
        devices = dict(summary.start_rows(setup, params, Path("a"), 0))["devices"]
        expected = "; moco.shuffle has no effect on one device" * (method == "moco" and shuffle)
        assert devices == f"1 × {ONE[0].device_kind}{expected}"


def test_double_precision_is_refused():
    with jax.enable_x64(True), pytest.raises(UserError, match="JAX_ENABLE_X64 is on, but runs com"):
        Setup(tiny_config())


def test_changed_settings_are_noted_with_what_they_do_not_change():
    (note,) = summary.settings_notes(["log_every: 10 -> 7"], 2)
    assert note == "Settings changed (log_every: 10 -> 7); config.json records it."
    (note,) = summary.settings_notes(["eval.knn_k: 9 -> 7", "init_from.path: a -> b"], 4)
    assert "keeps its weights" in note
    assert summary.settings_notes([], 2) == []


def test_changed_environment_is_noted_with_its_effect_on_losses():
    (note,) = summary.environment_notes(["devices.count: 8 -> 4"])
    assert "(devices.count: 8 -> 4)" in note and "up to floating-point rounding" in note
    (note,) = summary.environment_notes(["derived.batchnorm_images: 20 -> 40"])
    assert "losses will differ" in note and "rounding" not in note
    assert summary.environment_notes([]) == []


def test_evaluation_line_has_the_accuracies_that_were_measured():
    setup = Setup(tiny_config(steps=8))
    always = {"rankme": 12.34, "eval_data_wait": 0.253}
    line = summary.evaluation_line(setup, 4, {"knn": 0.875, **always})
    assert line == "step 4/8 | kNN 87.50% | RankMe 12.3 | data wait 25.3%"
    accuracies = {"test_accuracy": 0.5, "probe_accuracy": 0.25, **always}
    line = summary.evaluation_line(setup, 8, accuracies)
    assert line == "step 8/8 | top-1 50.00% | online probe 25.00% | RankMe 12.3 | data wait 25.3%"


def test_verbosity_of_a_run(tmp_path, capsys, monkeypatch):
    share_steps(monkeypatch)
    config = with_whole_images(tiny_config(steps=2, batch_size=64))
    config.optim.warmup_epochs = 1.0  # longer than the run
    pretrain(config, tmp_path / "quiet", verbosity="quiet")
    warning, report = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: the warmup of 21 steps")
    assert report == f"Report: {tmp_path / 'quiet' / 'report.html'}"
    pretrain(config, tmp_path / "all")
    lines = capsys.readouterr().out.splitlines()
    names = [line.partition(" ")[0] for line in lines]
    begin = ["Opening", "Initializing", "Augmenting", "method", "parameters", "images", "classes"]
    begin += ["held", "batch", "devices", "steps", "workdir", "warning:"]
    assert names[:17] == [*begin, "Compiling", "compilation", "FLOPs", "memory"]
    assert names[-4:] == ["time", "speed", "kNN", "Report:"]
    # A finished run that is part of a larger command prints nothing.
    pretrain(config, tmp_path / "all", verbosity="line")
    assert capsys.readouterr().out == ""


def test_classifier_of_several_labels_has_an_output_per_class():
    config, source = tiny_config(method="supervised"), random_source()
    several = ArraySource(source.images, np.eye(4, dtype=np.int8)[source.labels])
    config.data.num_classes = 4
    setup = types.SimpleNamespace(train=several, test=several, config=config)
    assert not summary.data_warnings(setup)
