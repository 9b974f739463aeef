"""Ahead of time: the train step compiled for hardware that is not there, and what it will cost.

For TPUs the real compiler (libtpu) compiles on any CPU the very program that training would run;
for GPUs as many simulated devices stand in, and what they log of memory and time is an estimate.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from ml_collections import ConfigDict

from ssl_jax.config import Schedule, flat_views, run_schedule
from ssl_jax.data.sources import make_sources
from ssl_jax.errors import UserError, first_line
from ssl_jax.interop.initial_weights import resolve_initial_weights
from ssl_jax.models.resnet import resnet_name
from ssl_jax.plan.chips import (
    BETWEEN_HOSTS,
    EXAMPLES,
    GIB,
    GPUS_OF_A_HOST,
    Topology,
)
from ssl_jax.plan.hlo import CompiledText, part_of
from ssl_jax.spmd import make_spmd
from ssl_jax.step import Program

# Data sets that a plan knows without having them: images in the training split, classes.
_DATASETS = {"imagenet2012": (1_281_167, 1000), "cifar10": (50_000, 10), "cifar100": (50_000, 100)}
_RESIDENT = ("digits", "packed")  # whose images lie on the devices, so that their size matters
_HOP_S = 1e-6  # latency of a hop between neighbouring chips (Google, "How to Scale Your Model")


def devices_of(topology: Topology) -> list[jax.Device]:
    """Devices to compile for; on a real machine as many are seen.

    Raises:
      UserError: libtpu is missing or knows no such slice; or too few devices are simulated.
    """
    if not topology.is_tpu:
        have = jax.devices()
        if len(have) < topology.chips:
            raise UserError(
                f"{topology.name} is simulated by {topology.chips} devices, and there are "
                f"{len(have)}: set XLA_FLAGS to "
                f"--xla_force_host_platform_device_count={topology.chips}."
            )
        return have[: topology.chips]
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "A plan for TPUs needs their compiler, which is not installed: install the extra "
            "'plan', pip install -c constraints.txt -e '.[plan]' in a clone."
        )
    options = {"chip_config_name": topology.chip.compile_as} if topology.chip.compile_as else {}
    try:
        described = topologies.get_topology_desc(topology.name, platform="tpu", **options)
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--topology={topology.name} is no slice that libtpu knows "
            f"({first_line(error)}): {EXAMPLES}."
        ) from error
    return list(described.devices)


def traced_flops(function: Callable[..., Any], *shapes: Any) -> float:
    """FLOPs of the convolutions and products of a function, on all devices together.

    Counted on what JAX traces, two for a multiplication and an addition, loops as often as they
    run. Elementwise work is left out; so is what the compiler adds or removes.

    Args:
      function: of arrays.
      *shapes: of its arguments.
    """
    return _count(jax.make_jaxpr(function)(*shapes).jaxpr)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            channels = kernel.shape[parameters["dimension_numbers"].rhs_spec[0]]
            out = math.prod(equation.outvars[0].aval.shape)
            # Of a strided convolution's gradient most products are with zeros between the pixels.
            zeros = math.prod(parameters["lhs_dilation"])
            total += 2 * out * math.prod(kernel.shape) / channels / zeros
            continue
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += (
                2
                * math.prod(equation.outvars[0].aval.shape)
                * math.prod(shape[axis] for axis in contracted)
            )
            continue
        inner = [_count(inside) for inside in _inside(parameters)]
        if name == "cond":
            # Of a choice by platform the plainest counts: others take more work to be faster.
            by_platform = parameters.get("branches_platforms") is not None
            total += (min if by_platform else max)(inner, default=0.0)
        elif name == "scan":
            total += parameters["length"] * sum(inner)
        elif name == "shard_map":
            total += parameters["mesh"].size * sum(inner)
        else:
            total += sum(inner)
    return total


def _inside(parameters: dict[str, Any]) -> Iterator[Any]:
    """The traced functions that an operation calls."""
    for value in parameters.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns"):
                yield item
            elif hasattr(item, "jaxpr"):
                yield item.jaxpr


@dataclasses.dataclass(frozen=True)
class Data:
    """What a plan needs to know of the training set: its size, and what lies on the devices."""

    images: int
    classes: int
    device_data: dict[str, Any]


def describe_data(config: ConfigDict, images: int = 0) -> Data:
    """The training set of a config, which need not be there for well-known ones.

    Args:
      config: of the run.
      images: how many there are; 0: as the data set's name or files log.

    Raises:
      UserError: nothing says how many.
    """
    share = config.data.subset * (1 - config.data.validation)
    dataset = config.data.dataset.partition("/")[0].partition(":")[0]
    if config.data.name == "tfds" and config.data.split == "train" and dataset in _DATASETS:
        known, classes = _DATASETS[dataset]
        return Data(round(share * (images or known)), config.data.num_classes or classes, {})
    if images and config.data.name not in _RESIDENT:
        return Data(round(share * images), config.data.num_classes or 1000, {})
    try:
        source, _ = make_sources(config)
    except UserError as error:
        raise UserError(f"{error} Files that are not here need --images=NUMBER.") from error
    shapes = {
        name: jax.ShapeDtypeStruct((images or len(array), *array.shape[1:]), array.dtype)
        for name, array in source.device_data().items()
    }
    return Data(
        images or source.num_examples, config.data.num_classes or source.num_classes, shapes
    )


def make_plan(
    config: ConfigDict,
    topology: Topology,
    images: int = 0,
    log: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Compiles the train step of a config for a topology.

    Args:
      config: of the run.
      topology: of `parse_topology`.
      images: in the training set, where the data is not there to tell.
      log: told when all is checked and compiling begins.

    Returns:
      What `report` prints, as plain JSON types: bytes, seconds, FLOPs of one device and step.

    Raises:
      UserError: the config can't run on these devices.
    """
    data = describe_data(config, images)
    devices = devices_of(topology)
    program, shapes, schedule = program_of(config, data, devices)
    plan: dict[str, Any] = {
        "topology": topology.name,
        "estimate": not topology.is_tpu,
        "chips": topology.chips,
        "cores": topology.chips * topology.chip.tensor_cores,
        "devices": len(devices),
        "devices_of_a_chip": topology.chip.cores,
        "hbm_bytes": topology.chip.memory // topology.chip.cores,
        "method": config.method,
        "model": resnet_name(config.model),
        "dtype": config.dtype,
        "batch": config.batch_size,
        "batch_of_a_device": config.batch_size // len(devices),
        "microbatch": config.microbatch,
        "remat": config.remat,
        "batchnorm_images": program.batchnorm_images,
        "steps": schedule.total_steps,
        "views": len(flat_views(config)),
        "traced_flops": traced_flops(program.step, *shapes) / len(devices),
        "model_flops_of_an_image": model_flops(program),
    }
    log(f"Compiling for {topology.name}: minutes, for a large network …")
    try:
        compiled = program.lower(*shapes).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error):
            raise
        return plan | {"fits": False, "memory": _exceeded(str(error))}
    plan |= _measure(compiled, program, plan)
    return plan | _times(plan, topology)


