"""Evaluations that train, of a tiny run on digits: recipes, fine-tuning, distillation, commands."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoders import blank_state, copy_run, same
from tiny import tiny_config

from ssl_jax.cli import evals
from ssl_jax.cli import main as cli
from ssl_jax.config import Schedule, default_config
from ssl_jax.downstream import distill, finetune, runs
from ssl_jax.errors import UserError
from ssl_jax.evals.results import read_results, write_result
from ssl_jax.interop.initial_weights import load_initial_weights, resolve_initial_weights
from ssl_jax.interop.load import newest_step, restore_state
from ssl_jax.interop.weights import portable_config
from ssl_jax.methods import make_method
from ssl_jax.run.folder import read_config
from ssl_jax.step import assemble, init_state

BRIEF = ("epochs=1.0", "batch_size=64", "log_every=100", "eval.trials=2")
WHOLE = "views.view.crop.sampler=none"  # images, which compile faster than crops


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    """A SimCLR run with a projector of three layers."""
    return copy_run(finished_run, tmp_path_factory.mktemp("runs") / "simclr")


@pytest.fixture(scope="module")
def teacher(run):
    """It fine-tuned on a tenth of the labels, from the projector's first layer."""
    workdir = run.with_name("teacher")
    finetune(run, workdir, labels=0.1, overrides=(*BRIEF, WHOLE, "batch_size=16"))
    return workdir


def command(capsys, *arguments):
    code = cli.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


# Recipes


@pytest.mark.parametrize(
    ("recipe", "rate", "batch", "epochs", "per_epoch"),
    [
        ("simclr", 0.1, 4096, 90, False),
        ("simclr_cifar", 0.1, 512, 100, False),
        ("moco", 30, 256, 100, True),
        ("swav", 0.3, 256, 100, True),
        ("byol", 0.2, 1024, 80, False),
        ("simsiam", 0.1, 4096, 90, True),
    ],
)
def test_linear_recipes_are_the_official_ones(run, recipe, rate, batch, epochs, per_epoch):
    config = runs.linear_config(run, recipe)
    assert (config.optim.lr, config.batch_size, config.epochs) == (rate, batch, epochs)
    assert config.optim.lr_scaling == "linear" and config.optim.warmup_epochs == 0
    assert config.optim.momentum == 0.9 and config.optim.per_epoch == per_epoch
    # SimCLR's code leaves the bias out of the decay; the others have PyTorch's, or none.
    assert config.optim.decay_norm_bias == (recipe != "simclr")
    assert config.optim.weight_decay == (1e-6 if recipe in ("simclr", "swav") else 0)
    assert config.optim.nesterov == (recipe in ("simclr", "simclr_cifar", "byol"))
    assert config.optim.name == ("larc" if recipe == "simsiam" else "sgd")
    assert config.optim.schedule == ("step" if recipe == "moco" else "cosine")
    assert config.supervised.classifier_init == (
        0.01 if recipe in ("moco", "swav", "simsiam") else 0
    )
    (view,) = config.views.values()
    assert view.jitter.prob == view.gray == view.blur.prob == view.solarize.prob == 0
    assert view.flip == 0 and view.size == 8  # as in the run


@pytest.mark.parametrize("source", ["moco", "swav"])
def test_nothing_of_the_runs_own_optimiser_stays(run, tmp_path, source):
    other = tmp_path / source
    shutil.copytree(run, other)
    record = json.loads((other / "config.json").read_text())
    optim = record["config"]["optim"]
    optim |= {"schedule": "step", "step_epochs": [1.0], "final_lr": 0.1, "warmup_start": 0.3}
    optim |= {"trust_coefficient": 0.02, "frozen_steps": 9}
    record["config"]["model"]["bn_group_size"] = 1
    record["config"]["init_from"]["heads"] = True
    record["config"]["supervised"]["classifier_init"] = 0.5
    record["config"]["distill"] |= {"temperature": 3.0, "labels": 0.5, "teacher": "/nowhere"}
    (other / "config.json").write_text(json.dumps(record))
    made = [runs.linear_config(run, "byol"), runs.linear_config(other, "byol")]
    made += [runs.finetune_config(run), runs.finetune_config(other)]
    for mine, theirs in zip(made[::2], made[1::2], strict=True):
        assert mine.optim.to_dict() == theirs.optim.to_dict()
        assert theirs.model.bn_group_size == 0 and theirs.optim.final_lr == 0
        assert mine.supervised.to_dict() == theirs.supervised.to_dict()
        assert theirs.distill.to_dict() == default_config().distill.to_dict()
        assert not theirs.start.heads
    assert runs.distill_config(other).distill.labels == 0


