"""Runs the benchmarks of docs/benchmarks.md that need an accelerator, one step after the other.

    python benchmarks/accelerator.py --out=DIR [--train=train.npz --test=test.npz]
        [--budget-minutes=8.5] [--only=step,loss,...] [--toy]

Steps run in order until the time is up; SimCLR's and BYOL's runs on CIFAR-10 come first. Results
are saved in DIR, and the same command resumes with the first step that isn't done. Each method is
trained on CIFAR-10 (files from `ssl-jax data pack`) with lightly's settings for 200 epochs; such a
run stops when the time is up and resumes from its checkpoint. DIR/results.md is written after each
step. The exit code is 0 if everything is done, 1 if a step failed, 3 if steps are left; without
--train and --test, CIFAR-10 is skipped. `--toy` does the same with tiny networks, on a CPU.
"""

import argparse
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from markdown_table import markdown
from setting import require_images

ROOT = Path(__file__).parent.parent
IMAGES = 50_000  # in CIFAR-10
BENCHMARKS, CONFIGS = ROOT / "benchmarks", ROOT / "configs"
METHODS = ("simclr", "moco", "swav", "byol", "simsiam")
FIRST = ("cifar_simclr", "cifar_byol")  # what is learned counts more than how fast
MIN_S = 45.0  # with less time left, no step is started
SAVING_S = 120.0  # for a stopped run to write its checkpoint
LEFT = 3  # exit code
SKIPPED = "skipped: requires --train and --test"
SMALL = ("--config.model.depth=18", "--config.model.width=0.0625")
HEADS = ("--config.moco.queue=32", "--config.swav.prototypes=4")  # for a tiny dataset
SHORT = ("--config.epochs=2", "--config.batch_size=16", "--config.model.bn_splits=1")
SHORT += ("--config.eval.knn_k=2", "--config.eval.trials=1")
PLAIN = ("--config.model.depth=18", "--config.simclr.layers=2")  # implemented in plain Flax


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """Returns the command of each benchmark step; --json makes it write its results."""
    torch = ["torch"] if importlib.util.find_spec("torch") else []

    def step(config: str, batches: str, peers: list[str], *more: str) -> list[str]:
        if args.toy:
            config = config.replace("imagenet", "cifar10")
            batches = "2,4" if "," in batches else "4"
            more = (*more, "--rounds=1", "--seconds=0.1", "--no-compile", *HEADS)
            more = (*more, *(PLAIN if "plain" in peers else SMALL))
        file = BENCHMARKS / "train_step.py"
        options = [f"--batches={batches}", f"--peers={','.join(peers)}"]
        return [str(file), f"--config={CONFIGS / config}", *options, *more]

    def loss(sizes: str, large: str, *more: str) -> list[str]:
        if args.toy:
            sizes, large, more = "8", large and "16", ("--info-nce=", "--sinkhorn=", "--rounds=1")
            more += ("--statistics=8x16",)
        return [str(BENCHMARKS / "loss.py"), f"--sizes={sizes}", f"--large={large or 0}", *more]

    small = "2" if args.toy else "512"
    profile = f"--profile={args.out / 'kernels.txt'}"
    found = {
        "loss_large": loss("8192", "65536", "--info-nce=256x65536", "--sinkhorn=8192x3000"),
        "parts": step("simclr_imagenet.py", "256", [], "--split", profile),
        "sweep": step("simclr_imagenet.py", "64,128,512,1024", []),
        "cached": step("simclr_imagenet.py", "8192", [], f"--microbatch={small}"),
        "step": step("simclr_imagenet.py", "256", ["bare", "plain", *torch]),
        "loss": loss("1024,4096", "", "--info-nce=", "--sinkhorn=", "--statistics="),
    }
    for method in METHODS[1:]:
        found[f"step_{method}"] = step(f"{method}_imagenet.py", "256", ["bare"])
    found["step_cifar"] = step("simclr_cifar10.py:lightly", "512", ["bare"])
    return found


