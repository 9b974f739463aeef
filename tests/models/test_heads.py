import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.extend import core

from ssl_jax.errors import UserError
from ssl_jax.models import MLPHead
from ssl_jax.spmd import AXIS, device_groups, make_spmd

HEADS = {
    "simclr": (
        {"layers": 2, "hidden_bn": True, "out_bn": "scale", "kernel_init": "normal_0.01"},
        "dense1 bn1 relu dense2 bn2-scale",
    ),
    "simclr_v2": (
        {"layers": 3, "hidden_bn": True, "out_bn": "scale", "kernel_init": "normal_0.01"},
        "dense1 bn1 relu dense2 bn2 relu dense3 bn3-scale",
    ),
    "moco": ({"layers": 1, "out_bias": True}, "dense1-bias"),
    "moco_v2": (
        {"hidden_bias": True, "hidden_bn": False, "out_bias": True},
        "dense1-bias relu dense2-bias",
    ),
    "swav": ({"hidden_bias": True, "out_bias": True}, "dense1-bias bn1 relu dense2-bias"),
    "byol": ({"hidden_bias": True, "kernel_init": "haiku"}, "dense1-bias bn1 relu dense2"),
    "barlow": ({"layers": 3}, "dense1 bn1 relu dense2 bn2 relu dense3"),
    "vicreg": (
        {"layers": 3, "hidden_bias": True},
        "dense1-bias bn1 relu dense2-bias bn2 relu dense3",
    ),
    "simsiam_projector": (
        {"layers": 3, "out_bias": True, "out_bn": "no_affine"},
        "dense1 bn1 relu dense2 bn2 relu dense3-bias bn3-none",
    ),
    "simsiam_predictor": ({"out_bias": True}, "dense1 bn1 relu dense2-bias"),
    "dino": (
        {
            **{"layers": 3, "hidden_bias": True, "hidden_bn": False, "out_bias": True},
            **{"activation": "gelu", "kernel_init": "normal_0.02"},
        },
        "dense1-bias gelu dense2-bias gelu dense3-bias",
    ),
    "dino_lightly": (
        {"out_bias": True, "activation": "gelu"},
        "dense1 bn1 gelu dense2-bias",
    ),
    "mocov3": ({"out_bn": "no_affine"}, "dense1 bn1 relu dense2 bn2-none"),
    "full": ({"layers": 1, "out_bn": "full"}, "dense1 bn1"),
}


