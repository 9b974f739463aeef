"""Exports for detectors: detectron2's file and config, and torch.save for MMDetection."""

import functools
import pickle
import pickletools
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from encoders import random_encoder
from tiny import tiny_config

from ssl_jax.cli import main as cli
from ssl_jax.config import default_config, view
from ssl_jax.errors import UserError
from ssl_jax.interop.detectron2 import detectron2_config, require_detectron2s
from ssl_jax.interop.export import export_detectron2, export_pth, export_torch
from ssl_jax.interop.weights import Weights, read_safetensors, write_weights

KINDS = ("params", "batch_stats")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def detector_config(**model):
    config = default_config()
    one = view(size=32, **IMAGENET)
    config.views = {"view1": one, "view2": one}
    config.model.update(**model)
    return config


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a ResNet-50 as detectron2's file and with torchvision's names."""
    folder = tmp_path_factory.mktemp("detectron2")
    config = detector_config(depth=50)
    networks = ({"encoder": tree} for tree in map(random_encoder(config).get, KINDS))
    write_weights(Weights(config, *networks, 7), folder / "ours.safetensors")
    line = [f"--from={folder / 'ours.safetensors'}", "--format=detectron2"]
    assert cli.main(["export", *line, f"--out={folder / 'encoder.pkl'}"]) == 0
    export_torch(folder / "ours.safetensors", folder / "torch.safetensors")
    return folder


@pytest.fixture(scope="module")
def content(exported):
    with (exported / "encoder.pkl").open("rb") as file:
        return pickle.load(file, encoding="latin1")  # as detectron2 does


def detectron2_r50_c4():
    """Shapes by name of the ResNet in detectron2's R50-C4, whose last stage is in its heads."""
    shapes = {}

    def conv(name, inputs, outputs, size):
        shapes[f"{name}.weight"] = (outputs, inputs, size, size)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.norm.{leaf}"] = (outputs,)
        shapes[f"{name}.norm.num_batches_tracked"] = ()

    conv("backbone.stem.conv1", 3, 64, 7)
    inputs = 64
    for stage, blocks, width in ((2, 3, 64), (3, 4, 128), (4, 6, 256), (5, 3, 512)):
        for block in range(blocks):
            name = f"{'roi_heads' if stage == 5 else 'backbone'}.res{stage}.{block}"
            if block == 0:
                conv(f"{name}.shortcut", inputs, 4 * width, 1)
            conv(f"{name}.conv1", inputs, width, 1)
            conv(f"{name}.conv2", width, width, 3)
            conv(f"{name}.conv3", width, 4 * width, 1)
            inputs = 4 * width
    return shapes


def test_every_parameter_of_detectron2s_r50_c4_matches_one_in_the_file(content):
    assert content.keys() == {"model", "__author__", "matching_heuristics"}
    assert content["matching_heuristics"] is True
    model, left = content["model"], set(content["model"])
    for name, shape in detectron2_r50_c4().items():
        # detectron2 takes the longest suffix.
        (found,) = [key for key in model if f".{name}".endswith(f".{key}")]
        assert model[found].shape == shape, name
        assert model[found].dtype == ("int64" if name.endswith("tracked") else "float32")
        assert type(model[found]) is np.ndarray and model[found].flags.c_contiguous
        left.remove(found)
    assert not left
    assert {"stem.conv1.weight", "stem.conv1.norm.running_var"} <= model.keys()
    assert {"res2.0.conv1.weight", "res2.0.shortcut.norm.bias"} <= model.keys()


# MoCo's rule, in order; a name without "layer" is one of the stem.
REPLACED = [(f"layer{i}", f"res{i + 1}") for i in (1, 2, 3, 4)]
REPLACED += [(f"bn{i}", f"conv{i}.norm") for i in (1, 2, 3)]
REPLACED += [("downsample.0", "shortcut"), ("downsample.1", "shortcut.norm")]


def test_file_equals_mocos_conversion_of_the_torch_export(exported, content):
    state, _ = read_safetensors(exported / "torch.safetensors")
    expected = {}
    for name, value in state.items():
        start = "" if "layer" in name else "stem."
        expected[functools.reduce(lambda x, pair: x.replace(*pair), REPLACED, start + name)] = value
    assert content["model"].keys() == expected.keys()
    for name, value in expected.items():
        found = content["model"][name]
        assert found.shape == value.shape and found.dtype == value.dtype, name
        assert found.tobytes() == value.tobytes(), name


