import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend import core

from ssl_jax.errors import UserError
from ssl_jax.models import ResNet
from ssl_jax.models.resnet import architecture, resnet_name
from ssl_jax.spmd import AXIS, device_groups, make_spmd

TINY = 1 / 32  # two channels in the stem


@functools.cache
def shapes(model):
    """Shapes and dtypes of the variables, without computing them."""
    image = jnp.zeros((1, 16, 16, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))


def random_variables(model, seed=0):
    """Variables without zeros and ones, as after some training."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            value = rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        elif name in ("scale", "var"):
            value = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            value = rng.normal(size=leaf.shape) / 2
        return value.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes(model))


def images_of(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("depth", "parameters"),
    [(18, 11176512), (34, 21284672), (50, 23508032), (101, 42500160), (152, 58143808)],
)
def test_parameter_counts_equal_torchvision(depth, parameters):
    assert count(shapes(ResNet(depth))["params"]) == parameters


def test_name_includes_width_and_selective_kernels_unless_standard():
    assert resnet_name({"depth": 50, "width": 1.0, "sk": False}) == "ResNet-50"
    wide = {"depth": 152, "width": 3.0, "sk": True}
    assert resnet_name(wide) == "ResNet-152 ×3 with selective kernels"


def test_cifar_stem_is_3x3():
    assert count(shapes(ResNet(18, stem="cifar"))["params"]) == 11176512 - (7 * 7 - 3 * 3) * 3 * 64


def test_simclr_projects_the_first_shortcut_of_resnet_18_for_21_convolutions():
    def kernels(model):
        paths = jax.tree_util.tree_leaves_with_path(shapes(model)["params"])
        return {jax.tree_util.keystr(path) for path, x in paths if len(x.shape) == 4}

    plain = kernels(ResNet(18, stem="cifar"))
    simclr = kernels(ResNet(18, stem="cifar", project_first=True))
    assert (len(plain), len(simclr)) == (20, 21)
    assert simclr - plain == {"['stage1_block1']['proj_conv']['kernel']"}
    model = {"depth": 18, "width": 1.0, "sk": False, "stem": "cifar", "padding": "simclr"}
    assert architecture({**model, "project_first": True})["project_first"]
    # With bottlenecks the first block changes its width, and is always projected.
    assert not architecture({**model, "depth": 50, "project_first": True})["project_first"]
    named = resnet_name({**model, "project_first": True})
    assert named == "ResNet-18 with a projected first shortcut"


@pytest.mark.parametrize(
    ("depth", "width", "sk", "millions"),
    [
        (50, 1, False, 24),
        (50, 1, True, 35),
        (50, 2, False, 94),
        (50, 2, True, 140),
        (101, 1, False, 43),
        (101, 1, True, 65),
        (101, 2, False, 170),
        (152, 1, False, 58),
        (152, 1, True, 89),
        (152, 2, False, 233),
        (152, 3, True, 795),
    ],
)
def test_parameter_counts_equal_simclr_v2(depth, width, sk, millions):
    """Table 1 of arXiv:2006.10029, which evidently includes running statistics."""
    assert round(count(shapes(ResNet(depth, width=width, sk=sk))) / 1e6) == millions


def test_selective_kernels_are_in_bottleneck_blocks_only():
    basic = shapes(ResNet(18, sk=True))
    assert set(basic["params"]["stem"]) == {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3"}
    assert not [name for name, block in basic["params"].items() if "sk" in block]
    bottleneck = shapes(ResNet(50, sk=True, stem="cifar"))
    assert set(bottleneck["params"]["stem"]) == {"conv1", "bn1"}
    kernels = bottleneck["params"]["stage4_block3"]["sk"]
    assert kernels["conv1"]["kernel"].shape == (1, 1, 512, 32)
    assert kernels["conv2"]["kernel"].shape == (1, 1, 32, 1024)
    wide = shapes(ResNet(50, width=2, sk=True))
    assert wide["params"]["stage4_block1"]["sk"]["conv1"]["kernel"].shape == (1, 1, 1024, 64)


@pytest.mark.parametrize(
    ("depth", "width", "features"), [(18, 0.25, 128), (50, 0.25, 512), (50, 2, 4096), (34, 1, 512)]
)
def test_number_of_features(depth, width, features):
    model = ResNet(depth, width=width)
    assert model.num_features == features
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    out = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), shapes(model), images)
    assert out.shape == (2, features) and out.dtype == jnp.float32


# An independent implementation in float64 with loops over windows, from the papers and the
# official code's description.


def pads_of(size, kernel, stride, padding):
    if padding == "symmetric":
        return kernel // 2, kernel // 2
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)  # TensorFlow's SAME
    return total // 2, total - total // 2


def windows(x, kernel, stride, padding, fill):
    """All windows of x [n, h, w, c], as [n, h', w', kernel, kernel, c]."""
    pads = [pads_of(size, kernel, stride, padding) for size in x.shape[1:3]]
    x = np.pad(x, [(0, 0), *pads, (0, 0)], constant_values=fill)
    rows, columns = ((size - kernel) // stride + 1 for size in x.shape[1:3])
    out = np.empty((x.shape[0], rows, columns, kernel, kernel, x.shape[3]))
    for i in range(rows):
        for j in range(columns):
            top, left = i * stride, j * stride
            out[:, i, j] = x[:, top : top + kernel, left : left + kernel]
    return out


class Oracle:
    def __init__(self, model, variables, train):
        self.model, self.train = model, train
        self.variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
        self.stats = {}
        self.pool_padding = "symmetric" if model.padding == "symmetric" else "same"
        self.conv_padding = "same" if model.padding == "same" else "symmetric"

    def at(self, kind, path):
        node = self.variables[kind]
        for part in path.split("/"):
            node = node[part]
        return node

    def conv(self, x, path, stride=1):
        kernel = self.at("params", path)["kernel"]
        x = windows(x, kernel.shape[0], stride, self.conv_padding, 0.0)
        return np.einsum("nhwijc,ijco->nhwo", x, kernel)

    def bn(self, x, path):
        params, running = self.at("params", path), self.at("batch_stats", path)
        mean, var = running["mean"], running["var"]
        if self.train:
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            self.stats[path] = (
                0.9 * running["mean"] + 0.1 * mean,
                0.9 * running["var"] + 0.1 * var,
            )
        return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]

    def stem(self, x):
        model = self.model
        convs = 3 if model.sk and model.stem == "imagenet" else 1
        for i in range(1, convs + 1):
            stride = 2 if model.stem == "imagenet" and i == 1 else 1
            x = np.maximum(self.bn(self.conv(x, f"stem/conv{i}", stride), f"stem/bn{i}"), 0)
        if model.stem == "imagenet":
            x = windows(x, 3, 2, self.pool_padding, -np.inf).max((3, 4))
        return x

    def mix(self, x, path):
        first, second = np.split(x, 2, axis=-1)
        pooled = (first + second).mean((1, 2), keepdims=True)
        hidden = np.maximum(self.bn(self.conv(pooled, f"{path}/conv1"), f"{path}/bn"), 0)
        a, b = np.split(self.conv(hidden, f"{path}/conv2"), 2, axis=-1)
        weight = 1 / (1 + np.exp(b - a))
        return first * weight + second * (1 - weight)

    def shortcut(self, x, path, stride):
        if "proj_conv" not in self.at("params", path):
            return x
        if self.model.sk:
            n, h, w, c = x.shape
            fill = 0.0 if stride == 2 else np.nan  # nan: not counted
            x = np.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)], constant_values=fill)
            stacked = np.stack([x[:, i : h + i, j : w + j] for i in (0, 1) for j in (0, 1)])
            x, stride = np.nanmean(stacked, 0)[:, ::stride, ::stride], 1
        return self.bn(self.conv(x, f"{path}/proj_conv", stride), f"{path}/proj_bn")

    def block(self, x, path, stride):
        names = [name for name in self.at("params", path) if name.startswith("conv")]
        strided = "conv2" if len(names) == 3 else "conv1"
        y = x
        for i in range(1, len(names) + 1):
            y = self.conv(y, f"{path}/conv{i}", stride if f"conv{i}" == strided else 1)
            y = self.bn(y, f"{path}/bn{i}")
            if i < len(names):
                y = np.maximum(y, 0)
            if i == 2 and len(names) == 3 and self.model.sk:
                y = self.mix(y, f"{path}/sk")
        return np.maximum(y + self.shortcut(x, path, stride), 0)

    def __call__(self, x):
        x = self.stem(x.astype(np.float64))
        for stage in (1, 2, 3, 4):
            block = 1
            while f"stage{stage}_block{block}" in self.variables["params"]:
                stride = 2 if stage > 1 and block == 1 else 1
                x = self.block(x, f"stage{stage}_block{block}", stride)
                block += 1
        return x.mean((1, 2))


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"depth": 18}, (37, 34)),
        ({"depth": 18, "padding": "same"}, (37, 32)),
        ({"depth": 18, "padding": "simclr", "project_first": True}, (34, 32)),
        ({"depth": 18, "stem": "cifar", "sk": True, "padding": "same"}, (10, 13)),
        ({"depth": 50, "sk": True}, (37, 34)),
        ({"depth": 50, "stem": "cifar"}, (9, 10)),
    ],
    ids=str,
)
def test_features_equal_a_float64_reference(options, size):
    model = ResNet(**options, width=TINY)
    variables = random_variables(model)
    x = images_of(3, *size, 3)
    features = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, x)
    expected = Oracle(model, variables, train=False)(x)
    assert features.dtype == jnp.float32
    scale = np.abs(expected).max()
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("options", [{"depth": 18}, {"depth": 50, "sk": True}], ids=str)
def test_training_uses_batch_statistics_and_updates_running_ones(options):
    model = ResNet(**options, width=TINY, stem="cifar")
    variables = random_variables(model)
    x = images_of(8, 16, 16, 3)
    oracle = Oracle(model, variables, train=True)
    expected = oracle(x)
    apply = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    features, changed = apply(variables, x)
    np.testing.assert_allclose(features, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
    assert len(oracle.stats) == len(jax.tree.leaves(changed)) // 2
    for path, (mean, var) in oracle.stats.items():
        new = changed["batch_stats"]
        for part in path.split("/"):
            new = new[part]
        np.testing.assert_allclose(new["mean"], mean, rtol=2e-3, atol=2e-4, err_msg=path)
        np.testing.assert_allclose(new["var"], var, rtol=2e-3, atol=2e-4, err_msg=path)


def products(jaxpr):
    """Yields all convolutions and matrix products of a program, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=is_program):
            if is_program(value):
                yield from products(getattr(value, "jaxpr", value))


