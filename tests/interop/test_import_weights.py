"""Imported files of a tiny network: inferred kinds, refusals, and runs that start from them."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from encoders import blank_state, random_encoder
from safetensors.numpy import save_file
from tiny import method_config, tiny_config, with_two_stages

import ssl_jax
from ssl_jax.errors import UserError
from ssl_jax.interop.card import model_card
from ssl_jax.interop.export import export_folder, export_torch
from ssl_jax.interop.import_weights import read_weights
from ssl_jax.interop.initial_weights import load_initial_weights, resolve_initial_weights
from ssl_jax.interop.torch_names import to_torch
from ssl_jax.interop.weights import (
    Weights,
    read_header,
    read_safetensors,
    write_safetensors,
    write_weights,
)

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def drawn():
    """Random parameters and running statistics of a tiny encoder."""
    return random_encoder(with_two_stages(tiny_config()))


@pytest.fixture(scope="module")
def state(drawn):
    """The same with torchvision's names."""
    return to_torch(drawn["params"], drawn["batch_stats"])


def prefixed(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def saved(tmp_path, state, name="net.safetensors"):
    save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, tmp_path / name)
    return tmp_path / name


def numbered(state):
    """Names of the children of a `Sequential`, as in lightly's small ResNets."""
    children = {"conv1": "0", "bn1": "1", "layer1": "2", "layer2": "3"}
    names = {name: name.partition(".") for name in state}
    return {f"{children[a]}.{rest}": state[name] for name, (a, _, rest) in names.items()}


def test_numbered_names_are_lightly_even_with_heads_like_solo_learn(tmp_path, state):
    theirs = prefixed("backbone.", numbered(state)) | {"prototypes.layers.weight": normal(3, 4)}
    theirs |= prefixed("momentum_backbone.", numbered(state)) | {"projector.0.weight": normal(2, 2)}
    weights = read_weights(saved(tmp_path, theirs))
    assert weights.source.startswith("lightly")
    assert weights.config.model.stem == "cifar_no_relu"
    assert weights.config.views.view1.std[0] == 0.229
    assert "prototypes.layers.weight" in weights.left_out


@pytest.mark.parametrize(
    ("prefix", "heads"),
    [
        ("encoder.", ("classifier.", "projector.0.")),
        ("backbone.", ("classifier.", "head.mlp.0.")),
        ("backbone.", ("momentum_projector.0.",)),
    ],
)
def test_solo_learn_is_inferred_from_its_heads(tmp_path, state, prefix, heads):
    theirs = prefixed(prefix, state) | {f"{head}weight": normal(2, 8) for head in heads}
    weights = read_weights(saved(tmp_path, theirs))
    assert weights.source.startswith("solo") and weights.config.model.stem == "cifar_pad2"


@pytest.mark.parametrize(
    ("prefix", "more"),
    [
        ("encoder.", "predictor.0.weight"),  # SimSiam's
        ("encoder.", "classifier.weight"),  # anyone's
        ("model.encoder.", ""),
        ("backbone.", ""),
        ("backbone.", "projector.0.weight"),  # VICReg's
        ("backbone.", "bn.running_mean"),
    ],
)
def test_small_stems_under_common_names_need_a_kind(tmp_path, state, prefix, more):
    theirs = prefixed(prefix, state) | ({more: normal(2, 2)} if more else {})
    file = saved(tmp_path, theirs)
    sentence = rf"has a 3×3 stem and names that start with '{prefix}'.* --kind=solo .* --kind=light"
    with pytest.raises(UserError, match=sentence):
        read_weights(file)
    stems = {"torchvision": "cifar"} | ({} if more else {"solo": "cifar_pad2"})
    for kind, stem in stems.items():
        assert read_weights(file, kind).config.model.stem == stem


def test_deep_stem_is_refused(tmp_path, state):
    theirs = {re.sub("^conv1", "conv1.0", name): value for name, value in state.items()}
    with pytest.raises(UserError, match="its stem is not a single convolution, conv1"):
        read_weights(saved(tmp_path, theirs))


