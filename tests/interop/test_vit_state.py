"""ViTs of timm, DINO, DINOv2, MAE and MoCo v3, under the names that their code gives them."""

import json

import jax
import numpy as np
import pytest
from encoders import random_encoder
from safetensors.numpy import save_file
from tiny import tiny_config

import ssl_jax
from ssl_jax.cli import main as cli
from ssl_jax.errors import UserError
from ssl_jax.interop import export
from ssl_jax.interop.import_weights import read_weights
from ssl_jax.interop.vit_names import vit_to_torch
from ssl_jax.interop.weights import Weights, write_weights
from ssl_jax.models.vit import sincos_positions

RNG = np.random.default_rng(0)
SIZE = 12  # pixels, 3×3 patches
TINY = {"width": 64, "depth": 2, "heads": 1, "patch": 4, "image_size": SIZE}


def vit_config(**options):
    config = tiny_config()
    config.model.name = "vit"
    config.model.vit.update({**TINY, **options})
    for view in config.views.values():
        view.size = SIZE
    return config


@pytest.fixture(scope="module")
def nets():
    """Configs, parameters and timm's state dicts of ViTs by their options."""
    found = {}
    for name, options in {
        "class": {},
        "scaled": {"layer_scale": 0.1},
        "registers": {"registers": 2, "layer_scale": 0.1},
        "mean": {"pool": "mean"},
        "mean_register": {"pool": "mean", "registers": 1},
        "sincos": {"positions": "sincos"},
        "sincos_mean": {"positions": "sincos", "pool": "mean", "heads": 4},
    }.items():
        config = vit_config(**options)
        params = random_encoder(config)["params"]
        found[name] = config, params, vit_to_torch(params, config)
    return found


def prefixed(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def saved(tmp_path, state, name="net.safetensors"):
    file = tmp_path / name
    save_file({k: np.array(v, order="C") for k, v in state.items()}, file)
    return file


def extra(*names):
    return {name: RNG.normal(size=(1, 1, 4)).astype(np.float32) for name in names}


def timm(net):
    return net, {}


def dino(net):
    """The full checkpoint; its dicts `student` and `teacher` are joined with their keys."""
    head = extra("teacher.head.mlp.0.weight", "student.module.head.mlp.0.weight")
    student = prefixed("student.module.backbone.", {k: v + 1 for k, v in net.items()})
    return prefixed("teacher.backbone.", net), student | head


def mae(net):
    """MAE's pretraining checkpoint, with the decoder."""
    decoder = extra("mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight")
    return net, decoder | extra("decoder_embed.weight")


def moco_v3(net):
    momentum = {k: v + 1 for k, v in net.items()} | extra("head.0.weight")
    rest = prefixed("module.momentum_encoder.", momentum)
    rest |= extra("module.base_encoder.head.0.weight", "module.predictor.0.weight")
    return prefixed("module.base_encoder.", net), rest


def dinov2(net):
    return net, extra("mask_token")


@pytest.mark.parametrize(
    ("code", "name"),
    [(timm, "class"), (dino, "class"), (mae, "class"), (moco_v3, "class"), (dinov2, "scaled")],
)
def test_published_names_are_recognized_and_other_networks_listed(tmp_path, nets, code, name):
    config, params, state = nets[name]
    names, left = code(state)
    weights = read_weights(saved(tmp_path, names | left))
    assert weights.source == f"{code.__name__}: net.safetensors"
    assert list(weights.left_out) == sorted(left)
    jax.tree.map(np.testing.assert_array_equal, weights.params, {"encoder": params})
    options, expected = weights.config.model.vit, config.model.vit
    assert weights.config.model.name == "vit"
    for key in ("width", "depth", "heads", "patch", "image_size", "pool", "registers"):
        assert options[key] == expected[key], key
    assert bool(options.layer_scale) == (name == "scaled")
    assert weights.config.views.view1.size == SIZE
    assert weights.config.views.view1.mean == (0.485, 0.456, 0.406)
    bicubic = "bilinear" if code is moco_v3 else "bicubic"
    assert weights.config.eval.interpolation == bicubic


def test_chunked_blocks_and_registers_of_dinov2(tmp_path, nets):
    """Its class token has a position, its registers have none."""
    _, params, state = nets["registers"]
    chunked = {
        name.replace("blocks.", f"blocks.{name.split('.')[1]}.", 1)
        if name.startswith("blocks.")
        else name: value
        for name, value in state.items()
    }
    assert "blocks.1.1.ls1.gamma" in chunked
    chunked["register_tokens"] = chunked.pop("reg_token")
    position = RNG.normal(size=(1, 1, 64)).astype(np.float32)
    chunked["pos_embed"] = np.concatenate([position, chunked["pos_embed"]], axis=1)
    chunked["cls_token"] = chunked["cls_token"] - position
    weights = read_weights(saved(tmp_path, chunked | extra("mask_token")))
    assert weights.source.startswith("dinov2") and weights.left_out == ("mask_token",)
    assert weights.config.model.vit.registers == 2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        weights.params["encoder"],
        params,
    )


