"""Draws the curves of runs: loss, kNN accuracy, embedding_std and RankMe over steps.

    python benchmarks/curves_picture.py --out=FILE.png runs/methods/*_digits

A column per run. `benchmarks/curves.py` draws its comparison with lightly by the same function,
over epochs: a line per implementation, the mean over seeds, in a band from lowest to highest.
"""

import argparse
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ssl_jax import methods
from ssl_jax.run.log import read_metrics

# A run's curves: steps or epochs, and values, by metric. A panel: the runs of each label.
Curve = Mapping[str, tuple[Sequence[float], Sequence[float]]]
Panel = Mapping[str, Sequence[Curve]]
ROWS = {"loss": "loss", "knn": "kNN, %", "embedding_std": "embedding_std", "rankme": "RankMe"}
COLORS = ("#00619e", "#e39c37")
INK, GRAY = "#16202a", "#c6ccd2"
WIDTH, HEIGHT, DPI = 2.0, 1.7, 150  # inches of a plot
POINTS = 300  # per curve; longer ones are averaged in groups


def read_run(workdir: Path) -> Curve:
    """Reads the curves of an ssl_jax run over its steps; accuracies in percent."""
    records = read_metrics(workdir / "metrics.jsonl")
    curve = {}
    for name in ROWS:
        found = [(r["step"], r[name]) for r in records if name in r]
        if found:
            x, y = np.array(found, float).T
            curve[name] = thinned(x, 100 * y if name == "knn" else y)
    return curve


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of groups of neighboring points, at most `POINTS`."""
    size = -(-len(x) // POINTS)
    ends = range(0, len(x), size)
    return (
        np.array([x[i : i + size].mean() for i in ends]),
        np.array([y[i : i + size].mean() for i in ends]),
    )


def draw(panels: Mapping[str, Panel], file: Path, x_label: str) -> None:
    """Draws a column per panel and a row per metric that any run has, as a PNG."""
    curves = [c for panel in panels.values() for each in panel.values() for c in each]
    rows = [name for name in ROWS if any(name in curve for curve in curves)]
    size = (WIDTH * len(panels) + 0.5, HEIGHT * len(rows) + 0.4)
    figure = Figure(size, dpi=DPI, layout="constrained")
    axes = figure.subplots(len(rows), len(panels), squeeze=False, sharex="col")
    for column, (title, panel) in enumerate(panels.items()):
        for row, name in enumerate(rows):
            draw_lines(axes[row, column], panel, name)
            if column == 0:
                axes[row, 0].set_ylabel(ROWS[name], fontsize=8, color=INK)
        axes[0, column].set_title(title, fontsize=9, color=INK)
        axes[-1, column].set_xlabel(x_label, fontsize=8, color=INK)
    labels = axes[0, 0].get_legend_handles_labels()
    if len(labels[1]) > 1:
        figure.legend(*labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    Image.open(buffer).convert("RGB").quantize(64).save(file, "PNG", optimize=True)


def draw_lines(axes: Axes, panel: Panel, name: str) -> None:
    """Draws a metric's line per label: the mean over seeds, and the range as a band."""
    for (label, seeds), color in zip(panel.items(), COLORS, strict=False):
        measured = [curve[name] for curve in seeds if name in curve]
        if not measured:
            continue
        x = measured[0][0]
        y = np.array([values for _, values in measured])
        marker = "o" if len(x) < 10 else None
        axes.plot(x, y.mean(0), color=color, label=label, lw=1.2, marker=marker, ms=2.5)
        axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.25, lw=0)
    axes.tick_params(labelsize=7, color=GRAY, labelcolor=INK)
    axes.grid(color=GRAY, lw=0.4)
    for spine in axes.spines.values():
        spine.set_color(GRAY)


def title(workdir: Path) -> str:
    """The method of a run."""
    config: Any = json.loads((workdir / "config.json").read_text())["config"]
    name = config["method"]
    second = name == "simclr" and config["simclr"]["layers"] == 3
    return methods.title(name) + " v2" * second


def main() -> None:
    """Draws the picture of some runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    parser.add_argument("workdirs", type=Path, nargs="+")
    args = parser.parse_args()
    for folder in args.workdirs:
        if not (folder / "config.json").is_file():
            parser.error(f"there is no run in {folder}: it has no config.json")
    titles = [title(folder) for folder in args.workdirs]
    if len(set(titles)) < len(titles):  # runs of one method
        titles = [f"{name}, {folder}" for name, folder in zip(titles, args.workdirs, strict=True)]
    runs = zip(titles, args.workdirs, strict=True)
    panels = {name: {"": [read_run(folder)]} for name, folder in runs}
    draw(panels, args.out, "step")


if __name__ == "__main__":
    main()
