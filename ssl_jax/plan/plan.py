"""Compiles the train step of a config for other hardware and collects what it will cost.

For TPUs, the TPU compiler (libtpu) runs on any CPU and compiles exactly the program that training
would run. For GPUs, simulated devices stand in to show the collectives; memory and time are
estimates from the traced program, see `fused.py`.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from ssl_jax.config import Schedule, flat_views, run_schedule
from ssl_jax.data.labels import targets_of
from ssl_jax.data.sources import make_sources
from ssl_jax.errors import UserError, first_line
from ssl_jax.files import read_regular, reading
from ssl_jax.interop.initial_weights import resolve_initial_weights
from ssl_jax.methods import method_class
from ssl_jax.plan.chips import BETWEEN_HOSTS, EXAMPLES, GPUS_PER_HOST, Topology, require_compiler
from ssl_jax.plan.flops import jaxpr_flops, model_flops
from ssl_jax.plan.fused import Cost, fused_cost
from ssl_jax.plan.hlo import Collectives, CompiledText, part_of
from ssl_jax.spmd import make_spmd, microbatches
from ssl_jax.step import Program

# Datasets with a known size: images in the training split, classes.
_DATASETS = {"imagenet2012": (1_281_167, 1000), "cifar10": (50_000, 10), "cifar100": (50_000, 100)}
_ON_DEVICE = ("digits", "packed")  # sources whose images are in device memory
# A GPU's step time relative to the sum of its lower bounds: from 1 to the largest ratio measured on
# an H200 (1.05 and 1.04 for ResNet-50, 1.30 for ResNet-18 at 32 pixels; see docs/plans.md).
GPU_STEP = (1.0, 1.3)
_HOP_S = 1e-6  # latency of a hop between neighboring chips (Google, "How to Scale Your Model")


@dataclasses.dataclass(frozen=True)
class Data:
    """The training set as a plan needs it: its size, and the arrays in device memory.

    Attributes:
      images: Their number.
      classes: Number of classes of the labels; 0 without labels.
      device_data: Shapes of the arrays.
      several: Whether the method learns several labels per image.
    """

    images: int
    classes: int
    device_data: dict[str, Any]
    several: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cost of a train step on a topology; the keys of `ssl-jax plan --json`.

    Bytes, seconds and FLOPs are per device and step. Everything after `memory` is empty if the
    program exceeds the device's memory.

    Attributes:
      topology: As given, v4:4x4x4.
      estimate: Whether memory and times are estimates, as for GPUs.
      chips: Number of chips.
      cores: Number of tensor cores.
      devices: Number of JAX devices.
      devices_of_a_chip: JAX devices per chip.
      hbm_bytes: Memory per device.
      method: The run's method.
      model: Depth and width of the encoder.
      dtype: Computation dtype.
      batch: Global batch size.
      batch_of_a_device: Batch size per device.
      microbatch: Global microbatch size, 0 for none.
      remat: Whether activations are recomputed.
      batchnorm_images: Images over which BatchNorm takes its statistics.
      steps: Number of steps of the run.
      views: Views per image.
      traced_flops: As traced, see `flops.traced_flops`.
      model_flops_of_an_image: The encoder's FLOPs per image, see `flops.model_flops`.
      fits: Whether the program fits in the device's memory.
      memory: Bytes by kind, and "peak", their sum.
      compiled_flops: By the compiler's count; None where it is unknown.
      bytes_accessed: Traffic between the chip and its memory.
      cycles: The TPU compiler's estimate, by part of the step.
      float32_activations: Large float32 arrays with an entry per image or view, and their part;
        empty for GPUs.
      collectives: All-reduces, all-gathers, ..., by kind.
      seconds: Lower bounds by resource: "compute", "memory", "interconnect".
      step_seconds: Their maximum (all overlapped) and their sum (nothing overlapped); for GPUs
        their sum and 1.3 times that (`GPU_STEP`).
      hours: The same for the run.
      chip_hours: The same for the run, times the number of chips.
      fitting: The plan of the largest microbatch that fits, where this plan doesn't fit.
    """

    topology: str
    estimate: bool
    chips: int
    cores: int
    devices: int
    devices_of_a_chip: int
    hbm_bytes: int
    method: str
    model: str
    dtype: str
    batch: int
    batch_of_a_device: int
    microbatch: int
    remat: bool
    batchnorm_images: int
    steps: int
    views: int
    traced_flops: float
    model_flops_of_an_image: float
    fits: bool = False
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    compiled_flops: float | None = None
    bytes_accessed: float = 0.0
    cycles: dict[str, int] = dataclasses.field(default_factory=dict)
    float32_activations: tuple[str, ...] = ()
    collectives: tuple[Collectives, ...] = ()
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    step_seconds: tuple[float, ...] = ()
    hours: tuple[float, ...] = ()
    chip_hours: tuple[float, ...] = ()
    fitting: "Plan | None" = None