def program_of(
    config: ConfigDict, data: Data, devices: Sequence[jax.Device]
) -> tuple[Program, tuple[Any, ...], Schedule]:
    """What training on such data would run on those devices, and the shapes of its arguments.

    Raises:
      UserError: the config can't run on these devices.
    """
    config = ConfigDict(config.to_dict())
    config.data.num_classes = data.classes
    resolve_initial_weights(config)
    spmd = make_spmd(devices=devices, batch_size=config.batch_size, microbatch=config.microbatch)
    schedule = run_schedule(config, data.images)
    program = Program(config, schedule, spmd)
    return program, program.shapes(data.device_data, labelled=data.classes > 0), schedule


def _exceeded(message: str) -> dict[str, int]:
    """What the compiler says that a program which doesn't fit would need."""
    used = re.search(r"Used ([\d.]+)([KMGT]) of", message)
    size = float(used[1]) * 1024 ** ("KMGT".index(used[2]) + 1) if used else 0
    return {"peak": round(size)}


def memory_kinds(memory: Any) -> dict[str, int]:
    """What a compiled program takes of a device's memory, bytes by kind.

    Args:
      memory: of its `memory_analysis`.
    """
    return {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }


def _measure(compiled: Any, program: Program, plan: dict[str, Any]) -> dict[str, Any]:
    """What the compiled program says of itself."""
    cost = compiled.cost_analysis()
    kinds = memory_kinds(compiled.memory_analysis())
    kinds["peak"] = sum(kinds.values())
    microbatches = plan["batch"] // (plan["microbatch"] or plan["batch"])
    text = CompiledText(compiled.as_text())
    moved = microbatches * float(cost.get("bytes accessed", 0.0))
    return {
        "memory": kinds,
        "fits": kinds["peak"] <= plan["hbm_bytes"],
        # The compiler counts the body of a loop over microbatches once.
        "compiled_flops": float(cost.get("flops", 0.0)) if microbatches == 1 else None,
        # Of a TPU's program what stays on the chip is known, and left out.
        "bytes_accessed": moved if plan["estimate"] else float(text.traffic()),
        "cycles": text.cycles(),
        "float32_activations": _float32_activations(text, program, plan),
        "collectives": [dataclasses.asdict(c) for c in text.collectives()],
    }


