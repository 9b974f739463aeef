"""Configs, data and steps of tests: networks and views small enough to compile in seconds."""

import json

import jax
import numpy as np
from ml_collections import ConfigDict

from ssl_jax.config import default_config, flat_views, run_schedule, to_json, view
from ssl_jax.data.arrays import ArraySource
from ssl_jax.data.pipeline import make_augment_fn
from ssl_jax.methods import Method
from ssl_jax.models import heads, resnet
from ssl_jax.models.resnet import STAGES
from ssl_jax.spmd import AXIS, device_groups
from ssl_jax.step import assemble, init_state, make_train_step

METHODS = ("simclr", "simclr_memory", "moco", "swav", "byol", "simsiam", "mocov3", "barlow")
METHODS += ("vicreg", "dino", "supcon", "supervised")

# One stage of one block, and two such stages; a ResNet-18 takes four times as long to compile.
STAGES.update({4: (1,), 6: (1, 1)})


def tiny_config(**changes):
    """SimCLR on 8×8 images with a ResNet of three convolutions of 8 channels, batch 32.

    Runs skip the final evaluation, which takes seconds; tests that read it set `eval.at_end`.
    """
    config = default_config()
    config.batch_size = 32
    config.epochs = 2.0
    config.log_every = 1
    small = view(
        size=8,
        crop={"sampler": "torchvision", "area": (0.5, 1.0), "interpolation": "bilinear"},
        flip=0.5,
        jitter={"saturation": 0.0, "hue": 0.0},
        gray=0.0,
        blur={"prob": 0.0},
    )
    config.views = {"view1": small, "view2": ConfigDict(small)}
    config.model.update(depth=4, width=1 / 8, stem="cifar", zero_init_residual=False)
    config.simclr.update(out=16, temperature=0.2)
    config.optim.update(lr=1.0, warmup_epochs=1.0)
    config.eval.update(knn_every_epochs=0.0, trials=2, labels_per_class=(1, 5), batch_size=64)
    config.eval.at_end = False
    config.checkpoint.every_epochs = 0.0
    config.update(changes)
    return config


def without_color(config):
    """Turns color off, which takes a third of a tiny step's compile time."""
    for each in config.views.values():
        each.flip = each.jitter.prob = 0.0
    return config


def with_two_stages(config):
    """Adds a stage that halves the image, with a projection shortcut."""
    config.model.update(depth=6, width=1 / 16)
    return config


# Keys of a view that is the whole image, resized if its size differs.
WHOLE_IMAGE = {"crop.sampler": "none", "affine.degrees": 0.0, "affine.translate": 0.0}
WHOLE_IMAGE |= {"flip": 0.0, "jitter.prob": 0.0, "gray": 0.0, "blur.prob": 0.0, "noise": 0.0}


def with_whole_images(config):
    """Turns augmentation off, which takes most of a tiny step's compile time."""
    for each in config.views.values():
        each.update_from_flattened_dict(WHOLE_IMAGE)
    return config