def is_program(value):
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def program(model, size=32):
    """Traces a forward and backward pass; also returns the shapes of its results."""
    variables = shapes(model)

    def loss(params, stats, x):
        features, new = model.apply(
            {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
        )
        return features.sum(), (features, new)

    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    trace = jax.make_jaxpr(jax.grad(loss, has_aux=True), return_shape=True)
    return trace(variables["params"], variables["batch_stats"], images)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_convolutions_and_matmuls_use_the_compute_dtype_and_state_is_float32(dtype):
    model = ResNet(50, sk=True, dtype=dtype)
    jaxpr, results = program(model)
    operands = {var.aval.dtype for equation in products(jaxpr.jaxpr) for var in equation.invars}
    assert operands == {jnp.dtype(dtype)}
    state = jax.tree.leaves((shapes(model), results))
    assert {leaf.dtype for leaf in state} == {jnp.dtype(jnp.float32)}


def outputs_of(*names):
    return lambda module, method: method == "__call__" and module.name in names


def test_statistics_and_features_have_float32_precision_under_bfloat16():
    model = ResNet(18, width=TINY, stem="cifar", dtype="bfloat16")
    variables = random_variables(model)
    x = 3 + images_of(16, 16, 16, 3)

    @jax.jit
    def apply(variables, x):
        return model.apply(
            variables,
            x,
            train=True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=outputs_of("conv1", "stage4_block2"),
        )

    features, changed = apply(variables, x)
    seen = changed["intermediates"]
    (conv,) = seen["stem"]["conv1"]["__call__"]
    assert conv.dtype == jnp.bfloat16
    conv = np.asarray(conv, np.float64)
    old, new = variables["batch_stats"]["stem"]["bn1"], changed["batch_stats"]["stem"]["bn1"]
    mean = (new["mean"] - 0.9 * old["mean"]) / 0.1
    var = (new["var"] - 0.9 * old["var"]) / 0.1
    # Loose, as a compiler may skip the rounding between convolution and statistics.
    np.testing.assert_allclose(mean, conv.mean((0, 1, 2)), rtol=1e-3)
    np.testing.assert_allclose(var, conv.var((0, 1, 2)), rtol=1e-3)
    (last,) = seen["stage4_block2"]["__call__"]
    assert last.dtype == jnp.bfloat16
    rounded = features.astype(jnp.bfloat16).astype(jnp.float32)
    assert (rounded != features)[features > 0].mean() > 0.5


@pytest.mark.parametrize("zero", [True, False])
def test_zero_init_residual_makes_blocks_start_as_identity(zero):
    model = ResNet(18, width=TINY, stem="cifar", zero_init_residual=zero)
    x = images_of(2, 8, 8, 3)
    watched = ("stem", "stage1_block1", "stage1_block2")

    @jax.jit
    def run(kernels, key, x):
        variables = flatten_dict(model.init(key, x, train=False))
        # Kernels from the host, as compiling their random initialization takes long.
        variables |= {path: kernels[path] for path in variables if path[-1] == "kernel"}
        return model.apply(
            unflatten_dict(variables),
            x,
            train=False,
            mutable=["intermediates"],
            capture_intermediates=outputs_of(*watched),
        )

    _, seen = run(flatten_dict(random_variables(model)), jax.random.key(0), x)
    stem, first, second = (seen["intermediates"][name]["__call__"][0] for name in watched)
    assert np.array_equal(stem, first) == zero
    assert np.array_equal(first, second) == zero


@pytest.mark.parametrize("group", [0, 4])
def test_batch_norm_groups_equal_their_images_on_one_device(group):
    """Group size 0 puts all devices in one group."""
    options = {"depth": 18, "width": TINY, "stem": "cifar"}
    spmd = make_spmd()
    model = ResNet(**options, axis_name=AXIS, axis_index_groups=device_groups(spmd.size, group))
    alone = ResNet(**options)
    variables = random_variables(alone)
    x = images_of(32, 8, 8, 3)

    def per_device(variables, x):
        features, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return features, jax.tree.map(lambda leaf: leaf[None], new["batch_stats"])

    mapped = spmd.map(per_device, ("replicated", "sharded"), ("sharded", "sharded"))
    features, stats = mapped(spmd.replicate(variables), spmd.place_batch(x))
    single = jax.jit(lambda v, x: alone.apply(v, x, train=True, mutable=["batch_stats"]))
    size = group or spmd.size
    for start in range(0, spmd.size, size):
        rows = slice(4 * start, 4 * (start + size))
        expected, changed = single(variables, x[rows])
        scale = np.abs(expected).max()
        np.testing.assert_allclose(features[rows], expected, rtol=1e-3, atol=1e-3 * scale)
        for device in range(start, start + size):
            jax.tree.map(
                lambda ours, theirs, device=device: np.testing.assert_allclose(
                    ours[device], theirs, rtol=1e-3, atol=1e-4
                ),
                stats,
                changed["batch_stats"],
            )


def test_remat_keeps_parameter_names_and_features():
    plain = ResNet(18, width=TINY, stem="cifar")
    remat = ResNet(18, width=TINY, stem="cifar", remat=True)
    assert jax.tree.structure(shapes(remat)) == jax.tree.structure(shapes(plain))
    variables, x = random_variables(plain), images_of(2, 8, 8, 3)
    a, b = (jax.jit(lambda v, m=m: m.apply(v, x, train=False))(variables) for m in (plain, remat))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    assert len(list(products(program(remat)[0].jaxpr))) > len(
        list(products(program(plain)[0].jaxpr))
    )


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("truncated_fan_in", (9 * 32) ** -0.5),
        ("haiku", 0.8796 * (9 * 32) ** -0.5),
        ("fan_out_normal", (2 / (9 * 64)) ** 0.5),
        ("torch", (3 * 9 * 32) ** -0.5),
    ],
)
def test_conv_init_has_the_right_scale(name, std):
    model = ResNet(18, width=1 / 8, stem="cifar", conv_init=name)
    image = jnp.zeros((1, 8, 8, 3))

    @jax.jit
    def initial_kernel(key):  # of one layer, as compiling all takes long
        params = model.init(key, image, train=False)["params"]
        return params["stage4_block1"]["conv1"]["kernel"]

    kernel = initial_kernel(jax.random.key(0))
    assert kernel.shape == (3, 3, 32, 64)
    np.testing.assert_allclose(kernel.std(), std, rtol=0.02)
    np.testing.assert_allclose(kernel.mean(), 0, atol=0.02 * std)