def test_what_is_made_of_a_run_sends_nothing_where_the_run_did(run, tmp_path, monkeypatch):
    theirs = read_config(run)
    theirs.wandb = "theirs"
    monkeypatch.setattr(runs, "config_at", lambda path: theirs)
    made = [runs.finetune_config(run), runs.linear_config(run, "moco")]
    assert [config.wandb for config in made] == ["", ""]
    assert portable_config(theirs)["wandb"] == ""


def test_a_file_that_was_being_written_is_no_result(tmp_path):
    file = write_result(tmp_path, "knn", "kNN", {"examples": 4})
    (file.parent / ".knn.123.json").write_text("{")
    (file.parent / "lin.json").write_text("{")
    found, corrupt = read_results(tmp_path)
    assert [record["what"] for record in found] + corrupt == ["kNN", "lin.json"]


def test_mocos_rate_falls_at_60_and_80_of_100_epochs(run):
    config = runs.linear_config(run, "moco")
    config.data.num_classes = 10
    _, _, rate = assemble(config, Schedule(10, 1000))
    rates = [float(rate(10 * epoch)) for epoch in (0, 59, 60, 79, 80, 99)]
    np.testing.assert_allclose(rates, [30, 30, 3, 3, 0.3, 0.3], rtol=1e-5)


def test_fine_tuning_is_simclr_v2s(run):
    config = runs.finetune_config(run, labels=0.01)
    assert (config.epochs, config.data.subset, config.supervised.projector_layer) == (60, 0.01, 1)
    for labels, layer in ((0.1, 1), (1.0, 0)):
        more = runs.finetune_config(run, labels=labels)
        assert (more.epochs, more.supervised.projector_layer) == (30, layer)
    assert runs.finetune_config(run, projector_layer=1).supervised.projector_layer == 1
    config.data.num_classes = 10
    _, _, rate = assemble(config, Schedule(10, 1000))
    assert float(rate(0)) == pytest.approx(0.005 * 1024**0.5)
    assert config.optim.weight_decay == 0 and config.optim.name == "lars"


@pytest.mark.parametrize("changed", [{"width": 2.0}, {"sk": True}])
def test_a_larger_network_is_fine_tuned_at_a_smaller_rate(run, monkeypatch, changed):
    source = runs.config_at(run)
    source.model.update(changed)
    monkeypatch.setattr(runs, "config_at", lambda path: source)
    assert runs.finetune_config(run).optim.lr == 0.002
    assert runs.finetune_config(run, overrides=["optim.lr=0.01"]).optim.lr == 0.01


@pytest.mark.parametrize(
    ("dataset", "epochs", "layer"),
    [
        ("imagenet2012_subset", 60, 1),  # of which TFDS takes 1 %
        ("imagenet2012_subset/1pct", 60, 1),
        ("imagenet2012_subset/1pct:5.0.0", 60, 1),
        ("imagenet2012_subset/10pct", 30, 1),
        ("imagenet2012", 30, 0),
    ],
)
def test_published_shares_of_imagenets_labels_are_few_labels(run, dataset, epochs, layer):
    data = ("data.name=tfds", f"data.dataset={dataset}")
    config = runs.finetune_config(run, overrides=data)
    assert (config.epochs, config.supervised.projector_layer) == (epochs, layer)
    changed = runs.finetune_config(run, overrides=(*data, "epochs=7"))
    assert changed.epochs == 7
    folder, what = evals._finetuned(config, "")
    assert folder == f"finetune_{dataset.replace('/', '_').replace(':', '_')}_1"
    assert what == f"fine-tuned on 100 % of {dataset}"
    assert evals._finetuned(config, dataset) == (
        "finetune_1",
        "fine-tuned on 100 % of the images",
    )


