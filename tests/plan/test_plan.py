import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_step import ONE
from tiny import method_config, tiny_config, with_whole_images, without_color

from ssl_jax.cli import main as cli
from ssl_jax.cli.plan import _duration, _numbers, compare, describe
from ssl_jax.config import Schedule, load_config
from ssl_jax.data.pipeline import Prefetcher
from ssl_jax.errors import UserError
from ssl_jax.models import ViT
from ssl_jax.models.conv import conv_general_dilated
from ssl_jax.plan import plan
from ssl_jax.plan.chips import parse_topology
from ssl_jax.plan.flops import jaxpr_flops, model_flops, traced_flops
from ssl_jax.plan.fused import Cost, fused_cost
from ssl_jax.spmd import make_spmd
from ssl_jax.step import Program
from ssl_jax.train.setup import Setup

GPUS = parse_topology("h100:8")


@pytest.mark.parametrize(
    ("name", "chips", "cores"), [("v4:4x4x4", 64, 1), ("v5e:2x4", 8, 1), ("v3:4x4", 16, 2)]
)
def test_topology_has_a_chip_and_a_shape(name, chips, cores):
    topology = parse_topology(name)
    assert (topology.chips, topology.chip.cores, topology.is_tpu) == (chips, cores, True)
    assert not GPUS.is_tpu and GPUS.chips == 8


@pytest.mark.parametrize(
    "name", ["v4:4x4", "v5e:2x4x4", "v5e:", "v5e", "h100:0", "h100:2x4", "v4:"]
)
def test_invalid_shape_is_rejected_with_examples(name):
    with pytest.raises(UserError, match=r"is not a valid shape for .* such as v4:4x4x4"):
        parse_topology(name)


@pytest.mark.parametrize(("name", "most"), [("h100:4097", 4096), ("v4:32x32x32", 16384)])
def test_more_chips_than_can_be_simulated_are_rejected(name, most):
    with pytest.raises(UserError, match=f"{name} has more than {most} chips"):
        parse_topology(name)


def test_unknown_chip_is_rejected_with_a_suggestion():
    with pytest.raises(UserError, match="is not a known chip. Did you mean 'v5p'"):
        parse_topology("v5:2x2x2")


def test_topology_with_more_gpus_than_simulated_devices_is_rejected():
    with pytest.raises(UserError, match="h100:16 needs 16 simulated devices, but JAX has 8"):
        plan.devices_of(parse_topology("h100:16"))


# FLOPs


def convolve(x, w, stride):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_flops_of_convolutions_and_their_gradients(stride):
    x, w = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))
    forward = 2 * 2 * (8 // stride) ** 2 * 5 * 9 * 3
    assert traced_flops(lambda x, w: convolve(x, w, stride), x, w) == forward
    gradient = jax.grad(lambda x, w: convolve(x, w, stride).sum(), (0, 1))
    counted = traced_flops(gradient, x, w)
    # Forward (unused, but traced) and two gradients; padded edges count in full.
    assert 3 * forward <= counted <= 3.2 * forward


def test_flops_of_matrix_products_in_loops_and_on_all_devices():
    def looped(x):
        return jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=7)[0]

    x = jnp.zeros((4, 4))
    assert traced_flops(looped, x) == 7 * 2 * 4**3
    mapped = make_spmd().map(lambda a: a @ a.T, ("sharded",), "sharded")
    assert traced_flops(mapped, jnp.zeros((16, 3))) == 8 * 2 * 2 * 2 * 3


def test_flops_of_a_platform_dependent_function_are_those_of_the_plain_branch():
    def square(x, **more):
        branches = {"cpu": lambda x: x @ x @ x, "default": lambda x: x @ x, **more}
        return jax.lax.platform_dependent(x, **branches)

    x = jnp.zeros((4, 4))
    assert traced_flops(square, x) == 2 * 4**3
    of_tpu = functools.partial(square, tpu=lambda x: x @ x @ x @ x)
    assert traced_flops(of_tpu, x) == 3 * 2 * 4**3
    # A CPU leaves out what meets only padding.
    conv = functools.partial(conv_general_dilated, strides=(1, 1), padding="SAME")
    assert traced_flops(conv, jnp.zeros((1, 1, 1, 4)), jnp.zeros((3, 3, 4, 5))) == 2 * 9 * 4 * 5


def test_resnet_50_takes_24_5_gflop_per_view():
    config = load_config("configs/simclr_imagenet.py:256")
    program = Program(config, Schedule(10, 100), make_spmd(devices=ONE))
    assert model_flops(program) / 2 == pytest.approx(24.5e9, rel=0.01)


