"""The ViT's features equal those of timm's on the same weights."""

import re

import jax
import numpy as np
import pytest

from ssl_jax.models import ViT

torch = pytest.importorskip("torch", reason="torch is not installed here: make peers")
timm = pytest.importorskip("timm", reason="timm is not installed here: make peers")

OPTIONS = {
    "class": ({}, {}),
    "many_heads": ({"heads": 8}, {"num_heads": 8}),
    "layer_scale": ({"layer_scale": 0.1}, {"init_values": 0.1}),
    "mean": ({"pool": "mean"}, {"global_pool": "avg", "class_token": False}),
    "registers": ({"registers": 3}, {"reg_tokens": 3, "no_embed_class": True}),
    "registers_mean": (
        {"registers": 3, "pool": "mean"},
        {
            **{"reg_tokens": 3, "no_embed_class": True},
            **{"global_pool": "avg", "class_token": False},
        },
    ),
}


def params_of(state):
    """Converts timm's state dict: names, and the orders of axes."""
    params = {}
    for name, value in state.items():
        *path, leaf = re.sub(r"blocks\.", "blocks_", name).split(".")
        if path[:1] == ["patch_embed"]:
            path = ["patch_embed"]
        value = value.numpy()
        if value.ndim == 4:
            value, leaf = value.transpose(2, 3, 1, 0), "kernel"
        elif leaf == "weight" and value.ndim == 2:
            value, leaf = value.T, "kernel"
        node = params
        for part in path:
            node = node.setdefault(part, {})
        node[{"weight": "scale", "gamma": "scale"}.get(leaf, leaf)] = value
    return params


@pytest.mark.parametrize("name", OPTIONS)
def test_features_equal_timms(name):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ours, theirs = OPTIONS[name]
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    net = timm.models.VisionTransformer(
        **{**sizes, **theirs}, num_classes=0, dynamic_img_size=True
    ).eval()
    with torch.no_grad():
        for each, value in net.named_parameters():
            one = "norm" in each and each.endswith("weight")
            value.copy_(one + 0.2 * torch.randn(value.shape))
    module = ViT(**{"width": 32, "depth": 3, "heads": 2, "patch": 8, "image_size": 32, **ours})
    params = params_of(net.state_dict())
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), np.zeros((1, 32, 32, 3)), train=False)
    )
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes["params"])
    for height, width in ((32, 32), (48, 48), (16, 24)):  # others interpolate the positions
        x = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
        with torch.no_grad():
            expected = net(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
        found = jax.jit(lambda p, x: module.apply({"params": p}, x, train=False))(params, x)
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