def test_class_token_under_a_mean_over_patches_is_a_register(tmp_path, nets):
    """MAE's and timm's fine-tuned networks average patches, but attend to a class token."""
    config, params, state = nets["mean_register"]
    tuned = {**state, "cls_token": state["reg_token"] - 1}
    del tuned["reg_token"]
    ones = np.ones((1, 1, 64), np.float32)
    tuned["pos_embed"] = np.concatenate([ones, state["pos_embed"]], axis=1)
    head = {"head.weight": RNG.normal(size=(5, 64)), "head.bias": RNG.normal(size=5)}
    weights = read_weights(saved(tmp_path, tuned | head))
    assert weights.config.model.vit.registers == 1 and weights.config.model.vit.pool == "mean"
    assert weights.config.data.num_classes == 5 and weights.left_out == ()
    np.testing.assert_allclose(weights.params["classifier"]["Dense_0"]["bias"], head["head.bias"])
    found = weights.params["encoder"]["reg_token"]
    np.testing.assert_allclose(found, params["reg_token"], atol=1e-6)
    assert config.model.vit.registers == 1


def with_positions(state, count):
    table = RNG.normal(size=(1, count, 64)).astype(np.float32)
    return {**state, "pos_embed": table}


def test_several_image_sizes_need_the_users_or_timms(tmp_path, nets, capsys):
    """25 positions are 5×5 patches, or 4×4 and those of a class token and 8 registers."""
    _, _, state = nets["class"]
    state = with_positions(state, 25) | {"reg_token": np.zeros((1, 8, 64), np.float32)}
    file = saved(tmp_path, state)
    line = ["import", str(file), f"--out={tmp_path / 'out.safetensors'}"]
    assert cli.main(line) == 2
    error = capsys.readouterr().err
    assert "images of 20 or 16 pixels" in error and "--image-size" in error
    for size, registers in ((20, 0), (16, 1)):
        assert cli.main([*line, f"--image-size={size}"]) == 0
        weights = read_weights(tmp_path / "out.safetensors")
        assert weights.config.model.vit.image_size == size
        token = weights.params["encoder"]["reg_token"]
        assert np.any(token) == registers
    assert cli.main([*line, "--image-size=24"]) == 2
    assert "--image-size is 24" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_args": {"img_size": 16}}))
    read_weights(saved(tmp_path, with_positions(nets["class"][2], 10)))  # leaves the cache
    assert read_weights(saved(tmp_path, state)).config.model.vit.image_size == 16


def test_heads_are_those_of_the_width_the_code_or_the_user(tmp_path, capsys):
    files = {}
    for width in (48, 384):
        config = vit_config(width=width, heads=1, depth=1)
        files[width] = vit_to_torch(random_encoder(config)["params"], config)
    narrow = saved(tmp_path, files[48])
    with pytest.raises(UserError, match="width 48, can't be inferred: run .* --heads"):
        read_weights(narrow)
    assert read_weights(narrow, heads=3).config.model.vit.heads == 3
    with pytest.raises(UserError, match="5 heads .* don't divide"):
        read_weights(narrow, heads=5)
    assert read_weights(saved(tmp_path, files[384])).config.model.vit.heads == 6
    moco = saved(tmp_path, prefixed("module.base_encoder.", files[384]), "moco.safetensors")
    assert read_weights(moco).config.model.vit.heads == 12
    out = tmp_path / "out.safetensors"
    assert cli.main(["import", str(narrow), "--heads=6", f"--out={out}"]) == 0
    assert "with 6 heads; networks: encoder" in capsys.readouterr().out
    assert ssl_jax.load(out).config.model.vit.heads == 6
    with pytest.raises(UserError, match="omit them"):
        read_weights(out, heads=6)