def vit_flops(width, depth, patches, tokens, patch=16):
    """A forward pass, counted by hand, without the patches' convolution; and that convolution."""
    linear = 2.0 * tokens * width**2 * (3 + 1 + 4 + 4)  # qkv, projection, and the perceptron's two
    attention = 2.0 * 2 * tokens**2 * width  # of queries with keys, of weights with values
    return depth * (linear + attention), 2.0 * patches * 3 * patch**2 * width


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12)])
@pytest.mark.parametrize("size", [224, 96])
def test_flops_of_a_vit_equal_a_count_by_hand(width, heads, size):
    patches = (size // 16) ** 2
    module = ViT(width=width, heads=heads, image_size=size, dtype="bfloat16")
    image = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), image)
    blocks, stem = vit_flops(width, 12, patches, patches + 1)
    forward = traced_flops(lambda v, x: module.apply(v, x, train=False), variables, image)
    assert forward == 2 * (blocks + stem)
    # ViT-S/16: 4.6 G multiply-adds at 224 pixels.
    if (width, size) == (384, 224):
        assert forward / 4 == pytest.approx(4.6e9, rel=0.01)

    def loss(v, x):
        return module.apply(v, x, train=True).sum()

    # Two products for each of the forward pass; the images need no gradient.
    assert traced_flops(jax.grad(loss), variables, image) == 2 * (3 * blocks + 2 * stem)


# Memory and traffic of GPUs


def gpu_cost(function, *shapes):
    return fused_cost(jax.make_jaxpr(function)(*shapes))


X = jax.ShapeDtypeStruct((64, 64), jnp.float32)
BYTES = 64 * 64 * 4


def test_elementwise_work_is_fused_into_what_reads_it():
    def dense(x, w):
        return jax.nn.relu(3 * (x + 1)) @ w

    # x is read, the product's operand written, both operands read, the result written.
    assert gpu_cost(dense, X, X) == Cost(5 * BYTES, BYTES)
    assert gpu_cost(lambda x: jnp.exp(x) * 2 + x, X) == Cost(2 * BYTES, 0)


def test_reductions_of_the_same_arrays_share_a_kernel_and_bfloat16_counts_half():
    def moments(x):
        return x.sum(0), (x * x).sum(0)

    assert gpu_cost(moments, X).traffic == BYTES + 64 * 4
    half = gpu_cost(lambda x, w: jnp.tanh(x) @ w, *[X.update(dtype=jnp.bfloat16)] * 2)
    assert half == Cost(5 * BYTES / 2, BYTES / 2)


def test_loops_multiply_the_traffic_and_arrays_live_until_they_are_read():
    def looped(x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ c) @ c, None), x, None, length=7)[0]

    body = gpu_cost(lambda c: jnp.tanh(c @ c) @ c, X)
    assert gpu_cost(looped, X).traffic == 7 * body.traffic
    assert body.temporary == gpu_cost(looped, X).temporary == 2 * BYTES

    def kept(x):
        first = x @ x
        second = first @ x
        return (second @ x) @ first  # at most `first` and two products at a time

    assert gpu_cost(kept, X).temporary == 3 * BYTES


@pytest.mark.long
@pytest.mark.parametrize(
    ("config", "milliseconds", "gib"),
    [
        ("simclr_imagenet.py:256", 69.4, 19.9),
        ("simclr_imagenet.py:8192", 2811, 41.9),
        ("simclr_cifar10.py:lightly", 11.3, None),
    ],
)
def test_estimates_are_near_what_was_measured_on_an_h200(config, milliseconds, gib):
    """docs/benchmarks.md and docs/large_batches.md, of a single GPU."""
    config = load_config(f"configs/{config}")
    config.data.num_classes = 1000
    config.microbatch = 512 if config.batch_size == 8192 else 0
    program = Program(config, Schedule(100, 1000), make_spmd(devices=ONE))
    jaxpr = jax.make_jaxpr(program.step)(*program.shapes())
    cost, chip = fused_cost(jaxpr), parse_topology("h200:1").chip
    estimate = 1e3 * (jaxpr_flops(jaxpr) / chip.peak + cost.traffic / chip.bandwidth)
    assert estimate <= milliseconds <= plan.GPU_STEP[1] * estimate * 1.01
    if gib:
        assert cost.temporary / 2**30 == pytest.approx(gib, rel=0.05)


# The plan


@pytest.fixture(scope="module")
def tiny_plan():
    """SimCLR at batch size 64."""
    return plan.make_plan(with_whole_images(tiny_config(batch_size=64)), GPUS, images=6400)


