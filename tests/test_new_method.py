"""The method in docs/new_method.md is short and correct, and runs like a built-in one."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
import test_step
from tiny import method_config, with_whole_images

import ssl_jax
from ssl_jax.cli import main as cli
from ssl_jax.config import Schedule, default_config, from_json, load_config, to_json
from ssl_jax.errors import UserError
from ssl_jax.methods import Method, register
from ssl_jax.run.log import read_metrics
from ssl_jax.train import pretrain

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


def test_custom_projector_without_layers_has_no_hidden_layer_to_evaluate():
    class Own(Method):
        networks = {"projector": object()}

    method = Own(method_config("simclr"), Schedule(1, 1))
    method.check_projector_layer(0)
    with pytest.raises(UserError, match="no hidden layer"):
        method.check_projector_layer(1)