def without(name):
    return lambda state: {k: v for k, v in state.items() if not k.startswith(name)}


def reshaped(name, *shape):
    return lambda state: {**state, name: np.zeros(shape, np.float32)}


def added(name):
    return lambda state: {**state, name: np.zeros((4,), np.float32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("blocks.0."), "lacks block 0 of its ViT, but has block 1"),
        (without("blocks."), "no block blocks.0"),
        (without("pos_embed"), "no table of positions"),
        (without("norm."), "no norm or fc_norm"),
        (without("cls_token"), "not the output at a class token"),
        (without("blocks.1.attn.qkv.bias"), "lacks 1 of .* blocks_1/attn/qkv/bias"),
        (reshaped("pos_embed", 0, 5, 8), r"pos_embed has the shape \[0, 5, 8\]"),
        (reshaped("pos_embed", 1, 0, 64), r"pos_embed has the shape \[1, 0, 64\]"),
        (reshaped("pos_embed", 1, 8, 64), "positions .* of 8 tokens"),
        (reshaped("pos_embed"), r"pos_embed has the shape \[\]"),
        (reshaped("cls_token", 1, 2, 64), r"cls_token has the shape \[1, 2, 64\], not \[1, 1, 64"),
        (reshaped("patch_embed.proj.weight", 64), r"shape \[64\], not \[width"),
        (reshaped("patch_embed.proj.weight", 0, 3, 4, 4), r"shape \[0, 3, 4, 4\]"),
        (reshaped("patch_embed.proj.weight", 64, 3, 4, 2), r"shape \[64, 3, 4, 2\]"),
        (reshaped("patch_embed.proj.weight", 64, 17, 4, 4), "images of 17 channels"),
        (reshaped("blocks.0.mlp.fc1.weight", 128, 64), r"blocks_0/mlp/fc1/kernel .* \[64, 128\]"),
        (reshaped("blocks.0.mlp.fc1.weight"), r"blocks_0/mlp/fc1/kernel .* \[1\]"),
        (added("blocks.0.0.norm1.weight"), "unknown or repeated, such as blocks.0.norm1"),
        (added("blocks.99999999999999999999.norm1.weight"), "unknown or repeated"),
        (added("fc_norm.weight"), "both before and after pooling"),
        (added("blocks.0.mlp.w12.weight"), "SwiGLU"),
        (added("blocks.0.attn.q_norm.weight"), "normalized queries and keys"),
        (added("rope_embed.periods"), "rotary positions, as in DINOv3"),
        (added("dist_token"), "distillation token"),
        (added("norm_pre.weight"), "as in CLIP"),
        (added("blocks.0.attn.rel_pos_h"), "relative positions"),
        (added("patch_embed.proj.0.weight"), "convolutional stem"),
    ],
)
def test_other_and_damaged_networks_are_refused_by_name(tmp_path, nets, change, message):
    file = saved(tmp_path, change(nets["class"][2]))
    with pytest.raises(UserError, match=message):
        read_weights(file)


def test_kinds_without_vits_and_vits_kinds_of_resnets_are_refused(tmp_path, nets):
    file = saved(tmp_path, nets["class"][2])
    with pytest.raises(UserError, match="contains a ViT, but the kind 'swav'"):
        read_weights(file, "swav")
    resnet = saved(tmp_path, {"layer1.0.conv1.weight": np.zeros((1, 1, 1, 1))}, "r.safetensors")
    with pytest.raises(UserError, match="contains no ViT, as files of mae"):
        read_weights(resnet, "mae")
    with pytest.raises(UserError, match="contains no ViT: omit --heads"):
        read_weights(resnet, heads=3)