def _float32_activations(compiled: CompiledText, program: Program, plan: Any) -> list[str]:
    """Large arrays of float32 that have an entry for each image, or for each of its views."""
    images = (plan["microbatch"] or plan["batch"]) // plan["devices"]
    entries = {images * views for views in range(1, plan["views"] + 1)}
    weights = {leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(program.init))}
    found = set()
    for shape, where in compiled.wide(2**20):
        dimensions = tuple(int(d) for d in re.findall(r"\d+", shape.removeprefix("f32")))
        if dimensions[0] in entries and dimensions not in weights and len(dimensions) > 1:
            found.add(f"{shape} in {part_of(where)}")
    return sorted(found)


def _times(plan: dict[str, Any], topology: Topology) -> dict[str, Any]:
    """The roofline: seconds of a step by what they would go to, and of the run."""
    chip = topology.chip
    beyond = not topology.is_tpu and topology.chips > GPUS_OF_A_HOST
    link = (BETWEEN_HOSTS if beyond else chip.link) / chip.cores
    hops = sum(n // 2 for n in topology.shape) if topology.is_tpu else 1
    exchange = 0.0
    for found in plan["collectives"]:
        twice = 2 if found["kind"] == "all-reduce" else 1  # scattered, then gathered
        exchange += twice * (found["bytes"] / link + found["count"] * hops * _HOP_S)
    seconds = {
        "compute": plan["traced_flops"] / (chip.peak / chip.cores),
        "memory": plan["bytes_accessed"] / (chip.bandwidth / chip.cores),
        "interconnect": exchange if plan["devices"] > 1 else 0.0,
    }
    bounds = [max(seconds.values()), sum(seconds.values())]
    hours = [plan["steps"] * bound / 3600 for bound in bounds]
    return {
        "seconds": seconds,
        "step_seconds": bounds,
        "hours": hours,
        "chip_hours": [plan["chips"] * h for h in hours],
    }


def model_flops(program: Program) -> float:
    """FLOPs of training the encoder on all views of an image: three times those of a forward pass.

    ResNet-50 at 224 pixels: 24.5 GFLOP per view.
    """
    config, method = program.config, program.method
    state = jax.eval_shape(program.init)

    @functools.cache
    def forward(size: int) -> float:
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)

        def features(params: Any, stats: Any, x: Any) -> Any:
            return method.features(params, stats, x)

        return traced_flops(features, state.params, state.method_state["batch_stats"], images)

    return 3 * sum(forward(view.size) for view in flat_views(config))


