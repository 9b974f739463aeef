"""Compiles every method's train step with the TPU compiler, without a TPU."""

import importlib.util
import os

import jax
import pytest
from tiny import METHODS, method_config, with_two_stages, without_color

from ssl_jax.cli import backend
from ssl_jax.cli.plan import describe
from ssl_jax.config import Schedule, load_config
from ssl_jax.errors import UserError
from ssl_jax.plan import plan
from ssl_jax.plan.chips import parse_topology
from ssl_jax.spmd import make_spmd
from ssl_jax.step import Program

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("the extra `plan` (libtpu) is not installed: make peers", allow_module_level=True)
jax.devices()  # the CPU backend reads its flags now; libtpu would abort on them
os.environ.pop("XLA_FLAGS", None)
backend.compile_elsewhere()

TOPOLOGY = parse_topology("v5e:2x4")
# Collectives per step: two for each BatchNorm of the encoder (four for a projector's), one for
# gradients and metrics, and those of the loss. A pod waits for each of them.
COLLECTIVES = {
    "simclr": {"all-reduce": 19, "all-gather": 2},
    "simclr_memory": {"all-reduce": 19, "all-gather": 3},
    "moco": {"all-reduce": 11, "all-gather": 1},  # with global BatchNorm, nothing is shuffled
    "swav": {"all-reduce": 19, "all-gather": 1},
    "byol": {"all-reduce": 19},
    "simsiam": {"all-reduce": 27},
    "barlow": {"all-reduce": 20, "all-gather": 1},
    "vicreg": {"all-reduce": 22},
    "dino": {"all-reduce": 19},
    "supervised": {"all-reduce": 11},
    "mocov3": {"all-reduce": 23, "all-gather": 1},
    "supcon": {"all-reduce": 12, "all-gather": 2},
}
# Upper bounds of the temporary memory, at least a tenth above the actual values.
MAX_MIB = {
    "simclr": 4.8,
    "simclr_memory": 5.4,
    "moco": 5.0,
    "swav": 7.4,
    "byol": 6.3,
    "simsiam": 6.3,
    "barlow": 6.0,
    "vicreg": 6.2,
    "dino": 7.4,
    "supervised": 5.2,
    "mocov3": 6.9,
    "supcon": 5.1,
}


@pytest.mark.parametrize("method", METHODS)
def test_step_has_the_expected_collectives_and_memory(method):
    config = with_two_stages(method_config(method, dtype="bfloat16"))
    made = plan.make_plan(config, TOPOLOGY, images=6400)
    assert made.fits and not made.estimate
    assert {c.kind: c.count for c in made.collectives} == COLLECTIVES[method]
    assert made.memory["temporary"] < MAX_MIB[method] * 2**20
    assert made.cycles
    assert "8 chips, 8 cores, 8 devices" in describe(made)


def test_only_augmented_images_are_float32_in_a_bfloat16_network():
    config = load_config("configs/simclr_imagenet.py:256")
    config.model.depth = 18
    where = {}
    for dtype in ("float32", "bfloat16"):
        config.dtype = dtype
        made = plan.make_plan(config, parse_topology("v5e:2x2"))
        where[dtype] = {each.split(" in ")[1] for each in made.float32_activations}
    assert {"augment", "forward", "backward"} <= where["float32"]
    assert "augment" in where["bfloat16"]
    assert not where["bfloat16"] & {"forward", "backward", "loss"}
    # By the compiler's estimate; a blur by shifts made it half of all cycles.
    assert made.cycles["augment"] < sum(made.cycles.values()) / 6


@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_only_all_gathers_grow_with_the_number_of_devices(method):
    sizes = []
    for topology, batch in ((TOPOLOGY, 64), (parse_topology("v5e:4x4"), 128)):
        config = without_color(method_config(method, dtype="bfloat16"))
        config.batch_size, config.moco.queue = batch, 256
        made = plan.make_plan(config, topology, images=6400)
        sizes.append({c.kind: c.bytes for c in made.collectives})
    few, many = sizes
    assert few.keys() == many.keys()
    for kind in few:
        grown = 2 if kind == "all-gather" else 1
        assert many[kind] == grown * few[kind], kind


def test_collectives_count_for_every_microbatch():
    made = []
    for microbatch in (32, 16):
        config = without_color(method_config("simclr", dtype="bfloat16", microbatch=microbatch))
        made.append(plan.make_plan(config, TOPOLOGY, images=6400))
    few, many = ({c.kind: c.count for c in m.collectives}["all-reduce"] for m in made)
    assert many > 1.5 * few
    assert many - few == pytest.approx(few, rel=0.35)  # plus those outside the loop


def test_vits_blocks_have_no_collectives():
    """Its LayerNorms need none: one for gradients and metrics, and the embeddings' all-gathers."""
    config = method_config("simclr", dtype="bfloat16")
    config.simclr.head_bn = "none"
    config.model.name = "vit"
    config.model.vit.update(width=32, depth=2, heads=2, patch=4)
    made = plan.make_plan(config, TOPOLOGY, images=6400)
    assert made.fits and made.cycles
    counts = {each.kind: each.count for each in made.collectives}
    assert counts.get("all-reduce", 0) <= 3, counts


def test_largest_recipe_starts_with_its_state_in_memory_once():
    """SimCLR v2's R152 3x with selective kernels: its step takes more."""
    config = load_config("configs/simclrv2_imagenet.py:r152w3sk")
    spmd = make_spmd(devices=plan.devices_of(parse_topology("v4:2x2x1")))
    program = Program(config, Schedule(10, 100), spmd)
    shapes = jax.tree.leaves(jax.eval_shape(program.init))
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in shapes)
    memory = jax.jit(program.init).lower().compile().memory_analysis()
    assert 7e9 < state == pytest.approx(memory.output_size_in_bytes, rel=0.01)
    assert memory.temp_size_in_bytes < 0.01 * state


def test_unknown_slice_is_rejected():
    with pytest.raises(UserError, match=r"v5e:3x3 is not a slice that libtpu knows \(.*v5e:4x4"):
        plan.devices_of(parse_topology("v5e:3x3"))


def test_v4_has_one_device_per_chip_and_v3_has_two():
    assert parse_topology("v4:2x2x1").chip.tensor_cores == 2
    assert len(plan.devices_of(parse_topology("v4:2x2x1"))) == 4
    assert len(plan.devices_of(parse_topology("v3:2x2"))) == 8
