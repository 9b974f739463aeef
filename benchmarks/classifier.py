"""Time of the linear classifier on frozen features, and estimates for all of ImageNet.

Features are ReLUs of class centers and noise, whose variance falls from direction to direction as
that of an encoder's features. Times are medians without compilation. "Preparation" is everything
but L-BFGS: copies, principal axes, projection. FLOPs are 4·n·d·classes per evaluation of the
objective and its gradient. The last line is the evaluation at the end of a run on ImageNet, one
row of its table: a probe of as many images as the config allows, and for each number of labels as
many trials; one of each is timed, compilation included.

    python benchmarks/classifier.py [--sizes=50000x512x10,20000x2048x1000] [--penalty=1e-4]
        [--rounds=3] [--end=50000x2048x1000]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

IMAGENET = (1_281_167, 2048, 1000)
COLUMNS = ("features", "classes", "seconds", "preparation", "evaluations", "TFLOP", "TFLOP/s")


def random_features(n: int, d: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns features, float32 [n, d], and labels, int64 [n]; classes overlap."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(n) % classes)
    centers = rng.normal(size=(classes, d)).astype(np.float32)
    x = rng.normal(size=(n, d)).astype(np.float32)
    x += centers[labels] / 2
    x *= np.arange(1, d + 1, dtype=np.float32)[None, :] ** -0.5
    rotation, _ = np.linalg.qr(rng.normal(size=(d, d)))
    return np.maximum(x @ rotation.astype(np.float32), 0), labels


def flops(n: int, d: int, classes: int) -> float:
    """FLOPs of an evaluation of the objective and its gradient."""
    return 4.0 * n * d * classes


def memory(n: int, d: int, classes: int) -> float:
    """GB over all devices: the features and about three arrays of the logits' size."""
    return 4e-9 * n * (d + 3 * classes)


def seconds_of(function: Callable[[], Any], rounds: int) -> float:
    """Returns the median of the seconds of several calls."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def measure(size: tuple[int, int, int], penalty: float, rounds: int) -> dict[str, Any]:
    """Returns seconds of a fit and of its preparation, evaluations and FLOP/s in L-BFGS."""
    from ssl_jax.evals import fit_linear

    x, y = random_features(*size)

    def fit(iterations: int) -> Any:
        return fit_linear(
            x,
            y,
            num_classes=size[2],
            penalties=[penalty],
            max_iterations=iterations,
            tolerance=1e-5,  # that of a run's probe
        )

    fit(1)  # compiles
    preparation = seconds_of(lambda: fit(0), rounds)
    models: list[Any] = []
    seconds = seconds_of(lambda: models.append(fit(500)), rounds)
    evaluations = models[-1].evaluations
    work = evaluations * flops(*size)
    rate = work / max(seconds - preparation, 1e-9)  # in a toy run, noise may be more than the fit
    row = {"size": size, "seconds": seconds, "preparation": preparation}
    return row | {"evaluations": evaluations, "flops": work, "rate": rate}


def cells(row: dict[str, Any]) -> list[str]:
    """Formats a row of the table."""
    n, d, classes = row["size"]
    return [
        *(f"{n:,} × {d:,}", f"{classes:,}", f"{row['seconds']:.3g}", f"{row['preparation']:.3g}"),
        *(f"{row['evaluations']}", f"{row['flops'] / 1e12:.3g}", f"{row['rate'] / 1e12:.3g}"),
    ]


def estimate(row: dict[str, Any], fits: int) -> str:
    """Describes the same fits on ImageNet's training images, at a measured rate."""
    n, d, classes = IMAGENET
    work = row["evaluations"] * flops(*IMAGENET)
    measured = " × ".join(f"{number:,}" for number in row["size"])
    minutes = (work / row["rate"] + row["preparation"] * n / row["size"][0]) / 60
    return (
        f"{n:,} × {d:,} features of {classes:,} classes: {work / 1e12:,.0f} TFLOP per fit with "
        f"{row['evaluations']} evaluations, {minutes:,.0f} minutes with preparation at the rates "
        f"of {measured}; {fits} fits with the choice of a penalty; {memory(*IMAGENET):.0f} GB over "
        "all devices."
    )


def end_of_run(size: tuple[int, int, int]) -> str:
    """Times a row of the table at the end of a run; trials are timed once and multiplied."""
    from ssl_jax.config import default_config
    from ssl_jax.evals.linear import few_label_accuracies, linear_probe

    options = default_config().eval
    x, y = random_features(2 * size[0], *size[1:])
    data = (x[: size[0]], y[: size[0]], x[size[0] :])
    whole = seconds_of(lambda: linear_probe(*data), 1)
    parts, total = [f"{whole:,.1f} s for the probe"], whole
    for count in options.labels_per_class:

        def trial(count: int = count) -> Any:
            return few_label_accuracies(
                *data, y[size[0] :], labels_per_class=count, trials=1, seed=0
            )

        once = seconds_of(trial, 1)
        parts.append(f"{once:,.1f} s per trial of {count}")
        total += options.trials * once
    shape = " × ".join(f"{number:,}" for number in size)
    return (
        f"End of a run, {shape}, as many held-out images: {', '.join(parts)}; with "
        f"{options.trials} trials {total / 60:,.1f} minutes per row."
    )


def sizes(text: str) -> list[tuple[int, int, int]]:
    """Parses "50000x512x10,20000x2048x1000": images, width of the features, classes."""
    parsed = [tuple(map(int, part.split("x"))) for part in text.split(",") if part]
    if any(len(size) != 3 for size in parsed):
        raise argparse.ArgumentTypeError("give each size as IMAGESxWIDTHxCLASSES")
    return [(n, d, classes) for n, d, classes in parsed]


def main() -> None:
    """Prints the table as Markdown, and the estimate from its last row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=sizes, default="50000x512x10,20000x2048x1000")
    parser.add_argument("--penalty", type=float, default=1e-4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--end", type=sizes, default="50000x2048x1000", help="may be empty")
    args = parser.parse_args()
    from ssl_jax.evals.linear import PENALTIES

    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for size in args.sizes:
        row = measure(size, args.penalty, args.rounds)
        print("| " + " | ".join(cells(row)) + " |", flush=True)
    print("\n" + estimate(row, len(PENALTIES) + 1), flush=True)
    for size in args.end:
        print("\n" + end_of_run(size))


if __name__ == "__main__":
    main()