def fitting(
    config: ConfigDict,
    topology: Topology,
    images: int = 0,
    log: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """A plan; where it doesn't fit, that of the largest microbatch that does, found by compiling.

    Args:
      config: of the run.
      topology: of `parse_topology`.
      images: as in `make_plan`.
      log: told of each attempt.

    Returns:
      The plan of the config, with "fitting", the other plan or None, where it doesn't fit.
    """
    plan = make_plan(config, topology, images, log)
    if plan["fits"]:
        return plan
    batch, devices = config.microbatch or config.batch_size, plan["devices"]
    sizes = [
        size
        for size in range(batch - devices, 0, -devices)
        if config.batch_size % size == 0 and size % devices == 0
    ]
    # Memory grows with the microbatch: halve the range.
    low, high, best = 0, len(sizes), None
    while low < high:
        middle = (low + high) // 2
        log(f"It doesn't fit; trying config.microbatch={sizes[middle]} …")
        attempt = ConfigDict(config.to_dict())
        attempt.microbatch = sizes[middle]
        try:
            tried = make_plan(attempt, topology, images)
        except UserError:  # too few images for BatchNorm: larger ones only
            high = middle
            continue
        if tried["fits"]:
            best, high = tried, middle
        else:
            low = middle + 1
    return plan | {"fitting": best}


def report(plan: dict[str, Any]) -> str:
    """A plan in lines for people."""
    lines = [f"{name:<22}{text}" for name, text in _rows(plan)]
    if "fitting" in plan:
        best = plan["fitting"]
        lines += ["", "It does not fit."]
        if best is None:
            lines.append("No microbatch fits either: use more chips, or config.remat=True.")
        else:
            lines += [f"It fits with --config.microbatch={best['microbatch']}:", "", report(best)]
    return "\n".join(lines)


def _rows(plan: dict[str, Any]) -> Iterator[tuple[str, str]]:
    about, real = ("about ", "machine") if plan["estimate"] else ("", "slice")
    cores = "" if plan["estimate"] else f"{plan['cores']} cores, "
    yield (
        "topology",
        f"{plan['topology']}: {plan['chips']} chips, {cores}{plan['devices']} devices as compiled "
        f"and as a real {real} shows them",
    )
    yield "run", f"{plan['method']}, {plan['model']}, {plan['dtype']}, {plan['steps']:,} steps"
    micro = f", in microbatches of {plan['microbatch']}" if plan["microbatch"] else ""
    yield (
        "batch",
        f"{plan['batch']:,}, {plan['batch_of_a_device']} of a device, {plan['views']} views each"
        f"{micro}; BatchNorm over {plan['batchnorm_images']:,} images",
    )
    memory, whole = plan["memory"], plan["hbm_bytes"]
    kinds = ", ".join(f"{name} {n / GIB:.2f}" for name, n in memory.items() if name != "peak")
    fits = "fits" if plan["fits"] else "DOES NOT FIT"
    yield (
        "memory",
        f"{about}{memory['peak'] / GIB:.2f} of {whole / GIB:.1f} GiB of a device"
        f"{f' ({kinds})' if kinds else ''}: {fits}",
    )
    model = plan["model_flops_of_an_image"] * plan["batch_of_a_device"]
    per_view = plan["model_flops_of_an_image"] / plan["views"] / 1e9
    yield (
        "FLOPs of a step",
        f"{plan['traced_flops'] / 1e12:.3g} T of a device, {plan['traced_flops'] / model:.3f} of "
        f"the encoder's {per_view:.3g} GFLOP per view",
    )
    if "seconds" not in plan:
        return
    if plan["compiled_flops"]:
        ratio = plan["compiled_flops"] / model
        yield "", f"{plan['compiled_flops'] / 1e12:.3g} T by the compiler's count ({ratio:.3f})"
    per_image = plan["bytes_accessed"] / plan["batch_of_a_device"] / plan["views"]
    yield (
        "bytes moved",
        f"{plan['bytes_accessed'] / 1e9:.4g} GB of a device, {per_image / 1e6:.0f} MB per view",
    )
    if plan["cycles"]:
        yield "cycles", _cycles(plan["cycles"])
    for found in plan["collectives"]:
        yield found["kind"], f"{found['count']} of {found['bytes'] / 1e6:.4g} MB together"
    seconds = plan["seconds"]
    yield (
        "time of a step",
        f"{about}{1e3 * plan['step_seconds'][0]:.1f} to {1e3 * plan['step_seconds'][1]:.1f} ms; "
        + ", ".join(f"{name} {1e3 * s:.1f}" for name, s in seconds.items()),
    )
    times = " to ".join(_duration(3600 * hours) for hours in plan["hours"])
    chip_hours = " to ".join(_number(hours) for hours in plan["chip_hours"])
    yield (
        "time of the run",
        f"{about}{times} (all overlapped to nothing overlapped, at peak rates), "
        f"{chip_hours} chip-hours",
    )


def _cycles(parts: dict[str, int]) -> str:
    total = sum(parts.values())
    largest_first = sorted(parts.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{part} {100 * n / total:.1f} %" for part, n in largest_first)
    return f"{total / 1e6:,.4g} M by the compiler's estimate: {shares}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{_number(seconds / length)} {unit}"
    return f"{_number(seconds)} s"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def compare(plan: dict[str, Any], other: dict[str, Any]) -> str:
    """Two plans side by side, with the ratio of their numbers."""
    lines = [f"{'':<34}{plan['topology']:>16}{other['topology']:>16}{'ratio':>9}"]
    if estimates := {p["topology"] for p in (plan, other) if p.get("estimate")}:
        lines.append(f"{' and '.join(sorted(estimates))}: memory and times are estimates")
    mine, theirs = dict(_numbers(plan)), dict(_numbers(other))
    for name in mine | theirs:
        a, b = mine.get(name), theirs.get(name)
        ratio = f"{b / a:.3f}" if a and b is not None else ""
        shown = ["" if x is None else f"{x:,.4g}" for x in (a, b)]
        lines.append(f"{name:<34}{shown[0]:>16}{shown[1]:>16}{ratio:>9}")
    return "\n".join(lines)


def _numbers(plan: dict[str, Any]) -> Iterator[tuple[str, float]]:
    yield "devices", plan["devices"]
    yield "batch", plan["batch"]
    for name, size in plan["memory"].items():
        yield f"memory, {name} [GiB]", size / GIB
    yield "FLOPs of a device [T]", plan["traced_flops"] / 1e12
    if "seconds" not in plan:
        return
    yield "bytes moved [GB]", plan["bytes_accessed"] / 1e9
    if plan["cycles"]:
        yield "cycles [M]", sum(plan["cycles"].values()) / 1e6
    for found in plan["collectives"]:
        yield f"{found['kind']}, count", found["count"]
        yield f"{found['kind']} [MB]", found["bytes"] / 1e6
    for name, seconds in plan["seconds"].items():
        yield f"{name} [ms]", 1e3 * seconds
    yield "chip-hours, all overlapped", plan["chip_hours"][0]


def read_plan(path: Path) -> dict[str, Any]:
    """A plan that `--json` wrote.

    Raises:
      UserError: it is none.
    """
    try:
        plan: dict[str, Any] = json.loads(path.read_text())
        dict(_numbers(plan))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no plan that --json wrote ({error}).") from error
    return plan