@pytest.mark.parametrize("source", ["digits", "folder", "several labels"])
def test_plan_compiles_the_program_that_training_runs(source, tmp_path):
    config = without_color(tiny_config(batch_size=32))
    if source == "folder":
        from images import fill

        fill(tmp_path / "images", per_class=16)
        config.data.update(name="folder", dir=str(tmp_path / "images"))
        config.model.width = 1 / 16
    if source == "several labels":
        config.method, config.data.name = "supervised", "packed"
        config.data.dir = str(tmp_path / "packed.npz")
        images, labels = np.zeros((64, 8, 8, 3), np.uint8), np.eye(64, 3, dtype=np.int8)
        np.savez(config.data.dir, images=images, labels=labels, class_names=[])
    setup = Setup(config)
    state = setup.program.init()
    device_data = setup.spmd.replicate(setup.train.device_data())
    place = setup.place_batch
    with Prefetcher(setup.train, setup.index, setup.rows, place, 0, 1) as batches:
        trained = setup.program.step.lower(state, batches.next(), device_data)
    data = plan.describe_data(config)
    program, shapes, schedule = plan.program_of(config, data, jax.devices())
    planned = program.lower(*shapes)
    assert planned.as_text() == trained.as_text()
    assert "tf.aliasing_output" in trained.as_text() or "jax.buffer_donor" in trained.as_text()
    assert schedule == setup.schedule


def test_plan_for_gpus_is_marked_as_an_estimate(tmp_path):
    made = plan.make_plan(with_whole_images(method_config("moco")), GPUS, images=6400)
    assert made.estimate and made.fits and made.cycles == {}
    assert (made.chips, made.devices, made.batch_of_a_device) == (8, 8, 8)
    assert made.steps == 200
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(dataclasses.asdict(made)))
    assert plan.read_plan(file) == made
    kinds = {c.kind for c in made.collectives}
    assert "all-reduce" in kinds and "all-gather" in kinds
    total = sum(made.seconds.values())
    assert made.step_seconds == (total, 1.3 * total)  # as measured
    text = describe(made)
    for part in ("8 chips, 8 devices", "moco, ResNet-4", "about", "fits", "chip-seconds (", "all-"):
        assert part in text
    assert " cores" not in text
    assert "h100:8: memory and times are estimates" in compare(made, made)
    assert made.memory["peak"] == sum(v for k, v in made.memory.items() if k != "peak")


def test_float32_plans_for_gpus_use_the_rate_of_tf32(tiny_plan):
    for name, share in (("a100:8", 0.5), ("h100:8", 0.5), ("b200:8", 0.5), ("v4:2x2x2", 1.0)):
        topology = parse_topology(name)
        made = [
            plan._with_times(dataclasses.replace(tiny_plan, dtype=dtype), topology)
            for dtype in ("bfloat16", "float32")
        ]
        seconds = [each.seconds["compute"] for each in made]
        assert seconds[0] == tiny_plan.traced_flops / topology.chip.peak
        assert seconds[0] == pytest.approx(share * seconds[1])


@pytest.mark.parametrize(
    ("hours", "text"),
    [
        ((2.34, 3.42), "2.34 to 3.42 hours"),
        ((0.5, 0.9), "30 to 54 minutes"),
        ((2.7e-05, 5.5e-05), "0.0972 to 0.198 seconds"),
    ],
)
def test_durations_have_a_fitting_unit(hours, text):
    assert _duration(hours) == text


def test_every_microbatch_counts(tiny_plan):
    whole = tiny_plan
    config = with_whole_images(tiny_config(batch_size=64, microbatch=16))
    parts = plan.make_plan(config, GPUS, images=6400)
    # Forward twice, backward once: 4/3 of the encoder's, plus augmentation and loss.
    assert 1.1 < parts.traced_flops / whole.traced_flops < 1.6
    counts = [{c.kind: c.count for c in made.collectives}["all-reduce"] for made in (whole, parts)]
    assert counts[1] > 2 * counts[0]  # BatchNorm's, in each of four microbatches


def test_largest_fitting_microbatch_is_found_by_compiling(tiny_plan, monkeypatch):
    tried = []

    def made(config, topology, images, log=None):
        tried.append(config.microbatch)
        size = config.microbatch or config.batch_size
        return dataclasses.replace(
            tiny_plan, fits=size <= 24, devices=8, microbatch=config.microbatch
        )

    monkeypatch.setattr(plan, "make_plan", made)
    config = ConfigDict({"batch_size": 192, "microbatch": 0})
    found = plan.fitting(config, GPUS)
    assert found.fitting.microbatch == 24 and not found.fits
    assert len(tried) <= 4
    monkeypatch.setattr(
        plan, "make_plan", lambda c, t, i, *_: dataclasses.replace(made(c, t, i), fits=False)
    )
    assert plan.fitting(config, GPUS).fitting is None


