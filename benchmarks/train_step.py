"""Measures the train step on one accelerator: images/s, memory, share of peak, time by part.

The step is the config's, with augmentation on the device. Its input is random uint8 on the device:
crops, or whole images if the config's data are packed. It is alternated with the same step on crops
without augmentation, with SimCLR in plain Flax, and with SimCLR in torch (channels last, bfloat16,
compiled) in a separate process. Times are medians of alternated rounds; an image counts once for
all its views. FLOPs are counted on the traced step, without recomputation. Needs no TensorFlow. A
batch that doesn't fit is reported and skipped.

    python benchmarks/train_step.py [--config=configs/simclr_imagenet.py] [--batches=128,256]
        [--peers=bare,plain,torch] [--torch-python=PATH] [--rounds=3] [--seconds=3]
        [--profile=FILE] [--microbatch=N] [--json=FILE] [--config.KEY=VALUE ...]

`--profile` writes each kernel's time to FILE and the compiled program next to it; it slows kernel
launches, so torch isn't measured in the same run. `--split` times each part of the step, compiled
separately. Both use the first batch size.
"""

import argparse
import contextlib
import gzip
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markdown_table import print_table

ROOT = Path(__file__).parent.parent
PEERS = Path(__file__).with_name("step_peers.py")
COLUMNS = ("step", "batch", "images/s", "time / ssl_jax", "ms", "GiB", "TFLOP/s", "share of peak")
PACKED = 50_000  # images on the device, the number in CIFAR-10
# Kernels replayed as a CUDA graph have no names.
NAMED_KERNELS = "--xla_gpu_enable_command_buffer="
# Our names of the devices whose peak is known, by JAX's; a GPU's other builds have other peaks.
KINDS = {
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "TPU v3": "v3",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5p": "v5p",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
}


class SslJax:
    """A config's train step, compiled for the first device."""

    def __init__(self, config: Any, cropped: bool) -> None:
        """Compiles the step, for crops or for whole images on the device."""
        import jax
        import numpy as np

        from ssl_jax.config import Schedule, flat_views
        from ssl_jax.spmd import make_spmd
        from ssl_jax.step import Program

        spmd = make_spmd(devices=jax.devices()[:1], batch_size=config.batch_size)
        program = Program(config, Schedule(100, 1000), spmd)
        rng, n = np.random.default_rng(0), config.batch_size
        batch, device_data = {"label": np.arange(n, dtype=np.int32) % 10}, {}
        if cropped:
            batch["id"], batch["views"] = np.arange(n, dtype=np.int32), random_views(config)
        else:
            size = flat_views(config)[0].size
            batch["id"] = rng.integers(0, PACKED, n, np.int32)
            device_data["image"] = rng.integers(0, 256, (PACKED, size, size, 3), np.uint8)
        self.batch, self.device_data = spmd.place_batch(batch), spmd.replicate(device_data)
        self.compiled = program.lower(*program.shapes(self.device_data)).compile()
        self.state = program.init()
        self.program, self.flops = program, step_flops(program, self.device_data)
        self.gib = compiled_gib(self.compiled)

    def run(self, steps: int) -> float:
        """Runs steps and returns the seconds they took."""
        import jax

        start = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.compiled(self.state, self.batch, self.device_data)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start


def step_flops(program: Any, device_data: Any) -> float:
    """Counts the traced step's FLOPs; microbatches' second forward pass isn't counted."""
    from ssl_jax.config import Schedule
    from ssl_jax.plan.flops import traced_flops
    from ssl_jax.step import Program

    config = program.config
    if config.microbatch:
        whole = type(config)(config.to_dict() | {"microbatch": 0})
        program = Program(whole, Schedule(100, 1000), program.spmd)
    # Otherwise JAX reuses the trace of the compiled step.
    return traced_flops(program.step, *program.shapes(device_data))


def random_views(config: Any) -> tuple[Any, ...]:
    """Returns a batch of random crops per view, uint8 [n, size, size, 3]."""
    import numpy as np

    from ssl_jax.config import flat_views

    rng, n = np.random.default_rng(0), config.batch_size
    sizes = [view.size for view in flat_views(config)]
    return tuple(rng.integers(0, 256, (n, size, size, 3), np.uint8) for size in sizes)


