"""A picture of what a config's augmentation makes of images, for a person to check it.

`collect` asks the same functions with the same keys as training does, so that what is shown is
what a step sees; `draw` lays it out.
"""

import dataclasses
import math
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ssl_jax.config import flat_views
from ssl_jax.config import view as view_config
from ssl_jax.data.augment import draw_parameters
from ssl_jax.data.device_crop import draw_geometry, view_corners
from ssl_jax.data.index import Index, view_keys, views_stream
from ssl_jax.data.pipeline import make_augment_fn, unnormalised
from ssl_jax.data.sources import Source, make_sources
from ssl_jax.errors import UserError
from ssl_jax.files import asked_for

# What was drawn for one image in one view: `draw_parameters`, `draw_geometry` or a host's box.
Drawn = dict[str, np.ndarray]
Picture = UInt8[np.ndarray, "height width 3"]
Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_JITTERS = ("brightness", "contrast", "saturation", "hue")  # as "order" numbers them
_BOX = ("top", "left", "height", "width")
_LEGEND = {
    "crop": "crop left,top width x height, in pixels of the original",
    "turn": "turn clockwise, in degrees",
    "shear": "shear in degrees",
    "shift": "shift right,down in pixels of the original",
    "jitter": "jitter in the order applied: b brightness, c contrast, s saturation, h hue",
    "blur": "blur sigma in pixels of the view",
    "solarize": "solarize from this brightness on",
    "noise": "noise standard deviation",
}

_MARGIN, _GAP = 36, 20
_SIDE = 160  # pixels that small images are enlarged to, about
_COLUMN = 160  # least width, so that the text below a small view has room
_ORIGINAL = 512  # most pixels along a side that an original on disk is read with
_ROUNDING = 1e-3  # of outlines, as a fraction of the image
_SMOOTH = 3  # outlines are drawn this many times as large
_TITLE, _HEAD, _NOTE = 22, 15, 12  # sizes of the type
_INK, _GRAY = (32, 36, 42), (112, 118, 128)
_FRAME, _OUTSIDE = (214, 217, 222), (240, 242, 245)
# Told apart by people with any colour vision (Okabe and Ito's, without the lightest and black).
_COLOURS = (
    *((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167)),
    *((230, 159, 0), (86, 180, 233), (128, 92, 48), (120, 94, 240)),
)


@runtime_checkable
class _CropsOnHost(Protocol):
    """A source that cuts the views out of images which stay on the host."""

    def boxes(
        self, step: int, ids: Sequence[int] | np.ndarray
    ) -> tuple[Int[np.ndarray, "n views 4"], Int[np.ndarray, "n 2"]]: ...


