"""SimCLR v2's three steps on digits: pretrain big, fine-tune on few labels, distill to small.

For each seed, a big and a small network are pretrained on all images without labels and fine-tuned
on the same few labels; the big one then teaches a student of the small one's size on all images
without labels. The small network is fine-tuned at three rates and the best one on the held-out
images is reported, which favors it in the comparison with the student.

    python benchmarks/distillation.py [--seeds=5] [--labels=0.05] [--out=runs/distillation]

Every part is a run in --out: rerun the command until the table is complete.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
BIG, SMALL = 0.25, 0.0625  # widths of a ResNet-18
RATES = (0.005, 0.01, 0.05)  # to fine-tune the small network; the big one uses the middle rate
BRIEF = ("eval.knn_every_epochs=0", "eval.trials=2", "checkpoint.every_epochs=0", "log_every=1000")


def pretrained(width: float, seed: int, epochs: float, out: Path) -> Path:
    """Pretrains SimCLR v2 without memory bank on digits; returns the workdir."""
    from ssl_jax.config import load_config
    from ssl_jax.train import pretrain

    workdir = out / f"pretrain_{width:g}_{seed}"
    if not (workdir / "evaluation.json").exists():
        changes = (
            f"seed={seed}",
            f"model.width={width}",
            f"epochs={epochs}",
            "simclr.memory_bank=0",
        )
        config = load_config(str(ROOT / "configs" / "simclrv2_digits.py"), [*changes, *BRIEF])
        pretrain(config, workdir)
    return workdir


def accuracy(workdir: Path, train: Any) -> float:
    """Top-1 accuracy of a run with a classifier; `train` trains it if it is missing."""
    if not (workdir / "evaluation.json").exists():
        train()
    result = json.loads((workdir / "evals" / "classifier.json").read_text())
    return float(result["metrics"]["top1"]["value"])


def finetuned(run: Path, seed: int, rate: float, args: argparse.Namespace) -> tuple[Path, float]:
    """Fine-tunes on few labels, the same for all networks; returns workdir and accuracy."""
    from ssl_jax.downstream import finetune

    workdir = run.with_name(f"{run.name}_finetune_{rate:g}")
    changes = (f"seed={seed}", f"data.subset_seed={seed}", f"optim.lr={rate}", "batch_size=32")
    overrides = (*changes, f"epochs={args.finetune_epochs}", *BRIEF)
    found = accuracy(
        workdir, lambda: finetune(run, workdir, labels=args.labels, overrides=overrides)
    )
    return workdir, found


def student(teacher: Path, seed: int, args: argparse.Namespace) -> float:
    """Distills into the small network on all images without labels; returns its accuracy."""
    from ssl_jax.downstream import distill

    workdir = args.out / f"student_{seed}"
    warmup = args.distill_epochs / 20
    changes = (f"seed={seed}", f"model.width={SMALL}", "batch_size=128")
    changes += ("optim.weight_decay=1e-6", "distill.temperature=1.0")
    overrides = (*changes, f"epochs={args.distill_epochs}", f"optim.warmup_epochs={warmup}", *BRIEF)
    return accuracy(workdir, lambda: distill(teacher, workdir, overrides=overrides))


def main() -> None:
    """Runs missing parts and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--labels", type=float, default=0.05)
    parser.add_argument("--epochs", type=float, default=100.0)
    parser.add_argument("--finetune-epochs", type=float, default=60.0)
    parser.add_argument("--distill-epochs", type=float, default=100.0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "distillation")
    args = parser.parse_args()
    from ssl_jax.cli.backend import tune_cpu

    tune_cpu()
    from ssl_jax.evals.intervals import mean_interval

    rows = []
    for seed in range(args.seeds):
        big, small = (pretrained(w, seed, args.epochs, args.out) for w in (BIG, SMALL))
        teacher, teacher_accuracy = finetuned(big, seed, RATES[1], args)
        direct = max(finetuned(small, seed, rate, args)[1] for rate in RATES)
        rows.append((teacher_accuracy, direct, student(teacher, seed, args)))
    teachers, direct, students = 100 * np.array(rows).T
    columns = {
        "big, fine-tuned": teachers,
        "small, fine-tuned (best of three rates)": direct,
        "small, distilled from the big one": students,
        "distilled over fine-tuned": students - direct,
    }
    print("| | top-1, mean of seeds | by seed |")
    print("| --- | --- | --- |")
    for name, values in columns.items():
        mean, half = mean_interval(values)
        each = ", ".join(f"{value:.1f}" for value in values)
        print(f"| {name} | {mean:.1f} ± {half:.1f} | {each} |")


if __name__ == "__main__":
    main()