def test_pickle_names_no_private_module_of_numpy(exported):
    """NumPy 1 has no `numpy._core`, which arrays pickled by NumPy 2 name."""
    data = (exported / "encoder.pkl").read_bytes()
    names, protocol, calls = set(), None, 0
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "PROTO":
            protocol = argument
        elif isinstance(argument, str):  # of GLOBAL, or on the stack for STACK_GLOBAL
            names.add(argument)
        calls += opcode.name in ("GLOBAL", "STACK_GLOBAL")
    assert protocol <= 4
    named = {name for name in names if "numpy" in name or name in ("ndarray", "dtype")}
    assert named == {"numpy", "ndarray", "dtype"} and calls == 2
    assert str(exported).encode() not in data


def test_pth_without_torch_is_one_clear_sentence(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    line = [f"--from={exported / 'ours.safetensors'}", "--format=pth"]
    assert cli.main(["export", *line, f"--out={tmp_path / 'a.pth'}"]) == 2
    error = capsys.readouterr().err
    assert "without PyTorch" in error and "run pip install torch, or use --format=torch" in error
    assert not list(tmp_path.iterdir())


def test_printed_config_has_the_runs_normalization(tmp_path):
    config = detector_config(depth=101)
    lines = detectron2_config(config, tmp_path / "my encoder.pkl")
    assert yaml.safe_load("\n".join(f"    {line}" for line in lines)) == {
        "MODEL": {
            "WEIGHTS": str(tmp_path / "my encoder.pkl"),
            "PIXEL_MEAN": [123.675, 116.28, 103.53],
            "PIXEL_STD": [58.395, 57.12, 57.375],
            "RESNETS": {"DEPTH": 101, "STRIDE_IN_1X1": False},
        },
        "INPUT": {"FORMAT": "RGB"},
    }
    config.model.depth = 50
    page = (Path(__file__).parents[2] / "docs" / "detection.md").read_text()
    (shown,) = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    assert shown.splitlines() == detectron2_config(config, Path("encoder.pkl"))
    config.views.view1.update(mean=(), std=())
    lines = "\n".join(detectron2_config(config, tmp_path / "a.pkl"))
    found = yaml.safe_load(lines)["MODEL"]
    assert (found["PIXEL_MEAN"], found["PIXEL_STD"]) == ([0.0] * 3, [255.0] * 3)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"depth": 18}, "The encoder has depth 18, but detectron2's ResNet has depth 50, 101"),
        ({"depth": 34, "project_first": True}, "has depth 34, a projected first shortcut, but"),
        ({"depth": 200}, "has depth 200, but"),
        ({"width": 2.0}, "has width 2, but"),
        ({"sk": True}, "has selective kernels, but"),
        ({"stem": "cifar"}, "has the stem 'cifar', but"),
        ({"padding": "same"}, "has TensorFlow's padding, but"),
        ({"padding": "simclr"}, "has TensorFlow's padding, but"),
    ],
)
def test_networks_that_detectron2_lacks_are_refused(model, words):
    with pytest.raises(UserError, match=words):
        require_detectron2s(detector_config(**model))


@pytest.mark.parametrize("depth", [50, 101, 152])
def test_networks_that_detectron2_has_are_accepted(depth):
    # It changes nothing at these depths.
    require_detectron2s(detector_config(depth=depth, project_first=True))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Weights of a network that no detector has."""
    config = tiny_config()
    networks = ({"encoder": tree} for tree in map(random_encoder(config).get, KINDS))
    file = tmp_path_factory.mktemp("small") / "small.safetensors"
    write_weights(Weights(config, *networks), file)
    return file


@pytest.mark.parametrize(
    ("export", "out", "words"),
    [
        (export_detectron2, "a.pkl", "has depth 4, width 0.125, the stem 'cifar', but detectron2"),
        (export_detectron2, "a.pth", "use a name that ends in .pkl"),
        (export_pth, "a.pth", "has width 0.125, the stem 'cifar', which no ResNet of torchvision"),
        (export_pth, "a.pt", "use a name that ends in .pth"),
    ],
)
def test_bad_exports_for_detectors_are_refused(small, tmp_path, export, out, words):
    with pytest.raises(UserError, match=words):
        export(small, tmp_path / out)
    assert not list(tmp_path.iterdir())