def random_source(n=64, size=8, seed=0, classes=4):
    """Random images with a bright grid whose position depends on the class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n).astype(np.int32)
    images = rng.integers(0, 80, (n, size, size, 3))
    for image, label in zip(images, labels, strict=True):
        image[2 * (label % 2) + 1 :: 4, 2 * (label // 2) + 1 :: 4] += 150
    return ArraySource(images.astype(np.uint8), labels, [str(c) for c in range(classes)])


def unaugmented(raw, device_data, key):
    """Replaces `make_augment_fn` if the batch has its views; such a step compiles fast."""
    return raw


_SHARED = {}


def shared(make, config, *about):
    """Returns `make()`, cached per process by the config and other arguments.

    Tracing and compiling a step is most of a test's time. Functions that tests patch are part of
    the cache key.
    """
    patched = (resnet.batch_norm, heads.batch_norm, Method.mean)
    key = (json.dumps(to_json(config)), patched, *about)
    if key not in _SHARED:
        _SHARED[key] = make()
    return _SHARED[key]


def share_steps(monkeypatch):
    """Lets runs in this process share traced and compiled steps.

    A run that differs from an earlier one only in its log, checkpoints or evaluations, such as a
    resumed run, then starts at once.
    """
    from ssl_jax.train import setup, start

    def key(config):
        about = to_json(config)
        for name in ("log_every", "heartbeat_timeout_s", "wandb", "checkpoint", "init_from"):
            del about[name]
        about["data"] |= {"dir": "", "test_dir": ""}
        compiled = ("probe", "projector_layer", "crop_fraction", "interpolation")
        return ConfigDict(about | {"eval": {name: about["eval"][name] for name in compiled}})

    def program(config, schedule, spmd, plain=setup.Program):
        return shared(lambda: plain(config, schedule, spmd), key(config), schedule, spmd)

    def evaluator(config, spmd, *splits, plain=start.Evaluator, **progress):
        made = plain(config, spmd, *splits, **progress)
        classes = [split and split.num_classes for split in splits]
        first = shared(lambda: made, key(config), "evaluator", spmd, *classes)
        for name in ("_encode", "_small", "_classify", "_augment_fn"):
            setattr(made, name, getattr(first, name))
        return made

    monkeypatch.setattr(setup, "Program", program)
    monkeypatch.setattr(start, "Evaluator", evaluator)


def make_step(config, spmd, source, augment_fn=None):
    """Builds the mapped train step and an initial state, as the training loop does.

    Returns:
      Method and step, shared by all tests of the config; a new state, which may be donated; the
      source's device data.
    """

    def make():
        schedule = run_schedule(config, source.num_examples)
        groups = device_groups(spmd.size, config.model.bn_group_size)
        method, optimizer, learning_rate = assemble(config, schedule, AXIS, groups)
        step = spmd.map(
            make_train_step(
                method, optimizer, augment_fn or make_augment_fn(config), learning_rate
            ),
            ("replicated", "sharded", "replicated"),
            ("replicated", "replicated"),
            donate=(0,),
        )
        # All meshes share one initial state.
        first = shared(lambda: jax.device_get(init_state(method, optimizer, config)), config)
        return method, step, first

    config = config.copy_and_resolve_references()  # a test may change its own later
    method, step, state = shared(make, config, source.num_examples, spmd, augment_fn)
    return method, step, spmd.replicate(state), spmd.replicate(source.device_data())


def ready_views(config, ids):
    """Returns views in [0, 1] for `unaugmented`: each is the image plus independent noise."""
    rng = np.random.default_rng(1)
    image = rng.integers(0, 128, (len(ids), 8, 8, 3))
    return tuple(
        ((image + rng.integers(0, 128, image.shape))[:, : v.size, : v.size] / 255).astype("float32")
        for v in flat_views(config)
    )


def leaves(tree):
    """Returns all leaves as NumPy arrays, by path."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def norm_of(tree):
    """The norm of all leaves together; by NumPy, which compiles nothing."""
    return float(
        sum(np.square(leaf, dtype=np.float64).sum() for leaf in leaves(tree).values()) ** 0.5
    )


def assert_trees_close(actual, expected, rtol=1e-4, atol=1e-6):
    """Compares leaf by leaf and names the one that differs."""
    actual, expected = leaves(actual), leaves(expected)
    assert actual.keys() == expected.keys()
    for name in expected:
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(
            actual[name], expected[name], rtol=rtol, atol=atol + rtol * scale, err_msg=name
        )


def assert_replicated(tree):
    """Checks that every leaf is bit-identical on all devices that hold it."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        for copy in copies[1:]:
            np.testing.assert_array_equal(copy, copies[0], err_msg=jax.tree_util.keystr(path))


def method_config(name, **changes):
    """Returns a config that trains the tiny network with a method."""
    config = tiny_config(method=name.removesuffix("_memory"), batch_size=64, **changes)
    config.data.num_classes = 4
    config.simclr.memory_bank = 256 if name == "simclr_memory" else 0
    config.moco.update(queue=192, out=8)
    config.byol.update(hidden=16, out=8)
    config.simsiam.update(out=16, predictor_hidden=8)
    config.mocov3.update(hidden=16, out=8, temperature=0.2)
    config.supcon.out = 8
    # More and fewer dimensions than images: the loss compares images, or dimensions.
    config.barlow.update(hidden=16, out=72)
    config.vicreg.update(hidden=16, out=12)
    config.swav.update(prototypes=12, hidden=16, out=8, queue=128, queue_from_epoch=1.0)
    config.dino.update(hidden=16, out=8, prototypes=12, head_bn=True, block_size=3)
    if name in ("swav", "dino"):
        small = view(
            size=6,
            count=2,
            crop={"sampler": "torchvision", "area": (0.1, 0.3), "interpolation": "bilinear"},
            blur={"prob": 0.0},
            gray=0.0,
        )
        first = config.views.view1
        config.views = {"a_large": first, "b_large": first, "c_small": small}
        config.optim.update(name="larc", frozen_steps=2, warmup_epochs=0.0)
    if name == "dino":
        config.optim.update(name="adamw", lr=0.01, weight_decay=0.04, weight_decay_end=0.4)
        config.optim.clip_norm_per_tensor = 0.5
    return config
