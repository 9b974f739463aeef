"""The map of held-out images by their features: a picture that a script makes answer."""

import json
import math
from html import escape

import numpy as np
from jaxtyping import Float, UInt8

from ssl_jax.evals.pictures import contact_sheet
from ssl_jax.report.images import jpeg, png
from ssl_jax.report.words import absent

COLOURS = 8
_SIZE, _MARGIN = 400.0, 14.0
_SMALL = 16  # pixels of an image that a JPEG would blur
# Ten marks around (0, 0): classes are told apart by these too.
_MARKS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.6-3.6h7.2v7.2h-7.2z",
    "M0-4.8L4.5 3.4h-9z",
    "M-4.5-3.4h9L0 4.8z",
    "M0-5.2L4.4 0 0 5.2-4.4 0z",
    "M-1.4-4.5h2.8v3.1h3.1v2.8h-3.1v3.1h-2.8v-3.1h-3.1v-2.8h3.1z",
    "M-4.2-2.2l2-2L0-2l2.2-2.2 2 2L2 0l2.2 2.2-2 2L0 2l-2.2 2.2-2-2L-2 0z",
    "M0-5.6L1.5-1.5 5.6 0 1.5 1.5 0 5.6-1.5 1.5-5.6 0-1.5-1.5z",
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0zM-2 0a2 2 0 1 0 4 0a2 2 0 1 0-4 0z",
    "M-4-4h8v8h-8zM-2-2v4h4v-4z",
)
_HELD = ("map_images", "map_positions", "map_neighbour", "map_similarity")


def map_section(images: dict[str, np.ndarray], encoder: str) -> str:
    """The map of a run's encoder, beside the untrained one's where there is that, as HTML.

    Args:
      images: of `report_images.npz`.
      encoder: its name.
    """
    if any(name not in images for name in _HELD):
        return absent(
            "Not there: report_images.npz holds no map (the run was evaluated before ssl_jax drew "
            "them, or has no held-out images)."
        )
    if not np.isfinite(images["map_positions"]).all():
        return absent("Not drawn: the features are not all finite numbers.")
    labels, names = images.get("map_label"), [str(n) for n in images.get("class_names", ())]
    maps = [(encoder, images["map_positions"])]
    if np.isfinite(images.get("map_untrained", np.nan)).all():
        maps.append(("random init", images["map_untrained"]))
    count = len(images["map_images"])
    text = (
        f"{count:,} held-out images, placed by t-SNE so that images with similar features lie near "
        "each other; distances between groups, and the axes, mean nothing."
    )
    shown = [] if labels is None else sorted({int(label) for label in labels})
    if labels is None:
        text += " There are no labels to colour them by."
    elif len(shown) < len(names):
        text += f" Shown are {len(shown)} of the {len(names):,} classes."
    looks = {label: i for i, label in enumerate(shown)}
    figures = "".join(
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3></figcaption>'
        f"{_map_svg(title, positions, labels, names, looks)}</figure>"
        for title, positions in maps
    )
    return (
        f'<p>{escape(text)} <span class="scripted">Point at, tap, or move by the arrow keys to see '
        "an image and those nearest to it by the features of "
        f"{escape(encoder)}.</span></p>{_legend(names, looks)}"
        f'<div class="pairs maps">{figures}</div>'
        f'<div class="panel" aria-live="polite" hidden></div>{_data(images, labels, names)}'
    )


def _mark(look: int) -> str:
    return _MARKS[look % len(_MARKS)]


def _map_svg(
    title: str,
    positions: Float[np.ndarray, "n 2"],
    labels: np.ndarray | None,
    names: list[str],
    looks: dict[int, int],
) -> str:
    low, high = positions.min(axis=0), positions.max(axis=0)
    scale = (_SIZE - 2 * _MARGIN) / max(float((high - low).max()), 1e-12)
    placed = _SIZE / 2 + (positions - (low + high) / 2) * scale
    parts = []
    for i, (x, y) in enumerate(placed):
        look = 0 if labels is None else looks[int(labels[i])]
        name = f"image {i + 1}" if labels is None else names[int(labels[i])]
        parts.append(
            f'<path class="pt k{look % COLOURS}" transform="translate({x:.1f} {y:.1f})" '
            f'd="{_mark(look)}"><title>{escape(name)}</title></path>'
        )
    for label, look in looks.items():
        x, y = np.median(placed[labels == label], axis=0)
        name = names[label] if len(names[label]) <= 12 else names[label][:11] + "…"
        parts.append(
            f'<text class="where k{look % COLOURS}" x="{x:.1f}" y="{y + 5:.1f}" '
            f'text-anchor="middle" aria-hidden="true">{escape(name)}</text>'
        )
    described = f"Map of {len(placed)} images by the features of {title}"
    if looks:
        described += f", coloured by {len(looks)} classes"
    return (
        f'<svg class="map" viewBox="0 0 {_SIZE:g} {_SIZE:g}" role="img" '
        f'aria-label="{escape(described)}">{"".join(parts)}</svg>'
    )


def _legend(names: list[str], looks: dict[int, int]) -> str:
    if not looks:
        return ""
    items = "".join(
        f'<li><svg viewBox="-7 -7 14 14" aria-hidden="true"><path class="pt k{look % COLOURS}" '
        f'd="{_mark(look)}"/></svg>{escape(names[label])}</li>'
        for label, look in looks.items()
    )
    return f'<ul class="legend marks">{items}</ul>'


def _data(images: dict[str, np.ndarray], labels: np.ndarray | None, names: list[str]) -> str:
    """What the script shows: one picture of all images, and who is near whom."""
    thumbs: UInt8[np.ndarray, "n s s 3"] = images["map_images"]
    small = thumbs.shape[1] <= _SMALL
    sheet = (png if small else jpeg)(contact_sheet(thumbs))
    data = {
        "sheet": sheet,
        "columns": math.isqrt(len(thumbs) - 1) + 1,
        "pixelated": small,
        "names": names,
        "labels": [] if labels is None else labels.tolist(),
        "near": images["map_neighbour"].tolist(),
        "similarity": [[round(float(s), 3) for s in row] for row in images["map_similarity"]],
    }
    # No tag may begin inside it.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="map">{text}</script>'