def read_plan(path: Path) -> Plan:
    """Reads a plan that `ssl-jax plan --json` has printed.

    Raises:
      UserError: The file is not a plan.
    """
    with reading(path):
        text = read_regular(path)
    try:
        return _from_json(json.loads(text))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a plan ({error}). Write one with `ssl-jax plan --json`."
        ) from error


def _from_json(saved: dict[str, Any]) -> Plan:
    fields: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in saved.items()
    }
    fields["collectives"] = tuple(Collectives(**each) for each in saved["collectives"])
    if saved["fitting"]:
        fields["fitting"] = _from_json(saved["fitting"])
    return Plan(**fields)


def devices_of(topology: Topology) -> list[jax.Device]:
    """Returns the devices to compile for, as many as a real machine shows.

    Raises:
      UserError: libtpu is missing or doesn't know the slice, or too few devices are simulated.
    """
    if not topology.is_tpu:
        devices = jax.devices()
        if len(devices) < topology.chips:
            raise UserError(
                f"{topology.name} needs {topology.chips} simulated devices, but JAX has "
                f"{len(devices)}. Set XLA_FLAGS to "
                f"--xla_force_host_platform_device_count={topology.chips}."
            )
        return devices[: topology.chips]
    require_compiler(topology)
    options = {"chip_config_name": topology.chip.compile_as} if topology.chip.compile_as else {}
    try:
        described = topologies.get_topology_desc(topology.name, platform="tpu", **options)
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--topology={topology.name} is not a slice that libtpu knows ({first_line(error)}). "
            f"Choose another: {EXAMPLES}."
        ) from error
    return list(described.devices)


def describe_data(config: ConfigDict, images: int = 0) -> Data:
    """Describes the training set of a config, without its files if the dataset is well known.

    Args:
      config: The run's config.
      images: The number of images; 0 takes it from the dataset's name or files.

    Raises:
      UserError: The number of images is unknown.
    """
    share = config.data.subset * (1 - config.data.validation)
    dataset = config.data.dataset.partition("/")[0].partition(":")[0]
    if config.data.name == "tfds" and config.data.split == "train" and dataset in _DATASETS:
        known, classes = _DATASETS[dataset]
        return Data(round(share * (images or known)), config.data.num_classes or classes, {})
    if images and config.data.name not in _ON_DEVICE:
        return Data(round(share * images), config.data.num_classes or 1000, {})
    try:
        source, _ = make_sources(config)
    except UserError as error:
        raise UserError(f"{error} To plan without the files, add --images=NUMBER.") from error
    shapes = {
        name: jax.ShapeDtypeStruct((images or len(array), *array.shape[1:]), array.dtype)
        for name, array in source.device_data().items()
    }
    targets = targets_of(source) if method_class(config.method).takes_targets else None
    classes = source.num_classes if targets is None else len(targets.names)
    count = images or source.num_examples
    return Data(count, config.data.num_classes or classes, shapes, targets is not None)


