"""Seconds from the command to its first line and to its first step, and what is imported.

Each run is one step in a new process, with its programs in the compilation cache. Two configs
alternate: the quickstart's digits, and SimCLR on ImageNet with ResNet-50 on a few generated
photographs. The other tables have the packages whose modules take longest to import, each without
what it imports from other packages.

    python benchmarks/startup.py [--rounds=5] [--batch=8] [--size=224] [--config.KEY=VALUE]
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from evaluation_images import write_photographs
from markdown_table import print_table

ROOT = Path(__file__).parents[1]
EVENTS = {"first line": re.compile(r"\S"), "first step": re.compile(r"step 1/")}
IMPORTS = {
    "the command line": "import ssl_jax.cli.main",
    "a run": "import ssl_jax.cli.main, ssl_jax.cli.pretrain",
}
TOP = 10
_TIMED = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")


def commands(images: Path, batch: int, size: int, more: list[str]) -> dict[str, list[str]]:
    """Returns the arguments of the runs by name."""
    brief = ["--config.steps=1", "--config.log_every=1", "--config.eval.at_end=False"]
    brief += ["--config.eval.knn_every_epochs=0", *more]
    digits = ["--config=configs/simclr_digits.py"]
    photographs = [f"--config=configs/simclr_imagenet.py:{batch}", "--config.dtype=float32"]
    photographs += ["--config.data.name=folder", f"--config.data.dir={images}"]
    photographs += ["--config.data.num_classes=0"]
    photographs += [f"--config.views.{view}.size={size}" for view in ("view1", "view2")]
    return {
        "digits, ResNet-18": digits + brief,
        f"ImageNet, ResNet-50, {batch}×{size}": [*photographs, *brief],
    }


def run(arguments: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Runs a command; returns the seconds until each event in its output."""
    seen: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "run_pretrain.py", *arguments, f"--workdir={workdir}/run"]
        start = time.perf_counter()
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                for event, pattern in EVENTS.items():
                    if pattern.search(line):
                        seen.setdefault(event, time.perf_counter() - start)
    if process.returncode or len(seen) < len(EVENTS):
        sys.exit(f"{' '.join(command)} ended with code {process.returncode} after {[*seen]}.")
    return seen


def import_times(code: str) -> tuple[float, int, Counter[str]]:
    """Returns the seconds of all imports, the number of modules, and seconds by package."""
    command = [sys.executable, "-X", "importtime", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds: Counter[str] = Counter()
    timed = _TIMED.findall(done.stderr)
    for microseconds, module in timed:
        seconds[module.split(".")[0]] += int(microseconds) / 1e6
    return sum(seconds.values()), len(timed), seconds


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="of the ResNet-50")
    parser.add_argument("--size", type=int, default=224, help="of the ResNet-50's views, pixels")
    args, more = parser.parse_known_args()
    measured: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        write_photographs(images, args.batch)
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        runs = commands(images, args.batch, args.size, more)
        for repeated in range(args.rounds + 1):
            for name, arguments in runs.items():
                for event, seconds in run(arguments, environment).items():
                    if repeated:  # the first fills the cache
                        measured.setdefault((name, event), []).append(seconds)
    rows = [
        [name, *(f"{statistics.median(measured[name, event]):.2f}" for event in EVENTS)]
        for name in runs
    ]
    print_table(["seconds (median)", *EVENTS], rows)
    for name, code in IMPORTS.items():
        total, modules, seconds = import_times(code)
        print(f"Imports of {name}: {modules:,} modules, {total:.2f} s\n")
        rows = [[package, f"{taken:.3f}"] for package, taken in seconds.most_common(TOP)]
        print_table(["package", "seconds"], rows)


if __name__ == "__main__":
    main()
