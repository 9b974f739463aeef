"""Users' encoders: the example in docs/new_encoder.md, from its registration to every use."""

import json
import re
import runpy
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from tiny import method_config, tiny_config

import ssl_jax
from ssl_jax.cli import main as cli
from ssl_jax.config import Schedule, apply_overrides, default_config, from_json, to_json
from ssl_jax.errors import UserError
from ssl_jax.interop import export
from ssl_jax.interop.initial_weights import resolve_initial_weights
from ssl_jax.interop.weights import Weights, write_weights
from ssl_jax.methods import make_method
from ssl_jax.models import make_encoder, register
from ssl_jax.models.registry import architecture
from ssl_jax.plan.flops import model_flops
from ssl_jax.report.words import network
from ssl_jax.spmd import make_spmd
from ssl_jax.step import Program, example_batch


class WrongFeatures(nn.Module):
    """An encoder without the average over height and width, or with a wrong number of features."""

    average: bool
    num_features: int = 5

    @nn.compact
    def __call__(self, images, train):
        return images.mean(axis=(1, 2)) if self.average else images


PAGE = (Path(__file__).parents[2] / "docs/new_encoder.md").read_text()
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture
def forget(monkeypatch):
    """Returns a function that unregisters all encoders; also called before and after the test."""

    def forget():
        monkeypatch.setattr("ssl_jax.config._ENCODERS", {})
        monkeypatch.setattr("ssl_jax.models.registry._REGISTERED", {})

    forget()
    return forget


@pytest.fixture
def file(forget, tmp_path, monkeypatch):
    """Writes the page's file to the folder in which its commands run."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "my_encoder.py"
    file.write_text(CODE)
    return file


@pytest.fixture
def config(file):
    """A config with the page's encoder, registered."""
    runpy.run_path(str(file))
    config = method_config("simclr")
    config.model.name = "convnet"
    config.model.convnet.update(width=4, depth=2)
    return config


@pytest.fixture
def exported(config, tmp_path):
    """A file of weights of zeros with the page's encoder."""
    method = make_method(config, Schedule(1, 1))
    batch = {"views": [np.zeros((1, 8, 8, 3), np.float32)]}
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(lambda k: method.init(k, batch), key)
    params, state = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    file = tmp_path / "weights.safetensors"
    write_weights(Weights(config, params, state["batch_stats"], 3), file)
    return file


def test_options_are_keys_of_the_model_and_saved_only_with_their_encoder(file, config):
    assert "convnet" not in to_json(default_config())["model"]
    saved = to_json(config)
    assert saved["model"]["convnet"] == {"width": 4, "depth": 2}
    assert from_json(saved).model.convnet.width == 4
    assert apply_overrides(config, ["model.convnet.depth=3"]).model.convnet.depth == 3
    with pytest.raises(UserError, match="config.model.convnet.width takes an integer"):
        apply_overrides(config, ["model.convnet.width=wide"])


def test_unknown_and_unregistered_names_are_refused(forget, config):
    saved = to_json(config)
    forget()
    with pytest.raises(UserError, match="encoder 'convnet' is not built .*--import=FILE.py"):
        from_json(saved)
    with pytest.raises(UserError, match="config.model.name is 'convnet', .*--import=FILE.py"):
        apply_overrides(default_config(), ["model.name=convnet"])


@pytest.mark.parametrize("name", ["resnet", "depth"])
def test_register_refuses_names_in_use(forget, name):
    with pytest.raises(UserError, match=f"config.model already has the name '{name}'"):
        register(name)(lambda *_: None)


def test_builders_must_return_a_module_with_num_features(forget):
    config = default_config()
    for made in (None, nn.Dense(3)):
        register("wrong")(lambda *_, made=made: made)
        config = tiny_config()
        config.model.name = "wrong"
        with pytest.raises(UserError, match="'wrong' .config.model.name. is of type .*num_feat"):
            make_encoder(config)


def test_encoder_is_named_and_measured_everywhere(config):
    method = make_method(config, Schedule(1, 1))
    assert (method.encoder_name, method.custom_encoder, method.num_features) == ("convnet", "", 8)
    assert network({"config": to_json(config)}) == "convnet"
    assert architecture(config.model) == {
        **{"name": "convnet", "convnet.width": 4, "convnet.depth": 2},
    }
    # Two convolutions, 3×3: of 4 channels on 4×4 pixels, then of 8 channels on 2×2.
    program = Program(config, Schedule(1, 1), make_spmd("shard_map", jax.devices()[:1], 64))
    forward = 2 * 9 * (16 * 3 * 4 + 4 * 4 * 8)
    assert model_flops(program) == 3 * 2 * forward


