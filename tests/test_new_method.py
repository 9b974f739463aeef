"""The method in docs/new_method.md is short and correct, and runs like a built-in one."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
import test_step
from tiny import method_config, with_whole_images

import ssl_jax
from ssl_jax.cli import main as cli
from ssl_jax.config import Schedule, default_config, from_json, load_config, to_json
from ssl_jax.errors import UserError
from ssl_jax.interop.card import model_card
from ssl_jax.interop.export import export_folder, export_torch
from ssl_jax.interop.initial_weights import resolve_initial_weights
from ssl_jax.interop.weights import Weights, write_weights
from ssl_jax.methods import Method, make_method, register
from ssl_jax.methods.base import init_networks
from ssl_jax.models import ResNet
from ssl_jax.report.words import network
from ssl_jax.run.log import read_metrics
from ssl_jax.train import pretrain
from ssl_jax.train.setup import Setup
from ssl_jax.train.summary import start_rows

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/new_method.md").read_text()
CODE, TEST = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture
def forget(monkeypatch):
    """Returns a function that unregisters all methods; also called before and after the test."""

    def forget():
        monkeypatch.setattr("ssl_jax.config._REGISTERED", {})
        monkeypatch.setattr("ssl_jax.methods._REGISTERED", {})

    forget()
    return forget


@pytest.fixture
def config_file(forget, tmp_path, monkeypatch):
    """Writes the page's file to the folder in which its commands and test run."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "my_method.py"
    file.write_text(CODE)
    return file


def test_example_is_under_60_lines():
    assert len(CODE.splitlines()) < 60


def test_pages_own_test_compares_gradients_on_1_and_8_devices(config_file, monkeypatch):
    found = []

    def kept(*arguments, real=test_step.gradients_on):
        found.append((arguments[-1], *real(*arguments)))
        return found[-1][1:]

    monkeypatch.setattr(test_step, "gradients_on", kept)
    names = {}
    exec(TEST, names)
    (test,) = (names[name] for name in names if name.startswith("test_"))
    test()
    (one, expected, *_), (eight, actual, *_) = found
    assert (len(one), len(eight)) == (1, len(jax.devices()))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.long
def test_example_trains_and_is_evaluated_and_loaded_after_import(
    config_file, forget, tmp_path, capsys
):
    config = load_config(str(config_file), ["barlow_twins.out=32", "steps=2", "batch_size=320"])
    config.model.update(method_config("simclr").model)
    with_whole_images(config)
    config.data.update(subset=0.25, test_fraction=0.1)
    config.eval.update(trials=2, labels_per_class=(1, 5), at_end=True)
    pretrain(config, tmp_path / "run")
    (accuracy,) = (r["knn"] for r in read_metrics(tmp_path / "run/metrics.jsonl") if "knn" in r)
    assert 0 < accuracy <= 1
    assert ssl_jax.load(tmp_path / "run").apply(np.zeros((2, 8, 8, 3), np.uint8)).shape[0] == 2
    forget()
    knn = ["knn", "--from=run"]
    with pytest.raises(UserError, match="'barlow_twins'.* Import the file that registers it"):
        ssl_jax.load("run")
    capsys.readouterr()
    assert cli.main(knn) == 2 and "--import=FILE.py" in capsys.readouterr().err
    assert cli.main([*knn, "--import=my_method.py"]) == 0
    assert "top-1" in capsys.readouterr().out
    assert cli.main([*knn, "--import=absent.py"]) == 2
    assert "no file absent.py (--import)" in capsys.readouterr().err


def test_registered_keys_are_not_saved_with_other_methods(config_file):
    before = to_json(default_config())
    load_config(str(config_file))
    assert to_json(default_config()) == before
    assert from_json(before).barlow_twins.hidden == 256


@pytest.mark.parametrize("name", ["moco", "optim", "seed"])
def test_register_refuses_names_in_use(forget, name):
    with pytest.raises(UserError, match=f"{name}"):
        register(name)(Method)


def test_register_refuses_options_of_unsupported_types(forget):
    with pytest.raises(UserError, match="config.listed.sizes has the default"):
        register("listed", sizes=[1, 2])


class TwoLayers(nn.Module):
    """An encoder that doesn't say how many features it has."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(12)(nn.relu(nn.Dense(5)(x.reshape(len(x), -1))))


def test_encoder_that_a_method_sets_is_named_everywhere(forget, tmp_path):
    @register("own", wide=False)
    class Own(Method):
        def __init__(self, *args):
            super().__init__(*args)
            wide = ResNet(depth=4, width=1 / 4, stem="cifar")
            self.encoder = wide if self.config.own.wide else TwoLayers()
            self.networks = {"encoder": self.encoder}

        def init(self, rng, batch):
            params, stats = init_networks(self.networks, rng, batch["views"][0])
            return params, {"batch_stats": stats}

    config = method_config("own")
    config.data.num_classes = 10
    method = make_method(config, Schedule(1, 1))
    assert (method.encoder_name, method.num_features) == ("TwoLayers", 12)
    setup = Setup(config)
    params = jax.eval_shape(setup.program.init).params
    rows = dict(start_rows(setup, params, tmp_path, 0))
    assert rows["method"].startswith("own, TwoLayers, 2 views")
    assert network({"config": to_json(config), "derived": setup.derived}) == "TwoLayers"
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), params)
    weights = Weights(config, params, {"encoder": {}}, 3)
    card = model_card(tmp_path, weights)
    assert "# TwoLayers, own" in card and "12 features per image" in card
    file = tmp_path / "own.safetensors"
    write_weights(weights, file)
    found = ssl_jax.load(file)
    assert "own, TwoLayers, 12 features" in repr(found)
    assert found.apply(np.zeros((2, 8, 8, 3), np.uint8)).shape == (2, 12)
    for export, out in ((export_torch, "a.safetensors"), (export_folder, "hub")):
        with pytest.raises(UserError, match="method 'own' is TwoLayers, .* export it with --for"):
            export(file, tmp_path / out)
        assert not (tmp_path / out).exists()
    other = method_config("simclr")
    other.init_from.path = str(file)
    with pytest.raises(UserError, match="The encoder in .* is TwoLayers, but that of config"):
        resolve_initial_weights(other)
    config.own.wide = True  # a ResNet, but not the config's
    assert make_method(config, Schedule(1, 1)).encoder_name == "ResNet-4 ×0.25"


def test_custom_projector_without_layers_has_no_hidden_layer_to_evaluate():
    class Own(Method):
        networks = {"projector": object()}

    method = Own(method_config("simclr"), Schedule(1, 1))
    method.check_projector_layer(0)
    with pytest.raises(UserError, match="no hidden layer"):
        method.check_projector_layer(1)