class PlainFlax:
    """SimCLR's step in plain Flax."""

    def __init__(self, config: Any) -> None:
        import jax
        from step_peers import plain_flax_step

        self.views = jax.device_put(random_views(config), jax.devices()[0])
        step, self.state = plain_flax_step(
            config.model.depth, config.model.stem, config.dtype, self.views
        )
        self.compiled = step.lower(self.state, self.views).compile()
        self.gib = compiled_gib(self.compiled)

    def run(self, steps: int) -> float:
        """Runs steps and returns the seconds they took."""
        import jax

        start = time.perf_counter()
        for _ in range(steps):
            self.state, loss = self.compiled(self.state, self.views)
        jax.block_until_ready(loss)
        return time.perf_counter() - start


class Torch:
    """SimCLR's step in torch, in a process that compiles while ssl_jax's step compiles."""

    def __init__(self, config: Any, python: str, compiled: bool) -> None:
        size = config.views.view1.size
        command = [python, str(PEERS), f"--batch={config.batch_size}", f"--size={size}"]
        command += [f"--depth={config.model.depth}", f"--stem={config.model.stem}"]
        command += [f"--dtype={config.dtype}", *["--compile"] * compiled]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes)
        self.gib = 0.0

    def _answer(self) -> list[str]:
        line = self.process.stdout.readline().split()
        if not line:
            raise RuntimeError("The torch process ended; see its output above.")
        return line

    def wait(self) -> None:
        """Waits until torch has compiled."""
        self._answer()

    def run(self, steps: int) -> float:
        """Runs steps and returns the seconds they took."""
        print(steps, file=self.process.stdin, flush=True)
        seconds, self.gib = map(float, self._answer())
        return seconds

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()


def compiled_gib(compiled: Any) -> float:
    """Returns the memory of a compiled program in GiB, according to the compiler."""
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return needed / 2**30


def bare(config: Any) -> Any:
    """Returns the config without augmentation: views are only divided by 255."""
    from ml_collections import ConfigDict

    config = ConfigDict(config.to_dict())
    for view in config.views.values():
        view.flip = view.gray = view.jitter.prob = view.blur.prob = view.solarize.prob = 0.0
        view.mean = view.std = ()
    return config


def peak_flops() -> float | None:
    """Returns the first device's bfloat16 peak in FLOP/s, by its data sheet; None if unknown."""
    import jax

    from ssl_jax.plan.chips import CHIPS

    name = KINDS.get(jax.devices()[0].device_kind)
    return CHIPS[name].peak / CHIPS[name].cores if name else None


