"""Trains with ssl_jax and lightly in alternation, and compares kNN accuracy, loss and speed.

CIFAR-10, in two files written by `ssl-jax data pack`: the first --images/10 training images of each
class, all test images. ResNet-18 at a quarter of the width with the ImageNet stem, float32, batch
256, lightly's CIFAR setting: the configs' `lightly` variants on one side; lightly's heads, losses
and transforms under torch in `curves_peer.py` on the other. kNN (k 200, temperature 0.1) is the
same function for both, measured at each fifth of the run.

    python benchmarks/curves.py --train=train.npz --test=test.npz --peer-python=peers/bin/python
        [--workdir=runs/curves] [--methods=simclr,byol] [--seeds=3] [--epochs=15] [--images=20000]

Interrupted runs are resumed and finished ones kept, so rerun the command until the table is
complete. One run at a time; which side goes first alternates with the seed. The table (curves.md)
and picture (curves.png) in --workdir are written after each run. Without --peer-python only
ssl_jax's runs are made. The peer's environment:

    python3.11 -m venv peers
    peers/bin/pip install torch==2.13.0
    peers/bin/pip install numpy pillow
    peers/bin/pip install --no-deps lightly==1.6.0 lightly-utils==0.0.2 torchvision==0.28.0
"""

import argparse
import json
import math
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import runs
from curves_picture import Panel, draw
from markdown_table import markdown
from setting import config_changes, recorded_setting, require_images

from ssl_jax.evals.intervals import difference_interval, mean_interval
from ssl_jax.evals.knn import knn_classify
from ssl_jax.methods import title
from ssl_jax.run.log import read_metrics

ROOT = Path(__file__).parent.parent
METHODS = ("simclr", "moco", "byol", "simsiam", "swav", "barlow")
SIDES = ("ssl_jax", "lightly")
PARTS = 5  # of a run, after each of which kNN is measured
# BYOL's loss is reported as 1 - cos, as ssl_jax's with loss_scale 1/4; lightly's is -cos.
ADDED = {"byol": 1.0}
SETTING = ("model.width=0.25", "model.stem=imagenet", "dtype=float32", "log_every=1")
SETTING += ("eval.at_end=False", "eval.probe=False", "checkpoint.every_epochs=1.0")
MORE = {"moco": ("moco.queue=4096",)}

Line = dict[str, float]
# The records of finished runs, by method, side and seed.
Found = dict[str, dict[str, dict[int, list[Line]]]]


def run_ssl_jax(method: str, seed: int, workdir: Path, args: argparse.Namespace) -> list[Line]:
    """Trains with ssl_jax, or resumes; returns a record per epoch."""
    changes = [*SETTING, *MORE.get(method, ()), f"seed={seed}", f"batch_size={args.batch}"]
    changes += [f"epochs={args.epochs}.0", f"eval.knn_every_epochs={args.epochs // PARTS}.0"]
    changes += [f"data.dir={args.train}", f"data.test_dir={args.test}", *args.changes]
    config = f"--config={ROOT / 'configs' / f'{method}_cifar10.py'}:lightly"
    runs.pretrain(workdir, [config, *(f"--config.{change}" for change in changes)])
    return ssl_jax_lines(workdir, method, args.epochs, args.batch)


def ssl_jax_lines(workdir: Path, method: str, epochs: int, batch: int) -> list[Line]:
    """Summarizes a finished run's metrics, one record per epoch.

    "seconds" and "images" leave out steps without a time, such as the first, and evaluations.
    """
    records = read_metrics(workdir / "metrics.jsonl")
    per_epoch = max(record["step"] for record in records) // epochs
    lines = []
    for epoch in range(1, epochs + 1):
        steps = range((epoch - 1) * per_epoch + 1, epoch * per_epoch + 1)
        mine = [record for record in records if record["step"] in steps]
        seconds = [batch / r["images_per_s"] for r in mine if "images_per_s" in r]
        line = {
            "epoch": epoch,
            "loss": statistics.fmean(r["loss"] for r in mine if "loss" in r),
            "seconds": sum(seconds),
            "images": batch * len(seconds),
        }
        line |= next(({"knn": r["knn"]} for r in mine if "knn" in r), {})
        lines.append(line)
    return lines


