"""Linear evaluation by the official recipes, of a tiny run on digits."""

import json

import jax
import numpy as np
import pytest
from classifier_runs import BRIEF, WHOLE, command
from encoders import same

from ssl_jax.config import Schedule, run_schedule
from ssl_jax.downstream.linear_recipes import linear_config
from ssl_jax.interop.load import restore_state
from ssl_jax.methods.supervised import Classifier
from ssl_jax.optim import learning_rate_schedule
from ssl_jax.run.folder import read_config
from ssl_jax.step import assemble


@pytest.mark.parametrize(
    ("recipe", "rate", "batch", "epochs", "per_epoch"),
    [
        ("simclr", 0.1, 4096, 90, False),
        ("simclr_cifar", 0.1, 512, 100, False),
        ("moco", 30, 256, 100, True),
        ("swav", 0.3, 256, 100, True),
        ("byol", 0.2, 1024, 80, False),
        ("simsiam", 0.1, 4096, 90, True),
        ("mocov3", 0.1, 1024, 90, True),
        ("mocov3_vit", 3, 1024, 90, True),
        ("barlow", 0.3, 256, 100, True),
        ("vicreg", 0.02, 256, 100, True),
    ],
)
def test_linear_recipes_match_the_official_codes(run, recipe, rate, batch, epochs, per_epoch):
    config = linear_config(run, recipe)
    assert (config.optim.lr, config.batch_size, config.epochs) == (rate, batch, epochs)
    assert config.optim.lr_scaling == "linear" and config.optim.warmup_epochs == 0
    assert config.optim.momentum == 0.9 and config.optim.per_epoch == per_epoch
    assert config.optim.decay_norm_bias
    decayed = recipe in ("simclr", "swav", "barlow", "vicreg")
    assert config.optim.weight_decay == (1e-6 if decayed else 0)
    assert config.optim.nesterov == (recipe in ("simclr", "simclr_cifar", "byol"))
    assert config.optim.name == ("larc" if recipe == "simsiam" else "sgd")
    assert config.optim.schedule == ("step" if recipe == "moco" else "cosine")
    inits = {"simclr": "zeros", "simclr_cifar": "zeros", "byol": "haiku"}
    assert config.supervised.classifier_init == inits.get(recipe, "normal_0.01")
    (view,) = config.views.values()
    assert view.jitter.prob == view.gray == view.blur.prob == view.solarize.prob == 0
    assert view.flip == 0 and view.size == 8  # as in the run


@pytest.mark.parametrize(
    ("recipe", "images", "steps", "peak"),
    [
        ("simclr", 1_281_167, 28_151, 1.6),  # N * epochs // B + 1
        ("simclr_cifar", 50_000, 9766, 0.2),
        ("byol", 1_281_167, 100_091, 0.8),  # N * epochs // B
        ("simsiam", 1_281_167, 90 * 312, 1.6),
        ("swav", 1_281_167, 100 * 5004, 0.3),
    ],
)
def test_linear_recipes_have_the_official_rate_at_every_step(run, recipe, images, steps, peak):
    config = linear_config(run, recipe)
    schedule = run_schedule(config, images)
    assert schedule.total_steps == steps
    progress = np.arange(steps) / steps
    if config.optim.per_epoch:
        progress = np.floor(progress * config.epochs + 1e-9) / config.epochs
    expected = peak * 0.5 * (1 + np.cos(np.pi * progress))
    rate = jax.jit(learning_rate_schedule(config.optim, config.batch_size, schedule))
    actual = rate(np.arange(steps, dtype=np.int32))
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-15 * peak)


def test_byol_recipe_starts_as_a_haiku_linear():
    """Truncated normal at two standard deviations of 1 / sqrt(inputs); no bias."""
    classifier = Classifier(50, "haiku").init(jax.random.key(0), np.zeros((1, 400)), True)
    dense = jax.device_get(classifier["params"]["Dense_0"])
    assert np.abs(dense["kernel"]).max() <= 2 / 20 and not dense["bias"].any()
    assert dense["kernel"].std() == pytest.approx(0.8796 / 20, rel=0.02)


def test_moco_recipe_drops_the_rate_at_epochs_60_and_80_of_100(run):
    config = linear_config(run, "moco")
    config.data.num_classes = 10
    _, _, rate = assemble(config, Schedule(10, 1000))
    rates = [float(rate(10 * epoch)) for epoch in (0, 59, 60, 79, 80, 99)]
    np.testing.assert_allclose(rates, [30, 30, 3, 3, 0.3, 0.3], rtol=1e-5)


def test_linear_recipe_leaves_the_frozen_encoder_bit_identical(run, capsys):
    flags = [f"--config.{change}" for change in (*BRIEF, WHOLE)]
    out = command(capsys, "linear", f"--from={run}", "--recipe=moco", *flags)
    step = read_config(run / "linear_moco").init_from.step
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
