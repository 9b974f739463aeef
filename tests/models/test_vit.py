"""The ViT: sizes, positions, dropped branches, and the step with microbatches and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_microbatch import MICROBATCHES, cached, computed, plain
from test_step import ONE
from tiny import assert_trees_close, method_config

from ssl_jax.config import Schedule, apply_overrides, default_config, from_json, to_json
from ssl_jax.errors import UserError
from ssl_jax.interop.initial_weights import resolve_initial_weights
from ssl_jax.methods import make_method
from ssl_jax.methods.base import apply_networks
from ssl_jax.models import ViT, make_encoder
from ssl_jax.models.registry import architecture, encoder_name
from ssl_jax.models.vit import sincos_positions
from ssl_jax.optim import role_labels

TINY = {"width": 8, "depth": 2, "heads": 2, "patch": 2, "image_size": 8}


def shapes(module, size):
    image = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda k, x: module.init_with_output(k, x, train=False), key, image)


def vit_config(**changes):
    """A tiny ViT under SimCLR without BatchNorm in the head."""
    config = method_config("simclr")
    config.simclr.head_bn = "none"
    config.model.head_init = "torch"  # large enough to pass the gradient on
    config.model.name = "vit"
    config.model.vit.update({**TINY, **changes})
    return config


# Of timm's vit_tiny, vit_small and vit_base_patch16_224 with num_classes=0.
@pytest.mark.parametrize(
    ("name", "width", "heads", "count"),
    [("Ti", 192, 3, 5_524_416), ("S", 384, 6, 21_665_664), ("B", 768, 12, 85_798_656)],
)
def test_sizes_have_the_published_number_of_parameters(name, width, heads, count):
    config = default_config()
    config.model.name = "vit"
    config.model.vit.update(width=width, heads=heads)
    out, variables = shapes(make_encoder(config), 224)
    assert variables.keys() == {"params"} and out.shape == (2, width)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == count
    assert encoder_name(config.model) == f"ViT-{name}/16"


def test_names_and_architecture_have_what_changes_the_function():
    config = default_config()
    config.model.name = "vit"
    config.model.vit.update(heads=12, registers=4, drop_path=0.1)
    assert encoder_name(config.model) == "ViT-S/16 with 12 heads and 4 registers"
    config.model.vit.depth = 6
    assert encoder_name(to_json(config)["model"]).startswith("ViT of 6 blocks of width 384/16")
    keys = architecture(config.model)
    assert keys["name"] == "vit" and keys["vit.heads"] == 12 and "vit.drop_path" not in keys
    assert from_json(to_json(config)).model.vit.registers == 4


def test_xavier_initialization_is_mocov3s():
    """Uniform by the fans of linear layers, of query, key and value each; patches are vectors."""
    width, patch = 32, 4
    module = ViT(width=width, depth=1, heads=4, patch=patch, image_size=8, weight_init="xavier")
    image = np.zeros((1, 8, 8, 3), np.float32)
    params = jax.jit(lambda k: module.init(k, image, train=False)["params"])(jax.random.key(0))
    block = params["blocks_0"]
    fans = {
        (3 * patch * patch, width): params["patch_embed"],
        (width, width): block["attn"]["qkv"],
        (width, width, "proj"): block["attn"]["proj"],
        (width, 4 * width): block["mlp"]["fc1"],
        (4 * width, width): block["mlp"]["fc2"],
    }
    for (fan_in, fan_out, *_), layer in fans.items():
        kernel, bound = np.asarray(layer["kernel"]), np.sqrt(6 / (fan_in + fan_out))
        assert 0.98 * bound < np.abs(kernel).max() <= bound
        assert kernel.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
        assert not np.asarray(layer["bias"]).any()
    assert 0 < np.abs(params["cls_token"]).max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_init": "xaver"}, "weight_init is 'xaver'. Did you mean 'xavier'"),
        ({"heads": 3}, "config.model.vit.width is 8, which config.model.vit.heads, 3, does not"),
        ({"patch": 3}, "config.views.view1.size is 8, but config.model.vit.patch is 3"),
        ({"image_size": 9}, "config.model.vit.image_size is 9: use a multiple"),
        ({"width": 6, "positions": "sincos"}, "with positions 'sincos', use a multiple of 4"),
    ],
)
def test_wrong_options_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_encoder(vit_config(**changes))


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_positions_are_interpolated_for_other_sizes_of_images(positions):
    """Positions of a constant table stay constant; those of a grid of half the size lie between."""
    module = ViT(**{**TINY, "positions": positions, "registers": 1, "pool": "mean"})
    out, variables = shapes(module, 12)
    assert out.shape == (2, 8) and "cls_token" not in variables["params"]
    table = variables["params"].get("pos_embed")
    assert (table is None) == (positions == "sincos")
    if table is not None:
        assert table.shape == (1, 16, 8)


def test_sincos_positions_are_those_of_the_paper_and_continuous():
    found = np.asarray(sincos_positions((3, 4), 4, 8)).reshape(3, 4, 8)
    rows, columns = (np.arange(3) + 0.5) * 4 / 3 - 0.5, np.arange(4)
    for i, y in enumerate(rows):
        for j, x in enumerate(columns):
            expected = [f(v / 100**k) for v in (x, y) for f in (np.sin, np.cos) for k in (0, 1)]
            np.testing.assert_allclose(found[i, j], expected, atol=1e-5)


def test_branches_are_dropped_by_image_and_scaled_in_training_only():
    module = ViT(**{**TINY, "drop_path": 0.5})
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)

    @jax.jit
    def features(key):
        variables = module.init(key, x, train=False)
        variables = jax.tree.map(lambda p: 10 * p, variables)  # branches that matter
        images, keys = jnp.tile(x, (64, 1, 1, 1)), jax.random.split(key, 64)
        networks, params = {"encoder": module}, {"encoder": variables["params"]}
        return (
            module.apply(variables, images, train=False, keys=keys),
            apply_networks(networks, params, {"encoder": {}}, images, keys)[0][0],
        )

    evaluated, dropped = map(np.asarray, features(jax.random.key(0)))
    np.testing.assert_allclose(evaluated, np.tile(evaluated[:1], (64, 1)), atol=1e-4)
    # The first block keeps all, the last one keeps both branches, one or none: four results.
    assert len(np.unique(dropped.round(2), axis=0)) == 4


def test_norms_scales_and_biases_are_not_decayed():
    _, variables = shapes(ViT(**{**TINY, "layer_scale": 0.1}), 8)
    labels = role_labels(variables["params"])
    assert labels["blocks_0"]["ls1"]["scale"] == labels["norm"]["scale"] == "norm_bias"
    assert labels["blocks_0"]["attn"]["qkv"]["kernel"] == labels["pos_embed"] == "weight"


def test_microbatched_gradients_equal_the_plain_steps():
    """Without BatchNorm they are equal to rounding, also with dropped branches."""
    # Of a random network, features at a class token hardly depend on the image.
    config = vit_config(drop_path=0.5, layer_scale=0.1, pool="mean", registers=1)
    expected, actual = (computed(config, ONE, way) for way in (plain, cached))
    assert_trees_close(actual, expected, rtol=1e-5, atol=1e-7)
    assert max(np.abs(g).max() for g in jax.tree.leaves(expected[1])) > 1e-4
    assert MICROBATCHES > 1 and make_method(config, Schedule(1, 1)).encoder.uses_keys


@pytest.mark.long
@pytest.mark.parametrize(
    "method",
    [
        "moco",
        "swav",
        "byol",
        "simsiam",
        "mocov3",
        "barlow",
        "vicreg",
        "dino",
        "supcon",
        "supervised",
    ],
)
def test_steps_agree_between_1_and_8_devices_and_with_microbatches(method):
    config = method_config(method)
    config.model.name = "vit"
    config.model.vit.update({**TINY, "drop_path": 0.5, "pool": "mean"})
    expected, actual = (computed(config, devices, plain) for devices in (ONE, jax.devices()))
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5, atol=1e-6)
    # Biases before a BatchNorm, such as the last LayerNorm's, have no gradient but rounding.
    assert_trees_close(actual[1], expected[1], rtol=2e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"remat": True}])
def test_bfloat16_and_remat_keep_the_features(options):
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    variables = ViT(**TINY).init(jax.random.key(0), x, train=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    plain, other = (ViT(**TINY, **each).apply(variables, x, train=False) for each in ({}, options))
    assert other.dtype == jnp.float32
    np.testing.assert_allclose(other, plain, atol=0.05 if "dtype" in options else 1e-6)


def test_positions_of_a_run_stay_those_of_its_views():
    config = vit_config(image_size=0)
    resolve_initial_weights(config)
    side = config.views.view1.size
    assert config.model.vit.image_size == side
    other = apply_overrides(config, [f"views.view1.size={2 * side}"])
    assert make_encoder(other).image_size == side
