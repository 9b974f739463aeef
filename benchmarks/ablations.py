"""The ablations of `configs/ablations.py`, a table per group with the unchanged run.

Each ablation is a run in --out. Interrupted runs are resumed and finished ones kept, so rerun the
command until the tables are complete. `--config.KEY=VALUE` applies to all of them.

    python benchmarks/ablations.py [--groups=head,temperature] [--out=runs/ablations]
    python benchmarks/ablations.py --groups=augmentation --train=train.npz --test=test.npz

Augmentations are compared on CIFAR-10, in two files written by `ssl-jax data pack`; BatchNorm per
device runs on 8 simulated CPU devices.
"""

import argparse
import json
import os
import runpy
from pathlib import Path

from markdown_table import markdown
from runs import pretrain
from setting import require_images

from ssl_jax.diagnostics import CollapseDetector
from ssl_jax.evals.intervals import mean_interval
from ssl_jax.evals.results import LAST_FILE
from ssl_jax.run.log import read_metrics

ROOT = Path(__file__).parent.parent
FILE = ROOT / "configs" / "ablations.py"
ABLATIONS = runpy.run_path(str(FILE))["ABLATIONS"]
# For groups that change one key of SimCLR: the unchanged run, and its name in the table.
UNCHANGED = {"temperature": ("head-mlp2", "temperature-0.2"), "batch": ("head-mlp2", "batch-256")}
DEVICES = "--xla_force_host_platform_device_count=8"
COLUMNS = (
    "",
    "kNN",
    "5 labels",
    "full linear",
    "contrastive",
    "embedding_std",
    "RankMe",
    "collapse",
)


def run(name: str, group: str, args: argparse.Namespace) -> None:
    """Trains and evaluates one ablation, or resumes."""
    arguments = [f"--config={FILE}:{name}", *args.changes]
    environment = {}
    if group == "augmentation":
        arguments += [f"--config.data.dir={args.train}", f"--config.data.test_dir={args.test}"]
    if group == "shuffle":
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}"
        environment["JAX_PLATFORMS"] = "cpu"
    pretrain(args.out / name, arguments, environment)


def cells(name: str, workdir: Path) -> list[str]:
    """Formats a finished run as a row."""
    records = read_metrics(workdir / "metrics.jsonl")
    last = {key: value for record in records for key, value in record.items()}
    file = workdir / "evaluation.json"
    if file.exists():
        trained = json.loads(file.read_text())["rows"][-1]
    else:  # the online probe
        trained = {"knn": last["knn"], "linear": last["probe_accuracy"]}
    detector = CollapseDetector()
    warnings = [w for record in records for w in detector.check(int(record["step"]), record)]
    few = ""
    if "labels_5" in trained:
        mean, half = mean_interval([100 * trial for trial in trained["labels_5"]["trials"]])
        few = f"{mean:.1f} ± {half:.1f}"
    contrastive = (
        f"{100 * last['contrastive_accuracy']:.0f}" if "contrastive_accuracy" in last else ""
    )
    return [
        *(name, f"{100 * trained['knn']:.1f}", few, f"{100 * trained['linear']:.1f}", contrastive),
        *(f"{last['embedding_std']:.2f}", f"{last['rankme']:.1f}"),
        warnings[0].removeprefix("warning: collapse ").partition(":")[0] if warnings else "no",
    ]


def table(group: str, out: Path) -> str:
    """Formats the finished runs of a group as a Markdown table."""
    runs = {name: out / name for name in ABLATIONS[group]}
    if group in UNCHANGED:
        folder, name = UNCHANGED[group]
        runs[name] = out / folder
    rows = []
    for name, workdir in sorted(runs.items(), key=lambda item: _order(item[0])):
        if (workdir / LAST_FILE).exists():
            rows.append(cells(name, workdir))
    return markdown(COLUMNS, rows)


def _order(name: str) -> float:
    """The number at the end of a name, to sort by; 0 without one, which keeps the order."""
    try:
        return float(name.rpartition("-")[2])
    except ValueError:
        return 0.0


def main() -> None:
    """Runs missing ablations, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", default=",".join(g for g in ABLATIONS if g != "augmentation"))
    parser.add_argument("--train", help="CIFAR-10: the packed training images")
    parser.add_argument("--test", help="CIFAR-10: the packed test images")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "ablations")
    args, args.changes = parser.parse_known_args()
    groups = args.groups.split(",")
    for group in groups:
        if group not in ABLATIONS:
            parser.error(f"--groups: no group {group}. Choose from {', '.join(ABLATIONS)}.")
    if "augmentation" in groups and not (args.train and args.test):
        parser.error("the group augmentation needs --train and --test")
    if "augmentation" in groups:
        require_images(parser, args)
    for group in groups:
        folder = UNCHANGED.get(group, (None,))[0]
        for name in ([folder] if folder else []) + list(ABLATIONS[group]):
            run(name, group, args)
    for group in groups:
        print(f"\n## {group}\n\n{table(group, args.out)}")


if __name__ == "__main__":
    main()
