"""State dicts of PyTorch codes, as published: which code it was, its encoder and heads."""

from pathlib import Path

import jax
import numpy as np
import pytest
from encoders import random_encoder
from tiny import tiny_config, with_two_stages
from torch_files import tensor, torch_file

from ssl_jax.interop.import_weights import read_weights
from ssl_jax.interop.torch_names import to_torch
from ssl_jax.interop.torch_state import read_state

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def drawn():
    """Random parameters and statistics by stem, "imagenet" (7×7) and "cifar" (3×3)."""
    config, found = with_two_stages(tiny_config()), {}
    for config.model.stem in ("imagenet", "cifar"):
        found[config.model.stem] = random_encoder(config)
    return found


def resnet(drawn, stem="imagenet"):
    """With torchvision's names."""
    state = to_torch(drawn[stem]["params"], drawn[stem]["batch_stats"])
    return {name: value for name, value in state.items() if value.dtype == np.float32}


def prefixed(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def layers(prefix, *names):
    """Vectors in place of a head's weights."""
    return {f"{prefix}{name}": RNG.normal(size=4).astype(np.float32) for name in names}


def saved(tmp_path, contents):
    """Writes nested dicts of arrays like `torch.save`."""
    storages = {}

    def walk(value):
        if isinstance(value, dict):
            return {name: walk(each) for name, each in value.items()}
        if not isinstance(value, np.ndarray):
            return value
        storages[str(len(storages))] = value = np.ascontiguousarray(value)
        return tensor(value, str(len(storages) - 1))

    return torch_file(tmp_path / "net.pth", walk(contents), storages)


MLP = ("0.weight", "0.bias", "1.weight", "1.running_mean", "3.weight")


def vissl(net, small):
    """VISSL's model zoo: the trunk is a ModuleDict, the heads are a dict of their own."""
    model = {"trunk": prefixed("_feature_blocks.", net), "heads": layers("0.clf.0.", "weight")}
    base = {"model": model, "meta": {"input_shape": [3, 224, 224]}}
    contents = {"classy_state_dict": {"base_model": base, "phase_idx": 9}, "iteration": 1}
    return contents, ["heads.0.clf.0.weight"]


def supcontrast(net, small):
    """SupContrast: its own ResNet, whose shortcut is `shortcut`, in data parallel."""
    net = {name.replace("downsample", "shortcut"): value for name, value in small.items()}
    head = layers("head.", "0.weight", "0.bias", "2.weight", "2.bias")
    return {"model": prefixed("encoder.module.", net) | head, "epoch": 3}, list(head)


def barlow_twins(net, small):
    """Barlow Twins' checkpoint; the published network alone has torchvision's names."""
    heads = layers("module.projector.", *MLP) | layers("module.bn.", "running_mean", "running_var")
    return {"epoch": 1, "model": prefixed("module.backbone.", net) | heads}, list(heads)


def vicreg(net, small):
    """VICReg's full checkpoint."""
    heads = layers("module.projector.", *MLP)
    return {"epoch": 1, "model": prefixed("module.backbone.", net) | heads}, list(heads)


def dino(net, small):
    """DINO's full checkpoint, which its evaluation reads the teacher of."""
    other = {name: value + 1 for name, value in net.items()}
    head = layers("module.head.", "mlp.0.weight", "last_layer.weight_g")
    student = prefixed("module.backbone.", other) | head
    teacher = prefixed("module.backbone.", net) | head
    center = layers("", "center")
    names = [f"student.{name}" for name in student] + [f"teacher.{name}" for name in head]
    contents = {"student": student, "teacher": teacher, "dino_loss": center, "epoch": 1}
    return contents, [*names, "dino_loss.center"]


def moco_v3(net, small):
    """MoCo v3's two encoders, without heads."""
    momentum = prefixed("module.momentum_encoder.", {name: v + 1 for name, v in net.items()})
    state = prefixed("module.base_encoder.", net) | momentum
    return {"arch": "resnet50", "state_dict": state}, [*momentum]


@pytest.mark.parametrize("code", [vissl, supcontrast, barlow_twins, vicreg, dino, moco_v3])
def test_published_checkpoints_are_recognized_and_what_is_left_out_is_listed(tmp_path, drawn, code):
    stem = "cifar" if code is supcontrast else "imagenet"
    contents, left_out = code(resnet(drawn), resnet(drawn, "cifar"))
    weights = read_weights(saved(tmp_path, contents))
    assert weights.source == f"{code.__name__}: net.pth"
    assert weights.config.model.stem == stem and weights.config.model.padding == "symmetric"
    assert sorted(weights.left_out) == sorted(left_out)
    jax.tree.map(np.testing.assert_array_equal, weights.params, {"encoder": drawn[stem]["params"]})
    interpolation = weights.config.eval.interpolation
    assert interpolation == ("bicubic" if code is dino else "bilinear")


HEADS = {
    "moco": ("encoder_q.", {"encoder_q.fc.0.": (4, 8), "encoder_q.fc.2.": (3, 4)}, "projector"),
    "simsiam": (
        "encoder.",
        {"encoder.fc.0.": (4, 8), "predictor.0.": (2, 4), "predictor.3.": (4, 2)},
        "predictor",
    ),
    "moco_v3": (
        "base_encoder.",
        {"base_encoder.fc.0.": (4, 8), "base_encoder.fc.3.": (3, 4), "predictor.0.": (4, 3)},
        "predictor",
    ),
    "swav": ("", {"projection_head.0.": (4, 8), "prototypes.": (5, 3)}, "prototypes"),
    "solo": ("backbone.", {"projector.0.": (4, 8), "classifier.": (3, 8)}, "encoder"),
    "torchvision": ("", {"fc.": (3, 8)}, "classifier"),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(
    "outer", ["", "module.", "_orig_mod.module.", "model.", "net.module.", "backbone.", "encoder."]
)
def test_common_prefixes_may_precede_the_names_of_every_code(drawn, kind, outer):
    own, heads, network = HEADS[kind]
    state = prefixed(own, resnet(drawn)) | {
        f"{name}weight": RNG.normal(size=shape).astype(np.float32) for name, shape in heads.items()
    }
    # `torch.compile` of the encoder alone is in the middle of its names.
    state = {f"{outer}{name}".replace("layer1", "_orig_mod.layer1"): state[name] for name in state}
    found = read_state(state, "", Path("net.pth"))
    assert found.kind == kind and network in found.params
    jax.tree.map(
        np.testing.assert_array_equal, found.params["encoder"], drawn["imagenet"]["params"]
    )
    assert set(found.left_out) <= set(state)
