"""Every method on one data set with one network: a table beside raw pixels and random features.

Each method is a run of its own under --workdir, continued if it was broken off and not repeated if
it is done, so the command may be given again until the table is complete.

    python benchmarks/methods.py [--data=digits] [--workdir=runs/methods] [--methods=simclr,moco]
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from ssl_jax.metrics import read_metrics

ROOT = Path(__file__).parent.parent
METHODS = ("simclr", "simclrv2", "moco", "swav", "byol", "simsiam", "supervised")
NAMES = {
    "simclr": "SimCLR v1",
    "simclrv2": "SimCLR v2 (memory)",
    "moco": "MoCo v2",
    "swav": "SwAV",
    "byol": "BYOL",
    "simsiam": "SimSiam",
    "supervised": "Supervised, all labels",
}
COLUMNS = ("", "5 labels", "10 labels", "full linear", "kNN", "std·√d", "RankMe", "images/s")


def run(method: str, data: str, workdir: Path) -> None:
    """Trains and evaluates one method, or continues."""
    command = [sys.executable, str(ROOT / "run_pretrain.py")]
    command += [f"--config={ROOT / 'configs' / f'{method}_{data}.py'}", f"--workdir={workdir}"]
    print("$", *command, flush=True)
    if subprocess.run(command).returncode:
        sys.exit(f"{method} failed; what it said is above.")


def accuracies(row: dict) -> list[str]:
    """The cells of an evaluation row, in percent."""
    few = [100 * row[key]["mean"] for key in ("labels_5", "labels_10")]
    return [f"{value:.1f}" for value in [*few, 100 * row["linear"], 100 * row["knn"]]]


def table(workdirs: dict[str, Path]) -> str:
    """The finished runs as a Markdown table; baselines are of the first run."""
    lines: list[list[str]] = []
    for method, workdir in workdirs.items():
        file = workdir / "evaluation.json"
        if not file.exists():
            continue
        raw, untrained, trained = json.loads(file.read_text())["rows"]
        if not lines:
            lines += [[row["name"], *accuracies(row), "", "", ""] for row in (raw, untrained)]
        records = read_metrics(workdir / "metrics.jsonl")
        last = {key: value for record in records for key, value in record.items()}
        rate = statistics.median(r["images_per_s"] for r in records if "images_per_s" in r)
        measured = [f"{last['embedding_std']:.2f}", f"{last['rankme']:.1f}", f"{rate:,.0f}"]
        lines.append([NAMES[method], *accuracies(trained), *measured])
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    """Runs what is not done yet, then prints the table and writes it to the workdir."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", choices=["digits"])
    parser.add_argument("--workdir", type=Path, default=Path("runs/methods"))
    parser.add_argument("--methods", default=",".join(METHODS))
    args = parser.parse_args()
    workdirs = {name: args.workdir / f"{name}_{args.data}" for name in args.methods.split(",")}
    for method, workdir in workdirs.items():
        if not (workdir / "evaluation.json").exists():
            run(method, args.data, workdir)
    text = table(workdirs)
    (args.workdir / f"{args.data}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
