"""Exports load in models of torchvision and timm, and give the same features."""

import re
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed here: make peers")
torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import ssl_jax  # noqa: E402
from ssl_jax.config import default_config, view  # noqa: E402
from ssl_jax.data.pipeline import prepare_eval  # noqa: E402
from ssl_jax.interop import export  # noqa: E402
from ssl_jax.interop.import_weights import read_weights  # noqa: E402
from ssl_jax.interop.weights import Weights, write_weights  # noqa: E402
from ssl_jax.models import make_encoder  # noqa: E402
from ssl_jax.models.resnet import STAGES  # noqa: E402

SIZE = 64
FC = {"fc.weight", "fc.bias"}


def random_file(tmp_path, size=SIZE, mean=(0.4, 0.5, 0.6), sampler="tf", **model):
    """Writes an ssl_jax file with random weights and statistics."""
    config = default_config()
    config.model.update(zero_init_residual=False, **model)
    std = (0.2, 0.25, 0.3) if mean else ()
    one = view(size=size, crop={"sampler": sampler}, mean=mean, std=std)
    config.views = {"view1": one, "view2": one}
    module = make_encoder(config)
    blank = jax.eval_shape(
        lambda: module.init(jax.random.key(0), np.zeros((1, size, size, 3)), train=False)
    )
    rng = np.random.default_rng(0)

    def randomized(path, value):
        if path[-1].key == "kernel":
            drawn = rng.standard_normal(value.shape) * (2 / np.prod(value.shape[:-1])) ** 0.5
        else:
            low, high = {"scale": (0.5, 1.5), "var": (0.5, 1.5)}.get(path[-1].key, (-0.3, 0.3))
            drawn = rng.uniform(low, high, value.shape)
        return drawn.astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(randomized, blank)
    params, stats = variables["params"], variables["batch_stats"]
    file = tmp_path / "ours.safetensors"
    write_weights(Weights(config, {"encoder": params}, {"encoder": stats}, 3), file)
    return file


def pixels(size=SIZE, n=2):
    return np.random.default_rng(1).integers(0, 256, (n, size, size, 3), np.uint8)


def normalized(images, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)):
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    return torchvision.transforms.functional.normalize(x, mean, std)


def assert_same(mine, theirs):
    mine, theirs = np.asarray(mine), theirs.detach().numpy()
    assert mine.shape == theirs.shape
    assert np.abs(mine - theirs).max() <= 1e-4 * np.abs(theirs).max()
    assert np.std(theirs, axis=0).max() > 1e-3


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_torchvision_and_timm_load_exports_of_every_depth(tmp_path, depth):
    source = random_file(tmp_path, depth=depth)
    file = tmp_path / "encoder.safetensors"
    lines = export.export_torch(source, file)
    expected = ssl_jax.load(source).apply(pixels())
    names = {"torchvision": torchvision, "torch": torch, "safetensors": sys.modules["safetensors"]}
    exec("\n".join(lines).replace('"encoder', f'"{tmp_path}/encoder'), names)
    with torch.no_grad():
        assert_same(expected, names["net"].eval()(normalized(pixels())))
        net = timm.create_model(f"resnet{depth}", num_classes=0)
        net.load_state_dict(load_file(file))
        assert_same(expected, net.eval()(normalized(pixels())))


