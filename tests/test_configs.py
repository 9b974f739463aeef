"""Every config file is valid, builds its method, and documents its cost."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny  # noqa: F401 - adds a ResNet of depth 4
from images import fill

from ssl_jax.config import Schedule, flat_views, flatten, load_config, run_schedule, to_json
from ssl_jax.data.augment import blur_taps
from ssl_jax.data.pipeline import Prefetcher
from ssl_jax.errors import UserError
from ssl_jax.methods import METHODS, make_method
from ssl_jax.methods.supervised import CLASSIFIER_INITS
from ssl_jax.models import layers, resnet, vit
from ssl_jax.optim import (
    LR_SCALINGS,
    OPTIMIZERS,
    SCHEDULES,
    learning_rate_schedule,
    weight_decay_schedule,
)
from ssl_jax.schema import SCHEMA
from ssl_jax.step import assemble, example_batch
from ssl_jax.train.setup import Setup

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.py"))
VARIANTS = {
    "simclr_imagenet": ["8192"],
    "simclrv2_imagenet": ["r50sk", "r152w3sk"],
    "moco_imagenet": ["v1"],
    "swav_imagenet": ["256"],
    "byol_imagenet": ["40", "100", "300"],
    "dino_imagenet": ["vit_base", "resnet50"],
    "vicreg_imagenet": ["100"],
    "simclr_cifar10": ["lightly", "solo"],
    "simsiam_cifar10": ["lightly", "solo"],
    "moco_cifar10": ["solo"],
    "swav_cifar10": ["solo"],
    "byol_cifar10": ["solo"],
    "dino_cifar10": ["solo"],
    "mocov3_imagenet": ["100", "300", "vit_s", "vit_b"],
    "barlow_cifar10": ["solo"],
}
ALL = [(file, v) for file in FILES for v in ["", *VARIANTS.get(file.stem, [])]]


_SHAPES = {}  # of parameters and state, by the settings they depend on


def shapes(method, config):
    """The shapes of a method's parameters and state.

    Many variants change the schedule only, and a number that isn't whole changes no shape.
    """
    settings = flatten(to_json(config))
    groups = ("method", "dtype", f"{config.method}.", "model.", "views.")
    key = repr(
        [(k, v) for k, v in settings.items() if k.startswith(groups) and not isinstance(v, float)]
    )
    if key not in _SHAPES:
        _SHAPES[key] = jax.eval_shape(method.init, jax.random.key(0), example_batch(config))
    return _SHAPES[key]


@pytest.mark.parametrize(
    ("file", "variant"),
    [
        pytest.param(file, v, id=f"{file.stem}-{v}", marks=[pytest.mark.long] * bool(v))
        for file, v in ALL
    ],
)
def test_config_builds_its_method_and_optimizer(file, variant):
    config = load_config(f"{file}:{variant}" if variant else str(file))
    config.data.num_classes = 10
    config.model.bn_splits = min(config.model.bn_splits, 2)  # of the example batch
    method, optimizer, rate = assemble(config, Schedule(5004, 5004 * 10))
    params, state = shapes(method, config)
    jax.eval_shape(optimizer.init, params)
    if not variant:  # variants change at most the network's size
        outputs, _ = jax.eval_shape(
            method.forward, params, state, example_batch(config), jax.random.key(0)
        )
        assert outputs["embedding"].shape == (2, method.encoder.num_features)
    assert float(rate(5004 * 11)) <= config.optim.lr * config.batch_size


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_docstring_names_paper_published_result_and_cost(file):
    docstring = ast.get_docstring(ast.parse(file.read_text()))
    assert len(docstring.splitlines()) >= 3
    if file.stem.endswith("_imagenet"):
        for word in ("Paper", "Published", "Cost", "imagenet_config"):
            assert word in docstring
    if file.stem.endswith("_cifar10"):
        assert "Cost" in docstring and "ublished" in docstring


def test_every_method_has_a_config_per_dataset():
    for data in ("digits", "cifar10", "imagenet"):
        names = {file.stem.removesuffix(f"_{data}") for file in FILES if data in file.stem}
        expected = {"simclr", "simclrv2", "moco", "swav", "byol", "simsiam", "supervised"}
        assert names >= expected | {"mocov3", "barlow", "vicreg", "dino", "supcon"}


def test_choices_in_the_schema_equal_the_implemented_ones():
    model, optim = SCHEMA["model"], SCHEMA["optim"]
    assert set(SCHEMA["method"].choices) == METHODS.keys()
    assert model["stem"].choices == resnet.STEMS
    assert model["padding"].choices == tuple(resnet.PADDINGS)
    assert model["head_init"].choices == ("official", "torch")
    assert model["vit"]["pool"].choices == vit.POOLS
    assert model["vit"]["positions"].choices == vit.POSITIONS
    assert model["vit"]["weight_init"].choices == tuple(vit.WEIGHT_INITS)
    assert model["conv_init"].choices == tuple(layers.KERNEL_INITS)
    assert SCHEMA["supervised"]["classifier_init"].choices == tuple(CLASSIFIER_INITS)
    assert optim["name"].choices == OPTIMIZERS
    assert optim["schedule"].choices == SCHEDULES
    assert optim["lr_scaling"].choices == LR_SCALINGS


def test_swav_imagenet_uses_the_papers_multi_crop():
    config = load_config(str(ROOT / "configs/swav_imagenet.py"))
    assert [view.size for view in flat_views(config)] == [224] * 2 + [96] * 6


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("simclr_imagenet", 4.8),
        ("simclrv2_imagenet", 6.4),
        ("moco_imagenet", 0.03),
        ("swav_imagenet", 4.8),
        ("byol_imagenet", 3.2),
        ("simsiam_imagenet", 0.1),
        ("barlow_imagenet", 1.6),
        ("vicreg_imagenet:100", 0.6),
        ("simclr_cifar10", 2.0),
        ("simclr_cifar10:lightly", 0.24),
        ("moco_cifar10:solo", 0.3),
        ("dino_imagenet:vit_base", 2e-3),
        ("swav_cifar10", 4e-3),
        ("simsiam_cifar10", 0.06),
        ("simsiam_cifar10:lightly", 0.06),
        ("supcon_imagenet", 9.6),
        ("supcon_cifar10", 0.5),
    ],
)
def test_peak_learning_rate_is_the_published_one(name, peak):
    file, _, variant = name.partition(":")
    config = load_config(f"{ROOT}/configs/{file}.py" + (f":{variant}" if variant else ""))
    length = Schedule(312, 312 * 1000)
    rate = learning_rate_schedule(config.optim, config.batch_size, length)
    warmup = round(config.optim.warmup_epochs * 312)
    assert float(rate(warmup)) == pytest.approx(peak, rel=1e-5)


# The official codes' schedules, in float64, at every step.


def cosine(step, total, peak, end=0.0):
    return end + (peak - end) * 0.5 * (1 + np.cos(np.pi * step / total))


def warm_cosine(total, warmup, peak):
    step = np.arange(total)
    risen = step / max(warmup, 1) * peak
    return np.where(step < warmup, risen, cosine(step - warmup, total - warmup, peak))


def simclr_rates(images, batch, epochs, warmup_epochs, peak):
    """tf2/model.py: `get_train_steps` and `WarmUpAndCosineDecay`."""
    total = images * epochs // batch + 1
    return warm_cosine(total, round(warmup_epochs * images // batch), peak)


def byol_rates(images, batch, epochs, warmup_epochs, peak):
    """configs/byol.py and utils/schedules.py."""
    return warm_cosine(epochs * images // batch, warmup_epochs * images // batch, peak)


def mocov3_rates(batches, epochs, warmup_epochs, peak):
    """main_moco.py of MoCo v3: `adjust_learning_rate` at every step."""
    return warm_cosine(batches * epochs, batches * warmup_epochs, peak)


def swav_rates(batches, epochs, warmup_epochs, start, peak, end):
    """main_swav.py, with `len(train_loader)` batches."""
    warmup = np.linspace(start, peak, batches * warmup_epochs)
    after = batches * (epochs - warmup_epochs)
    return np.concatenate([warmup, cosine(np.arange(after), after, peak, end)])


def epoch_rates(batches, rates):
    """main_moco.py and main_simsiam.py: `adjust_learning_rate` at the start of an epoch."""
    return np.repeat(rates, batches)


def solo_rates(batches, epochs, warmup_epochs, start, peak):
    """solo-learn's LinearWarmupCosineAnnealingLR, stepped with every batch."""
    return swav_rates(batches, epochs, warmup_epochs, start, peak, 0.0)