def test_distillation_is_simclr_v2s(run):
    for changes, temperature in (
        ((), 0.1),
        (("model.bn_group_size=1",), 0.1),
        (("model.width=0.03125",), 1.0),
        (("model.depth=18",), 1.0),
        (("distill.temperature=2.0",), 2.0),
    ):
        config = runs.distill_config(run, changes)
        assert config.distill.temperature == temperature
        assert (config.optim.name, config.optim.weight_decay) == ("lars", 1e-4)


# Weights that come from elsewhere


def first_state(config, initial=blank_state):
    config.data.num_classes = 10
    resolve_initial_weights(config)
    return load_initial_weights(initial(config), config)


def drawn_state(config):
    method, optimizer, _ = assemble(config, Schedule(1, 10))
    return init_state(method, optimizer, config)


@pytest.fixture(scope="module")
def kept(run):
    """The config of fine-tuning on few labels, which keeps a layer, and its first state."""
    config = runs.finetune_config(run, labels=0.1)
    return config, first_state(config, drawn_state)


def test_fine_tuning_starts_at_the_runs_encoder_and_kept_projector(run, kept):
    source, state = restore_state(run), kept[1]
    assert same(state.params["encoder"], source.params["encoder"])
    assert sorted(state.params["projector"]) == ["bn1", "dense1"]
    assert same(state.params["projector"]["dense1"], source.params["projector"]["dense1"])
    stats = state.method_state["batch_stats"]["projector"]
    assert same(stats["bn1"], source.method_state["batch_stats"]["projector"]["bn1"])
    assert not state.params["classifier"]["Dense_0"]["kernel"].any()


def test_what_is_kept_of_the_projector_is_its_hidden_layer(run, kept):
    config, state = kept
    method = make_method(config, Schedule(1, 1))
    images = jnp.asarray(np.random.default_rng(0).random((3, 8, 8, 3)), jnp.float32)
    classifier = {**state.params["classifier"]["Dense_0"]}
    classifier["kernel"] = jax.random.normal(jax.random.key(0), classifier["kernel"].shape)
    params = {**state.params, "classifier": {"Dense_0": classifier}}
    logits = method.classify(params, state.method_state["batch_stats"], images)
    from ssl_jax import load

    hidden = load(run, projector_layer=1)
    features = hidden._apply(hidden.variables, images)
    np.testing.assert_allclose(
        logits, features @ classifier["kernel"] + classifier["bias"][None], rtol=1e-4, atol=1e-4
    )


def test_pretraining_may_start_there_too_and_targets_follow(run):
    config = runs.finetune_config(run)
    config.method = "moco"
    config.batch_size = 64
    config.moco.update(queue=64, out=8)
    with config.unlocked():
        config.views = {"a": config.views["view"], "b": config.views["view"]}
    source, state = restore_state(run), first_state(config)
    assert same(state.params["encoder"], source.params["encoder"])
    assert same(state.method_state["target"]["encoder"], source.params["encoder"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": {"depth": 18}}, r"config.model.depth is 18, but the encoder in .* has 4"),
        ({"supervised": {"projector_layer": 3}}, "has 2 hidden layers: use 0 to 2"),
        ({"init_from": {"path": "/nowhere"}}, "/nowhere"),
        ({"init_from": {"step": 7}}, "no checkpoint of step 7"),
    ],
)
def test_weights_that_do_not_fit_are_refused(run, changes, sentence):
    config = runs.finetune_config(run)
    for group, values in changes.items():
        config[group].update(values)
    with pytest.raises(UserError, match=sentence):
        first_state(config)


def test_a_run_without_a_classifier_teaches_nothing(run):
    with pytest.raises(UserError, match="has no classifier to learn from: fine-tune it first"):
        first_state(runs.distill_config(run))
    config = tiny_config(method="distill")
    with pytest.raises(UserError, match="config.distill.teacher is empty"):
        make_method(config, Schedule(1, 1))


