"""Imported weights of other packages' models give the same features."""

import argparse
import pickle
import sys
import types
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed here: make peers")
torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

import ssl_jax  # noqa: E402
from ssl_jax.config import Schedule  # noqa: E402
from ssl_jax.errors import UserError  # noqa: E402
from ssl_jax.interop.import_weights import read_weights  # noqa: E402
from ssl_jax.interop.metadata import preprocessing  # noqa: E402
from ssl_jax.methods import make_method  # noqa: E402

SIZE = 64


def randomized(net, seed=0):
    """Randomizes weights and statistics; returns the module in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(module.bias, 0, 0.2, generator=generator)
    return net.eval()


def images(size=SIZE, n=2):
    return np.random.default_rng(0).normal(size=(n, size, size, 3)).astype(np.float32)


@torch.no_grad()
def by_torch(net, x):
    x = torch.from_numpy(x)
    out = net(x.permute(0, 3, 1, 2) if x.ndim == 4 else x)
    return out.flatten(1).numpy()


def ours(weights, x, network="encoder"):
    module = make_method(weights.config, Schedule(1, 1)).networks[network]
    variables = {
        "params": weights.params[network],
        "batch_stats": weights.batch_stats.get(network, {}),
    }
    apply = jax.jit(lambda variables, x: module.apply(variables, x, train=False))
    return np.asarray(apply(jax.tree.map(jnp.asarray, variables), x))


def assert_same(mine, theirs):
    assert mine.shape == theirs.shape
    assert np.abs(mine - theirs).max() <= 1e-4 * np.abs(theirs).max()
    assert np.std(theirs, axis=0).max() > 1e-3  # images differ


def resnet(depth=18, stem="imagenet", padding=1, fc=None):
    net = getattr(torchvision.models, f"resnet{depth}")()
    net.fc = fc or nn.Identity()
    if stem == "cifar":
        net.conv1 = nn.Conv2d(3, 64, 3, 1, padding, bias=False)
        net.maxpool = nn.Identity()
    return net


def prefixed(prefix, net):
    return {f"{prefix}{name}": value for name, value in net.state_dict().items()}


def saved(tmp_path, state, legacy=False, name="weights.pth.tar", **more):
    file = tmp_path / name
    torch.save({"state_dict": state, **more}, file, _use_new_zipfile_serialization=not legacy)
    return file


def mlp(*sizes, bn, bias, last_bias=True):
    layers = []
    for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        last = i == len(sizes) - 2
        layers.append(nn.Linear(a, b, bias=last_bias if last else bias))
        if not last:
            layers += [nn.BatchNorm1d(b), nn.ReLU()] if bn else [nn.ReLU()]
    return nn.Sequential(*layers)


# torchvision and timm


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_torchvision_resnets_of_every_depth(tmp_path, depth):
    net = randomized(resnet(depth))
    file = tmp_path / "net.safetensors"
    save_file(net.state_dict(), file)
    weights = read_weights(file)
    assert (weights.config.model.depth, weights.config.model.width) == (depth, 1)
    assert weights.left_out == ()
    assert_same(ours(weights, images()), by_torch(net, images()))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_timm_resnets_with_classifier(tmp_path, name):
    net = randomized(timm.create_model(name, num_classes=5))
    weights = read_weights(saved(tmp_path, net.state_dict()))
    features = by_torch(
        lambda x: net.forward_head(net.forward_features(x), pre_logits=True), images()
    )
    assert_same(ours(weights, images()), features)
    assert_same(ours(weights, features, "classifier"), by_torch(net, images()))


def test_cifar_stem_is_inferred(tmp_path):
    net = randomized(resnet(stem="cifar"))
    weights = read_weights(saved(tmp_path, net.state_dict()))
    assert weights.config.model.stem == "cifar" and weights.config.views.view1.size == 32
    assert_same(ours(weights, images(32)), by_torch(net, images(32)))


def test_width_is_inferred(tmp_path):
    net = timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock, (2, 2, 2, 2), channels=(128, 256, 512, 1024), num_classes=0
    )
    # timm's stem keeps its width; SimCLR's is wide, too.
    net.conv1 = nn.Conv2d(3, 128, 7, 2, 3, bias=False)
    net.bn1 = nn.BatchNorm2d(128)
    first = net.layer1[0]
    first.conv1 = nn.Conv2d(128, 128, 3, 1, 1, bias=False)
    first.downsample = None
    weights = read_weights(saved(tmp_path, randomized(net).state_dict()))
    assert weights.config.model.width == 2
    assert_same(ours(weights, images()), by_torch(net, images()))


# Official code


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_moco_v1_and_v2(tmp_path, version, legacy):
    head = nn.Linear(512, 128) if version == 1 else mlp(512, 512, 128, bn=False, bias=True)
    net, key = randomized(resnet(fc=head)), randomized(resnet(fc=head), seed=1)
    state = prefixed("module.encoder_q.", net) | prefixed("module.encoder_k.", key)
    state |= {"module.queue": torch.randn(128, 64), "module.queue_ptr": torch.zeros(1).long()}
    optimizer = torch.optim.SGD(net.parameters(), 0.1).state_dict()
    file = saved(tmp_path, state, legacy, epoch=200, arch="resnet18", optimizer=optimizer)
    weights = read_weights(file)
    assert weights.config.method == "moco" and weights.config.moco.layers == version
    assert len(weights.left_out) == len(key.state_dict()) + 2
    net.fc = nn.Identity()
    features = by_torch(net, images())
    assert_same(ours(weights, images()), features)
    assert_same(ours(weights, features, "projector"), by_torch(head, features))
    with pytest.raises(UserError, match="no names that start with 'backbone.'"):
        read_weights(file, "solo")


def test_simsiam_with_projector_and_predictor(tmp_path):
    head = mlp(512, 512, 512, 256, bn=True, bias=False)
    head.append(nn.BatchNorm1d(256, affine=False))
    predictor = mlp(256, 64, 256, bn=True, bias=False)
    net = randomized(resnet(fc=head))
    randomized(predictor)
    state = prefixed("module.encoder.", net) | prefixed("module.predictor.", predictor)
    weights = read_weights(saved(tmp_path, state))
    options = weights.config.simsiam
    assert (options.hidden, options.out, options.predictor_hidden) == (512, 256, 64)
    assert weights.left_out == ()
    net.fc = nn.Identity()
    features = by_torch(net, images())
    assert_same(ours(weights, images()), features)
    projected = by_torch(head, features)
    assert_same(ours(weights, features, "projector"), projected)
    assert_same(ours(weights, projected, "predictor"), by_torch(predictor, projected))


def test_moco_v3_with_projector_and_predictor(tmp_path):
    head = mlp(512, 64, 32, bn=True, bias=False, last_bias=False)
    head.append(nn.BatchNorm1d(32, affine=False))
    predictor = mlp(32, 64, 32, bn=True, bias=False, last_bias=False)
    net, average = randomized(resnet(fc=head)), randomized(resnet(fc=head), seed=1)
    randomized(net), randomized(predictor)
    state = prefixed("module.base_encoder.", net) | prefixed("module.predictor.", predictor)
    state |= prefixed("module.momentum_encoder.", average)
    weights = read_weights(saved(tmp_path, state))
    options = weights.config.mocov3
    assert weights.config.method == "mocov3" and not options.predictor_bn
    assert (options.hidden, options.out, options.layers) == (64, 32, 2)
    assert all("momentum_encoder" in name for name in weights.left_out)
    net.fc = nn.Identity()
    features = by_torch(net, images())
    assert_same(ours(weights, images()), features)
    projected = by_torch(head, features)
    assert_same(ours(weights, features, "projector"), projected)
    assert_same(ours(weights, projected, "predictor"), by_torch(predictor, projected))


def test_swav_with_prototypes(tmp_path):
    net, head = randomized(resnet()), randomized(mlp(512, 512, 128, bn=True, bias=True))
    prototypes = nn.Linear(128, 30, bias=False)
    state = prefixed("module.", net) | prefixed("module.projection_head.", head)
    state |= prefixed("module.prototypes.", prototypes)
    file = tmp_path / "swav.pth.tar"
    torch.save(state, file)  # published files contain only the state dict
    weights = read_weights(file)
    assert weights.config.swav.prototypes == 30 and weights.left_out == ()
    assert weights.config.views.view1.std[0] == 0.228
    features = by_torch(net, images())
    assert_same(ours(weights, images()), features)
    assert_same(ours(weights, features, "projector"), by_torch(head, features))
    kernel = weights.params["prototypes"]["kernel"]
    np.testing.assert_array_equal(kernel, prototypes.weight.detach().numpy().T)


class Basic(nn.Module):
    """lightly's block, which names its shortcut `shortcut`."""

    def __init__(self, n, m, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(n, m, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(m)
        self.conv2 = nn.Conv2d(m, m, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(m)
        self.shortcut = nn.Sequential()
        if stride > 1 or n != m:
            self.shortcut = nn.Sequential(nn.Conv2d(n, m, 1, stride, bias=False), nn.BatchNorm2d(m))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def small_layers():
    sizes = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    return [nn.Sequential(Basic(n, m, s), Basic(m, m, 1)) for n, m, s in sizes]


@pytest.mark.parametrize("splits", [1, 8])
def test_lightly_small_network_has_no_relu_in_its_stem(tmp_path, splits):
    """Its benchmarks use the children of a network that applies the stem's ReLU in `forward`."""
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)]
    net = randomized(nn.Sequential(*stem, *small_layers(), nn.AdaptiveAvgPool2d(1)))
    state = prefixed("backbone.", net) | {"projection_head.layers.0.weight": torch.zeros(4, 4)}
    if splits > 1:  # split BatchNorm has statistics per part
        state = {k: v.repeat(splits) if "running" in k else v for k, v in state.items()}
    weights = read_weights(saved(tmp_path, state))
    assert weights.config.model.stem == "cifar_no_relu"
    assert weights.left_out == ("projection_head.layers.0.weight",)
    assert_same(ours(weights, images(32)), by_torch(net, images(32)))


def test_lightly_large_network(tmp_path):
    net = randomized(nn.Sequential(*list(resnet().children())[:-1]))
    weights = read_weights(saved(tmp_path, prefixed("backbone.", net)))
    assert weights.config.model.stem == "imagenet"
    assert_same(ours(weights, images()), by_torch(net, images()))


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_solo_learn_pads_its_small_stem_by_two(tmp_path, stem):
    net, size = randomized(resnet(stem=stem, padding=2)), 32 if stem == "cifar" else SIZE
    state = prefixed("backbone.", net) | {"classifier.weight": torch.zeros(10, 512)}
    state |= prefixed("momentum_backbone.", net)
    # Lightning's checkpoints contain hyperparameters, too.
    options = argparse.Namespace(lr=0.1, path=Path("x"))
    file = saved(tmp_path, state, name="last.ckpt", hyper_parameters=options)
    weights = read_weights(file)
    assert weights.config.model.stem == {"cifar": "cifar_pad2"}.get(stem, stem)
    assert_same(ours(weights, images(size)), by_torch(net, images(size)))


def test_byol_haiku_checkpoint(tmp_path, monkeypatch):
    hk = pytest.importorskip("haiku")

    def forward(x, train):
        norm = {"create_scale": True, "create_offset": True, "decay_rate": 0.9}
        config = {"bn_config": {"decay_rate": 0.9, "eps": 1e-5}, "resnet_v2": False}
        net = hk.nets.ResNet50(10, **config)

        def head(name):
            def apply(x):
                x = hk.Linear(24)(x)
                x = jax.nn.relu(hk.BatchNorm(**norm)(x, train))
                return hk.Linear(12, with_bias=False)(x)

            return hk.to_module(apply)(name=name)

        captured = []

        def keep(next_f, args, kwargs, context):
            out = next_f(*args, **kwargs)
            if context.module.name == "block_2" and "block_group_3" in context.module.module_name:
                captured.append(out)
            return out

        with hk.intercept_methods(keep):
            net(x, train)
        features = captured[-1].mean((1, 2))
        z = head("projector")(features)
        return features, z, head("predictor")(z)

    model = hk.transform_with_state(forward)
    x = images()
    params, state = model.init(jax.random.key(0), x, True)
    rng = np.random.default_rng(0)

    def randomized_leaf(path, value):
        value = np.asarray(value)
        if "ema" in path or "norm" in path:
            return rng.uniform(0.5, 1.5, value.shape).astype(value.dtype)
        return value

    def each(tree):
        return {
            m: {k: randomized_leaf(m, v) for k, v in leaves.items()} for m, leaves in tree.items()
        }

    params, state = each(params), each(state)
    expected, _ = model.apply(params, state, None, x, False)
    # Like the official experiment's checkpoint: a pickled named tuple of its module.
    module = types.ModuleType("byol.byol_experiment")
    fields = "online_params target_params online_state target_state opt_state"
    module._ByolExperimentState = namedtuple("_ByolExperimentState", fields)
    module._ByolExperimentState.__module__ = module.__name__
    monkeypatch.setitem(sys.modules, "byol", types.ModuleType("byol"))
    monkeypatch.setitem(sys.modules, "byol.byol_experiment", module)
    other = jax.tree.map(np.zeros_like, params)
    experiment = module._ByolExperimentState(params, other, state, state, ())
    file = tmp_path / "pretrain_res50x1.pkl"
    checkpoint = {"experiment_state": experiment, "step": 1, "rng": np.zeros(2, np.uint32)}
    file.write_bytes(pickle.dumps(checkpoint, protocol=2))
    monkeypatch.delitem(sys.modules, "byol.byol_experiment")
    monkeypatch.delitem(sys.modules, "byol")
    weights = read_weights(file)
    assert weights.config.method == "byol" and weights.config.model.padding == "same"
    assert (weights.config.byol.hidden, weights.config.byol.out) == (24, 12)
    features, projected, predicted = map(np.asarray, expected)
    assert_same(ours(weights, x), features)
    assert_same(ours(weights, features, "projector"), projected)
    assert_same(ours(weights, projected, "predictor"), predicted)


# Loading


def test_loaded_imports_preprocess_like_their_code(tmp_path):
    net = randomized(resnet())
    encoder = ssl_jax.load(
        saved(tmp_path, prefixed("module.encoder_q.", resnet(fc=nn.Linear(512, 8))))
    )
    assert encoder.config.views.view1.mean == (0.485, 0.456, 0.406)
    encoder = ssl_jax.load(saved(tmp_path, net.state_dict()))
    assert preprocessing(encoder.config)["antialias"]  # as in torchvision's evaluation
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    normalize = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        x = normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
        theirs = net(x).numpy()
    assert_same(np.asarray(encoder.apply(pixels)), theirs)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda s: s.pop("layer3.1.bn2.weight"),
            "lacks 1 of 60 parameters of the encoder: stage3_block2",
        ),
        (lambda s: s.pop("bn1.running_mean"), "lacks 1 of 40 running statistics of the encoder"),
        (
            lambda s: s.update({"layer1.0.conv1.weight": torch.zeros(64, 32, 3, 3)}),
            r"conv1/kernel in parameters of the encoder has the shape \[3, 3, 32, 64\]",
        ),
        (lambda s: s.pop("conv1.weight"), "its stem is not a single convolution"),
        (
            lambda s: s.update({"layer1.0.conv3.weight": torch.zeros(1, 1, 1, 1)}),
            "contains no ResNet",
        ),
    ],
)
def test_missing_names_and_other_shapes_are_refused(tmp_path, change, sentence):
    state = resnet().state_dict()
    change(state)
    with pytest.raises(UserError, match=sentence):
        read_weights(saved(tmp_path, state))
