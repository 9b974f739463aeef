"""Pictures in the report: views, nearest neighbours, and retrieval's failures."""

import base64
import io
import math
from html import escape

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ssl_jax.report.words import absent

_MAX_GROUPS = 24  # of views, and of queries
_THUMB = 64  # CSS pixels
_OLD = "the run was evaluated before ssl_jax kept them"


def png(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """A picture as the address of its own content."""
    return _address(Image.fromarray(image), "PNG")


def jpeg(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """A photograph as the address of its own content, smaller than as a PNG."""
    return _address(Image.fromarray(image), "JPEG")


def _address(picture: Image.Image, form: str) -> str:
    data = io.BytesIO()
    picture.save(data, form, optimize=True)
    content = base64.b64encode(data.getvalue()).decode("ascii")
    return f"data:image/{form.lower()};base64,{content}"


def thumb(image: UInt8[np.ndarray, "h w 3"], alt: str, caption: str = "", kind: str = "") -> str:
    """An image as a figure, small ones enlarged by whole factors, `caption` is HTML."""
    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    if max(height, width) > 2 * _THUMB:  # twice, for dense screens
        picture.thumbnail((2 * _THUMB, 2 * _THUMB))
    scale = _THUMB / max(height, width)
    scale = math.floor(scale) if scale >= 1 else scale
    source = _address(picture, "PNG" if scale > 1 else "JPEG")
    shown = round(scale * width), round(scale * height)
    return (
        f'<figure class="thumb {kind}">'
        f'<img{" class=small" if scale > 1 else ""} src="{source}" '
        f'alt="{escape(alt)}" width="{shown[0]}" height="{shown[1]}">'
        f"{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>"
    )


def views_section(images: dict[str, np.ndarray]) -> str:
    """Images with the views that training makes of them, as HTML."""
    if "originals" not in images or "views" not in images or not len(images["originals"]):
        return absent("Not there: report_images.npz holds no views.")
    originals, views = images["originals"][:_MAX_GROUPS], images["views"][:_MAX_GROUPS]
    items = "".join(
        "<li>"
        + thumb(original, f"Image {i}, original", kind="first")
        + "".join(thumb(view, f"Image {i}, view {j}") for j, view in enumerate(group, start=1))
        + "</li>"
        for i, (original, group) in enumerate(zip(originals, views, strict=False), start=1)
    )
    return (
        f"<p>Each group is an original image and {views.shape[1]} views of it as training draws "
        f'them.</p><ul class="gallery">{items}</ul>'
    )


def name_html(text: str) -> str:
    """A class's name, which the page cuts short where it is long."""
    return f'<span class="name" title="{escape(text)}">{escape(text)}</span>' if text else ""


def neighbours_section(images: dict[str, np.ndarray]) -> str:
    """Held-out images with the most similar training images, as HTML."""
    names = ("neighbours_query", "neighbours", "neighbour_similarity")
    if any(name not in images for name in names) or not images["neighbours"].size:
        return absent("Not there: report_images.npz holds no neighbours.")
    query, neighbours, similarity = (images[name][:_MAX_GROUPS] for name in names)
    text = (
        "Left of each line a test image, correct of it the training images with the most similar "
        "features and their cosine similarity."
    )
    labels = None
    if {"query_label", "neighbour_label", "class_names"} <= images.keys():
        labels = images["query_label"][:_MAX_GROUPS], images["neighbour_label"][:_MAX_GROUPS]
        correct = labels[1] == labels[0][:, None]
        others = "" if correct.all() else "; the others have a dashed frame, a ✕ and their class"
        text += f" {correct.sum()} of {correct.size} are of the test image's class{others}."
    listed = _queries(query, neighbours, similarity, labels, images.get("class_names"))
    return f"<p>{text}</p>{listed}"


def failures_section(images: dict[str, np.ndarray]) -> str:
    """Held-out images whose nearest training image is of another class, as HTML."""
    if "failures_count" not in images:
        if "neighbours" in images and "query_label" not in images:
            return absent("Not there: without labels no neighbour is wrong.")
        return absent(f"Not there: report_images.npz holds no retrieval failures ({_OLD}).")
    count, asked = int(images["failures_count"]), int(images["failures_asked"])
    told = f"Of {asked:,} held-out images, {count:,} have a nearest training image of another class"
    text = f"<strong>{told} ({100 * count / asked:.1f} %).</strong>"
    if not count:
        return f"<p>{text}</p>"
    query = images["failures_query"][:_MAX_GROUPS]
    shown = "They are" if len(query) == count else f"These are the {len(query)} that are"
    text += f" {shown} shown with their neighbours, the most similar, and so most confident, first."
    labels = images["failures_query_label"], images["failures_neighbour_label"]
    listed = _queries(
        query,
        images["failures_neighbours"],
        images["failures_similarity"],
        labels,
        images.get("class_names"),
    )
    return f"<p>{text}</p>{listed}"


def _queries(
    query: UInt8[np.ndarray, "n h w 3"],
    neighbours: UInt8[np.ndarray, "n k H W 3"],
    similarity: np.ndarray,
    labels: tuple[np.ndarray, np.ndarray] | None,
    class_names: np.ndarray | None,
) -> str:
    """A line for each query with its neighbours; `labels` are its own and theirs."""
    # Without labels no neighbour is wrong, and none has a name.
    correct = np.ones(neighbours.shape[:2], bool)
    own, other = np.full(len(query), ""), np.full(correct.shape, "")
    if labels is not None and class_names is not None:
        label, found = labels
        correct = found == label[:, None]
        own, other = class_names[label], class_names[found]
    items = []
    for i in range(len(query)):
        alt = f"Test image {i + 1}" + (f": {own[i]}" if own[i] else "")
        columns = zip(neighbours[i], similarity[i], other[i], correct[i], strict=True)
        hits = "".join(
            f"<li>{_hit(image, rank, *rest)}</li>" for rank, (image, *rest) in enumerate(columns, 1)
        )
        first = thumb(query[i], alt, name_html(own[i]), "query")
        items.append(f'<li>{first}<ul class="hits">{hits}</ul></li>')
    line = (_THUMB + 8) * neighbours.shape[1] + 96  # so wide is a query with all its neighbours
    return f'<ul class="queries" style="--line:{line}px">{"".join(items)}</ul>'


def _hit(
    image: UInt8[np.ndarray, "h w 3"], rank: int, similarity: float, name: str, correct: bool
) -> str:
    alt = f"Neighbour {rank}, similarity {similarity:.2f}"
    if name:
        alt += f": {name}, {'same' if correct else 'another'} class"
    if correct:
        return thumb(image, alt, f"{similarity:.2f}")
    caption = f'{similarity:.2f} <span class="cross">✕</span>{name_html(name)}'
    return thumb(image, alt, caption, "wrong")
