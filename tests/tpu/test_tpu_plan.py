"""Every method's train step through the TPU's own compiler, without a TPU."""

import importlib.util
import os

import jax
import pytest
from tiny import METHODS, method_config, with_two_stages, without_color

from ssl_jax.cli import backend
from ssl_jax.config import load_config
from ssl_jax.errors import UserError
from ssl_jax.plan import plan
from ssl_jax.plan.chips import parse_topology

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("the extra `plan` (libtpu) is not installed: make peers", allow_module_level=True)
jax.devices()  # the CPU reads its flags now; libtpu would end the process over them
os.environ.pop("XLA_FLAGS", None)
backend.compile_elsewhere()

TOPOLOGY = parse_topology("v5e:2x4")
# Exchanges of a step: two of each BatchNorm of the encoder (four of a projector's), the gradients
# and the metrics together, what the loss gathers. A change here changes what a pod waits for.
EXCHANGES = {
    "simclr": {"all-reduce": 19, "all-gather": 2},
    "simclr_memory": {"all-reduce": 19, "all-gather": 3},
    "moco": {"all-reduce": 11, "all-gather": 1, "all-to-all": 2},
    "swav": {"all-reduce": 19, "all-gather": 1},
    "byol": {"all-reduce": 19},
    "simsiam": {"all-reduce": 27},
    "supervised": {"all-reduce": 11},
}
# Temporary memory, at least a tenth above what it is.
MIB = {
    "simclr": 4.8,
    "simclr_memory": 5.4,
    "moco": 5.0,
    "swav": 7.4,
    "byol": 6.3,
    "simsiam": 6.3,
    "supervised": 5.2,
}


@pytest.mark.parametrize("method", METHODS)
def test_exchanges_and_memory_of_a_step(method):
    config = with_two_stages(method_config(method, dtype="bfloat16"))
    made = plan.make_plan(config, TOPOLOGY, images=6400)
    assert made["fits"] and not made["estimate"]
    exchanges = {c["kind"]: c["count"] for c in made["collectives"]}
    assert exchanges == EXCHANGES[method]
    assert made["memory"]["temporary"] < MIB[method] * 2**20
    assert made["cycles"]
    assert "8 chips, 8 cores, 8 devices as compiled" in plan.report(made)


def test_of_a_network_in_bfloat16_only_the_pictures_are_float32():
    config = load_config("configs/simclr_imagenet.py:256")
    config.model.depth = 18
    where = {}
    for dtype in ("float32", "bfloat16"):
        config.dtype = dtype
        made = plan.make_plan(config, parse_topology("v5e:2x2"))
        where[dtype] = {each.split(" in ")[1] for each in made["float32_activations"]}
    assert {"augment", "forward", "backward"} <= where["float32"]
    assert "augment" in where["bfloat16"]
    assert not where["bfloat16"] & {"forward", "backward", "loss"}
    # By the compiler's own estimate; with a blur by shifts it was half of it.
    assert made["cycles"]["augment"] < sum(made["cycles"].values()) / 6


@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_only_gathered_embeddings_grow_with_the_devices(method):
    exchanged = []
    for topology, batch in ((TOPOLOGY, 64), (parse_topology("v5e:4x4"), 128)):
        config = without_color(method_config(method, dtype="bfloat16"))
        config.batch_size, config.moco.queue = batch, 256
        made = plan.make_plan(config, topology, images=6400)
        exchanged.append({c["kind"]: c["bytes"] for c in made["collectives"]})
    few, many = exchanged
    assert few.keys() == many.keys()
    for kind in few:
        grown = 2 if kind == "all-gather" else 1
        assert many[kind] == grown * few[kind], kind


def test_exchanges_in_a_loop_over_microbatches_count_as_often_as_it_runs():
    made = []
    for microbatch in (32, 16):
        config = without_color(method_config("simclr", dtype="bfloat16", microbatch=microbatch))
        made.append(plan.make_plan(config, TOPOLOGY, images=6400))
    few, many = ({c["kind"]: c["count"] for c in m["collectives"]}["all-reduce"] for m in made)
    assert many > 1.5 * few
    assert many - few == pytest.approx(few, rel=0.35)  # beside those outside of the loop


def test_the_compiler_refuses_a_slice_that_does_not_exist():
    with pytest.raises(UserError, match=r"v5e:3x3 is no slice that libtpu knows \(.*v5e:4x4"):
        plan.devices_of(parse_topology("v5e:3x3"))


def test_v4_shows_one_device_for_a_chip():
    assert parse_topology("v4:2x2x1").chip.tensor_cores == 2
    assert len(plan.devices_of(parse_topology("v4:2x2x1"))) == 4
    assert len(plan.devices_of(parse_topology("v3:2x2"))) == 8