@pytest.mark.parametrize(
    "model",
    [
        {"depth": 18, "width": 2.0},
        {"depth": 50, "width": 0.5},
        {"depth": 18, "stem": "cifar"},
        {"depth": 18, "stem": "cifar_pad2"},
        {"depth": 18, "stem": "cifar_no_relu", "width": 0.25},
        {"depth": 18, "padding": "same", "project_first": True},
        {"depth": 50, "padding": "simclr", "width": 0.25},
        {"depth": 200, "width": 0.25, "padding": "same"},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [SIZE, 65])
def test_torch_encoder_loads_other_widths_stems_and_paddings(tmp_path, monkeypatch, model, size):
    if size == 65 and model.get("padding", "symmetric") == "symmetric":
        size = 33
    source = random_file(tmp_path, size, **model)
    export.export_torch(source, tmp_path / "encoder.safetensors")
    expected = ssl_jax.load(source).apply(pixels(size))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch_encoder", raising=False)
    import torch_encoder

    net = torch_encoder.load(tmp_path / "encoder.safetensors")
    with torch.no_grad():
        assert_same(expected, net(normalized(pixels(size))))
    # Importing it back restores padding and preprocessing.
    again = read_weights(tmp_path / "encoder.safetensors")
    assert again.config.model.padding == model.get("padding", "symmetric")
    assert again.config.model.stem == model.get("stem", "imagenet")
    np.testing.assert_array_equal(
        ssl_jax.load(tmp_path / "encoder.safetensors").apply(pixels(size)), expected
    )


def feature_maps(source, images):
    """The outputs of the encoder's stages [n, c, h, w]."""
    encoder = ssl_jax.load(source)
    config, module = encoder.config, make_encoder(encoder.config)
    last = [f"stage{i}_block{n}" for i, n in enumerate(STAGES[config.model.depth], start=1)]
    kept = lambda module, method: module.name in last and method == "__call__"  # noqa: E731

    def blocks(variables, images):
        x = prepare_eval(images, config)
        return module.apply(
            variables, x, train=False, mutable="intermediates", capture_intermediates=kept
        )[1]

    variables = {"params": encoder.params, "batch_stats": encoder.batch_stats}
    found = jax.jit(blocks)(variables, images)["intermediates"]
    return [np.asarray(found[name]["__call__"][0]).transpose(0, 3, 1, 2) for name in last]


@torch.no_grad()
def test_torchvisions_detector_and_segmenter_compute_the_encoders_feature_maps(tmp_path):
    source = random_file(tmp_path, depth=50)
    lines = export.export_pth(source, tmp_path / "encoder.pth")
    assert "mean=[102.0, 127.5, 153.0], std=[51.0, 63.75, 76.5], bgr_to_rgb=True" in lines[1]
    assert str(tmp_path).encode() not in (tmp_path / "encoder.pth").read_bytes()
    state = torch.load(tmp_path / "encoder.pth", weights_only=True)
    export.export_torch(source, tmp_path / "encoder.safetensors")
    same = load_file(tmp_path / "encoder.safetensors")
    assert state.keys() == same.keys() == torchvision.models.resnet50().state_dict().keys() - FC
    assert all(torch.equal(state[name], same[name]) for name in same)

    images = pixels()
    mine = feature_maps(source, images)
    assert [x.shape[1:] for x in mine] == [(256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 2, 2)]
    page = (Path(__file__).parents[2] / "docs" / "detection.md").read_text()
    program, _ = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    names = {}
    exec(program.replace('"encoder', f'"{tmp_path}/encoder'), names)
    theirs = names["detector"].eval().backbone.body(normalized(images))
    for a, b in zip(mine, theirs.values(), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("mean", [(), (0.4, 0.5, 0.6)])
def test_timm_loads_a_folder_with_its_preprocessing(tmp_path, monkeypatch, mean):
    source = random_file(tmp_path, depth=18, mean=mean)
    folder = tmp_path / "hub"
    export.export_folder(source, folder)
    net = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    config = timm.data.resolve_model_data_config(net)
    assert tuple(config["input_size"]) == (3, SIZE, SIZE)
    assert tuple(config["mean"]) == (mean or (0.0, 0.0, 0.0))
    transform = timm.data.create_transform(**config)
    images = pixels()
    x = torch.stack([transform(Image.fromarray(image).resize((73, 73))) for image in images])
    assert x.shape == (2, 3, SIZE, SIZE)
    with torch.no_grad():
        plain = normalized(images, mean or (0, 0, 0), (0.2, 0.25, 0.3) if mean else (1, 1, 1))
        assert_same(ssl_jax.load(source).apply(images), net(plain))


@pytest.mark.parametrize(
    ("sampler", "interpolation"),
    [("tf", "bicubic"), ("byol", "bilinear"), ("torchvision", "bicubic"), ("none", "bilinear")],
)
def test_torch_encoder_preprocesses_like_ssl_jax(tmp_path, monkeypatch, sampler, interpolation):
    """Crops, resizes and normalizes pictures of any size like `ssl_jax.load`."""
    source = random_file(tmp_path, depth=18, sampler=sampler)
    weights = read_weights(source)
    weights.config.eval.interpolation = interpolation
    write_weights(weights, source)
    folder = tmp_path / "hub"
    export.export_folder(source, folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "torch_encoder", raising=False)
    import torch_encoder

    net = torch_encoder.load(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    for shape in ((160, 121, 3), (SIZE, SIZE, 3), (33, 40, 3)):
        picture = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
        prepared = torch_encoder.preprocess(picture, net)
        with torch.no_grad():
            theirs = net(prepared[None]).numpy()
        image = np.asarray(picture)[None]
        expected = np.asarray(prepare_eval(image, weights.config))[0].transpose(2, 0, 1)
        np.testing.assert_allclose(prepared.numpy(), expected, atol=2e-3)
        mine = np.asarray(ssl_jax.load(source).apply(image))
        assert np.abs(mine - theirs).max() <= 2e-3 * np.abs(theirs).max()


def test_torch_example_ranks_pictures_by_similarity(tmp_path, monkeypatch, capsys):
    export.export_folder(random_file(tmp_path, depth=18), tmp_path / "hub")
    for number, image in enumerate(pixels()):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    monkeypatch.delitem(sys.modules, "torch_encoder", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    files = [str(tmp_path / f"{number}.png") for number in (0, 1, 0)]
    monkeypatch.setattr(sys, "argv", ["features_in_torch.py", str(tmp_path / "hub"), *files])
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "features_in_torch.py"))
    rows = [line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows[0] == rows[2] and rows[0][0] == "1.000" != rows[0][1]
