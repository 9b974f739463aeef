"""SimCLR's TensorFlow checkpoints, built of TensorFlow's own variables: the features are the same.

The network is written here from the papers in TensorFlow's functions, with variables under the
names that the official codes give theirs: numbered in the order of creation by the first code, by
module in the second.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from ssl_jax.config import Schedule, to_json  # noqa: E402
from ssl_jax.errors import UserError  # noqa: E402
from ssl_jax.interop.import_weights import is_weights_file, read_weights  # noqa: E402
from ssl_jax.methods import make_method  # noqa: E402
from ssl_jax.models.resnet import STAGES  # noqa: E402

RNG = np.random.default_rng(0)


class Modules:
    """Makes variables, as values and under both codes' names."""

    def __init__(self):
        self.first, self.second = {}, {}
        self.counts = {"conv2d": 0, "batch_normalization": 0}

    def number(self, kind, scope):
        count = self.counts[kind]
        self.counts[kind] += 1
        return f"{scope}/{kind}_{count}" if count else f"{scope}/{kind}"

    def conv(self, x, filters, size, stride, place):
        shape = (size, size, x.shape[-1], filters)
        kernel = RNG.normal(size=shape).astype(np.float32) * (2 / np.prod(shape[:3])) ** 0.5
        self.first[f"{self.number('conv2d', 'base_model')}/kernel"] = kernel
        self.second[f"{place}/kernel"] = kernel
        if stride > 1:
            before = (size - 1) // 2
            pads = [before, size - 1 - before]
            x = tf.pad(x, [[0, 0], pads, pads, [0, 0]])
        return tf.nn.conv2d(x, kernel, stride, "SAME" if stride == 1 else "VALID")

    def norm(self, x, place, relu=True, first="", beta=True):
        n = x.shape[-1]
        values = {"gamma": RNG.uniform(0.5, 1.5, n), "moving_mean": RNG.normal(size=n) * 0.3}
        values["moving_variance"] = RNG.uniform(0.5, 2, n)
        values["beta"] = RNG.normal(size=n) * 0.2 if beta else np.zeros(n)
        values = {name: value.astype(np.float32) for name, value in values.items()}
        name = first or self.number("batch_normalization", "base_model")
        for leaf, value in values.items():
            if leaf != "beta" or beta:
                self.first[f"{name}/{leaf}"] = self.second[f"{place}/bn/{leaf}"] = value
        scale = values["gamma"] / np.sqrt(values["moving_variance"] + 1e-5)
        x = (x - values["moving_mean"]) * scale + values["beta"]
        return tf.nn.relu(x) if relu else x

    def selective(self, x, filters, stride, place):
        x = self.conv(x, 2 * filters, 3, stride, f"{place}/conv2d_fixed_padding/conv2d")
        x = self.norm(x, f"{place}/batch_norm_relu")
        streams = tf.stack(tf.split(x, 2, axis=-1))
        pooled = tf.reduce_mean(tf.reduce_sum(streams, axis=0), [1, 2], keepdims=True)
        y = self.conv(pooled, max(filters // 16, 32), 1, 1, f"{place}/conv2d_0")
        y = self.norm(y, f"{place}/batch_norm_relu_1")
        y = self.conv(y, 2 * filters, 1, 1, f"{place}/conv2d_1")
        mixing = tf.nn.softmax(tf.stack(tf.split(y, 2, axis=-1)), axis=0)
        return tf.reduce_sum(streams * mixing, axis=0)

    def basic_block(self, x, filters, stride, project, place):
        shortcut = x
        if project:
            at = f"{place}/shortcut_layers"
            shortcut = self.conv(x, filters, 1, stride, f"{at}/0/conv2d")
            shortcut = self.norm(shortcut, f"{at}/1", relu=False)
        at = f"{place}/conv2d_bn_layers"
        x = self.norm(self.conv(x, filters, 3, stride, f"{at}/0/conv2d"), f"{at}/1")
        x = self.norm(self.conv(x, filters, 3, 1, f"{at}/2/conv2d"), f"{at}/3", relu=False)
        return tf.nn.relu(x + shortcut)

    def block(self, x, filters, stride, project, sk, place):
        shortcut = x
        if project:
            at = f"{place}/projection_layers"
            if sk:
                if stride > 1:
                    shortcut = tf.pad(shortcut, [[0, 0], [0, 1], [0, 1], [0, 0]])
                padding = "SAME" if stride == 1 else "VALID"
                shortcut = tf.nn.avg_pool2d(shortcut, 2, stride, padding)
            number = (1 if stride == 1 else 2) if sk else 0
            strides = 1 if sk else stride
            shortcut = self.conv(shortcut, 4 * filters, 1, strides, f"{at}/{number}/conv2d")
            shortcut = self.norm(shortcut, f"{at}/{number + 1}", relu=False)
        at = f"{place}/conv_relu_dropblock_layers"
        x = self.norm(self.conv(x, filters, 1, 1, f"{at}/0/conv2d"), f"{at}/1")
        if sk:
            x = self.selective(x, filters, stride, f"{at}/3")
        else:
            x = self.norm(self.conv(x, filters, 3, stride, f"{at}/3/conv2d"), f"{at}/4")
        number = 5 if sk else 6
        x = self.conv(x, 4 * filters, 1, 1, f"{at}/{number}/conv2d")
        return tf.nn.relu(self.norm(x, f"{at}/{number + 1}", relu=False) + shortcut)

    def network(self, x, depth, width, sk, cifar):
        at, base = "model/resnet_model/initial_conv_relu_max_pool", int(64 * width)
        if sk and not cifar:
            x = self.norm(self.conv(x, base // 2, 3, 2, f"{at}/0/conv2d"), f"{at}/1")
            x = self.norm(self.conv(x, base // 2, 3, 1, f"{at}/2/conv2d"), f"{at}/3")
            x = self.norm(self.conv(x, base, 3, 1, f"{at}/4/conv2d"), f"{at}/6")
        else:
            x = self.conv(x, base, *((3, 1) if cifar else (7, 2)), f"{at}/0/conv2d")
            x = self.norm(x, f"{at}/2")
        if not cifar:
            x = tf.nn.max_pool2d(x, 3, 2, "SAME")
        for stage, blocks in enumerate(STAGES[depth]):
            for i in range(blocks):
                place = f"model/resnet_model/block_groups/{stage}/layers/{i}"
                stride = 2 if stage and not i else 1
                filters = base * 2**stage
                if depth < 50:
                    x = self.basic_block(x, filters, stride, not i, place)
                else:
                    x = self.block(x, filters, stride, not i, sk, place)
        return tf.reduce_mean(x, [1, 2])

    def head(self, x, layers):
        for j in range(layers):
            last = j == layers - 1
            kernel = RNG.normal(size=(x.shape[-1], 16 if last else x.shape[-1])) * 0.05
            second = f"model/_projection_head/linear_layers/{j}"
            first, kernel = f"head_contrastive/nl_{j}", kernel.astype(np.float32)
            self.first[f"{first}/dense/kernel"] = self.second[f"{second}/dense/kernel"] = kernel
            norm = f"{first}/batch_normalization"
            x = self.norm(x @ kernel, f"{second}/bn_relu", not last, norm, beta=not last)
        return x


def save_tensors(tensors, prefix):
    """Writes a checkpoint by the operation that `tf.train.Saver` adds to its graph."""
    values = [tf.constant(value) for value in tensors.values()]
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(tensors),
        shape_and_slices=[""] * len(values),
        tensors=values,
    )
    return str(prefix)


def save_with_saver(tensors, prefix):
    """The same by `tf.train.Saver`, as in the first code: slow for a ResNet's many variables."""
    graph = tf.Graph()
    with graph.as_default(), tf.compat.v1.Session(graph=graph) as session:
        made = [tf.compat.v1.get_variable(name, initializer=v) for name, v in tensors.items()]
        session.run(tf.compat.v1.global_variables_initializer())
        return tf.compat.v1.train.Saver(made).save(session, str(prefix))


def save_first(values, folder, save=save_tensors):
    """As the first code, with a step and an optimizer's slot."""
    slot = next(iter(values)) + "/Momentum"
    others = {"global_step": np.int64(7), slot: np.zeros(3, np.float32)}
    return save({**values, **others}, folder / "model.ckpt-7")


def save_second(values, folder):
    """As a saved model's variables of the second code: the shortest way to one is a list of all."""
    root = tf.Module()
    root.trainable_variables_list = []
    for name, value in values.items():
        *path, leaf = name.split("/")
        node = root
        for part, following in zip(path, [*path[1:], leaf], strict=True):
            if isinstance(node, list):
                while len(node) <= int(part):
                    node.append(tf.Module())
                if following.isdigit():
                    raise AssertionError("no list of lists")
                node = node[int(part)]
            else:
                if not hasattr(node, part):
                    setattr(node, part, [] if following.isdigit() else tf.Module())
                node = getattr(node, part)
        variable = tf.Variable(value)
        setattr(node, leaf, variable)
        if not leaf.startswith("moving"):
            root.trainable_variables_list.append(variable)
    (folder / "variables").mkdir()
    tf.train.Checkpoint(
        model=root.model, trainable_variables_list=root.trainable_variables_list
    ).write(str(folder / "variables" / "variables"))
    return str(folder)


def ours(weights, x, network):
    module = make_method(weights.config, Schedule(1, 1)).networks[network]
    variables = {"params": weights.params[network], "batch_stats": weights.batch_stats[network]}
    apply = jax.jit(lambda variables, x: module.apply(variables, x, train=False))
    return np.asarray(apply(jax.tree.map(jnp.asarray, variables), x))


@pytest.mark.parametrize(
    ("depth", "width", "sk", "cifar", "layers"),
    [
        (50, 0.25, False, False, 2),
        (50, 0.25, True, False, 3),
        (18, 0.5, False, True, 3),  # the CIFAR command's, with a projection in its first block
    ],
)
def test_features_and_projections_are_the_same(tmp_path, depth, width, sk, cifar, layers):
    x = RNG.uniform(size=(2, 32 if cifar else 65, 32 if cifar else 65, 3)).astype(np.float32)
    modules = Modules()
    features = modules.network(x, depth, width, sk, cifar)
    projected = modules.head(features, layers)
    found = []
    for save, values, left_out in (
        (save_first, modules.first, ("global_step",)),
        (save_second, modules.second, ()),
    ):
        path = save(values, tmp_path)
        assert is_weights_file(path)
        weights = read_weights(path)
        model = weights.config.model
        assert (model.depth, model.width, model.sk) == (depth, width, sk)
        assert model.project_first == (depth == 18)
        assert model.padding == "simclr" and model.stem == ("cifar" if cifar else "imagenet")
        assert weights.config.simclr.layers == layers and weights.config.views.view1.mean == ()
        assert weights.left_out == left_out
        found.append(weights)
    first, second = found
    for network, given, expected in (
        ("encoder", x, features.numpy()),
        ("projector", features.numpy(), projected.numpy()),
    ):
        mine = ours(first, given, network)
        assert np.abs(mine - expected).max() <= 1e-4 * np.abs(expected).max()
    # Both codes' files hold the same networks, so that they compute the same.
    assert to_json(second.config) == to_json(first.config)
    for kind in ("params", "batch_stats"):
        jax.tree.map(np.testing.assert_array_equal, getattr(second, kind), getattr(first, kind))


KERNEL = {"base_model/conv2d/kernel": np.ones((7, 7, 3, 64), np.float32)}


def test_a_saver_writes_what_its_operation_does(tmp_path):
    (tmp_path / "saver").mkdir()
    plain = save_first(KERNEL, tmp_path)
    saver = save_first(KERNEL, tmp_path / "saver", save_with_saver)
    one, other = map(tf.train.load_checkpoint, (plain, saver))
    assert one.get_variable_to_shape_map() == other.get_variable_to_shape_map()
    for name in one.get_variable_to_shape_map():
        np.testing.assert_array_equal(one.get_tensor(name), other.get_tensor(name))


def test_other_variables_are_no_resnet(tmp_path):
    path = save_first(KERNEL, tmp_path, save_with_saver)
    with pytest.raises(UserError, match="has 1 convolutions in base_model/, which matches no"):
        read_weights(path)


@pytest.mark.parametrize("graph", [b"\xff\xff", b"", 1.0], ids=["bytes", "empty", "number"])
def test_a_corrupt_graph_of_objects_is_one_sentence(tmp_path, graph):
    prefix = save_tensors({"_CHECKPOINTABLE_OBJECT_GRAPH": graph}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="Cannot read .* Download its files again"):
        read_weights(prefix)


def test_a_corrupt_checkpoint_is_one_sentence(tmp_path):
    path = save_first(KERNEL, tmp_path, save_with_saver)
    index = tmp_path / "model.ckpt-7.index"
    index.write_bytes(index.read_bytes()[:50])
    with pytest.raises(UserError, match="Cannot read .* Download its files again"):
        read_weights(path)