def run_lightly(method: str, seed: int, workdir: Path, args: argparse.Namespace) -> list[Line]:
    """Trains with lightly, or resumes; returns a record per epoch."""
    command = [args.peer_python, str(ROOT / "benchmarks" / "curves_peer.py"), f"--out={workdir}"]
    command += [f"--train={args.train}", f"--test={args.test}", f"--method={method}"]
    command += [f"--seed={seed}", f"--epochs={args.epochs}", f"--every={args.epochs // PARTS}"]
    command += [f"--batch={args.batch}", f"--workers={args.peer_workers}"]
    runs.execute(command)
    return lightly_lines(workdir, method, args)


def lightly_lines(workdir: Path, method: str, args: argparse.Namespace) -> list[Line]:
    """Reads the peer's records; classifies its features."""
    train, test = (np.load(file)["labels"] for file in (args.train, args.test))
    lines = [json.loads(line) for line in (workdir / "epochs.jsonl").read_text().splitlines()]
    for line in lines:
        line["loss"] += ADDED.get(method, 0.0)
        file = workdir / f"features_{line['epoch']}.npz"
        if file.exists():
            with np.load(file) as features:
                found = knn_classify(
                    features["train"], train, features["test"], num_classes=int(train.max()) + 1
                )
            line["knn"] = float(np.mean(found == test))
    return lines


def read_results(workdir: Path, methods: list[str]) -> Found:
    """Reads the records of all finished runs, of any seed."""
    found: Found = {}
    for method in methods:
        for side in SIDES:
            for file in sorted(workdir.glob(f"{method}_*_{side}.jsonl")):
                seed = int(file.name.split("_")[1])
                lines = [json.loads(line) for line in file.read_text().splitlines()]
                found.setdefault(method, {}).setdefault(side, {})[seed] = lines
    return found


def table(found: Found) -> str:
    """Formats finished runs as a Markdown table: means and 95 % intervals over seeds."""
    each = [lines for sides in found.values() for side in sides.values() for lines in side.values()]
    epochs = sorted({int(line["epoch"]) for lines in each for line in lines if "knn" in line})
    names = ["", "", "seeds", *(f"kNN, epoch {epoch}" for epoch in epochs)]
    header = [*names, "over lightly", "last loss", "minutes", "images/s"]
    rows = []
    for method, sides in found.items():
        for side, seeds in sides.items():
            all_lines = seeds.values()
            knn = [[100 * x["knn"] for x in lines if "knn" in x] for lines in all_lines]
            cells = [f"{len(seeds)}", *(interval(column) for column in zip(*knn, strict=True))]
            cells.append(over_lightly(sides) if side == "ssl_jax" else "")
            cells.append(interval([lines[-1]["loss"] for lines in all_lines], digits=3))
            rates = [median_rate(lines) for lines in all_lines]
            images = statistics.fmean(sum(x["images"] for x in lines) for lines in all_lines)
            cells.append(f"{images / statistics.fmean(rates) / 60:.1f}")
            cells.append(f"{statistics.fmean(rates):,.0f}")
            rows.append([title(method), side, *cells])
    return markdown(header, rows)


def median_rate(lines: list[Line]) -> float:
    """Images per second of the median epoch, which a pause of the machine doesn't change.

    An epoch of a single step may have no time: that of a run's first step is not recorded.
    """
    return statistics.median(line["images"] / line["seconds"] for line in lines if line["seconds"])


def interval(values: Sequence[float], digits: int = 1) -> str:
    """Formats a mean with its 95 % interval; without for a single value."""
    mean, half = mean_interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def over_lightly(sides: dict[str, dict[int, list[Line]]]) -> str:
    """Formats the difference in final kNN; "" without lightly's runs.

    Not paired: seeds of two libraries have no random numbers in common.
    """
    own, peer = sides["ssl_jax"], sides.get("lightly", {})
    if not peer:
        return ""
    first, second = ([100 * lines[-1]["knn"] for lines in side.values()] for side in (own, peer))
    mean, half = difference_interval(first, second)
    return f"{round(mean, 1) + 0:+.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")


