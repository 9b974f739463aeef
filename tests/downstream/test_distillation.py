"""Distillation of a tiny fine-tuned run: recipe, loss, and a student on unlabeled images."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from classifier_runs import BRIEF, WHOLE, first_state
from encoders import same
from tiny import tiny_config

from ssl_jax.config import Schedule
from ssl_jax.downstream import distill, finetune
from ssl_jax.downstream.distillation import distill_config
from ssl_jax.errors import UserError
from ssl_jax.interop.initial_weights import resolve_initial_weights
from ssl_jax.interop.load import restore_state
from ssl_jax.methods import make_method


@pytest.fixture(scope="module")
def teacher(run):
    """The run fine-tuned on a tenth of the labels, from the projector's first hidden layer."""
    workdir = run.with_name("teacher")
    finetune(run, workdir, labels=0.1, overrides=(*BRIEF, WHOLE, "batch_size=16"))
    return workdir


def test_distill_config_is_the_recipe_of_simclr_v2(run):
    for changes, temperature in (
        ((), 0.1),
        (("model.bn_group_size=1",), 0.1),
        (("model.width=0.03125",), 1.0),
        (("model.depth=18",), 1.0),
        (("distill.temperature=2.0",), 2.0),
    ):
        config = distill_config(run, changes)
        assert config.distill.temperature == temperature
        assert (config.optim.name, config.optim.weight_decay) == ("lars", 1e-4)


def test_distillation_from_a_run_without_classifier_is_refused(run):
    with pytest.raises(UserError, match="has no classifier to learn from: fine-tune it first"):
        first_state(distill_config(run))
    config = tiny_config(method="distill")
    with pytest.raises(UserError, match="config.distill.teacher is empty"):
        make_method(config, Schedule(1, 1))


def test_resumed_distillation_keeps_all_keys_of_its_teacher():
    started = tiny_config(method="distill")
    networks = {"depth": 18, "width": 0.125, "sk": True, "stem": "cifar", "padding": "same"}
    started.distill.update(networks, project_first=True, projector_layer=1, projector_hidden=7)
    config = tiny_config(method="distill")
    resolve_initial_weights(config, started)
    assert config.distill == started.distill


@pytest.mark.long
def test_student_learns_from_unlabeled_images_and_keeps_the_teacher_constant(
    teacher, unlabeled, tmp_path
):
    overrides = (*unlabeled, "model.width=0.03125")
    assert distill(teacher, tmp_path / "student", overrides=overrides)["examples"] == 6
    student = restore_state(tmp_path / "student")
    source = restore_state(teacher)
    assert same(student.method_state["teacher"]["params"], source.params)
    assert same(student.method_state["teacher"]["batch_stats"], source.method_state["batch_stats"])
    lines = (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()
    assert any("agreement" in json.loads(line) for line in lines)


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.0), (3.0, 0.25)])
def test_distillation_loss_is_the_formula_of_the_paper(teacher, temperature, share):
    config = distill_config(teacher)
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
    labeled = -np.mean(np.log(softmax(s[:, 0]))[np.arange(6), label])
    outputs = {"logits": jnp.asarray(s, jnp.float32), "teacher": jnp.asarray(t, jnp.float32)}
    loss, logs = method.loss({}, outputs, {}, {"label": jnp.asarray(label)}, jnp.int32(0))
    assert float(loss) == pytest.approx((1 - share) * expected + share * labeled, rel=1e-5)
    agreed = np.mean(s[:, 0].argmax(1) == t[:, 0].argmax(1))
    assert float(logs["agreement"]) == pytest.approx(agreed)
