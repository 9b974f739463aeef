"""Configs derived from a run, their initial weights, and data that can't be evaluated."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from classifier_runs import first_state
from encoders import same
from images import fill

from ssl_jax.cli import main as cli
from ssl_jax.config import default_config
from ssl_jax.data.sources import make_sources
from ssl_jax.downstream import classifier, finetune
from ssl_jax.downstream.classifier import loss_warning, train_classifier
from ssl_jax.downstream.distillation import distill_config
from ssl_jax.downstream.finetuning import finetune_config
from ssl_jax.downstream.linear_recipes import linear_config
from ssl_jax.errors import UserError
from ssl_jax.evals.results import end_settings, write_result
from ssl_jax.interop.load import restore_state
from ssl_jax.interop.weights import portable_config
from ssl_jax.report import write_images
from ssl_jax.run.folder import read_config, write_config
from ssl_jax.run.log import MetricsLog


@pytest.mark.parametrize("source", ["moco", "swav"])
def test_derived_configs_keep_nothing_of_the_runs_optimizer_and_classifier(run, tmp_path, source):
    other = tmp_path / source
    shutil.copytree(run, other)
    record = json.loads((other / "config.json").read_text())
    optim = record["config"]["optim"]
    optim |= {"schedule": "step", "step_epochs": [1.0], "final_lr": 0.1, "warmup_start": 0.3}
    optim |= {"trust_coefficient": 0.02, "frozen_steps": 9}
    record["config"]["model"]["bn_group_size"] = 1
    record["config"]["init_from"] |= {"heads": True, "state": "all"}
    record["config"]["supervised"]["classifier_init"] = "normal_0.01"
    record["config"]["distill"] |= {"temperature": 3.0, "labels": 0.5, "teacher": "/nowhere"}
    (other / "config.json").write_text(json.dumps(record))
    made = [linear_config(run, "byol"), linear_config(other, "byol")]
    made += [finetune_config(run), finetune_config(other)]
    for expected, found in zip(made[::2], made[1::2], strict=True):
        assert expected.optim.to_dict() == found.optim.to_dict()
        assert found.model.bn_group_size == 0 and found.optim.final_lr == 0
        assert expected.supervised.to_dict() == found.supervised.to_dict()
        assert found.distill.to_dict() == default_config().distill.to_dict()
        assert not found.init_from.heads and found.init_from.state == "weights"
        assert found.data.num_classes == 0  # the data's own, whatever the run was trained on
    assert distill_config(other).distill.labels == 0


def test_derived_configs_and_exports_drop_the_wandb_project(run, tmp_path, monkeypatch):
    config = read_config(run)
    config.wandb = "project"
    monkeypatch.setattr(classifier, "config_at", lambda path: config)
    made = [finetune_config(run), linear_config(run, "moco")]
    assert [each.wandb for each in made] == ["", ""]
    assert portable_config(config)["wandb"] == ""


def test_pretraining_from_a_run_initializes_encoder_and_target(run):
    config = finetune_config(run)
    config.method = "moco"
    config.batch_size = 64
    config.moco.update(queue=64, out=8)
    with config.unlocked():
        config.views = {"a": config.views["view"], "b": config.views["view"]}
    source, state = restore_state(run), first_state(config)
    assert same(state.params["encoder"], source.params["encoder"])
    assert same(state.method_state["target"]["encoder"], source.params["encoder"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"depth": 18}}, r"config.model.depth is 18, but the encoder in .* has 4"),
        ({"supervised": {"projector_layer": 3}}, "has 2 hidden layers: use 0 to 2"),
        ({"init_from": {"path": "/nowhere"}}, "/nowhere"),
        ({"init_from": {"step": 7}}, "no checkpoint of step 7"),
    ],
)
def test_initial_weights_that_do_not_fit_the_config_are_refused(run, changes, message):
    config = finetune_config(run)
    for group, values in changes.items():
        config[group].update(values)
    with pytest.raises(UserError, match=message):
        first_state(config)


def test_fine_tuning_on_unlabeled_images_is_refused_before_training(run, unlabeled, tmp_path):
    with pytest.raises(UserError, match="The training images have no labels."):
        finetune(run, tmp_path / "other", overrides=unlabeled)
    assert not (tmp_path / "other").exists()


def test_fine_tuning_without_a_labeled_test_split_is_refused_before_training(run, tmp_path):
    fill(tmp_path / "images", per_class=30)
    data = (f"data.dir={tmp_path / 'images'}", "data.name=folder", "data.test_dir=")
    with pytest.raises(UserError, match="There are no held-out images. Set"):
        finetune(run, tmp_path / "other", overrides=data)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("finetune", "finetune_1"),
        ("linear --recipe=simclr", "linear_simclr"),
        ("distill", "distill"),
        ("transfer --rates=0.1", "transfer"),
        ("transfer --rates=0.1", "transfer/digits"),
        ("transfer --rates=0.1 --decays=0", "transfer/digits/chosen_rate_0.1_decay_0"),
    ],
)
def test_link_in_place_of_the_default_folder_of_a_run_is_refused(
    run, tmp_path, capsys, line, place
):
    """The evaluated run may come from someone else."""
    other, victim, sets = tmp_path / "run", tmp_path / "victim", tmp_path / "sets.json"
    shutil.copytree(run, other)
    victim.mkdir()
    (other / place).parent.mkdir(parents=True, exist_ok=True)
    (other / place).symlink_to(victim)
    sets.write_text(json.dumps({"digits": {"data": {}}}))
    more = [f"--sets={sets}", "--config.batch_size=16"] if "transfer" in line else []
    assert cli.main([*line.split(), f"--from={other}", *more]) == 2
    assert f"{other / place} is a link" in capsys.readouterr().err
    assert not list(victim.iterdir())


def test_metrics_measured_with_other_settings_are_not_returned(run, tmp_path, monkeypatch):
    """A run that is evaluated again for new settings may be stopped before it is."""
    config = finetune_config(run)
    _, test = make_sources(config)
    settings = np.array(end_settings(config, test.fingerprint))
    write_images(tmp_path, {"settings": settings}, step=0)
    metric = {"value": 0.5, "low": 0.4, "high": 0.6}
    measured = {"examples": 4, "top1": metric}
    write_result(tmp_path, "classifier", "the run's own classifier", measured)
    monkeypatch.setattr(classifier, "pretrain", lambda *args, **more: SimpleNamespace(state=0))
    assert train_classifier(config, tmp_path) == (0, measured)
    config.eval.crop_fraction = 0.3
    assert train_classifier(config, tmp_path) == (0, None)


@pytest.mark.parametrize(
    ("loss", "warns"), [(4877.0, True), (math.nan, True), (2.31, True), (2.3, False)]
)
def test_classifier_that_has_learned_nothing_is_warned_of(run, tmp_path, loss, warns):
    config = linear_config(run, "moco")
    config.data.num_classes = 10
    write_config(tmp_path, config, "")
    assert loss_warning(tmp_path) == ""
    log = MetricsLog(tmp_path)
    log.write(1, {"loss": 0.1})
    log.write(2, {"loss": loss})
    log.write(2, {"knn": 0.5})
    log.close()
    found = loss_warning(tmp_path)
    assert ("Lower --config.optim.lr (now 30), or train longer" in found) == warns == bool(found)