def test_missing_names_are_listed_in_the_error(tmp_path, state):
    less = {name: v for name, v in state.items() if not re.match(r"layer1.0.(conv|bn)", name)}
    less["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"]
    with pytest.raises(UserError) as caught:
        read_weights(saved(tmp_path, less))
    told = str(caught.value)
    assert "lacks 5 of " in told and " more" not in told
    for name in ("bn1/bias", "bn1/scale", "bn2/bias", "bn2/scale", "conv2/kernel"):
        assert f"stage1_block1/{name}" in told


def timms(std=0.5, mean=0.5, size=40):
    told = {"mean": [mean] * 3, "std": [std] * 3, "input_size": [3, size, size], "crop_pct": 0.9}
    return json.dumps({"pretrained_cfg": {**told, "interpolation": "bicubic"}})


def test_preprocessing_is_read_from_timm_config_next_to_torchvision_names_only(tmp_path, state):
    file, beside = saved(tmp_path, state, "model.safetensors"), tmp_path / "config.json"
    beside.write_text(timms())
    # The folder itself works, too.
    for path in (file, tmp_path):
        config = ssl_jax.load(path).config
        assert config.views.view1.size == 40 and config.views.view1.std == (0.5,) * 3
        assert config.eval.crop_fraction == 0.9
        assert config.views.view1.crop.sampler == "torchvision"
    for wrong in (timms(std=0.0), timms(std=-1.0), timms(size=5000), "[" * 100_000):
        beside.write_text(wrong)
        other = saved(tmp_path, {**state, "more": normal(len(wrong))}, "other.safetensors")
        assert read_weights(other).config.views.view1.size == 32
    beside.write_text(timms())
    moco = saved(tmp_path, prefixed("module.encoder_q.", state), "moco.safetensors")
    assert read_weights(moco).config.views.view1.size == 32


def test_initial_weights_from_an_imported_file_include_heads_and_target(tmp_path, drawn, state):
    head = {"fc.0.weight": normal(8, 8), "fc.0.bias": normal(8)}
    head |= {"fc.2.weight": normal(5, 8), "fc.2.bias": normal(5)}
    file = saved(tmp_path, prefixed("module.encoder_q.", {**state, **head}))
    assert ssl_jax.load(file, projector_layer=1).apply(np.zeros((1, 8, 8, 3))).shape == (1, 8)
    config = with_two_stages(method_config("moco"))
    config.moco.update(out=5, hidden=8, layers=2)
    config.init_from.update(path=str(file), heads=True)
    resolve_initial_weights(config)
    state = load_initial_weights(blank_state(config), config)
    for params in (state.params, state.method_state["target"]):
        jax.tree.map(np.testing.assert_array_equal, params["encoder"], drawn["params"])
        dense = params["projector"]
        np.testing.assert_array_equal(dense["dense1"]["kernel"], head["fc.0.weight"].T)
        np.testing.assert_array_equal(dense["dense2"]["bias"], head["fc.2.bias"])


def ours(drawn):
    return Weights(
        with_two_stages(tiny_config()),
        {"encoder": drawn["params"]},
        {"encoder": drawn["batch_stats"]},
        3,
    )


def test_projected_first_shortcut_is_inferred_and_named_on_export(tmp_path):
    config = with_two_stages(tiny_config())
    config.model.project_first = True
    drawn = random_encoder(config)
    names = to_torch(drawn["params"], drawn["batch_stats"])
    assert "layer1.0.downsample.0.weight" in names
    file = saved(tmp_path, {**names, "fc.weight": normal(3, 8), "fc.bias": normal(3)})
    weights = read_weights(file, "torchvision")
    assert weights.config.model.project_first
    first, *_ = export_torch(file, tmp_path / "out.safetensors")
    assert "no ResNet with width 0.0625, the stem 'cifar', a projected first shortcut" in first
    plain = with_two_stages(tiny_config())
    plain.init_from.path = str(file)
    with pytest.raises(UserError, match="set config.model.project_first=True"):
        resolve_initial_weights(plain)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("moco_v3", "MoCo v3 (Chen, Xie & He, 2021"), ("supcontrast", "SupCon (Khosla et al., 2020")],
)
def test_card_of_an_import_names_the_method_of_its_code(tmp_path, drawn, kind, method):
    weights = dataclasses.replace(ours(drawn), source=f"{kind}: net.pth")
    assert f"Method: {method}" in model_card(tmp_path / "ours.safetensors", weights)