def test_weights_are_loaded_only_into_the_same_encoder(config, exported):
    found = ssl_jax.load(exported)
    assert "convnet, 8 features" in repr(found)
    config.init_from.path = str(exported)
    resolve_initial_weights(config)
    config.model.convnet.depth = 3
    with pytest.raises(UserError, match="config.model.convnet.depth is 3, but .* has 2: set conf"):
        resolve_initial_weights(config)
    config.model.name = "resnet"
    with pytest.raises(UserError, match="config.model.name is 'resnet', but .*model.name=convnet"):
        resolve_initial_weights(config)


@pytest.mark.parametrize("form", ["torch", "detectron2", "pth"])
def test_formats_for_torch_refuse_other_encoders(exported, tmp_path, form):
    out = tmp_path / {"torch": "a.safetensors", "detectron2": "a.pkl", "pth": "a.pth"}[form]
    with pytest.raises(UserError, match="The encoder is convnet, but .*--format=folder"):
        getattr(export, f"export_{form}")(exported, out)
    assert not out.exists()


def test_folder_has_the_card_and_the_weights_of_ssl_jax_only(exported, tmp_path):
    export.export_folder(exported, tmp_path / "hub")
    names = {file.name for file in (tmp_path / "hub").iterdir()}
    assert names == {
        *("README.md", "config.json", "preprocessor_config.json", "ssl_jax.safetensors")
    }
    found = json.loads((tmp_path / "hub/config.json").read_text())
    assert (found["num_features"], found["ssl_jax"]["convnet.width"]) == (8, 4)
    card = (tmp_path / "hub/README.md").read_text()
    assert card.startswith("---") and "# convnet, SimCLR" in card and "torch_encoder" not in card
    assert ssl_jax.load(tmp_path / "hub").num_features == 8


def test_only_resnets_are_teachers(config, exported, tmp_path):
    config.method = "supervised"
    write_weights(Weights(config, {}, {}), tmp_path / "teacher.safetensors")
    student = tiny_config(method="distill")
    student.distill.teacher = str(tmp_path / "teacher.safetensors")
    with pytest.raises(UserError, match="The encoder of the teacher .* is convnet, but only a Res"):
        resolve_initial_weights(student)


@pytest.mark.long
def test_example_goes_all_the_way_from_the_command_line(file, forget, tmp_path, capsys):
    (tmp_path / "config.py").write_text(
        "from tiny import tiny_config\n"
        "def get_config():\n"
        "    config = tiny_config(steps=4, batch_size=64)\n"
        "    config.eval.update(at_end=True, knn_k=5)\n"
        "    return config\n"
    )
    forget()
    imported = "--import=my_encoder.py"
    chosen = ["--config.model.name=convnet", "--config.model.convnet.width=8"]
    train = ["pretrain", "--config=config.py", "--workdir=run", imported, *chosen]
    assert cli.main([*train, "--config.microbatch=32"]) == 0, capsys.readouterr().err
    assert "simclr, convnet, 2 views" in capsys.readouterr().out
    assert "convnet" in (tmp_path / "run/report.html").read_text()
    forget()
    assert cli.main(["knn", "--from=run"]) == 2 and "--import" in capsys.readouterr().err
    commands = [["knn", "--from=run"], ["linear", "--from=run"]]
    commands += [["finetune", "--from=run", "--config.steps=2", "--config.batch_size=64"]]
    files = {"jax": "all.safetensors", "program": "encoder.bin", "folder": "hub"}
    commands += [["export", "--from=run", f"--format={f}", f"--out={o}"] for f, o in files.items()]
    commands += [
        ["knn", "--from=all.safetensors"],
        ["import", "all.safetensors", "--out=b.safetensors"],
    ]
    for command in commands:
        forget()
        assert cli.main([*command, imported]) == 0, capsys.readouterr().err
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    features = [
        ssl_jax.load(tmp_path / name).apply(images) for name in ("run", "all.safetensors", "hub")
    ]
    assert features[0].shape == (4, 32)
    np.testing.assert_array_equal(features[0], features[1])
    np.testing.assert_array_equal(features[0], features[2])
    program = jax.export.deserialize(bytearray((tmp_path / "encoder.bin").read_bytes()))
    np.testing.assert_allclose(program.call(images), features[0], rtol=1e-4, atol=1e-5)


def test_runs_without_a_name_of_their_encoder_are_of_a_resnet():
    model = default_config().model.to_dict()
    del model["name"]
    assert "ResNet-50" in network({"config": {"model": model}})


@pytest.mark.parametrize(
    ("average", "words"),
    [
        (False, r"\[1, 8, 8, 3\] for one image, where num_features is 5. Return \[n, num_f"),
        (True, r"WrongFeatures returns features of shape \[1, 3\] for one image, where num_fe"),
    ],
)
def test_features_of_a_wrong_shape_are_refused_before_training(forget, average, words):
    register("wrong")(lambda *_: WrongFeatures(average))
    config = method_config("simclr")
    config.model.name = "wrong"
    method = make_method(config, Schedule(1, 10))
    with pytest.raises(UserError, match=words):
        jax.eval_shape(method.init, jax.random.key(0), example_batch(config))