def barlow_rates(batches, epochs, peak):
    """main.py and main_vicreg.py: `adjust_learning_rate`, with `len(loader)` batches."""
    total, warmup = epochs * batches, 10 * batches
    step = np.arange(total)
    after = cosine(step - warmup, total - warmup, peak, 1e-3 * peak)
    return np.where(step < warmup, step / warmup * peak, after)


IMAGENET, CIFAR = 1_281_167, 50_000
EPOCHS = np.arange(200)
OFFICIAL = {
    "simclr_imagenet": (IMAGENET, simclr_rates(IMAGENET, 4096, 1000, 10, 4.8)),
    "simclr_imagenet:8192": (IMAGENET, simclr_rates(IMAGENET, 8192, 1000, 10, 9.6)),
    "simclrv2_imagenet": (IMAGENET, simclr_rates(IMAGENET, 4096, 800, 40, 6.4)),
    "simclr_cifar10": (CIFAR, simclr_rates(CIFAR, 512, 1000, 10, 2.0)),
    "simclrv2_cifar10": (CIFAR, simclr_rates(CIFAR, 512, 1000, 10, 2.0)),
    "byol_imagenet": (IMAGENET, byol_rates(IMAGENET, 4096, 1000, 10, 3.2)),
    "byol_imagenet:300": (IMAGENET, byol_rates(IMAGENET, 4096, 300, 10, 4.8)),
    "byol_imagenet:40": (IMAGENET, byol_rates(IMAGENET, 4096, 40, 10, 7.2)),
    "swav_imagenet": (IMAGENET, swav_rates(312, 800, 10, 0.3, 4.8, 0.0048)),
    "swav_imagenet:256": (IMAGENET, swav_rates(5004, 200, 0, 0.0, 0.6, 0.0006)),
    "moco_imagenet:v1": (
        IMAGENET,
        epoch_rates(5004, 0.03 * 0.1 ** ((EPOCHS >= 120) * 1 + (EPOCHS >= 160))),
    ),
    "moco_imagenet:v2": (IMAGENET, epoch_rates(5004, cosine(EPOCHS, 200, 0.03))),
    "simsiam_imagenet": (IMAGENET, epoch_rates(2502, cosine(EPOCHS[:100], 100, 0.1))),
    "barlow_imagenet": (IMAGENET, barlow_rates(625, 1000, 0.2 * 8)),
    "vicreg_imagenet": (IMAGENET, barlow_rates(625, 1000, 0.2 * 8)),
    "vicreg_imagenet:100": (IMAGENET, barlow_rates(2502, 100, 0.3 * 2)),
    "barlow_cifar10:solo": (CIFAR, solo_rates(195, 1000, 10, 3e-5, 0.3)),
    "vicreg_cifar10": (CIFAR, solo_rates(195, 1000, 10, 3e-5, 0.3)),
    **{
        f"{name}_cifar10:lightly": (CIFAR, epoch_rates(97, cosine(EPOCHS, 200, peak)))
        for name, peak in (
            ("simclr", 0.24),
            ("moco", 0.24),
            ("byol", 0.24),
            ("barlow", 0.24),
            ("simsiam", 0.06),
        )
    },
    "swav_cifar10:lightly": (CIFAR, epoch_rates(97, cosine(EPOCHS, 200, 4e-3))),
    "dino_imagenet": (IMAGENET, swav_rates(2502, 100, 10, 0.0, 1e-3, 1e-6)),
    "dino_imagenet:resnet50": (IMAGENET, swav_rates(2502, 100, 10, 0.0, 0.06, 1e-6)),
    "dino_cifar10:lightly": (CIFAR, epoch_rates(97, cosine(EPOCHS, 200, 0.24))),
    "dino_cifar10:solo": (CIFAR, solo_rates(195, 1000, 10, 3e-5, 0.3)),
    "moco_cifar10:solo": (CIFAR, solo_rates(195, 1000, 10, 3e-5, 0.3)),
    "byol_cifar10:solo": (CIFAR, solo_rates(195, 1000, 10, 3e-5, 1.0)),
    "mocov3_imagenet": (IMAGENET, mocov3_rates(312, 1000, 10, 4.8)),
    "mocov3_imagenet:100": (IMAGENET, mocov3_rates(312, 100, 10, 9.6)),
    "mocov3_imagenet:vit_s": (IMAGENET, mocov3_rates(312, 300, 40, 2.4e-3)),
    "mocov3_cifar10:solo": (CIFAR, solo_rates(195, 1000, 10, 3e-5, 0.3)),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_learning_rate_is_the_official_one_at_every_step(name):
    file, _, variant = name.partition(":")
    config = load_config(f"{ROOT}/configs/{file}.py" + (f":{variant}" if variant else ""))
    images, expected = OFFICIAL[name]
    schedule = run_schedule(config, images)
    assert schedule.total_steps == len(expected)
    rate = jax.jit(learning_rate_schedule(config.optim, config.batch_size, schedule))
    steps = np.arange(schedule.total_steps, dtype=np.int32)
    # Near the end, 1 + cos(x) cancels in float64 as well.
    np.testing.assert_allclose(rate(steps), expected, rtol=1e-6, atol=1e-15 * expected.max())


@pytest.mark.parametrize(("variant", "base"), [("1000", 0.996), ("40", 0.97)])
def test_byol_ema_decay_is_the_official_one_at_every_step(variant, base):
    config = load_config(f"{ROOT}/configs/byol_imagenet.py:{variant}")
    schedule = run_schedule(config, IMAGENET)
    total = int(variant) * IMAGENET // 4096
    expected = 1 - (1 - base) * cosine(np.arange(total), total, 1.0)
    steps = np.arange(total, dtype=np.int32)
    decay = jax.jit(jax.vmap(make_method(config, schedule).ema_decay))(steps)
    np.testing.assert_allclose(decay, expected, rtol=1e-6)


def test_dino_imagenet_has_the_official_schedules_and_crops():
    """main_dino.py: `cosine_scheduler` of the weight decay and of the teacher's EMA."""
    config = load_config(str(ROOT / "configs/dino_imagenet.py"))
    schedule = run_schedule(config, IMAGENET)
    total, steps = 2502 * 100, np.arange(0, 2502 * 100, 97, dtype=np.int32)
    decay = jax.jit(jax.vmap(weight_decay_schedule(config.optim, schedule)))(steps)
    np.testing.assert_allclose(decay, cosine(steps, total, 0.04, 0.4), rtol=1e-5)
    ema = jax.jit(jax.vmap(make_method(config, schedule).ema_decay))(steps)
    np.testing.assert_allclose(ema, cosine(steps, total, 0.996, 1.0), rtol=1e-6)
    assert config.optim.frozen_steps == 2502
    assert [view.size for view in flat_views(config)] == [224] * 2 + [96] * 8
    chances = [(view.blur.prob, view.solarize.prob) for view in flat_views(config)]
    assert chances == [(1.0, 0.0), (0.1, 0.2), *[(0.5, 0.0)] * 8]


def test_barlow_imagenets_effective_rates_and_views_are_the_official_ones():
    """One GPU's share of the true gradient, which LARS adapts in weights only."""
    config = load_config(str(ROOT / "configs/barlow_imagenet.py"))
    assert config.barlow.loss_scale * 32 == 1
    # --scale-loss .024 of the code's first version
    ratio = config.optim.norm_bias_lr / config.optim.lr
    assert ratio == pytest.approx(0.024)
    for name in ("barlow", "vicreg"):
        views = load_config(str(ROOT / f"configs/{name}_imagenet.py")).views
        assert (views.view1.blur.prob, views.view2.blur.prob) == (1.0, 0.1)
        assert (views.view1.solarize.prob, views.view2.solarize.prob) == (0.0, 0.2)
        for view in views.values():
            assert view.jitter.style == "torchvision" and view.crop.interpolation == "bicubic"
            jitter = [view.jitter[key] for key in ("brightness", "contrast", "saturation", "hue")]
            assert jitter == [0.4, 0.4, 0.2, 0.1]


def test_swav_imagenet_blurs_small_crops_by_three_sigma():
    config = load_config(str(ROOT / "configs/swav_imagenet.py"))
    taps = {view.size: blur_taps((view.size, view.size), view) for view in flat_views(config)}
    # A tenth of the side at 224 pixels, an odd number, is more.
    assert taps == {224: 22, 96: 13}
    # The border mirrors at most the whole image.
    assert blur_taps((6, 6), config.views.small) == 11
    config.views.small.blur.kernel_size = 23
    assert blur_taps((6, 8), config.views.small) == 11
    assert blur_taps((32, 32), config.views.small) == 23


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_unknown_variant_is_refused_and_the_variants_are_listed(file):
    with pytest.raises(UserError) as caught:
        load_config(f"{file}:foo")
    message = str(caught.value)
    variants = VARIANTS.get(file.stem, [])
    if "(variant:" not in file.read_text():
        assert f"{file.name} has no variants, so no 'foo'. Use" in message
    elif file.stem == "ablations":
        assert "The variant of ablations.py is 'foo'. Use one of: crop-and-color, " in message
    else:
        assert f"{file.name} has no variant 'foo'. " in message
        cpu = ["cpu"] if file.stem.endswith("_cifar10") else []
        assert all(f"`{name}`" in message for name in [*variants, *cpu])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A TFDS data_dir with an imagenet2012 and a cifar10 of 72 images each."""
    builds = pytest.importorskip("tfds_builds")
    root = tmp_path_factory.mktemp("tfds")
    images = fill(root / "images", per_class=24)
    for name, version, held_out, classes in (
        ("imagenet2012", "5.1.0", "validation", 1000),
        ("cifar10", "3.0.2", "test", 10),
    ):
        splits = ("train", held_out)
        builds.build(root / "tfds", images, "tfrecord", name, version, splits, classes)
    return str(root / "tfds")


def shrink(config):
    """Shrinks network, views and batch so that a step compiles and runs in seconds."""
    config.batch_size, config.dtype = 64, "float32"
    config.model.update(depth=4, width=1 / 8, sk=False, bn_splits=min(config.model.bn_splits, 2))
    for view in config.views.values():
        view.size = max(view.size // 7, 8) // 8 * 8
    config.moco.queue, config.simclr.memory_bank = 128, min(config.simclr.memory_bank, 128)
    config.swav.update(queue=min(config.swav.queue, 128), prototypes=16)
    config.dino.update(prototypes=16, out=8)
    config.model.vit.update(depth=1, width=16, heads=2, patch=8)
    groups = ("simclr", "moco", "swav", "byol", "simsiam", "mocov3", "barlow", "vicreg", "dino")
    for group in (*groups, "supcon"):
        config[group].hidden = 16
    config.barlow.out = config.vicreg.out = 32


@pytest.mark.long
@pytest.mark.parametrize(
    "file",
    [f for f in FILES if "_imagenet" in f.stem or "_cifar10" in f.stem],
    ids=lambda file: file.stem,
)
def test_one_tiny_training_step_from_tfds_data(file, prepared):
    config = load_config(str(file))
    config.data.dir = prepared
    if file.stem.endswith("_cifar10"):
        config.data.update(name="tfds", dataset="cifar10", test_split="test")
    shrink(config)
    setup = Setup(config)
    assert setup.test.num_examples == setup.train.num_examples == 72
    assert setup.config.data.num_classes == (10 if "cifar" in file.stem else 1000)
    state = setup.program.init()
    with Prefetcher(setup.train, setup.index, setup.rows, setup.spmd.place_batch, 0, 1) as batches:
        state, metrics = setup.program.step(state, batches.next(), {})
    assert np.isfinite(float(metrics["loss"])) and int(state.step) == 1


@pytest.mark.parametrize(
    ("name", "padding", "project_first"),
    [
        *((f"simclr_imagenet{variant}", "simclr", True) for variant in ("", ":8192")),
        *((f"simclrv2_imagenet{variant}", "simclr", True) for variant in ("", ":r152w3sk")),
        *((name, "simclr", True) for name in ("simclr_cifar10", "simclrv2_cifar10")),
        ("byol_imagenet", "same", True),
        *((f"{name}_imagenet", "symmetric", False) for name in ("moco", "swav", "simsiam")),
        ("mocov3_imagenet", "symmetric", False),
        *((f"{name}_imagenet", "symmetric", False) for name in ("barlow", "vicreg")),
    ],
)
def test_networks_pad_and_project_as_in_the_official_codes(name, padding, project_first):
    """TensorFlow's and Haiku's differ from torchvision's, which the other codes use."""
    path, _, variant = name.partition(":")
    model = load_config(f"{ROOT}/configs/{path}.py" + (f":{variant}" if variant else "")).model
    assert (model.padding, model.project_first) == (padding, project_first)
