"""Memory and time of SimCLR's step with embedding caching and rematerialization.

Memory is the compiled program's temporary memory, in addition to its arguments (state, uint8
views), and the resident memory that a step adds. The small network is a ResNet-18 at a quarter of
the width on 16x16 images. Times are medians of alternated rounds; ResNet-50 at 224 pixels is
compiled, not run.

    python benchmarks/large_batch.py [--rounds=5] [--large=8192] [--only=time]
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from markdown_table import print_table

MIB = 2**20
_SIZE = 16  # of the small network's images, pixels


def make_config(size: int, batch: int, microbatch: int, remat: bool, large: bool) -> Any:
    """Returns SimCLR with a narrow ResNet-18, or with a ResNet-50 in bfloat16."""
    from ssl_jax.config import default_config
    from ssl_jax.recipes import simclr_views

    config = default_config()
    config.batch_size, config.microbatch, config.remat = batch, microbatch, remat
    config.views = simclr_views(size=size, blur=large)
    if large:
        config.dtype = "bfloat16"
    else:
        config.model.update(depth=18, width=0.25, stem="cifar")
    return config


def build(config: Any) -> Any:
    """Builds the train step's program for one device."""
    import jax

    from ssl_jax.config import Schedule
    from ssl_jax.spmd import make_spmd
    from ssl_jax.step import Program

    return Program(config, Schedule(100, 1000), make_spmd(devices=jax.devices()[:1]))


def shapes_of(program: Any) -> tuple[Any, Any, Any]:
    """Returns the shapes of the step's arguments, without labels."""
    return program.shapes(labeled=False)


def compiled_mib(config: Any) -> float:
    """Returns the compiled step's temporary memory."""
    program = build(config)
    return program.lower(*shapes_of(program)).compile().memory_analysis().temp_size_in_bytes / MIB


class Runner:
    """A compiled step with its state, on random pixels."""

    def __init__(self, config: Any) -> None:
        """Compiles the step and runs it once."""
        import jax
        import numpy as np

        program = build(config)
        _, raw, _ = shapes_of(program)
        self.step, self.state = program.step, program.init()
        rng = np.random.default_rng(0)
        self.raw = jax.tree.map(
            lambda s: jax.device_put(rng.integers(0, 256, s.shape, np.uint8).astype(s.dtype)), raw
        )
        self.seconds()

    def seconds(self) -> float:
        """Returns the seconds of one step."""
        import jax

        start = time.perf_counter()
        self.state, metrics = self.step(self.state, self.raw, {})
        jax.block_until_ready(metrics)
        return time.perf_counter() - start


def resident_mib(batch: int, microbatch: int, remat: bool) -> float:
    """Returns the peak memory that a step adds to a process that holds the views."""
    arguments = [__file__, "--inside", str(batch), str(microbatch), str(int(remat))]
    out = subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, text=True
    ).stdout
    return float(out.split()[-1])


def inside(batch: int, microbatch: int, remat: bool) -> float:
    """Returns this process's peak growth after the views were created."""
    import jax
    import numpy as np

    config = make_config(_SIZE, batch, microbatch, remat, large=False)
    program = build(config)
    shapes = shapes_of(program)
    compiled = program.lower(*shapes).compile()
    state = program.init()
    rng = np.random.default_rng(0)
    views = jax.tree.map(
        lambda s: jax.device_put(rng.integers(0, 256, s.shape, np.uint8).astype(s.dtype)), shapes[1]
    )
    jax.block_until_ready(views)
    reset_peak()
    before = peak_mib()
    state, metrics = compiled(state, views, {})
    jax.block_until_ready(metrics)
    return peak_mib() - before


def reset_peak() -> None:
    """Sets this process's peak to the memory that it holds now.

    Otherwise a step that takes less than an earlier peak, such as the compiler's, would count as 0.
    """
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Returns this process's peak; `ru_maxrss` would begin at the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def alternate(runners: dict[str, Runner], rounds: int) -> dict[str, float]:
    """Returns median seconds of alternated runs."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            seconds[name].append(runner.seconds())
    return {name: statistics.median(values) for name, values in seconds.items()}


def memory_rows(large: int) -> list[list[str]]:
    """Measures memory of the small network at two batch sizes."""
    rows = []
    small = large // 16
    for name, batch, microbatch, remat in [
        (f"plain, batch {small}", small, 0, False),
        (f"plain, batch {small}, remat", small, 0, True),
        (f"batch {large}, microbatch {small}", large, small, False),
        (f"batch {large}, microbatch {small}, remat", large, small, True),
    ]:
        compiled = compiled_mib(make_config(_SIZE, batch, microbatch, remat, large=False))
        resident = resident_mib(batch, microbatch, remat)
        rows.append([name, f"{compiled:,.0f}", f"{resident:,.0f}"])
    compiled = compiled_mib(make_config(_SIZE, large, 0, False, large=False))
    rows.append([f"plain, batch {large}", f"{compiled:,.0f}", "not run"])
    return rows


def time_rows(batch: int, rounds: int) -> list[list[str]]:
    """Times the small network at a batch size that all variants can run."""
    kinds = {
        "plain": (0, False),
        "remat": (0, True),
        f"microbatch {batch // 4}": (batch // 4, False),
        f"microbatch {batch // 4}, remat": (batch // 4, True),
    }
    runners = {
        name: Runner(make_config(_SIZE, batch, microbatch, remat, large=False))
        for name, (microbatch, remat) in kinds.items()
    }
    seconds = alternate(runners, rounds)
    return [
        [name, f"{batch / s:,.0f}", f"{s / seconds['plain']:.2f}"] for name, s in seconds.items()
    ]


def resnet50_rows(large: int) -> list[list[str]]:
    """Compiles ResNet-50 at 224 pixels and reports its memory."""
    rows = []
    for batch, microbatch, remat in [
        (64, 0, False),
        (64, 0, True),
        (large, 64, False),
        (large, 64, True),
    ]:
        name = f"batch {batch}" + (f", microbatch {microbatch}" if microbatch else "")
        name += ", remat" if remat else ""
        compiled = compiled_mib(make_config(224, batch, microbatch, remat, large=True))
        rows.append([name, f"{compiled / 1024:,.2f}"])
    return rows


def main() -> None:
    """Measures and prints three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", type=int, default=8192, help="batch size with microbatches")
    parser.add_argument("--timed", type=int, default=512, help="batch size to time")
    parser.add_argument("--only", choices=["memory", "time", "resnet50"], help="default: all three")
    parser.add_argument("--inside", nargs=3, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    from ssl_jax.cli.backend import tune_cpu

    tune_cpu()
    if args.inside:
        batch, microbatch, remat = args.inside
        print(inside(batch, microbatch, bool(remat)))
        return
    if args.only in (None, "memory"):
        print_table(["", "compiled, MiB", "resident, MiB"], memory_rows(args.large))
    if args.only in (None, "time"):
        print_table(["", "images/s", "time / plain"], time_rows(args.timed, args.rounds))
    if args.only in (None, "resnet50"):
        print_table(["ResNet-50, 224", "compiled, GiB"], resnet50_rows(args.large))


if __name__ == "__main__":
    main()
