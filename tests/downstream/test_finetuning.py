"""Fine-tuning of a tiny run: SimCLR v2's recipe, and the weights that it starts from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from classifier_runs import first_state, random_state
from encoders import same

from ssl_jax import load
from ssl_jax.cli import evals
from ssl_jax.config import Schedule, run_schedule
from ssl_jax.downstream import classifier, finetuning
from ssl_jax.downstream.finetuning import finetune_config
from ssl_jax.interop.load import config_at, restore_state
from ssl_jax.methods import make_method
from ssl_jax.optim import learning_rate_schedule
from ssl_jax.step import assemble


def test_finetune_config_is_the_recipe_of_simclr_v2(run):
    config = finetune_config(run, labels=0.01)
    assert (config.epochs, config.data.subset, config.supervised.projector_layer) == (60, 0.01, 1)
    for labels, layer in ((0.1, 1), (1.0, 0)):
        more = finetune_config(run, labels=labels)
        assert (more.epochs, more.supervised.projector_layer) == (30, layer)
    assert finetune_config(run, projector_layer=1).supervised.projector_layer == 1
    config.data.num_classes = 10
    _, _, rate = assemble(config, Schedule(10, 1000))
    assert float(rate(0)) == pytest.approx(0.005 * 1024**0.5)
    assert config.optim.weight_decay == 0 and config.optim.name == "lars"


@pytest.mark.parametrize(("labels", "images", "steps"), [(0.01, 12_811, 751), (0.1, 128_116, 3754)])
def test_finetuning_has_simclr_v2s_rate_at_every_step(run, labels, images, steps):
    config = finetune_config(run, labels=labels)
    schedule = run_schedule(config, images)
    assert schedule.total_steps == steps  # N * epochs // B + 1
    expected = 0.005 * 32 * 0.5 * (1 + np.cos(np.pi * np.arange(steps) / steps))
    rate = jax.jit(learning_rate_schedule(config.optim, config.batch_size, schedule))
    np.testing.assert_allclose(rate(np.arange(steps, dtype=np.int32)), expected, rtol=1e-6)


@pytest.mark.parametrize("changed", [{"width": 2.0}, {"sk": True}])
def test_finetune_config_lowers_the_rate_of_larger_networks(run, monkeypatch, changed):
    source = config_at(run)
    source.model.update(changed)
    for module in (classifier, finetuning):
        monkeypatch.setattr(module, "config_at", lambda path: source)
    assert finetune_config(run).optim.lr == 0.002
    assert finetune_config(run, overrides=["optim.lr=0.01"]).optim.lr == 0.01


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
def test_published_imagenet_subsets_are_fine_tuned_as_few_labels(run, dataset, epochs, layer):
    data = ("data.name=tfds", f"data.dataset={dataset}")
    config = finetune_config(run, overrides=data)
    assert (config.epochs, config.supervised.projector_layer) == (epochs, layer)
    changed = finetune_config(run, overrides=(*data, "epochs=7"))
    assert changed.epochs == 7
    folder, what = evals._finetuned(config, "")
    assert folder == f"finetune_{dataset.replace('/', '_').replace(':', '_')}_1"
    assert what == f"fine-tuned on 100 % of {dataset}"
    assert evals._finetuned(config, dataset) == (
        "finetune_1",
        "fine-tuned on 100 % of the images",
    )


@pytest.fixture(scope="module")
def kept(run):
    """A config of fine-tuning on few labels, which keeps a projector layer, and its first state."""
    config = finetune_config(run, labels=0.1)
    return config, first_state(config, random_state)


def test_fine_tuning_starts_from_the_runs_encoder_and_kept_projector_layer(run, kept):
    source, state = restore_state(run), kept[1]
    assert same(state.params["encoder"], source.params["encoder"])
    assert sorted(state.params["projector"]) == ["bn1", "dense1"]
    assert same(state.params["projector"]["dense1"], source.params["projector"]["dense1"])
    stats = state.method_state["batch_stats"]["projector"]
    assert same(stats["bn1"], source.method_state["batch_stats"]["projector"]["bn1"])
    assert not state.params["classifier"]["Dense_0"]["kernel"].any()


def test_classifier_input_is_the_kept_hidden_layer_of_the_projector(run, kept):
    config, state = kept
    method = make_method(config, Schedule(1, 1))
    images = jnp.asarray(np.random.default_rng(0).random((3, 8, 8, 3)), jnp.float32)
    classifier = {**state.params["classifier"]["Dense_0"]}
    classifier["kernel"] = jax.random.normal(jax.random.key(0), classifier["kernel"].shape)
    params = {**state.params, "classifier": {"Dense_0": classifier}}
    logits = method.classify(params, state.method_state["batch_stats"], images)
    hidden = load(run, projector_layer=1)
    features = hidden._apply(hidden.variables, images)
    np.testing.assert_allclose(
        logits, features @ classifier["kernel"] + classifier["bias"][None], rtol=1e-4, atol=1e-4
    )