@pytest.mark.parametrize(
    "name", ["class", "registers", "mean", "mean_register", "sincos", "sincos_mean"]
)
def test_exports_for_timm_import_back_exactly(tmp_path, nets, name):
    config, params, state = nets[name]
    source = tmp_path / "ours.safetensors"
    write_weights(Weights(config, {"encoder": params}, {"encoder": {}}, 3), source)
    lines = export.export_torch(source, tmp_path / "timm.safetensors")
    assert lines[1].startswith('net = timm.create_model("vit_base_patch16_224", img_size=12, ')
    assert [file.name for file in sorted(tmp_path.iterdir())] == [
        "ours.safetensors",
        "timm.safetensors",
    ]
    again = read_weights(tmp_path / "timm.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again.params, {"encoder": params})
    assert again.config.model.to_dict() == config.model.to_dict()
    patches = 9 + (name in ("class", "sincos"))
    assert state["pos_embed"].shape == (1, patches, 64)
    export.export_folder(source, tmp_path / "hub")
    assert (tmp_path / "hub" / "model.safetensors").is_file()
    assert not (tmp_path / "hub" / "torch_encoder.py").exists()
    hub = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert hub["architecture"] == "vit_base_patch16_224" and hub["model_args"]["depth"] == 2
    assert hub["pretrained_cfg"]["classifier"] == "head"
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "timm.create_model" in card and "torch_encoder" not in card


@pytest.mark.parametrize("channels", [1, 4])
def test_exports_of_other_channels_name_them_for_timm(tmp_path, nets, channels):
    state = dict(nets["class"][2])
    state["patch_embed.proj.weight"] = np.ones((64, channels, 4, 4), np.float32)
    source = saved(tmp_path, state)
    lines = export.export_torch(source, tmp_path / "out.safetensors")
    assert f"in_chans={channels}" in lines[1]
    assert read_weights(tmp_path / "out.safetensors").config.data.channels == channels
    export.export_folder(source, tmp_path / "hub")
    hub = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert hub["model_args"]["in_chans"] == channels
    assert hub["pretrained_cfg"]["first_conv"] is None  # or timm would replace the weights


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_fixed_positions_are_written_for_the_size_of_the_first_view(tmp_path, pool):
    """timm would interpolate the table of another size, where the run computes its positions."""
    config = vit_config(positions="sincos", pool=pool, image_size=16)
    for each in config.views.values():
        with each.unlocked(), each.ignore_type():
            each.size = (8, 12)
    params = random_encoder(config)["params"]
    state = vit_to_torch(params, config)
    table = np.asarray(sincos_positions((2, 3), 4, 64))
    expected = np.concatenate([np.zeros((1, 64)), table]) if pool == "class" else table
    np.testing.assert_array_equal(state["pos_embed"][0], np.float32(expected))
    source = tmp_path / "ours.safetensors"
    write_weights(Weights(config, {"encoder": params}, {"encoder": {}}, 3), source)
    assert "img_size=(8, 12), " in export.export_torch(source, tmp_path / "timm.safetensors")[1]
    export.export_folder(source, tmp_path / "hub")
    hub = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert hub["model_args"]["img_size"] == [8, 12]
    assert hub["pretrained_cfg"]["input_size"] == [3, 8, 12]
    (tmp_path / "config.json").write_text(json.dumps({"model_args": {"img_size": [8, 12]}}))
    with pytest.raises(UserError, match=r"positions are those of images of \[8, 12\] pixels"):
        read_weights(tmp_path / "timm.safetensors")


@pytest.mark.parametrize("write", [export.export_detectron2, export.export_pth])
def test_detectors_refuse_vits(tmp_path, nets, write):
    config, params, _ = nets["class"]
    source = tmp_path / "ours.safetensors"
    write_weights(Weights(config, {"encoder": params}, {"encoder": {}}, 3), source)
    suffix = "pkl" if write is export.export_detectron2 else "pth"
    with pytest.raises(UserError, match="is for ResNets only: .*--format=torch, for timm"):
        write(source, tmp_path / f"net.{suffix}")