def test_solo_learns_stem_starts_as_torchs_default():
    """Its conv1 takes the place of torchvision's, whose kernels are scaled by the fan-out."""
    model = ResNet(18, stem="cifar_pad2", conv_init="fan_out_normal")
    key, image = jax.random.key(0), jnp.zeros((1, 8, 8, 3))
    variables = jax.jit(
        lambda: model.init({"params": key}, image, train=False)["params"]["stem"]["conv1"]
    )()
    kernel = variables["kernel"]
    assert kernel.shape == (3, 3, 3, 64)
    np.testing.assert_allclose(kernel.std(), 81**-0.5, rtol=0.05)
    assert np.abs(kernel).max() <= 27**-0.5  # uniform


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 20}, "config.model.depth is 20. Use one of: 18, 34, 50, 101, 152"),
        ({"depth": 18, "stem": "mnist"}, "stem is 'mnist'. Use one of: imagenet, cifar"),
        ({"depth": 18, "width": 0}, "config.model.width is 0"),
        ({"depth": 18, "width": 0.3}, "config.model.width is 0.3"),
        ({"depth": 18, "width": float("inf")}, "config.model.width is inf"),
        ({"depth": 18, "width": 1 / 64, "sk": True}, "multiple of 1/32 with config.model.sk"),
        ({"depth": 18, "padding": "valid"}, "config.model.padding is 'valid'"),
        ({"depth": 18, "conv_init": "zeros"}, "config.model.conv_init is 'zeros'"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ResNet(**options)