# Training them


def test_the_frozen_encoder_stays_as_it_is_bit_for_bit(run, capsys):
    flags = [f"--config.{change}" for change in (*BRIEF, WHOLE)]
    out = command(capsys, "linear", f"--from={run}", "--recipe=moco", *flags)
    step = read_config(run / "linear_moco").start.step
    said = f"recipe moco, step {step}, batch_size=64, epochs=1.0, {WHOLE}: top-1 "
    assert f"linear classifier, {said}" in out
    source, state = restore_state(run), restore_state(run / "linear_moco")
    assert same(state.params["encoder"], source.params["encoder"])
    assert same(
        state.method_state["batch_stats"]["encoder"], source.method_state["batch_stats"]["encoder"]
    )
    assert state.params["classifier"]["Dense_0"]["kernel"].any()
    record = json.loads((run / "evals" / "linear_moco.json").read_text())
    assert record["trained_in"].endswith("linear_moco") and record["step"] == step
    page = (run / "report.html").read_text()
    assert "Further evaluations" in page and "recipe moco" in page


@pytest.fixture
def unlabelled(tmp_path):
    """Overrides for images without labels, and six of them with labels to measure on."""
    from images import fill

    fill(tmp_path / "sorted", per_class=30)
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, file in enumerate(sorted((tmp_path / "sorted").rglob("*.png"))):
        shutil.copy(file, flat / f"{number}.png")
    fill(tmp_path / "test", per_class=2)
    data = (f"data.dir={flat}", f"data.test_dir={tmp_path / 'test'}", "data.name=folder")
    return (*BRIEF, WHOLE, *data)


def test_a_student_learns_its_teachers_opinion_of_images_without_labels(
    teacher, unlabelled, tmp_path
):
    overrides = (*unlabelled, "model.width=0.03125")
    assert distill(teacher, tmp_path / "student", overrides=overrides)["examples"] == 6
    student = restore_state(tmp_path / "student")
    source = restore_state(teacher)
    assert same(student.method_state["teacher"]["params"], source.params)
    assert same(student.method_state["teacher"]["batch_stats"], source.method_state["batch_stats"])
    lines = (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()
    assert any("agreement" in json.loads(line) for line in lines)


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.0), (3.0, 0.25)])
def test_the_distillation_loss_is_the_papers(teacher, temperature, share):
    config = runs.distill_config(teacher)
    config.data.num_classes = 10
    config.distill.update(temperature=temperature, labels=share)
    resolve_initial_weights(config)
    method = make_method(config, Schedule(1, 1))
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, 6, 1, 10))
    label = rng.integers(0, 10, 6)

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)

    log_s = np.log(softmax(s[:, 0] / temperature))
    expected = -np.mean(np.sum(softmax(t[:, 0] / temperature) * log_s, axis=1)) * temperature**2
    labelled = -np.mean(np.log(softmax(s[:, 0]))[np.arange(6), label])
    outputs = {"logits": jnp.asarray(s, jnp.float32), "teacher": jnp.asarray(t, jnp.float32)}
    loss, logs = method.loss({}, outputs, {}, {"label": jnp.asarray(label)}, jnp.int32(0))
    assert float(loss) == pytest.approx((1 - share) * expected + share * labelled, rel=1e-5)
    agreed = np.mean(s[:, 0].argmax(1) == t[:, 0].argmax(1))
    assert float(logs["agreement"]) == pytest.approx(agreed)


# On features


