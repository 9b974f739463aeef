"""Draws the results of a run with labels.

    python docs/result.py RUN OUT.png

From the run's own evaluation and pictures: accuracies of the frozen features beside raw pixels and
the untrained network, and held-out images with the training images whose features are nearest.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SCALE = 2  # pixels of a unit, so that screens with dense pixels have sharp type
WIDTH, HEIGHT = 800, 286
INK, GRAY, PAPER, EDGE = "#16202a", "#55616c", "#fbfcfd", "#c6ccd2"
# Told apart by brightness, too.
COLORS = {"raw pixels": "#b9c3cc", "random init": "#e39c37", "trained": "#00619e"}
COLUMNS = ("1 label", "5 labels", "10 labels", "all, linear", "all, kNN")
BASE, TOP, LEFT, GROUP, BAR = 226, 66, 44, 78, 22
SHOWN, SIDE = 5, 30  # rows of neighbors, and the side of an image


class Page:
    """A picture in units."""

    def __init__(self) -> None:
        """An empty card."""
        self.image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.box(0, 0, WIDTH - 0.5, HEIGHT - 0.5, None, EDGE)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: str | None, line: str = ""):
        """A rectangle."""
        corners = [SCALE * value for value in (x0, y0, x1, y1)]
        self.draw.rectangle(corners, fill=fill, outline=line or fill)

    def text(self, x: float, y: float, words: str, size: float = 12, fill=INK, anchor="mm"):
        """Words at a place."""
        font = ImageFont.load_default(size * SCALE)
        self.draw.text((SCALE * x, SCALE * y), words, fill, font, anchor)

    def picture(self, x: float, y: float, pixels: np.ndarray) -> None:
        """An image, at the side of `SIDE`."""
        picture = Image.fromarray(pixels).resize((SIDE * SCALE,) * 2, Image.Resampling.NEAREST)
        self.image.paste(picture, (round(x * SCALE), round(y * SCALE)))


def accuracies(row: dict) -> list[float]:
    """A row's accuracies in percent, in the order of the columns."""
    few = [row[f"labels_{n}"]["mean"] for n in (1, 5, 10)]
    return [100 * value for value in (*few, row["linear"], row["knn"])]


def draw_accuracies(page: Page, evaluation: dict) -> None:
    """Bars from 0, in a group for each way of measuring."""
    title = f"Accuracy on {evaluation['test_examples']:,} held-out images, %"
    page.text(LEFT, 24, title, 14, anchor="lm")
    raw, untrained, *_, trained = evaluation["rows"]  # the online network stands between
    rows = [raw, untrained, trained]
    for number, (row, color) in enumerate(zip(rows, COLORS.values(), strict=True)):
        x = LEFT + 116 * number
        page.box(x, 41, x + 10, 51, color)
        name = "pretrained, frozen" if number == 2 else row["name"]
        page.text(x + 15, 46, name, 11.5, GRAY, "lm")
        for group, value in enumerate(accuracies(row)):
            left = LEFT + GROUP * group + (BAR + 1) * number
            top = BASE - value / 100 * (BASE - TOP - 10)
            page.box(left, top, left + BAR - 1, BASE, color)
            page.text(left + BAR / 2, top - 7, f"{value:.0f}", 10.5, INK)
    page.box(LEFT - 6, BASE, LEFT + 5 * GROUP - 8, BASE + 0.5, INK)
    for group, name in enumerate(COLUMNS):
        page.text(LEFT + GROUP * group + 1.5 * BAR, BASE + 14, name, 11.5)
    page.text(LEFT, 264, "labels per class, of a classifier of the features", 11.5, GRAY, "lm")


def draw_neighbors(page: Page, shown: dict[str, np.ndarray], caption: str) -> None:
    """A held-out image of as many classes as there is room for, and its nearest training images."""
    left = 484
    page.text(left, 24, "Held-out", 14, anchor="lm")
    page.text(left + 76, 24, "Nearest by features", 14, anchor="lm")
    _, first = np.unique(shown["query_label"], return_index=True)
    for number, row in enumerate(first[:SHOWN]):
        y = 42 + (SIDE + 8) * number
        page.picture(left, y, shown["neighbors_query"][row])
        for place, pixels in enumerate(shown["neighbors"][row]):
            page.picture(left + 76 + (SIDE + 6) * place, y, pixels)
    page.text(left, 264, caption, 11.5, GRAY, anchor="lm")


def main(run: Path, out: Path) -> None:
    """Draws the picture of a run."""
    page = Page()
    config = json.loads((run / "config.json").read_text())["config"]
    evaluation = json.loads((run / "evaluation.json").read_text())
    draw_accuracies(page, evaluation)
    with np.load(run / "report_images.npz") as shown:
        draw_neighbors(page, dict(shown), f"{config['method']}, {evaluation['step']:,} steps")
    page.image.quantize(256).save(out, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("out", type=Path, help="the PNG to write")
    args = parser.parse_args()
    if not (args.run / "evaluation.json").is_file():
        parser.error(f"{args.run} has no evaluation.json: the run has not finished")
    main(args.run, args.out)