def measure(
    config: Any, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Alternates the step and its peers at one batch size.

    Returns:
      A row for each; and the time by part in ms, for `--profile` and `--split`.
    """
    model, options = config.model, config.simclr
    plain = (model.width, model.sk, options.layers, options.memory_bank) == (1, False, 2, 0)
    contrastive = config.method == "simclr" and list(config.views) == ["view1", "view2"] and plain
    peers = [p for p in args.peers.split(",") if p and (contrastive or p == "bare")]
    runners: dict[str, Any] = {}
    parts: dict[str, dict[str, float]] = {}
    with contextlib.ExitStack() as stack:
        if "torch" in peers:
            torch = Torch(config, args.torch_python, args.compile)
            stack.callback(torch.close)
        runners["ssl_jax"] = ours = SslJax(config, cropped=config.data.name != "packed")
        if "torch" in peers:
            torch.wait()  # before anything is timed
        if args.profile:
            parts["profile"] = profile(ours, args)
        if args.split:
            parts["split"] = split(ours, args.seconds)
        if "bare" in peers:
            runners["ssl_jax, no augmentation"] = SslJax(bare(config), cropped=True)
        if "plain" in peers:
            runners["plain Flax, no augmentation"] = PlainFlax(config)
        if "torch" in peers:
            runners["torch, no augmentation"] = torch
        seconds = {name: [] for name in runners}
        steps = {}
        for name, runner in runners.items():
            runner.run(2)
            steps[name] = max(1, round(args.seconds / runner.run(1)))
        for _ in range(args.rounds):
            for name, runner in runners.items():
                seconds[name].append(runner.run(steps[name]) / steps[name])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peak = peak_flops() if config.dtype == "bfloat16" else None
    rows = []
    for name, each in medians.items():
        rate = ours.flops / each / 1e12
        rows.append(
            {
                "step": name,
                "batch": config.batch_size,
                "images/s": config.batch_size / each,
                "time / ssl_jax": each / medians["ssl_jax"],
                "ms": 1e3 * each,
                "GiB": runners[name].gib,
                "TFLOP/s": rate,
                "share of peak": rate * 1e12 / peak if peak else None,
            }
        )
        print(" | ".join(cells(rows[-1])), file=sys.stderr, flush=True)
    return rows, parts


# Where time goes.


def profile(ours: SslJax, args: argparse.Namespace) -> dict[str, float]:
    """Profiles three steps; writes each kernel's time and the compiled program.

    Returns:
      ms of a step by part of it.
    """
    import jax

    from ssl_jax.plan.hlo import part_of

    ours.run(2)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            ours.run(3)
        (trace,) = Path(folder).rglob("*.xplane.pb")
        events = kernel_times(jax.profiler.ProfileData.from_file(str(trace)))
    text = ours.compiled.as_text()
    parts, kernels = Counter(), []
    names = dict(re.findall(r'%([\w.\-]+) = [^\n]*?op_name="([^"]*)"', text))
    for (kernel, op), seconds in events.items():
        where = names.get(op, "")
        part = part_of(where)
        parts[part] += seconds / 3
        kernels.append((1e3 * seconds / 3, part, op, kernel, where))
    total = sum(parts.values())
    for part, seconds in parts.most_common():
        print(f"{part:<12}{1e3 * seconds:8.2f} ms{100 * seconds / total:6.1f} %", file=sys.stderr)
    lines = [f"{ms:9.4f} {' | '.join(rest)}" for ms, *rest in sorted(kernels, reverse=True)]
    args.profile.write_text("\n".join(lines))
    with gzip.open(args.profile.with_suffix(".hlo.gz"), "wt") as program:
        program.write(text)
    return {part: 1e3 * seconds for part, seconds in parts.most_common()}


def kernel_times(data: Any) -> dict[tuple[str, str], float]:
    """Sums seconds by (kernel, HLO instruction) on the first device; on a CPU by thunk.

    Of all runs of a kernel the median stands for each: now and then one waits for the profiler.
    """
    devices = [plane for plane in data.planes if plane.name.startswith("/device:")]
    seconds: dict[tuple[str, str], list[float]] = {}
    for plane in devices[:1] or data.planes:
        for line in plane.lines:
            if devices and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                op = next((str(value) for name, value in event.stats if name == "hlo_op"), "")
                if devices or op:
                    seconds.setdefault((event.name, op), []).append(event.duration_ns / 1e9)
    return {kernel: len(each) * statistics.median(each) for kernel, each in seconds.items()}


def split(ours: SslJax, seconds: float) -> dict[str, float]:
    """Times parts of the step, each compiled separately; differences give each part's share.

    Returns:
      ms of each.
    """
    import jax
    import optax

    from ssl_jax.data.index import views_stream
    from ssl_jax.data.pipeline import make_augment_fn
    from ssl_jax.step import loss_and_gradients

    program = ours.program
    method, spmd, augment_fn = program.method, program.spmd, make_augment_fn(program.config)

    def views_of(state: Any, raw: Any, device_data: Any) -> Any:
        return augment_fn(
            raw, device_data, views_stream(jax.random.wrap_key_data(state.key), state.step)
        )

    def forward(state: Any, batch: Any) -> Any:
        return method.forward(state.params, state.method_state, batch, jax.random.key(0))

    def loss(state: Any, outputs: Any, batch: Any) -> Any:
        def of(outputs: Any) -> Any:
            return method.loss(state.params, outputs, state.method_state, batch, state.step)[0]

        return jax.value_and_grad(of)(outputs)

    def gradients(state: Any, batch: Any) -> Any:
        return loss_and_gradients(method, state, batch)[:2]

    def optimize(state: Any, gradients: Any) -> Any:
        updates, _ = program.optimizer.update(gradients, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates)

    state, one, shared = ours.state, "replicated", "sharded"
    make = spmd.map(views_of, (one, shared, one), shared)
    batch = make(state, ours.batch, ours.device_data)
    encode = spmd.map(forward, (one, shared), (shared, one))
    outputs, _ = encode(state, batch)
    both = spmd.map(gradients, (one, shared), (one, one))
    _, gradient = both(state, batch)
    parts = {
        "augmentation": (make, (state, ours.batch, ours.device_data)),
        "forward": (encode, (state, batch)),
        "loss, both ways": (
            spmd.map(loss, (one, shared, shared), (one, shared)),
            (state, outputs, batch),
        ),
        "forward, loss, backward": (both, (state, batch)),
        "optimizer": (spmd.map(optimize, (one, one), one), (state, gradient)),
    }
    found = {}
    for name, (function, arguments) in parts.items():
        jax.block_until_ready(function(*arguments))
        times, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end or not times:
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            times.append(time.perf_counter() - start)
        found[name] = 1e3 * statistics.median(times)
        print(f"{name:<26}{found[name]:9.2f} ms", file=sys.stderr, flush=True)
    return found


def cells(row: dict[str, Any]) -> list[str]:
    """Formats a row of the table."""
    share = row["share of peak"]
    return [
        row["step"],
        f"{row['batch']:,}",
        f"{row['images/s']:,.0f}",
        f"{row['time / ssl_jax']:.3f}",
        f"{row['ms']:,.1f}",
        f"{row['GiB']:.1f}" if row["GiB"] else "",
        f"{row['TFLOP/s']:.3g}",
        "" if share is None else f"{100 * share:.1f} %",
    ]


def hardware() -> str:
    """Describes the device and the versions."""
    import jax

    device = jax.devices()[0].device_kind
    return f"{device}, JAX {jax.__version__}, Python {sys.version.split()[0]}"


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parses the command line and the config overrides."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/train_step.py --batches=256 --peers=bare,plain,torch",
    )
    parser.add_argument(
        "--config", default=str(ROOT / "configs" / "simclr_imagenet.py"), help="FILE.py[:variant]"
    )
    parser.add_argument("--batches", default="128,256", help="batch sizes")
    parser.add_argument("--microbatch", type=int, default=0, help="microbatch size; 0: off")
    parser.add_argument("--peers", default="bare,plain", help="comma-separated: bare, plain, torch")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter that has torch")
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="run torch without torch.compile"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds per turn")
    parser.add_argument("--profile", type=Path, help="write each kernel's time to this file")
    parser.add_argument("--split", action="store_true", help="time each part of the step")
    parser.add_argument(
        "--json", type=Path, help="write the rows to this file after each batch size"
    )
    args, overrides = parser.parse_known_args(argv)
    if args.profile and "torch" in args.peers.split(","):
        parser.error("--profile slows kernel launches of ssl_jax only: leave torch out of --peers")
    return args, overrides


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every batch size and prints the table.

    Args:
      argv: the command line; default, that of the process.
    """
    args, overrides = parse_arguments(argv)
    if args.profile:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} {NAMED_KERNELS}".strip()
    if "torch" in args.peers.split(","):
        # Both processes share the accelerator's memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".6")
    from ssl_jax.cli.backend import tune_cpu

    tune_cpu()
    import jax

    from ssl_jax.config import load_config

    rows: list[dict[str, Any]] = []
    parts: dict[str, dict[str, float]] = {}
    for batch in map(int, args.batches.split(",")):
        changed = [
            f"batch_size={batch}",
            f"microbatch={args.microbatch}",
            "model.bn_group_size=0",
            "model.bn_splits=1",
        ]
        changed += [override.removeprefix("--config.") for override in overrides]
        config = load_config(args.config, changed)
        try:
            measured, where = measure(config, args)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"Batch {batch} doesn't fit.", file=sys.stderr, flush=True)
            continue
        rows, parts = rows + measured, parts | where
        args.profile, args.split = None, False  # of the first batch
        if args.json:
            result = {"hardware": hardware(), "rows": rows, "ms": parts}
            args.json.write_text(json.dumps(result, indent=1))
    if not rows:
        sys.exit("No batch fits.")
    print(hardware())
    print_table(COLUMNS, map(cells, rows))


if __name__ == "__main__":
    main()
