"""`ssl-jax plan`: plans as text for the terminal."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator

from humanize import metric, naturalsize

from ssl_jax.errors import counted
from ssl_jax.files import local_path
from ssl_jax.plan.chips import Topology
from ssl_jax.plan.plan import GPU_STEP, Plan, fitting, read_plan


def run(args: argparse.Namespace) -> None:
    """Prints a plan, or compares two."""

    def log(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr)

    def plan_for(topology: Topology) -> Plan:
        return fitting(args.experiment, topology, args.images, log)

    saved = read_plan(local_path(args.compare)) if args.compare and args.other is None else None
    plan = plan_for(args.topology)
    if args.json:
        print(json.dumps(dataclasses.asdict(plan), indent=1))
        return
    print(describe(plan))
    if args.compare:
        print("\n" + compare(plan, saved or plan_for(args.other)))


def describe(plan: Plan) -> str:
    """Formats a plan as lines of a name and a text; appends the plan that fits if it doesn't."""
    lines = [f"{name:<18}{text}" for name, text in _rows(plan)]
    if not plan.fits:
        lines += ["", "The plan does not fit."]
        if plan.fitting is None:
            lines.append("No microbatch fits either. Use more chips, or config.remat=True.")
        else:
            microbatch = plan.fitting.microbatch
            lines += [f"--config.microbatch={microbatch} fits:", "", describe(plan.fitting)]
    return "\n".join(lines)


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    about = "about " if plan.estimate else ""
    cores = [] if plan.estimate else [counted(plan.cores, "core")]
    parts = [counted(plan.chips, "chip"), *cores, counted(plan.devices, "device")]
    yield "topology", f"{plan.topology}: {', '.join(parts)}"
    yield "run", f"{plan.method}, {plan.model}, {plan.dtype}, {plan.steps:,} steps"
    micro = f", microbatches of {plan.microbatch:,}" if plan.microbatch else ""
    yield (
        "batch",
        f"{plan.batch:,} total, {plan.batch_of_a_device:,} per device{micro}; "
        f"{counted(plan.views, 'view')} per image; BatchNorm over {plan.batchnorm_images:,} images",
    )
    kinds = ", ".join(f"{name} {_gib(n)}" for name, n in plan.memory.items() if name != "peak")
    yield (
        "memory",
        f"{about}{_gib(plan.memory['peak'])} of {_gib(plan.hbm_bytes)} GiB per device"
        f"{f' ({kinds})' if kinds else ''}: {'fits' if plan.fits else 'DOES NOT FIT'}",
    )
    model = plan.model_flops_of_an_image * plan.batch_of_a_device
    per_view = metric(plan.model_flops_of_an_image / plan.views, precision=3)
    yield (
        "FLOPs per step",
        f"{metric(plan.traced_flops, precision=3)} per device, {plan.traced_flops / model:.3f} × "
        f"the encoder's ({per_view} per view)",
    )
    if plan.seconds:
        yield from _cost_rows(plan, model)


def _cost_rows(plan: Plan, model: float) -> Iterator[tuple[str, str]]:
    about = "about " if plan.estimate else ""
    if plan.compiled_flops:
        compiled = metric(plan.compiled_flops, precision=3)
        yield "", f"{compiled} by the compiler's count ({plan.compiled_flops / model:.3f} ×)"
    per_view = plan.bytes_accessed / plan.batch_of_a_device / plan.views
    yield (
        "memory traffic",
        f"{naturalsize(plan.bytes_accessed, format='%.2f')} per device, "
        f"{naturalsize(per_view, format='%.0f')} per view",
    )
    if plan.cycles:
        yield "compiler cycles", _cycles(plan.cycles)
    for found in plan.collectives:
        yield found.kind, f"×{found.count}, {naturalsize(found.bytes)} total"
    seconds = ", ".join(f"{name} {1e3 * s:.1f}" for name, s in plan.seconds.items())
    low, high = (f"{1e3 * bound:.1f}" for bound in plan.step_seconds)
    yield "step time", f"{about}{low} to {high} ms ({seconds})"
    total, of_chips = _duration(plan.hours), _duration(plan.chip_hours, "chip-")
    how = "full overlap to none, at peak rates"
    if plan.estimate:
        how = f"no overlap at peak rates, to {GPU_STEP[1]:g} times that, as measured on an H200"
    yield "total time", f"{about}{total}, {of_chips} ({how})"


def _duration(hours: tuple[float, ...], of: str = "") -> str:
    """Formats a range of hours, in minutes or seconds if it is short."""
    units = {"hours": 1, "minutes": 60, "seconds": 3600}
    unit = next((unit for unit, n in units.items() if n * max(hours) >= 1), "seconds")
    return f"{' to '.join(_number(units[unit] * each) for each in hours)} {of}{unit}"


def _cycles(parts: dict[str, int]) -> str:
    total = sum(parts.values())
    largest_first = sorted(parts.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{part} {100 * n / total:.1f} %" for part, n in largest_first)
    return f"{metric(total, precision=4)}: {shares}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"  # one unit for all, to compare them


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _without_exponent(value: float) -> str:
    return f"{value:,.4g}" if value >= 1e-4 or value == 0 else f"{value:.8f}"


def compare(plan: Plan, other: Plan) -> str:
    """Formats two plans as columns, with the ratios of their numbers."""
    lines = [f"{'':<34}{plan.topology:>16}{other.topology:>16}{'ratio':>9}"]
    if estimates := {p.topology for p in (plan, other) if p.estimate}:
        lines.append(f"{' and '.join(sorted(estimates))}: memory and times are estimates")
    first, second = dict(_numbers(plan)), dict(_numbers(other))
    for name in first | second:
        a, b = first.get(name), second.get(name)
        ratio = f"{b / a:.3f}" if a and b is not None else ""
        shown = ["" if x is None else _without_exponent(x) for x in (a, b)]
        lines.append(f"{name:<34}{shown[0]:>16}{shown[1]:>16}{ratio:>9}")
    return "\n".join(lines)


def _numbers(plan: Plan) -> Iterator[tuple[str, float]]:
    yield "devices", plan.devices
    yield "batch", plan.batch
    for name, size in plan.memory.items():
        yield f"memory, {name} [GiB]", size / 2**30
    yield "FLOPs per device [T]", plan.traced_flops / 1e12
    if not plan.seconds:
        return
    yield "memory traffic [GB]", plan.bytes_accessed / 1e9
    if plan.cycles:
        yield "compiler cycles [M]", sum(plan.cycles.values()) / 1e6
    for found in plan.collectives:
        yield f"{found.kind}, count", found.count
        yield f"{found.kind} [MB]", found.bytes / 1e6
    for name, seconds in plan.seconds.items():
        yield f"{name} [ms]", 1e3 * seconds
    yield "chip-hours, all overlapped", plan.chip_hours[0]
