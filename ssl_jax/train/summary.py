"""What a run tells at its start and at its end, as rows of a name and a text."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ssl_jax.config import flat_views
from ssl_jax.errors import UserError
from ssl_jax.models.resnet import resnet_name
from ssl_jax.plan.plan import memory_kinds, traced_flops
from ssl_jax.run.log import read_metrics
from ssl_jax.train.setup import Setup

Row = tuple[str, str]
_GIB = 2**30


def lines(rows: Iterable[Row]) -> list[str]:
    """The rows, aligned."""
    return [f"{name:<12}{text}" for name, text in rows]


def start_rows(setup: Setup, params: Any, workdir: Path, start: int) -> Iterator[Row]:
    """What is run, before anything is compiled.

    Args:
      setup: of the run.
      params: of its state, by network.
      workdir: of the run.
      start: the step that it continues from.
    """
    config, schedule, devices = setup.config, setup.schedule, setup.spmd.size
    views = flat_views(config)
    sizes = ", ".join(str(size) for size in sorted({view.size for view in views}, reverse=True))
    yield (
        "run",
        f"{config.method}, {resnet_name(config.model)}, {len(views)} views of {sizes} pixels, "
        f"{config.dtype}",
    )
    encoder, frozen = _count(params["encoder"]), setup.method.frozen
    trained = sum(_count(tree) for name, tree in params.items() if name not in frozen)
    yield (
        "parameters",
        f"{large(encoder)} in the encoder, {large(trained)} trained in all",
    )
    held_out = f", {setup.test.num_examples:,} held out" if setup.test is not None else ""
    yield "images", f"{setup.train.num_examples:,}{held_out}"
    part = config.microbatch
    cut = f" in microbatches of {part}" if 0 < part < config.batch_size else ""
    yield (
        "batch",
        f"{config.batch_size:,}, {config.batch_size // devices:,} per device{cut}, BatchNorm over "
        f"{setup.derived['batchnorm_images']} images",
    )
    processes = jax.process_count()
    among = f" of {processes} processes" if processes > 1 else ""
    yield "devices", f"{devices} × {jax.devices()[0].device_kind}{among}"
    total, per_epoch = schedule.total_steps, schedule.steps_per_epoch
    left = f", {total - start:,} of them left" if start else ""
    yield "steps", f"{total:,}{left}, {total / per_epoch:.4g} epochs of {per_epoch:,}"
    yield "folder", str(workdir)


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def compiled(
    step: Callable[..., Any], arguments: Sequence[Any], devices: int
) -> tuple[Callable[..., Any], list[Row]]:
    """Compiles a train step, once, and says what it takes.

    Args:
      step: of `Program`.
      arguments: as of every step.
      devices: in the mesh.

    Returns:
      What to call in its place, and the rows; itself and none under pmap, or where JAX is asked to
      look into it (JAX_DISABLE_JIT, JAX_DEBUG_NANS).

    Raises:
      UserError: the state after the step has other shapes or dtypes than before.
    """
    options: Any = jax.config
    if options.jax_disable_jit or options.jax_debug_nans or not hasattr(step, "trace"):
        return step, []
    # It is traced here once: what follows finds the trace.
    flops = traced_flops(step, *arguments)
    traced = step.trace(*arguments)
    _require_same(arguments[0], traced.out_info[0])
    since = time.perf_counter()
    program = traced.lower().compile()
    seconds = time.perf_counter() - since
    rows = [
        (
            "FLOPs",
            f"{large(flops)} a step, {large(flops / devices)} per device: convolutions and "
            "products, as traced",
        )
    ]
    # Not every backend tells.
    if memory := program.memory_analysis():
        rows.append(("memory", f"{_memory(memory)}; as compiled in {duration(seconds)}"))
    return program, rows


def _require_same(before: Any, after: Any) -> None:
    """A method's `update` keeps the shapes and dtypes of what it was given."""
    leaves = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    for (path, old), new in leaves:
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise UserError(
                f"The step makes {jax.tree_util.keystr(path)} of the state {new.dtype} "
                f"{list(new.shape)}, which was {old.dtype} {list(old.shape)}: let the method's "
                "update keep what its init made."
            )


def _memory(told: Any) -> str:
    """A device's memory that a compiled program takes: all of it, of how much, and what for."""
    kinds = memory_kinds(told)
    kinds = {"state and data": kinds.pop("arguments"), **kinds}
    whole = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    of = f" of {_bytes(whole)}" if whole else ""
    largest = sorted(kinds.items(), key=lambda item: -item[1])[:2]
    parts = ", ".join(f"{name} {_bytes(n)}" for name, n in largest)
    return f"{_bytes(sum(kinds.values()))}{of} per device ({parts})"


def end_rows(workdir: Path, seconds: float, start: int) -> Iterator[Row]:
    """What a run has come to, from what it has written.

    Args:
      workdir: of the run.
      seconds: that it has taken; 0: it was done already.
      start: the step that it went on from.
    """
    records = read_metrics(workdir / "metrics.jsonl")
    if seconds:
        since = f" since step {start:,}" if start else ""
        yield "time", f"{duration(seconds)}{since}"
    if speeds := [r["images_per_s"] for r in records if "images_per_s" in r]:
        yield "speed", f"{np.median(speeds):,.0f} images/s (median)"
    if measured := [(r["knn"], r["step"]) for r in records if "knn" in r]:
        best, at = max(measured, key=lambda pair: pair[0])
        yield "kNN", f"{100 * measured[-1][0]:.2f} %; the best {100 * best:.2f} % at step {at:,}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 4.2 s, 3 min 20 s, 5 h 12 min, 2 d 3 h."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    return f"{hours} h {m} min" if hours else f"{m} min {s} s"


def large(number: float) -> str:
    """A count with three digits and its unit: 850, 23.5 M, 4.1 G."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= 0.9995 * size:  # else three digits would be 1e+03 of the unit below
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def _bytes(number: float) -> str:
    return f"{number / _GIB:.3g} GiB" if number >= 999.5 * 2**20 else f"{number / 2**20:.3g} MiB"
