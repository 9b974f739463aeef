"""All methods on one dataset with one network, in a table with raw pixels and random features.

Each method is a run in --workdir. Interrupted runs are resumed and finished ones kept, so rerun the
command until the table is complete.

    python benchmarks/methods.py [--data=digits] [--workdir=runs/methods] [--methods=simclr,moco]
    python benchmarks/methods.py --data=cifar10 --train=train.npz --test=test.npz
        [--config.epochs=100.0]

For CIFAR-10, two files written by `ssl-jax data pack`, the `cpu` variants of the configs are used.
Config keys are set in all runs.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import runs
from markdown_table import markdown
from setting import config_changes, recorded_setting, require_images

from ssl_jax.evals.intervals import mean_interval
from ssl_jax.evals.results import LAST_FILE, ONLINE
from ssl_jax.run.log import read_metrics

ROOT = Path(__file__).parent.parent
METHODS = ("simclr", "simclrv2", "moco", "swav", "byol", "simsiam", "mocov3", "barlow", "vicreg")
METHODS += ("dino", "supcon", "supervised")
NAMES = {
    "simclr": "SimCLR v1",
    "simclrv2": "SimCLR v2 (memory bank)",
    "moco": "MoCo v2",
    "swav": "SwAV",
    "byol": "BYOL",
    "simsiam": "SimSiam",
    "dino": "DINO",
    "mocov3": "MoCo v3",
    "supcon": "SupCon, all labels",
    "barlow": "Barlow Twins",
    "vicreg": "VICReg",
    "supervised": "Supervised, all labels",
}
COLUMNS = (
    *("", "5 labels", "over raw pixels", "over random init", "10 labels", "full linear", "kNN"),
    *("embedding_std", "RankMe", "images/s"),
)


def run(method: str, args: argparse.Namespace, workdir: Path) -> None:
    """Trains and evaluates one method, or resumes."""
    config = f"--config={ROOT / 'configs' / f'{method}_{args.data}.py'}"
    if args.data == "cifar10":
        data = [f"--config.data.dir={args.train}", f"--config.data.test_dir={args.test}"]
        runs.pretrain(workdir, [f"{config}:cpu", *data, *args.changes])
    else:
        runs.pretrain(workdir, [config, *args.changes])


def accuracies(row: dict, baselines: list[dict]) -> list[str]:
    """Formats an evaluation row in percent; differences are paired over trials."""
    return [
        f"{100 * row['labels_5']['mean']:.1f}",
        *(difference(row, baseline) for baseline in baselines),
        *(f"{100 * value:.1f}" for value in (row["labels_10"]["mean"], row["linear"], row["knn"])),
    ]


def difference(row: dict, baseline: dict) -> str:
    """Percentage points over a baseline at 5 labels, with the 95 % interval over paired trials."""
    if row["name"] == baseline["name"]:
        return ""
    trials = zip(row["labels_5"]["trials"], baseline["labels_5"]["trials"], strict=True)
    points = [100 * (a - b) for a, b in trials]
    mean, half = mean_interval(np.array(points))
    return f"{mean:+.1f} ± {half:.1f}"


def table(workdirs: dict[str, Path]) -> str:
    """Formats the finished runs as a Markdown table, with the first run's baselines as rows.

    Differences are relative to each run's own baselines, such as its own untrained network.
    """
    lines: list[list[str]] = []
    for method, workdir in workdirs.items():
        file = workdir / "evaluation.json"
        if not file.exists():
            continue
        raw, untrained, *own = json.loads(file.read_text())["rows"]
        if not lines:
            lines += [
                [row["name"], *accuracies(row, [raw, untrained]), "", "", ""]
                for row in (raw, untrained)
            ]
        records = read_metrics(workdir / "metrics.jsonl")
        last = {key: value for record in records for key, value in record.items()}
        rate = statistics.median(r["images_per_s"] for r in records if "images_per_s" in r)
        measured = [f"{last['embedding_std']:.2f}", f"{last['rankme']:.1f}", f"{rate:,.0f}"]
        # The online network, if the target is evaluated; then the run's own.
        for row in own:
            name = NAMES[method] + f", {ONLINE}" * (row["name"] == ONLINE)
            lines.append([name, *accuracies(row, [raw, untrained]), *measured])
    return markdown(COLUMNS, lines)


def main(argv: list[str] | None = None) -> None:
    """Runs missing methods, then prints the table and writes it to the workdir."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", choices=["digits", "cifar10"])
    parser.add_argument("--train", help="CIFAR-10: the packed training images")
    parser.add_argument("--test", help="CIFAR-10: the packed test images")
    parser.add_argument("--workdir", type=Path, default=Path("runs/methods"))
    parser.add_argument("--methods", default=",".join(METHODS))
    args, more = parser.parse_known_args(argv)
    args.changes = config_changes(parser, more)
    if unknown := set(args.methods.split(",")) - set(METHODS):
        parser.error(f"--methods: {', '.join(unknown)}. Choose from {', '.join(METHODS)}.")
    if args.data == "cifar10" and not (args.train and args.test):
        parser.error("--data=cifar10 needs --train and --test")
    if args.data == "cifar10":
        require_images(parser, args)
    train, test = (file and str(Path(file).resolve()) for file in (args.train, args.test))
    setting = {"train": train, "test": test, "changes": args.changes}
    workdirs = {name: args.workdir / f"{name}_{args.data}" for name in args.methods.split(",")}
    with recorded_setting(args.workdir / f"{args.data}.json", setting, f"*_{args.data}/*"):
        for method, workdir in workdirs.items():
            if not (workdir / LAST_FILE).exists():
                run(method, args, workdir)
    text = table(workdirs)
    (args.workdir / f"{args.data}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