def measure(name: str, command: list[str], out: Path, seconds: float) -> str:
    """Runs a benchmark step and returns its status."""
    file, log = out / f"{name}.json", out / f"{name}.log"
    if file.exists():
        return "already done"
    partial = file.with_suffix(".partial")
    with log.open("w") as handle:
        try:
            done = subprocess.run(
                [sys.executable, *command, f"--json={partial}"],
                env=environment(),
                stdout=handle,
                stderr=subprocess.STDOUT,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return "timed out"
    if done.returncode:
        return f"failed, see {log}"
    partial.rename(file)
    return "done"


def train(method: str, args: argparse.Namespace, seconds: float) -> str:
    """Trains a method on CIFAR-10 until it is done or the time is up; returns its status."""
    workdir = args.out / f"cifar_{method}"
    if (workdir / "evaluation.json").exists():
        return "already done"
    command = [sys.executable, str(ROOT / "run_pretrain.py"), f"--workdir={workdir}"]
    command += [f"--config={CONFIGS / f'{method}_cifar10.py'}:lightly"]
    command += [f"--config.data.dir={args.train}", f"--config.data.test_dir={args.test}"]
    command += ["--config.checkpoint.every_epochs=0"]  # only at the end, and when stopped
    if args.toy:
        command += [*SMALL, *HEADS, *SHORT]
    with (args.out / f"cifar_{method}.log").open("a") as log:
        process = subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # saves a checkpoint
            try:
                process.wait(timeout=SAVING_S)
            except subprocess.TimeoutExpired:
                process.kill()
    if (workdir / "evaluation.json").exists():
        return "done"
    # SIGTERM may arrive before the run has started.
    stopped = process.returncode in (0, -signal.SIGTERM)
    return "stopped, resumes next time" if stopped else f"failed, see {log.name}"


def environment() -> dict[str, str]:
    """Returns the environment of the steps, in which the package is found without installation."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def write_results(out: Path) -> None:
    """Writes all results so far as Markdown."""
    lines = []
    for file in sorted(out.glob("*.json")):
        found = json.loads(file.read_text())
        rows = found["rows"] if isinstance(found, dict) else found
        lines += [f"## {file.stem}", ""]
        lines += [found["hardware"], ""] if isinstance(found, dict) else []
        header = list(rows[0])
        lines += [markdown(header, ([cell(row[name]) for name in header] for row in rows)), ""]
        for kind, parts in found.get("ms", {}).items() if isinstance(found, dict) else ():
            lines += [markdown([kind, "ms"], ([p, f"{ms:.2f}"] for p, ms in parts.items())), ""]
    runs = [workdir for workdir in sorted(out.glob("cifar_*")) if workdir.is_dir()]
    if runs:
        header = ["method", "epochs", "kNN", "full linear", "minutes of steps"]
        lines += ["## CIFAR-10 (JPEG q75), ResNet-18", "", markdown(header, map(cifar_row, runs))]
    (out / "results.md").write_text("\n".join(lines) + "\n")


def cifar_row(workdir: Path) -> list[str]:
    """Returns the progress and accuracy of a run as cells of the table."""
    from ssl_jax.run.log import read_metrics

    method = workdir.name.removeprefix("cifar_")
    metrics = read_metrics(workdir / "metrics.jsonl")
    if not metrics:
        return [method, "0", "", "", ""]
    config = json.loads((workdir / "config.json").read_text())["config"]
    knn = [line["knn"] for line in metrics if "knn" in line]
    rates = [line["images_per_s"] for line in metrics if "images_per_s" in line]
    step, batch = metrics[-1]["step"], config["batch_size"]
    linear = ""
    if (workdir / "evaluation.json").exists():
        rows = json.loads((workdir / "evaluation.json").read_text())["rows"]
        linear = f"{100 * rows[-1]['linear']:.1f}"
    minutes = f"{step * batch / statistics.median(rates) / 60:.1f}" if rates else ""
    last = f"{100 * knn[-1]:.1f}" if knn else ""
    # An epoch has whole batches only.
    epochs = step / max(1, IMAGES // batch)
    return [method, f"{epochs:.0f}", last, linear, minutes]


def cell(value: object) -> str:
    """Formats a value in a table."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs as many steps as the time allows.

    Args:
      argv: The arguments; default: those of the process.
    """
    sys.path.insert(0, str(ROOT))  # in case the package isn't installed
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/accelerator.py --out=DIR --train=train.npz "
        "--test=test.npz",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--train", type=Path, help="packed CIFAR-10 training images")
    parser.add_argument("--test", type=Path, help="packed CIFAR-10 test images")
    parser.add_argument("--budget-minutes", type=float, default=8.5, help="time limit")
    parser.add_argument("--only", default="", help="names of steps to run, such as cifar_METHOD")
    parser.add_argument("--toy", action="store_true", help="tiny networks, for a CPU")
    args = parser.parse_args(argv)
    measuring = commands(args)
    training = [f"cifar_{method}" for method in METHODS]
    rest = [name for name in training if name not in FIRST]
    names = args.only.split(",") if args.only else [*FIRST, *measuring, *rest]
    if unknown := set(names) - {*measuring, *training}:
        parser.error(f"--only={unknown.pop()} is not a step: {', '.join([*measuring, *training])}")
    for name in ("train", "test"):
        if getattr(args, name) is None and args.only and set(names) & {*training}:
            parser.error(f"--{name} is required: pack CIFAR-10 with `ssl-jax data pack`")
    require_images(parser, args)
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.budget_minutes
    status = {}
    for name in names:
        left = end - time.monotonic()
        if name in training and not (args.train and args.test):
            status[name] = SKIPPED
        elif left < MIN_S:
            status[name] = "left for the next run"
        elif name in measuring:
            status[name] = measure(name, measuring[name], args.out, left)
        else:
            # A stopped run needs some time to save its checkpoint.
            status[name] = train(name.removeprefix("cifar_"), args, left - MIN_S / 2)
        print(f"{name}: {status[name]}", flush=True)
        write_results(args.out)
    print(args.out / "results.md")
    if any(each.startswith("failed") for each in status.values()):
        sys.exit(1)
    if not all(each in ("done", "already done", SKIPPED) for each in status.values()):
        print("Rerun the same command for the remaining steps.")
        sys.exit(LEFT)


if __name__ == "__main__":
    main()