def random_variables(head, features, seed=0):
    """Variables without zeros and ones, as after some training."""
    x = jnp.zeros((2, features))
    shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), x, train=False))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = rng.normal(size=leaf.shape)
        if path[-1].key in ("scale", "var"):
            value = 0.5 + value**2
        return value.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def oracle(layers, variables, x, train):
    """Computes a head in float64 from its layers' names.

    Returns:
      The output, the parameters used, the new statistics, and the output after each ReLU.
    """
    params, running = (
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables.get(kind, {}))
        for kind in ("params", "batch_stats")
    )
    used, stats, after = set(), {}, [x]
    for word in layers.split():
        name, _, option = word.partition("-")
        if word == "relu":
            x = np.maximum(x, 0)
            after.append(x)
        elif word == "gelu":  # exact, with the error function
            x = np.vectorize(lambda value: value * (1 + math.erf(value / 2**0.5)) / 2)(x)
        elif name.startswith("dense"):
            x = x @ params[name]["kernel"] + (params[name]["bias"] if option else 0)
            used |= {(name, "kernel")} | ({(name, "bias")} if option else set())
        else:
            old, (mean, var) = running[name], (x.mean(0), x.var(0))
            stats[name] = {
                "mean": 0.9 * old["mean"] + 0.1 * mean,
                "var": 0.9 * old["var"] + 0.1 * var,
            }
            if not train:
                mean, var = old["mean"], old["var"]
            x = (x - mean) / np.sqrt(var + 1e-5)
            if option != "none":
                x = x * params[name]["scale"]
                used.add((name, "scale"))
            if not option:
                x = x + params[name]["bias"]
                used.add((name, "bias"))
    return x, used, stats, after


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("method", HEADS)
def test_heads_of_all_methods_equal_a_float64_reference(method, train):
    options, layers = HEADS[method]
    head = MLPHead(hidden=7, out=5, **options)
    variables = random_variables(head, 6)
    x = np.random.default_rng(1).normal(size=(16, 6))
    expected, used, stats, _ = oracle(layers, variables, x, train)
    assert set(flatten_dict(variables["params"])) == used
    out, changed = head.apply(variables, x, train=train, mutable=["batch_stats"])
    assert out.shape == (16, 5) and out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    new = changed.get("batch_stats", {})
    assert new.keys() == stats.keys()
    for name, stat in (stats if train else variables.get("batch_stats", {})).items():
        for key in ("mean", "var"):
            np.testing.assert_allclose(new[name][key], stat[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden", [0, 1, 2])
def test_return_hidden_gives_that_layers_output(hidden):
    options, layers = HEADS["simclr_v2"]
    head = MLPHead(hidden=7, out=5, **options)
    variables = random_variables(head, 6)
    x = np.random.default_rng(1).normal(size=(16, 6))
    *_, after = oracle(layers, variables, x, train=False)
    out = head.apply(variables, x, train=False, return_hidden=hidden)
    np.testing.assert_allclose(out, after[hidden], rtol=1e-4, atol=1e-5)
    first = {"params": {name: variables["params"][name] for name in ("dense1", "bn1")}}
    first["batch_stats"] = {"bn1": variables["batch_stats"]["bn1"]}
    if hidden == 1:  # needs no variables of later layers
        np.testing.assert_array_equal(head.apply(first, x, train=False, return_hidden=1), out)


def test_zero_layers_are_the_identity():
    head = MLPHead(hidden=7, out=5, layers=0)
    x = jnp.arange(6.0).reshape(2, 3)
    assert not jax.tree.leaves(head.init(jax.random.key(0), x, train=False))
    for hidden in (None, 0):
        np.testing.assert_array_equal(head.apply({}, x, train=True, return_hidden=hidden), x)


@pytest.mark.parametrize("layer", [-1, 3])
def test_missing_hidden_layer_is_refused(layer):
    head = MLPHead(hidden=7, out=5, layers=3)
    with pytest.raises(UserError, match=f"no hidden layer {layer}: use 0 to 2"):
        head.apply(random_variables(head, 6), jnp.zeros((2, 6)), train=False, return_hidden=layer)


@pytest.mark.parametrize(
    ("name", "std", "largest"),
    [
        ("normal_0.01", 0.01, None),
        ("normal_0.02", 0.02, None),
        ("torch", 256**-0.5 / 3**0.5, 256**-0.5),
        ("truncated_fan_in", 256**-0.5, 2 * 256**-0.5 / 0.8796),
        ("haiku", 0.8796 * 256**-0.5, 2 * 256**-0.5),
        ("fan_out_normal", (2 / 1024) ** 0.5, None),
    ],
)
def test_kernel_inits_have_the_right_scale(name, std, largest):
    head = MLPHead(hidden=0, out=1024, layers=1, out_bias=True, kernel_init=name)
    params = head.init(jax.random.key(0), jnp.zeros((1, 256)), train=False)["params"]["dense1"]
    kernel, bias = np.asarray(params["kernel"]), np.asarray(params["bias"])
    np.testing.assert_allclose(kernel.std(), std, rtol=0.01)
    np.testing.assert_allclose(kernel.mean(), 0, atol=0.01 * std)
    if largest:
        np.testing.assert_allclose(np.abs(kernel).max(), largest, rtol=0.01)
    else:
        assert np.abs(kernel).max() > 3.5 * std
    if name == "torch":
        np.testing.assert_allclose(bias.std(), std, rtol=0.1)
        np.testing.assert_allclose(np.abs(bias).max(), largest, rtol=0.02)
    else:
        assert not bias.any()


def test_batch_norm_starts_as_identity_with_parameters_scale_and_bias():
    head = MLPHead(hidden=7, out=5, out_bn="full")
    params = head.init(jax.random.key(0), jnp.zeros((1, 6)), train=False)["params"]
    for name in ("bn1", "bn2"):
        assert set(params[name]) == {"scale", "bias"}
        assert (params[name]["scale"] == 1).all() and (params[name]["bias"] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmuls_use_the_compute_dtype_and_state_is_float32(dtype):
    head = MLPHead(hidden=7, out=5, layers=3, out_bn="scale", hidden_bias=True, dtype=dtype)
    variables = random_variables(head, 6)
    x = np.random.default_rng(1).normal(size=(16, 6)).astype(np.float32)

    def loss(params, x):
        out, new = head.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return (out**2).sum(), (out, new)

    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    operands = {
        var.aval.dtype
        for equation in products(jax.make_jaxpr(gradient)(variables["params"], x).jaxpr)
        for var in equation.invars
    }
    assert operands == {jnp.dtype(dtype)}
    results = jax.eval_shape(gradient, variables["params"], x)
    assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {jnp.dtype(jnp.float32)}


def products(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=is_program):
            if is_program(value):
                yield from products(getattr(value, "jaxpr", value))


def is_program(value):
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def test_batch_norm_of_nearly_equal_features_is_exact():
    """E[x²] - E[x]² in float32 would be off by 10 % or more here."""
    head = MLPHead(hidden=0, out=4, layers=1, out_bn="no_affine")
    x = (100 + 0.01 * np.random.default_rng(0).normal(size=(64, 4))).astype(np.float32)
    variables = {
        "params": {"dense1": {"kernel": np.eye(4, dtype=np.float32)}},
        "batch_stats": {"bn1": {"mean": np.zeros(4), "var": np.ones(4)}},
    }
    out, _ = head.apply(variables, x, train=True, mutable=["batch_stats"])
    x = x.astype(np.float64)
    expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-2)


def test_splits_are_normalized_like_batches_of_their_own():
    head, alone = (MLPHead(hidden=7, out=5, out_bn="full", bn_splits=s) for s in (4, 1))
    variables = random_variables(alone, 6)
    assert jax.tree.structure(random_variables(head, 6)) == jax.tree.structure(variables)
    x = np.random.default_rng(1).normal(size=(32, 6)).astype(np.float32)
    out, new = head.apply(variables, x, train=True, mutable=["batch_stats"])
    parts = [alone.apply(variables, p, train=True, mutable=["batch_stats"]) for p in np.split(x, 4)]
    np.testing.assert_allclose(out, np.concatenate([y for y, _ in parts]), rtol=1e-5, atol=1e-5)
    expected = jax.tree.map(lambda *leaves: sum(leaves) / 4, *(stats for _, stats in parts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), dict(new), expected)
    evaluated = [module.apply(variables, x, train=False) for module in (head, alone)]
    np.testing.assert_array_equal(*evaluated)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("unbiased", [False, True])
def test_running_variance_averages_the_biased_or_unbiased_one(unbiased, splits):
    head = MLPHead(hidden=7, out=5, layers=1, out_bn="full", bn_unbiased=unbiased, bn_splits=splits)
    variables = random_variables(head, 6)
    x = np.random.default_rng(1).normal(size=(32, 6)).astype(np.float32)
    y, new = head.apply(variables, x, train=True, mutable=["batch_stats"])
    dense = variables["params"]["dense1"]
    parts = np.split(np.float64(x) @ np.float64(dense["kernel"]), splits)
    variance = np.mean([part.var(axis=0, ddof=int(unbiased)) for part in parts], axis=0)
    before = variables["batch_stats"]["bn1"]["var"]
    found = new["batch_stats"]["bn1"]["var"]
    np.testing.assert_allclose(found, 0.9 * before + 0.1 * variance, rtol=1e-5)
    normal = MLPHead(hidden=7, out=5, layers=1, out_bn="full", bn_splits=splits)
    np.testing.assert_array_equal(y, normal.apply(variables, x, True, mutable=["batch_stats"])[0])


@pytest.mark.parametrize("group", [0, 1, 2])
def test_batch_norm_groups_equal_their_images_on_one_device(group):
    """Compares outputs, statistics, and gradients after one mean over devices."""
    options = {"hidden": 7, "out": 5, "out_bn": "full", "bn_unbiased": True}
    spmd = make_spmd()
    head = MLPHead(**options, axis_name=AXIS, axis_index_groups=device_groups(spmd.size, group))
    alone = MLPHead(**options)
    variables = random_variables(alone, 6)
    rng = np.random.default_rng(1)
    x, target = (rng.normal(size=(32, d)).astype(np.float32) for d in (6, 5))

    def objective(module, params, x, target):
        out, new = module.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return (out * target).sum(1).mean(), (out, new["batch_stats"])

    def per_device(params, x, target):
        def loss(params):
            value, rest = objective(head, params, x, target)
            return jax.lax.pmean(value, AXIS), rest

        gradient, (out, stats) = jax.grad(loss, has_aux=True)(params)
        return jax.lax.pmean(gradient, AXIS), (out, jax.tree.map(lambda leaf: leaf[None], stats))

    mapped = spmd.map(per_device, ("replicated", "sharded", "sharded"), ("replicated", "sharded"))
    params = spmd.replicate(variables["params"])
    gradient, (out, stats) = mapped(params, spmd.place_batch(x), spmd.place_batch(target))

    size = group or spmd.size
    gradients = []
    single = jax.jit(jax.grad(functools.partial(objective, alone), has_aux=True))
    for start in range(0, spmd.size, size):
        rows = slice(4 * start, 4 * (start + size))
        share, (expected, new) = single(variables["params"], x[rows], target[rows])
        gradients.append(share)
        np.testing.assert_allclose(out[rows], expected, rtol=1e-4, atol=1e-4)
        for device in range(start, start + size):
            mine = jax.tree.map(lambda leaf, device=device: leaf[device], stats)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), mine, new)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *gradients)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradient, mean
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_bn": "half"}, "out_bn is 'half'. Use one of: none, full, scale, no_affine"),
        ({"kernel_init": "ones"}, "kernel_init is 'ones'. "),
        ({"layers": -1}, "layers is -1: use at least 0"),
        ({"hidden": 0}, "hidden is 0: use at least 1"),
        ({"out": 0}, "out is 0: use at least 1"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        MLPHead(**{"hidden": 8, "out": 4, **options})