def test_card_of_an_import_has_no_training_section(tmp_path, drawn):
    write_weights(ours(drawn), tmp_path / "ours.safetensors")
    assert "## Training" in model_card(tmp_path / "ours.safetensors", ours(drawn))
    export_torch(tmp_path / "ours.safetensors", tmp_path / "torch.safetensors")
    export_folder(tmp_path / "torch.safetensors", tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "## Training" not in card and "SimCLR" in card
    assert "# ResNet-6 ×0.0625, SimCLR" in card
    assert "Imported from ssl_jax (simclr): torch.safetensors." in card


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, drawn, state, value):
    theirs = {**state, "layer1.0.bn1.running_var": state["layer1.0.bn1.running_var"].copy()}
    theirs["layer1.0.bn1.running_var"][:2] = value
    sentence = "has 2 NaN or infinite values in encoder/stage1_block1/bn1/var of its running stat"
    with pytest.raises(UserError, match=sentence):
        read_weights(saved(tmp_path, theirs))
    theirs["layer1.0.bn1.running_var"][:2] = -1
    with pytest.raises(UserError, match="negative variances in encoder/stage1_block1/bn1/var of"):
        read_weights(saved(tmp_path, theirs))
    mine = jax.tree.map(np.copy, drawn)
    mine["params"]["stem"]["conv1"]["kernel"][0, 0, 0] = value
    write_weights(ours(mine), tmp_path / "ours.safetensors")
    sentence = "ours.safetensors has 4 NaN or infinite values in encoder/stem/conv1/kernel of its p"
    with pytest.raises(UserError, match=sentence):
        ssl_jax.load(tmp_path / "ours.safetensors")
    config = with_two_stages(tiny_config())
    config.init_from.path = str(tmp_path / "ours.safetensors")
    with pytest.raises(UserError, match=sentence):
        load_initial_weights(blank_state(config), config)


def test_config_in_the_header_of_another_network_is_refused(tmp_path, drawn):
    write_weights(ours(drawn), tmp_path / "ours.safetensors")
    export_torch(tmp_path / "ours.safetensors", tmp_path / "torch.safetensors")
    arrays, header = read_safetensors(tmp_path / "torch.safetensors")
    config = json.loads(header["ssl_jax_config"])
    config["model"]["depth"] = 18
    header["ssl_jax_config"] = json.dumps(config)
    write_safetensors(arrays, tmp_path / "torch.safetensors", header)
    with pytest.raises(UserError, match="torch.safetensors lacks .* parameters of the encoder"):
        read_weights(tmp_path / "torch.safetensors")


def test_export_does_not_overwrite_a_users_torch_encoder(tmp_path, drawn):
    write_weights(ours(drawn), tmp_path / "ours.safetensors")
    mine = tmp_path / "torch_encoder.py"
    mine.write_text("import torch\n")
    with pytest.raises(UserError, match="torch_encoder.py was not written by ssl_jax: move it"):
        export_torch(tmp_path / "ours.safetensors", tmp_path / "a.safetensors")
    assert mine.read_text() == "import torch\n" and not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("names", "config"),
    [
        (("params/encoder", "params/encoder/stem"), "{}"),
        (("params/encoder",), "{}"),
        (("params",), "{}"),
        (("params/encoder/stem",), "[" * 100_000),
    ],
    ids=["both", "array", "no networks", "deep"],
)
def test_crafted_ssl_jax_files_are_refused_as_corrupt(tmp_path, drawn, names, config):
    write_weights(ours(drawn), tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    header["config"] = header["config"] if config == "{}" else config
    write_safetensors({name: normal(2) for name in names}, tmp_path / "b.safetensors", header)
    with pytest.raises(UserError, match="b.safetensors is corrupt .* export it again"):
        read_weights(tmp_path / "b.safetensors")


def test_kind_is_refused_for_files_that_need_none(tmp_path, drawn):
    write_weights(ours(drawn), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="written by ssl_jax: omit the kind"):
        read_weights(tmp_path / "a.safetensors", "moco")
    (tmp_path / "model.ckpt.index").write_bytes(b"")
    with pytest.raises(UserError, match="a TensorFlow checkpoint of SimCLR: omit the kind"):
        read_weights(tmp_path / "model.ckpt", "moco")