def program_of(
    config: ConfigDict, data: Data, devices: Sequence[jax.Device]
) -> tuple[Program, tuple[Any, ...], Schedule]:
    """Returns the program that training runs, the shapes of its arguments, and the schedule.

    Raises:
      UserError: The config can't run on these devices.
    """
    config = ConfigDict(config.to_dict())
    config.data.num_classes = data.classes
    config.supervised.sigmoid |= data.several
    resolve_initial_weights(config)
    spmd = make_spmd(devices=devices, batch_size=config.batch_size, microbatch=config.microbatch)
    schedule = run_schedule(config, data.images)
    program = Program(config, schedule, spmd)
    return program, program.shapes(data.device_data, labeled=data.classes > 0), schedule


def make_plan(
    config: ConfigDict,
    topology: Topology,
    images: int = 0,
    log: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Compiles the train step of a config for a topology.

    Args:
      config: The run's config.
      topology: The target hardware.
      images: The size of the training set, if its files are absent.
      log: Called with a message when the config is known to be valid and compiling starts.

    Raises:
      UserError: The config can't run on these devices.
    """
    data = describe_data(config, images)
    devices = devices_of(topology)
    program, shapes, schedule = program_of(config, data, devices)
    chip, jaxpr = topology.chip, jax.make_jaxpr(program.step)(*shapes)
    plan = Plan(
        topology=topology.name,
        estimate=not topology.is_tpu,
        chips=topology.chips,
        cores=topology.chips * chip.tensor_cores,
        devices=len(devices),
        devices_of_a_chip=chip.cores,
        hbm_bytes=chip.memory // chip.cores,
        method=config.method,
        model=program.method.encoder_name,
        dtype=config.dtype,
        batch=config.batch_size,
        batch_of_a_device=config.batch_size // len(devices),
        microbatch=config.microbatch,
        remat=config.remat,
        batchnorm_images=program.batchnorm_images,
        steps=schedule.total_steps,
        views=len(flat_views(config)),
        traced_flops=jaxpr_flops(jaxpr) / len(devices),
        model_flops_of_an_image=model_flops(program),
    )
    log(f"Compiling for {topology.name}; a large network takes minutes …")
    try:
        compiled = program.lower(*shapes).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error):
            raise
        return dataclasses.replace(plan, memory={"peak": _required_bytes(str(error))})
    plan = _with_costs(plan, compiled, program, None if topology.is_tpu else fused_cost(jaxpr))
    return _with_times(plan, topology)


def _required_bytes(message: str) -> int:
    """Parses the compiler's out-of-memory message; 0 where it doesn't name a size."""
    used = re.search(r"Used ([\d.]+)([KMGT]) of", message)
    return round(float(used[1]) * 1024 ** ("KMGT".index(used[2]) + 1)) if used else 0


def memory_kinds(memory: Any) -> dict[str, int]:
    """Returns the bytes of device memory that a compiled program takes, by kind.

    Args:
      memory: The result of the program's `memory_analysis`.
    """
    return {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }


def _with_costs(plan: Plan, compiled: Any, program: Program, fused: Cost | None) -> Plan:
    """Adds what the compiled program shows: memory, traffic, cycles, collectives.

    Memory and traffic of a GPU's program are those of `fused`, as a CPU's program has others.
    """
    cost = compiled.cost_analysis()
    kinds = memory_kinds(compiled.memory_analysis())
    text = CompiledText(compiled.as_text())
    if fused:
        kinds |= {"temporary": round(fused.temporary), "program": 0}
    kinds["peak"] = sum(kinds.values())
    microbatches = plan.batch // (plan.microbatch or plan.batch)
    return dataclasses.replace(
        plan,
        memory=kinds,
        fits=kinds["peak"] <= plan.hbm_bytes,
        # The compiler counts the body of the loop over microbatches once.
        compiled_flops=float(cost.get("flops", 0.0)) if microbatches == 1 else None,
        # A TPU program names the arrays that stay on the chip, so they can be left out.
        bytes_accessed=fused.traffic if fused else float(text.traffic()),
        cycles=text.cycles(),
        float32_activations=() if fused else _float32_activations(text, program, plan),
        collectives=tuple(text.collectives()),
    )


def _float32_activations(compiled: CompiledText, program: Program, plan: Plan) -> tuple[str, ...]:
    """Returns large float32 arrays with an entry per image, or per view, and where they arise."""
    images = (plan.microbatch or plan.batch) // plan.devices
    entries = {images * views for views in range(1, plan.views + 1)}
    weights = {leaf.shape for leaf in jax.tree.leaves(program.state_shapes)}
    found = set()
    for shape, where in compiled.float32_arrays(2**20):
        dimensions = tuple(int(d) for d in re.findall(r"\d+", shape.removeprefix("f32")))
        if dimensions[0] in entries and dimensions not in weights and len(dimensions) > 1:
            found.add(f"{shape} in {part_of(where)}")
    return tuple(sorted(found))


def _with_times(plan: Plan, topology: Topology) -> Plan:
    """Adds the roofline: seconds of a step by resource, and hours of the run."""
    chip = topology.chip
    across_hosts = not topology.is_tpu and topology.chips > GPUS_PER_HOST
    link = (BETWEEN_HOSTS if across_hosts else chip.link) / chip.cores
    hops = sum(n // 2 for n in topology.shape) if topology.is_tpu else 1
    communication = 0.0
    for found in plan.collectives:
        passes = 2 if found.kind == "all-reduce" else 1  # reduce-scatter, then all-gather
        communication += passes * (found.bytes / link + found.count * hops * _HOP_S)
    seconds = {
        "compute": plan.traced_flops / (chip.peak_of(plan.dtype) / chip.cores),
        "memory": plan.bytes_accessed / (chip.bandwidth / chip.cores),
        "interconnect": communication if plan.devices > 1 else 0.0,
    }
    total = sum(seconds.values())
    step_seconds = (max(seconds.values()), total)
    if plan.estimate:
        step_seconds = (GPU_STEP[0] * total, GPU_STEP[1] * total)
    hours = tuple(plan.steps * bound / 3600 for bound in step_seconds)
    return dataclasses.replace(
        plan,
        seconds=seconds,
        step_seconds=step_seconds,
        hours=hours,
        chip_hours=tuple(plan.chips * h for h in hours),
    )


def fitting(
    config: ConfigDict,
    topology: Topology,
    images: int = 0,
    log: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Makes a plan; if it doesn't fit, searches for the largest microbatch that does.

    Args:
      config: The run's config.
      topology: The target hardware.
      images: The size of the training set, if its files are absent.
      log: Called with a message for each attempt.

    Returns:
      The config's plan; if it doesn't fit, its `fitting` is the plan that does, or None.
    """
    plan = make_plan(config, topology, images, log)
    if plan.fits:
        return plan
    batch, devices = config.microbatch or config.batch_size, plan.devices
    sizes = microbatches(config.batch_size, devices, batch - devices)[::-1]
    # Memory grows with the microbatch, so bisect.
    low, high, best = 0, len(sizes), None
    while low < high:
        middle = (low + high) // 2
        log(f"The plan does not fit; trying config.microbatch={sizes[middle]} …")
        attempt = ConfigDict(config.to_dict())
        attempt.microbatch = sizes[middle]
        try:
            tried = make_plan(attempt, topology, images)
        except UserError:  # too few images for BatchNorm, so search among larger ones
            high = middle
            continue
        if tried.fits:
            best, high = tried, middle
        else:
            low = middle + 1
    return dataclasses.replace(plan, fitting=best)
