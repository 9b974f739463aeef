"""GFLOP/s of ResNet-18's 3×3 convolutions on a CPU, by ssl_jax, jaxlib and torch.

Each stage's convolution by itself, float32, channels last: forward, gradient of the input, gradient
of the kernel; medians of seven calls. The last two sizes are those of 32×32 images with the
ImageNet stem; products with padding count as FLOPs. ssl_jax runs with the flag of
`ssl_jax.cli.backend.tune_cpu`; jaxlib without and with it, and with it and each of --more. Each in
its own process.

    python benchmarks/convolutions.py [--peer-python=PATH] [--views=128]
        [--more=--xla_cpu_use_onednn=true,--xla_cpu_use_xnnpack=true]
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from classifier import seconds_of
from markdown_table import print_table

# Channels, and side of the images in pixels.
STAGES = ((64, 32), (128, 16), (256, 8), (512, 4), (256, 2), (512, 1))
CALLS = 7


def median_seconds(function: Callable[[], Any]) -> float:
    """The median of several calls, after one that compiles."""
    function()
    return seconds_of(function, CALLS)


def by_jax(ours: bool, views: int, channels: int, side: int) -> list[float]:
    """Seconds of the forward pass and both gradients in JAX, by ssl_jax's function or JAX's own."""
    import jax
    import jax.numpy as jnp

    from ssl_jax.models.conv import conv_general_dilated

    def convolve(x: Any, kernel: Any) -> Any:
        if ours:
            return conv_general_dilated(x, kernel, (1, 1), "SAME")
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)

    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (views, side, side, channels), jnp.float32)
    kernel = jax.random.normal(keys[1], (3, 3, channels, channels), jnp.float32)
    y = convolve(x, kernel)
    passes = [
        jax.jit(lambda x, kernel, y: convolve(x, kernel)),
        jax.jit(lambda x, kernel, y: jax.vjp(lambda x: convolve(x, kernel), x)[1](y)),
        jax.jit(lambda x, kernel, y: jax.vjp(lambda k: convolve(x, k), kernel)[1](y)),
    ]
    return [median_seconds(lambda f=f: jax.block_until_ready(f(x, kernel, y))) for f in passes]


def by_torch(views: int, channels: int, side: int) -> list[float]:
    """Seconds of the forward pass and both gradients in torch."""
    import torch

    def placed(*shape: int) -> Any:
        return torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()

    x, kernel = placed(views, channels, side, side), placed(channels, channels, 3, 3)
    y = torch.nn.functional.conv2d(x, kernel, padding=1)
    dy = torch.randn_like(y)

    def forward() -> Any:
        return torch.nn.functional.conv2d(x.detach(), kernel.detach(), padding=1)

    gradients = [
        lambda wanted=wanted: torch.autograd.grad(y, wanted, dy, retain_graph=True)
        for wanted in (x, kernel)
    ]
    return [median_seconds(function) for function in (forward, *gradients)]


def rates(by: str, views: int) -> list[str]:
    """GFLOP/s per stage: forward / gradient of the input / gradient of the kernel."""
    jax_ways = {name: functools.partial(by_jax, name == "ssl_jax") for name in ("ssl_jax", "jax")}
    measure = {**jax_ways, "torch": by_torch}[by]
    cells = []
    for channels, side in STAGES:
        flops = 2 * views * side**2 * channels**2 * 9
        seconds = measure(views, channels, side)
        cells.append(" / ".join(f"{flops / each / 1e9:.0f}" for each in seconds))
    return cells


def in_process(python: str, by: str, views: int, flags: str) -> list[str]:
    """`rates` in a process of its own, with XLA's flags."""
    command = [python, __file__, f"--by={by}", f"--views={views}"]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    except OSError as error:
        sys.exit(f"Cannot run {python} ({error.strerror}).")
    if done.returncode:
        sys.exit(f"{by} with XLA_FLAGS='{flags}' failed. See the output above.")
    cells: list[str] = json.loads(done.stdout.splitlines()[-1])
    return cells


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="interpreter that has torch")
    parser.add_argument("--views", type=int, default=128)
    parser.add_argument("--more", default="", help="comma-separated flags of XLA")
    parser.add_argument("--by", choices=["ssl_jax", "jax", "torch"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.by:
        print(json.dumps(rates(args.by, args.views)))
        return
    from ssl_jax.cli.backend import tune_cpu

    os.environ["XLA_FLAGS"] = ""
    os.environ["JAX_PLATFORMS"] = "cpu"
    tune_cpu()
    flag = os.environ["XLA_FLAGS"]
    ways = {"ssl_jax": ("ssl_jax", flag), "jaxlib": ("jax", ""), "with the flag": ("jax", flag)}
    for more in filter(None, args.more.split(",")):
        ways[f"and {more}"] = "jax", f"{flag} {more}"
    columns = {}
    if args.peer_python:
        columns["torch"] = in_process(args.peer_python, "torch", args.views, "")
    for name, (by, flags) in ways.items():
        columns[name] = in_process(sys.executable, by, args.views, flags)
    names = [f"{channels}, {side}×{side}" for channels, side in STAGES]
    rows = [list(cells) for cells in zip(names, *columns.values(), strict=True)]
    print_table(["channels, size", *columns], rows)


if __name__ == "__main__":
    main()