def panels(found: Found) -> dict[str, Panel]:
    """Converts finished runs for the picture."""

    def curve(lines: list[Line]) -> dict[str, tuple[list[float], list[float]]]:
        columns = {}
        for name, scale in (("loss", 1), ("knn", 100)):
            some = [line for line in lines if name in line]
            columns[name] = ([x["epoch"] for x in some], [scale * x[name] for x in some])
        return columns

    return {
        title(method): {
            side: [curve(lines) for lines in seeds.values()] for side, seeds in sides.items()
        }
        for method, sides in found.items()
    }


def report(workdir: Path, methods: list[str]) -> str:
    """Writes the table and the picture of the finished runs; returns the table."""
    found = read_results(workdir, methods)
    text = table(found)
    (workdir / "curves.md").write_text(text + "\n")
    draw(panels(found), workdir / "curves.png", "epoch")
    return text


def write_lines(file: Path, lines: list[Line]) -> None:
    """Replaces a file by JSON lines."""
    part = file.with_suffix(".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(part, file)


def first_of_each_class(source: Path, images: int, out: Path) -> None:
    """Writes a packed file with the first images of each class."""
    with np.load(source) as packed:
        arrays = dict(packed)
    classes = len(arrays["class_names"])
    rows = [np.flatnonzero(arrays["labels"] == k) for k in range(classes)]
    each, fewest = images // classes, min(map(len, rows))
    if not 0 < each <= fewest:
        sys.exit(
            f"--images={images} takes {each} of each class, but {source} has {fewest} of one: "
            f"use {classes} to {classes * fewest}."
        )
    chosen = np.concatenate([found[:each] for found in rows])
    arrays |= {name: arrays[name][chosen] for name in ("images", "labels")}
    part = out.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(part, out)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line; other arguments are overrides for ssl_jax's configs."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="--config.KEY=VALUE changes ssl_jax's runs only. Rerun the command to resume.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--train", type=Path, required=True, help="packed training images")
    parser.add_argument("--test", type=Path, required=True, help="packed test images")
    parser.add_argument("--peer-python", help="interpreter of lightly's environment")
    parser.add_argument("--peer-workers", type=int, default=1, help="lightly's loader processes")
    parser.add_argument(
        "--workdir", type=Path, default=Path("runs/curves"), help="folder of the runs"
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="names, with commas")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method and side")
    parser.add_argument("--epochs", type=int, default=15, help=f"a multiple of {PARTS}")
    parser.add_argument("--images", type=int, default=20_000, help="training images")
    parser.add_argument("--batch", type=int, default=256, help="images per step")
    args, more = parser.parse_known_args(argv)
    args.changes = [text.removeprefix("--config.") for text in config_changes(parser, more)]
    require_images(parser, args)
    if args.peer_python and not shutil.which(args.peer_python):
        parser.error(f"--peer-python={args.peer_python} is not a program")
    if args.epochs % PARTS:
        parser.error(f"--epochs={args.epochs} is not a multiple of {PARTS}")
    args.methods = args.methods.split(",")
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"--methods: {', '.join(unknown)}. Choose from {', '.join(METHODS)}.")
    return args


def main(argv: list[str] | None = None) -> None:
    """Makes the missing runs in alternation; prints the table."""
    args = parse_arguments(argv)
    source, args.test = args.train.resolve(), args.test.resolve()
    setting = {"train": str(source), "test": str(args.test), "images": args.images}
    setting |= {"epochs": args.epochs, "batch": args.batch, "changes": args.changes}
    args.train = (args.workdir / "train.npz").resolve()
    with recorded_setting(args.workdir / "setting.json", setting, "*_*/*") as new:
        if new or not args.train.exists():
            first_of_each_class(source, args.images, args.train)
        make_runs(args)
    print(report(args.workdir, args.methods))


def make_runs(args: argparse.Namespace) -> None:
    """Makes the missing runs in alternation, with a report after each."""
    train = {"ssl_jax": run_ssl_jax, "lightly": run_lightly}
    sides = SIDES if args.peer_python else SIDES[:1]
    for seed in range(args.seeds):
        for method in args.methods:
            for side in sides if seed % 2 == 0 else sides[::-1]:
                name = f"{method}_{seed}_{side}"
                file = args.workdir / f"{name}.jsonl"
                if not file.exists():
                    write_lines(file, train[side](method, seed, args.workdir / name, args))
                    for features in (args.workdir / name).glob("features_*.npz"):
                        features.unlink()
                    report(args.workdir, args.methods)


if __name__ == "__main__":
    main()