@dataclasses.dataclass(frozen=True)
class View:
    """One view of every image.

    Attributes:
      title: its name in `config.views`, numbered where there are several of it.
      pixels: as training sees them, but not normalised.
      corners: (y, x) of what it shows, as fractions of the original's height and width, clockwise
        from the view's top left.
      notes: what was done to each image.
    """

    title: str
    pixels: Float[np.ndarray, "n size size 3"]
    corners: Float[np.ndarray, "n 4 2"]
    notes: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Some images of a step's batch and their views.

    Attributes:
      ids: of the images.
      labels: their classes' names; "" where there are none.
      originals: the images; large ones of a host source are made smaller.
      sizes: (height, width) of the images as they are.
      views: in the order of `config.flat_views`.
    """

    ids: Int[np.ndarray, " n"]
    labels: tuple[str, ...]
    originals: tuple[Picture, ...]
    sizes: Int[np.ndarray, "n 2"]
    views: tuple[View, ...]


def write_views(
    config: ConfigDict, out: str | Path, *, images: int = 8, step: int = 0, command: str = ""
) -> int:
    """Draws images of the training set and their views into a PNG file.

    Args:
      config: of a run.
      out: the file.
      images: rows, at most the batch.
      step: whose views, counted from 0.
      command: to print above them.

    Returns:
      How many images were drawn.

    Raises:
      UserError: a file that is not a .png or can't be written, no images or a step before the
        first, or whatever is wrong with the config's data and views.
    """
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise UserError(f"The picture is to be {out}: give --out a name that ends in .png.")
    if not out.parent.is_dir():  # before seconds are spent on what can't be written
        raise UserError(f"{out} can't be written: there is no folder {out.parent}, make it first.")
    if images < 1:
        raise UserError(f"--images is {images}: draw at least 1.")
    if step < 0:
        raise UserError(f"--step is {step}: the first step is 0.")
    samples = collect(config, images, step)
    data = config.data.dataset if config.data.name == "tfds" else config.data.name
    title = f"Views of {data} at step {step}"
    picture = draw(samples, title, command)
    with asked_for(out) as file:
        picture.save(file, "PNG")
    return len(samples.ids)


def collect(config: ConfigDict, images: int, step: int) -> Samples:
    """The first images of a step's batch with the views that training makes of them.

    Args:
      config: of a run. Its batch may be larger than the data set.
      images: how many, at most the batch.
      step: counted from 0.

    Returns:
      What is to be drawn.

    Raises:
      UserError: whatever is wrong with the config's data and views.
    """
    source, _ = make_sources(config)
    batch_size = min(config.batch_size, source.num_examples)
    ids = Index(source.num_examples, batch_size, config.seed).ids(step)[:images]
    raw = next(source.batches(iter([(step, ids)])))
    key = views_stream(jax.random.key(config.seed), step)
    batch = jax.jit(make_augment_fn(unnormalised(config)))(raw, source.device_data(), key)
    boxes: Int[np.ndarray, "n views 4"] | None = None
    if isinstance(source, _CropsOnHost):
        boxes, sizes = source.boxes(step, ids)
        originals = _whole_images(config, ids, sizes)
    else:
        originals = tuple(source.eval_transform(ids))
        sizes = np.array([image.shape[:2] for image in originals])
    draws = _draws(key, jnp.asarray(ids), sizes, flat_views(config), boxes)
    views = [
        View(title, np.asarray(pixels), corners / sizes[:, None], notes)
        for title, pixels, (corners, notes) in zip(
            _titles(config), batch["views"], draws, strict=True
        )
    ]
    return Samples(ids, _labels(source, raw), originals, sizes, tuple(views))


def _titles(config: ConfigDict) -> list[str]:
    """The names of `config.flat_views`."""
    counts = {name: config.views[name].count for name in sorted(config.views)}
    return [
        name if count == 1 else f"{name} {number}"
        for name, count in counts.items()
        for number in range(1, count + 1)
    ]


def _labels(source: Source, raw: dict[str, Any]) -> tuple[str, ...]:
    names = source.class_names
    return tuple(
        names[label] if label < len(names) else f"class {label}" for label in raw.get("label", ())
    ) or ("",) * len(raw["id"])


def _whole_images(
    config: ConfigDict, ids: Int[np.ndarray, " n"], sizes: Int[np.ndarray, "n 2"]
) -> tuple[Picture, ...]:
    """Images that are cropped on the host, uncropped; large ones smaller."""
    # As the one view of a source that is otherwise the same: its view is the whole image, pressed
    # into a square, which the images' sizes undo.
    side = min(int(sizes.max()), _ORIGINAL)
    whole = ConfigDict(config.to_dict())
    whole.views = {"whole": view_config(size=side, crop={"sampler": "none"})}
    source, _ = make_sources(whole)
    (squares,) = next(source.batches(iter([(0, ids)])))["views"]
    images = []
    for square, size in zip(squares, sizes, strict=True):
        height, width = np.maximum(1, np.round(size * min(1, side / size.max()))).astype(int)
        images.append(np.asarray(Image.fromarray(square).resize((width, height))))
    return tuple(images)


def _draws(
    key: Key[Array, ""],
    ids: Int[Array, " n"],
    sizes: Int[np.ndarray, "n 2"],
    views: Sequence[ConfigDict],
    boxes: Int[np.ndarray, "n views 4"] | None,
) -> list[tuple[Float[np.ndarray, "n 4 2"], tuple[tuple[str, ...], ...]]]:
    """For each view, its corners in pixels of the images, and the notes of each image.

    The boxes are those that a host has drawn; None where they are drawn on the device.
    """
    height, width = (int(side) for side in sizes[0])  # on the device all are of one size

    def draw(
        key: Key[Array, ""], number: int, view: ConfigDict
    ) -> tuple[dict[str, Array], Float[Array, "n 4 2"]]:
        keys = view_keys(key, ids, number)
        if boxes is None:
            geometry = jax.vmap(lambda key: draw_geometry(key, height, width, view))(keys)
        else:
            geometry = {name: jnp.asarray(boxes[:, number, i]) for i, name in enumerate(_BOX)}
        colours = jax.vmap(lambda key: draw_parameters(key, view))(keys)
        colours.pop("noise_key", None)  # which tells nothing
        return {**geometry, **colours}, view_corners(geometry, height, width)

    all_draws = jax.jit(lambda key: [draw(key, *view) for view in enumerate(views)])(key)
    made = []
    for view, (drawn, corners) in zip(views, jax.device_get(all_draws), strict=True):
        images = [{name: values[i] for name, values in drawn.items()} for i in range(len(sizes))]
        made.append((corners, tuple(describe(image, view) for image in images)))
    return made


def describe(drawn: Drawn, view: ConfigDict) -> tuple[str, ...]:
    """What was done to one image, in the order in which it was done.

    Args:
      drawn: for this image, by the names of `augment.draw_parameters` and
        `device_crop.draw_geometry`.
      view: config of the view.

    Returns:
      One short text for each thing that changed the image.
    """
    gray = ["gray"] if drawn["gray"] else []
    notes = _describe_geometry(drawn, view)
    notes += ["flip"] if drawn["flip"] else []
    notes += gray if view.gray_first else []
    notes += _describe_jitter(drawn, view.jitter) if drawn["jitter"] else []
    notes += [] if view.gray_first else gray
    notes += [f"blur {drawn['sigma']:.2f}"] if drawn["blur"] else []
    notes += [f"solarize {view.solarize.threshold:g}"] if drawn["solarize"] else []
    notes += [f"noise {view.noise:g}"] if view.noise > 0 else []
    return tuple(notes)


def _describe_geometry(drawn: Drawn, view: ConfigDict) -> list[str]:
    notes = []
    if view.crop.sampler != "none":
        top, left, height, width = (drawn[name] for name in _BOX)
        notes.append(f"crop {left},{top} {width}x{height}")
    if view.affine.degrees:
        notes.append(f"turn {drawn['degrees']:z.0f}°")
    if view.affine.shear:
        notes.append(f"shear {drawn['shear']:z.0f}°")
    if view.affine.translate:
        notes.append(f"shift {drawn['shift_x']:z.1f},{drawn['shift_y']:z.1f}")
    return notes


def _describe_jitter(drawn: Drawn, jitter: ConfigDict) -> list[str]:
    """The factors of the jitter in the order of this image; those that are never drawn left out."""
    names = [_JITTERS[which] for which in drawn["order"]]
    signed = {"hue"} | ({"brightness"} if jitter.brightness_mode == "add" else set())
    words = [
        f"{name[0]}{drawn[name]:{'+z' if name in signed else ''}.2f}"
        for name in names
        if jitter[name] > 0
    ]
    return [" ".join(["jitter", *words])] if words else []


def draw(samples: Samples, title: str, command: str = "") -> Image.Image:
    """Lays out originals, a row each, and their views in columns, what was drawn below each.

    Small images are enlarged by whole factors; large views have their own pixels. What a view shows
    is outlined on the original in the view's colour.

    Args:
      samples: of `collect`.
      title: of the picture.
      command: that made it; "" for none.

    Returns:
      An RGB image.
    """
    sizes = [view.pixels.shape[1] for view in samples.views]
    columns = [_original_column(samples, max(_zoom(size) * size for size in sizes))]
    columns += [_view_column(view, _colour(i)) for i, view in enumerate(samples.views)]
    table = _grid(list(zip(*columns, strict=True)))
    shown = {note.split()[0] for view in samples.views for notes in view.notes for note in notes}
    legend = [text for word, text in _LEGEND.items() if word in shown]
    head = [_text([title], _TITLE, _INK, table.width)]
    head += [_text(command.split(), _NOTE, _GRAY, table.width, " ")] if command else []
    page = _stack([_stack(head, 8), table, _text(legend, _NOTE, _GRAY, table.width)], _MARGIN)
    return ImageOps.expand(page, _MARGIN, "white")


def _original_column(samples: Samples, side: int) -> list[Image.Image]:
    """The head and the cells of the originals, outlined."""
    corners = np.stack([view.corners for view in samples.views], axis=1)
    # Affine views reach out of the image: so far, as a fraction of its side.
    beyond = max(-corners.min(), corners.max() - 1)
    shown = [
        _framed(_outlined(_fitted(original, side), quads, beyond))
        for original, quads in zip(samples.originals, corners, strict=True)
    ]
    width = max(_COLUMN, *(image.width for image in shown))
    cells = [_head("original", "with the outlines of its views", _INK, width)]
    for row, image in enumerate(shown):
        tall, wide = samples.sizes[row]
        lines = [_text([f"image {samples.ids[row]}", f"{wide}x{tall}"], _NOTE, _GRAY, width)]
        if label := samples.labels[row]:
            lines.insert(0, _text(label.split(), _HEAD, _INK, width, " "))
        cells.append(_stack([image, _stack(lines, 2)], 6))
    return cells


def _view_column(view: View, colour: Colour) -> list[Image.Image]:
    """The head and the cells of a view."""
    size = view.pixels.shape[1]
    zoom = _zoom(size)
    width = max(zoom * size + 2, _COLUMN)  # with its frame
    scale = f", enlarged x{zoom}" if zoom > 1 else ""
    cells = [_head(view.title, f"{size} px{scale}", colour, width)]
    for pixels, notes in zip(view.pixels, view.notes, strict=True):
        image = Image.fromarray(np.round(255 * pixels).astype(np.uint8))
        shown = _framed(image.resize((zoom * size, zoom * size), Image.Resampling.NEAREST))
        cells.append(_stack([shown, _text(notes or ["unchanged"], _NOTE, _INK, width)], 6))
    return cells


def _head(title: str, about: str, colour: Colour, width: int) -> Image.Image:
    """What stands above a column."""
    lines = [_text(title.split(), _HEAD, _INK, width, " "), _text([about], _NOTE, _GRAY, width)]
    return _stack([Image.new("RGB", (width, 4), colour), _stack(lines, 2)], 6)


def _zoom(size: int) -> int:
    """How many times as large views of a size are shown."""
    return max(1, round(_SIDE / size))


def _fitted(original: Picture, side: int) -> Image.Image:
    """An original about as large as the views are shown, a small one enlarged by a whole factor."""
    image = Image.fromarray(original)
    room = (4 / 3 * side / image.width, side / image.height)
    scale = min(room)
    if scale >= 1:
        size = (int(scale) * image.width, int(scale) * image.height)
        return image.resize(size, Image.Resampling.NEAREST)
    size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _outlined(
    image: Image.Image, corners: Float[np.ndarray, "views 4 2"], beyond: float
) -> Image.Image:
    """An image, with some space around it, and the outline of each view."""
    space = math.ceil(beyond * max(image.size)) + 4 if beyond > _ROUNDING else 0
    spaced = ImageOps.expand(image, space, _OUTSIDE)
    # Drawn large and made smaller, for what is not upright is to be smooth.
    size = (_SMOOTH * spaced.width, _SMOOTH * spaced.height)
    canvas = spaced.resize(size, Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas)
    scale = _SMOOTH * (np.array([image.height, image.width]) - 1)
    for width, rim in ((4, True), (2, False)):  # a white rim keeps them visible on anything
        for number, quad in enumerate(_SMOOTH * space + scale * corners):
            points = [(x, y) for y, x in quad]
            colour = (255, 255, 255) if rim else _colour(number)
            pen.line([*points, *points[:2]], colour, width * _SMOOTH, joint="curve")
    return canvas.resize(spaced.size, Image.Resampling.BOX)


def _framed(image: Image.Image) -> Image.Image:
    """An image with a thin frame outside of it, which shows where a white one ends."""
    return ImageOps.expand(image, 1, _FRAME)


def _text(
    items: Sequence[str], size: int, colour: Colour, width: int, between: str = " · "
) -> Image.Image:
    """Items one after the other, in as many lines as they need."""
    font = ImageFont.load_default(size)
    lines = _wrapped([_printable(item) for item in items], font, width, between)
    height = round(1.35 * size)
    block = Image.new("RGB", (width, max(1, height * len(lines))), "white")
    canvas = ImageDraw.Draw(block)
    for row, line in enumerate(lines):
        canvas.text((0, row * height), line, colour, font)
    return block


def _wrapped(items: Sequence[str], font: Font, width: int, between: str) -> list[str]:
    """Lines of items; only an item longer than a line is broken, at spaces if it can be."""
    lines: list[str] = []
    for item in items:
        long = font.getlength(item) > width
        for number, word in enumerate(_pieces(item, font, width) if long else [item]):
            joint = between if number == 0 else " "
            starts = not lines or (long and number == 0)
            if starts or font.getlength(lines[-1] + joint + word) > width:
                lines.append(word)
            else:
                lines[-1] += joint + word
    return lines


def _pieces(item: str, font: Font, width: int) -> list[str]:
    """The words of an item, those longer than a line cut where the line ends."""
    pieces = []
    for word in item.split():
        while font.getlength(word) > width and len(word) > 1:
            fits = [n for n in range(1, len(word)) if font.getlength(word[:n]) <= width]
            end = max(fits, default=1)
            pieces.append(word[:end])
            word = word[end:]
        pieces.append(word)
    return pieces


def _printable(text: str) -> str:
    """A text without what Pillow's own font, of Latin letters, lacks: accents are taken off."""
    plain = unicodedata.normalize("NFKD", text)
    return "".join(
        letter if letter.isascii() or letter in "°·" else "?"
        for letter in plain
        if not unicodedata.combining(letter)
    )


def _stack(blocks: Iterable[Image.Image], gap: int) -> Image.Image:
    """Blocks below each other, flush left."""
    return _grid([[block] for block in blocks], gap)


def _grid(rows: Sequence[Sequence[Image.Image]], gap: int = _GAP) -> Image.Image:
    """Cells in rows and columns, each in the upper left of its place."""
    widths = [max(cell.width for cell in column) for column in zip(*rows, strict=True)]
    heights = [max(cell.height for cell in row) for row in rows]
    lefts = np.cumsum([0, *(width + gap for width in widths)])
    tops = np.cumsum([0, *(height + gap for height in heights)])
    grid = Image.new("RGB", (int(lefts[-1]) - gap, int(tops[-1]) - gap), "white")
    for top, row in zip(tops, rows, strict=False):
        for left, cell in zip(lefts, row, strict=False):
            grid.paste(cell, (int(left), int(top)))
    return grid


def _colour(number: int) -> Colour:
    return _COLOURS[number % len(_COLOURS)]