def test_program_that_exceeds_the_memory_is_reported_with_its_size(tiny_plan, monkeypatch):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory in hbm. Used 35.02G of 31.25G hbm."
            )

    monkeypatch.setattr(Program, "lower", lambda self, *shapes: Lowered())
    config = with_whole_images(tiny_config(batch_size=64))
    without = plan.make_plan(config, GPUS, images=6400)
    assert not without.fits and without.memory["peak"] == round(35.02 * 2**30)
    assert "35.02 of 79.65 GiB per device: DOES NOT FIT" in describe(without)
    smaller = dataclasses.replace(tiny_plan, microbatch=16)
    text = describe(dataclasses.replace(without, fitting=smaller))
    assert "--config.microbatch=16 fits:" in text and "per device, microbatches of 16;" in text
    assert "No microbatch fits" in describe(without)
    assert "h100:8" in compare(tiny_plan, without)


def test_absent_data_is_described_by_its_name_or_size(tmp_path):
    config = load_config("configs/simclr_imagenet.py")
    data = plan.describe_data(config)
    assert (data.images, data.classes, data.device_data) == (1_281_167, 1000, {})
    config.data.update(name="records", dir=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere.* add --images=NUMBER"):
        plan.describe_data(config)
    assert plan.describe_data(config, 500).images == 500


def test_images_in_device_memory_are_part_of_the_plan():
    data = plan.describe_data(tiny_config(), 500)
    assert data.images == 500 and data.device_data["image"].shape == (500, 8, 8, 3)


def test_indivisible_batch_is_rejected_before_compiling():
    logged = []
    with pytest.raises(UserError, match="config.batch_size is 36, which 8 devices"):
        plan.make_plan(tiny_config(batch_size=36), GPUS, 640, logged.append)
    assert logged == []


@pytest.mark.long
def test_plan_command_prints_json_and_compares(tmp_path, capsys, monkeypatch):
    config = tmp_path / "c.py"
    config.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from tiny import tiny_config, with_whole_images\n\n"
        "def get_config(variant=''):\n    return with_whole_images(tiny_config())\n"
    )
    # In a subprocess, where JAX is not imported yet and simulates the requested devices.
    command = [sys.executable, "-m", "ssl_jax.cli", "plan", f"--config={config}"]
    one_device = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    environment = os.environ | {"XLA_FLAGS": one_device}
    done = subprocess.run(
        [*command, "--topology=h100:4", "--json"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["devices"] == 4
    (tmp_path / "four.json").write_text(done.stdout)
    (tmp_path / "none.json").write_text("{}")

    # In this process, a subset of the simulated devices is used.
    monkeypatch.setattr("ssl_jax.cli.backend.compile_elsewhere", lambda simulated: None)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return cli.main(["plan", f"--config={config}", *arguments]), *capsys.readouterr()

    code, out, err = run("--topology=h100:2", "--compare=four.json")
    assert code == 0, err
    line = next(line for line in out.splitlines() if line.startswith("devices"))
    assert line.split() == ["devices", "2", "4", "2.000"]
    (tmp_path / "four.json").unlink()
    for arguments, message in (
        (["--topology=h100:2", "--compare=none.json"], "is not a plan"),
        (["--topology=h100:2", "--compare=v4:2x2x1"], "One process can't compile for both"),
        (["--topology=v4:2x2"], "is not a valid shape"),
        (["--topology=h100:2", "--compare=four.json"], "neither a file nor a topology"),
        (["--topology=h100:2", "--compare=h100:4", "--json"], "Remove --compare"),
    ):
        code, _, err = run(*arguments)
        assert code == 2 and message in err, err


def test_missing_tpu_compiler_is_reported_before_the_config_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["plan", "--config=/nowhere.py", "--topology=v4:4x4x4"]) == 2
    assert "Install the extra 'plan'" in capsys.readouterr().err.replace("\n", " ")
    with pytest.raises(UserError, match=r"Install the extra 'plan'"):
        plan.devices_of(parse_topology("v5e:2x4"))


def test_plan_numbers_are_finite(tiny_plan):
    assert all(np.isfinite(value) for _, value in _numbers(tiny_plan))
