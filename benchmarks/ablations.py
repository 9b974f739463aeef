"""The ablations of `configs/ablations.py`, each group as a table beside what it changes.

Each is a run of its own under --out, continued if it was broken off and not repeated if it is
done, so the command may be given again until the tables are complete. `--config.KEY=VALUE` changes
all of them.

    python benchmarks/ablations.py [--groups=head,temperature] [--out=runs/ablations]
    python benchmarks/ablations.py --groups=augmentation --train=train.npz --test=test.npz

The augmentations are compared on CIFAR-10, in two files that `ssl-jax data pack` has made;
BatchNorm per device is that of 8 simulated CPU devices.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

from ssl_jax.diagnostics import CollapseDetector
from ssl_jax.evals.intervals import mean_interval
from ssl_jax.run.log import read_metrics

ROOT = Path(__file__).parent.parent
FILE = ROOT / "configs" / "ablations.py"
ABLATIONS = runpy.run_path(str(FILE))["ABLATIONS"]
# What a group of SimCLR's changes of one key is beside, and its key's value there.
UNCHANGED = {"temperature": ("head-mlp2", "temperature-0.2"), "batch": ("head-mlp2", "batch-256")}
DEVICES = "--xla_force_host_platform_device_count=8"
COLUMNS = ("", "kNN", "5 labels", "full linear", "contrastive", "std·√d", "RankMe", "collapse")


def run(name: str, group: str, args: argparse.Namespace) -> None:
    """Trains and evaluates one, or continues."""
    command = [sys.executable, str(ROOT / "run_pretrain.py"), f"--config={FILE}:{name}"]
    command += [f"--workdir={args.out / name}", *args.changes]
    environment = dict(os.environ)
    if group == "augmentation":
        command += [f"--config.data.dir={args.train}", f"--config.data.test_dir={args.test}"]
    if group == "shuffle":
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {DEVICES}"
        environment["JAX_PLATFORMS"] = "cpu"
    print("$", *command, flush=True)
    if subprocess.run(command, env=environment).returncode:
        sys.exit(f"{name} failed; what it said is above.")


def cells(name: str, workdir: Path) -> list[str]:
    """A finished run's row."""
    records = read_metrics(workdir / "metrics.jsonl")
    last = {key: value for record in records for key, value in record.items()}
    file = workdir / "evaluation.json"
    if file.exists():
        trained = json.loads(file.read_text())["rows"][-1]
    else:  # the classifier that was trained along
        trained = {"knn": last["knn"], "linear": last["probe_accuracy"]}
    watch = CollapseDetector()
    warnings = [w for record in records for w in watch.check(int(record["step"]), record)]
    few = ""
    if "labels_5" in trained:
        mean, half = mean_interval([100 * draw for draw in trained["labels_5"]["trials"]])
        few = f"{mean:.1f} ± {half:.1f}"
    told = f"{100 * last['contrastive_accuracy']:.0f}" if "contrastive_accuracy" in last else ""
    return [
        *(name, f"{100 * trained['knn']:.1f}", few, f"{100 * trained['linear']:.1f}", told),
        *(f"{last['embedding_std']:.2f}", f"{last['rankme']:.1f}"),
        warnings[0].removeprefix("warning: collapse ").partition(":")[0] if warnings else "no",
    ]


def table(group: str, out: Path) -> str:
    """The finished runs of a group as a Markdown table."""
    runs = {name: out / name for name in ABLATIONS[group]}
    if group in UNCHANGED:
        folder, name = UNCHANGED[group]
        runs[name] = out / folder
    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    for name, workdir in sorted(runs.items(), key=lambda item: _order(item[0])):
        if (workdir / "report_images.npz").exists():
            lines.append(cells(name, workdir))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _order(name: str) -> float:
    """By the number at a name's end; else as listed, for sorting is stable."""
    try:
        return float(name.rpartition("-")[2])
    except ValueError:
        return 0.0


def main() -> None:
    """Runs what is not done yet, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", default=",".join(g for g in ABLATIONS if g != "augmentation"))
    parser.add_argument("--train", help="CIFAR-10: the packed training images")
    parser.add_argument("--test", help="CIFAR-10: the packed test images")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "ablations")
    args, args.changes = parser.parse_known_args()
    groups = args.groups.split(",")
    for group in groups:
        if group not in ABLATIONS:
            parser.error(f"there is no group {group}: {', '.join(ABLATIONS)}")
    if "augmentation" in groups and not (args.train and args.test):
        parser.error("the group augmentation needs --train and --test")
    for group in groups:
        folder = UNCHANGED.get(group, (None,))[0]
        for name in ([folder] if folder else []) + list(ABLATIONS[group]):
            run(name, group, args)
    for group in groups:
        print(f"\n## {group}\n\n{table(group, args.out)}")


if __name__ == "__main__":
    main()