def test_commands_on_features_print_and_keep_what_they_find(run, capsys, tmp_path):
    out = command(capsys, "knn", f"--from={run}", "--k=5", "--majority")
    step = newest_step(run)
    assert f"5 nearest neighbors, majority, step {step}: top-1 " in out and "Report: " in out
    found = json.loads(command(capsys, "linear", f"--from={run}", "--json"))
    assert found["metrics"]["examples"] == 450 and found["penalty"] > 0
    assert 0.1 < found["metrics"]["top1"]["low"] < found["metrics"]["top1"]["high"] < 1
    file = tmp_path / "features.npz"
    told = json.loads(command(capsys, "features", f"--from={run}", f"--out={file}", "--json"))
    with np.load(file, allow_pickle=False) as arrays:
        assert arrays["train"].shape == (told["train"], told["width"])
        assert arrays["test_labels"].shape == (450,) and len(arrays["class_names"]) == 10
    layer = json.loads(
        command(
            capsys, "features", f"--from={run}", f"--out={file}", "--json", "--projector-layer=2"
        )
    )
    assert (told["width"], layer["width"]) == (8, 24)
    subset = ["--config.data.subset=0.1", "--projector-layer=1", "--json"]
    few = json.loads(command(capsys, "knn", f"--from={run}", *subset))
    assert few["k"] == 200 and few["metrics"]["examples"] == 450
    told = f"130 nearest neighbors, temperature 0.1, step {step}, projector layer 1"
    assert few["what"] == f"{told}, data.subset=0.1"
    command(capsys, "knn", f"--from={run}", "--k=200", "--config.eval.batch_size=32")
    # What was measured otherwise is beside it; how many images were encoded at a time is no change.
    files = {file.name for file in (run / "evals").glob("knn*.json")}
    assert len(files) == 3 and "knn.json" in files
    assert (run / "evals" / "linear_lbfgs.json").exists()
    page = (run / "report.html").read_text()
    assert few["what"] in page and f"5 nearest neighbors, majority, step {step}" in page


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("knn", "--config.data.names=x"), "config.data has no key 'names'"),
        (("linear", "--recipe=mocco"), "--recipe=mocco. Did you mean 'moco'"),
        (("features", "--out=/nowhere/f.npz"), "no folder /nowhere"),
        (("knn", "--step=7"), "no checkpoint of step 7"),
        (("knn", "--majority", "--temperature=0.1"), "--majority has no temperature"),
        (("knn", "--majority", "--config.eval.knn_temperature=1"), "--majority has no temperature"),
        (("knn", "--config.model.padding=same"), "config.model.padding is not for a frozen enc"),
        (("knn", "--config.eval.trials=3"), "config.eval.trials is not for a frozen encoder"),
        (("knn", "--config.views.view2.size=9"), r"view2.size is not for .* views.view1.size"),
        (("linear", "--config.epochs=5"), "config.epochs is not for a frozen encoder's features"),
        (("linear", "--config.eval.knn_k=5"), "config.eval.knn_k is not for a frozen encoder's"),
        (("features", "--out=f.npz", "--config.seed=1"), "config.seed is not for a frozen enc"),
    ],
)
def test_bad_input_is_one_sentence(run, capsys, arguments, sentence):
    name, *rest = arguments
    assert cli.main([name, f"--from={run}", *rest]) == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_images_without_labels_are_not_fine_tuned_on(run, unlabelled, tmp_path):
    with pytest.raises(UserError, match="training images have no labels to learn"):
        finetune(run, tmp_path / "other", overrides=unlabelled)
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_measured_is_not_trained(run, tmp_path):
    from images import fill

    fill(tmp_path / "images", per_class=30)
    data = (f"data.dir={tmp_path / 'images'}", "data.name=folder", "data.test_dir=")
    with pytest.raises(UserError, match="no held-out split with labels to measure"):
        finetune(run, tmp_path / "other", overrides=data)
    assert not (tmp_path / "other").exists()


def test_data_without_a_held_out_split_is_not_measured(run, tmp_path, capsys):
    from images import fill

    other = tmp_path / "run"
    shutil.copytree(run, other)
    fill(tmp_path / "images", per_class=4)
    flags = ("--config.data.name=folder", f"--config.data.dir={tmp_path / 'images'}")
    assert cli.main(["features", f"--from={other}", *flags, f"--out={tmp_path / 'f.npz'}"]) == 0
    with np.load(tmp_path / "f.npz") as arrays:
        assert "test" not in arrays.files
    assert cli.main(["knn", f"--from={other}", *flags]) == 2
    assert "no held-out split with labels" in capsys.readouterr().err
