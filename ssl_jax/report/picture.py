"""A picture of the views that a config's augmentation makes, for a person to check it.

`collect` calls the functions that training calls, with the same keys, so the picture shows what a
step sees; `draw` lays it out.
"""

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from ssl_jax.config import flat_views
from ssl_jax.config import view as view_config
from ssl_jax.data import augment
from ssl_jax.data.device_crop import sample_geometry, view_corners
from ssl_jax.data.index import Index, view_keys, views_stream
from ssl_jax.data.labels import NO_LABEL
from ssl_jax.data.pipeline import make_augment_fn, unnormalized
from ssl_jax.data.sources import Source, make_sources
from ssl_jax.data.values import rgb
from ssl_jax.errors import UserError, install_extra
from ssl_jax.files import local_path, writing_output

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.patches import Polygon, Rectangle
    from matplotlib.transforms import IdentityTransform
except ImportError as error:
    raise UserError(
        f"Drawing views needs matplotlib, which is not installed. {install_extra('pictures')}."
    ) from error

Picture = UInt8[np.ndarray, "height width 3"]

_BOX = ("top", "left", "height", "width")
_LEGEND = {
    "crop": "crop left,top width x height, in pixels of the original",
    "rotate": "rotate clockwise, in degrees",
    "shear": "shear in degrees",
    "shift": "shift right,down in pixels of the original",
    **{entry.name: entry.legend for entry in augment.AUGMENTATIONS if entry.legend},
}

_DPI = 64  # a power of 2: sizes in inches are exact, so pixels of images are pixels of the figure
_MARGIN, _GAP, _EDGE = 36, 24, 2
_SIDE = 160  # pixels that small images are enlarged to, approximately
_COLUMN = 176  # minimum width, so that the text below a small view fits
_ORIGINAL = 512  # maximum side that an original on disk is read with, pixels
_ROUNDING = 1e-3  # of outlines, as a fraction of the image
_FRAME, _OUTSIDE = "#d6d9de", "#f0f2f5"
# Distinct with any color vision (Okabe and Ito's, without the lightest and black).
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#805c30", "#785ef0")


class _Style(NamedTuple):
    """A font, its size in pixels, and its color."""

    font: FontProperties
    size: int
    color: str = "#20242a"


_SANS = FontProperties(family="DejaVu Sans", weight="bold")
_MONO = FontProperties(family="DejaVu Sans Mono")
_TITLE, _HEAD = _Style(_SANS, 20), _Style(_SANS, 14)
_NOTE, _GRAY = _Style(_MONO, 11), _Style(_MONO, 11, "#6b727c")
_Line = tuple[str, _Style]


@dataclasses.dataclass(frozen=True)
class View:
    """One view of every image.

    Attributes:
      title: its name in `config.views`, numbered if its count is above 1.
      pixels: as training sees them, but not normalized.
      corners: (y, x) of its corners, as fractions of the original's height and width, clockwise
        from the view's top left.
      notes: what was done to each image.
    """

    title: str
    pixels: Float[np.ndarray, "n tall wide c"]
    corners: Float[np.ndarray, "n 4 2"]
    notes: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images of a step's batch, their names, their classes' names ("": none) and their views.

    Large originals of a host source are downsized; `sizes` are (height, width) in full size.
    """

    ids: Int[np.ndarray, " n"]
    names: tuple[str, ...]
    labels: tuple[str, ...]
    originals: tuple[Picture, ...]
    sizes: Int[np.ndarray, "n 2"]
    views: tuple[View, ...]


def write_views(
    config: ConfigDict, out: str | Path, *, images: int = 8, step: int = 0, command: str = ""
) -> int:
    """Draws training images and their views into a PNG file.

    Args:
      config: of a run.
      out: the file.
      images: number of rows, at most the batch size.
      step: whose views to draw, counted from 0.
      command: printed above them.

    Returns:
      The number of images.

    Raises:
      UserError: not a .png file or not writable, fewer than 1 image, a step below 0 or from 2**31
        on, or an error in the config's data and views.
    """
    out = local_path(out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out is {out}, not a .png file: give it a name that ends in .png.")
    if images < 1:
        raise UserError(f"--images is {images}: set it to at least 1.")
    if not 0 <= step < 2**31:
        raise UserError(f"--step is {step}: set it to 0 or more, and below {2**31}.")
    samples = collect(config, images, step)
    data = config.data.dataset if config.data.name == "tfds" else config.data.name
    title = f"Views of {data} at step {step}"
    picture = draw(samples, title, command)
    with writing_output(out) as file:
        picture.save(file, "PNG")
    return len(samples.ids)


def collect(config: ConfigDict, images: int, step: int) -> Samples:
    """Collects the first images of a step's batch and the views that training makes of them.

    Args:
      config: of a run. Its batch may be larger than the dataset.
      images: their number, at most the batch size.
      step: counted from 0.

    Returns:
      What `draw` draws.

    Raises:
      UserError: an error in the config's data and views.
    """
    source, _ = make_sources(config)
    batch_size = min(config.batch_size, source.num_examples)
    ids = Index(source.num_examples, batch_size, config.seed).ids(step)[:images]
    raw = next(source.batches(iter([(step, ids)])))
    key = views_stream(jax.random.key(config.seed), step)
    batch = jax.jit(make_augment_fn(unnormalized(config)))(raw, source.device_data(), key)
    boxes: Int[np.ndarray, "n views 4"] | None = None
    if host_boxes := getattr(source, "boxes", None):  # the source crops on the host
        boxes, sizes = host_boxes(step, ids)
        originals = _whole_images(config, ids, sizes)
    else:
        originals = tuple(rgb(source.eval_transform(ids), config.data.range))
        sizes = np.array([image.shape[:2] for image in originals])
    sampled = _sampled(key, jnp.asarray(ids), sizes, flat_views(config), boxes)
    views = [
        View(title, np.asarray(pixels), corners / sizes[:, None], notes)
        for title, pixels, (corners, notes) in zip(
            _titles(config), batch["views"], sampled, strict=True
        )
    ]
    names = tuple(source.names(ids))
    return Samples(ids, names, _labels(source, raw), originals, sizes, tuple(views))


def _titles(config: ConfigDict) -> list[str]:
    """Names the views of `config.flat_views`."""
    counts = {name: config.views[name].count for name in sorted(config.views)}
    return [
        name if count == 1 else f"{name} {number}"
        for name, count in counts.items()
        for number in range(1, count + 1)
    ]


def _labels(source: Source, raw: dict[str, Any]) -> tuple[str, ...]:
    labels = raw.get("label", np.full(len(raw["id"]), NO_LABEL))
    return tuple("" if label == NO_LABEL else source.class_names[label] for label in labels)


def _whole_images(
    config: ConfigDict, ids: Int[np.ndarray, " n"], sizes: Int[np.ndarray, "n 2"]
) -> tuple[Picture, ...]:
    """Reads the originals of views that are cropped on the host, the large ones downsized."""
    # By a source with the whole image as its only view, resized to a square. The images' own sizes
    # restore the aspect.
    side = min(int(sizes.max()), _ORIGINAL)
    whole = ConfigDict(config.to_dict())
    whole.views = {"whole": view_config(size=side, crop={"sampler": "none"})}
    source, _ = make_sources(whole)
    (squares,) = next(source.batches(iter([(0, ids)])))["views"]
    images = []
    for square, size in zip(rgb(squares), sizes, strict=True):
        height, width = np.maximum(1, np.round(size * min(1, side / size.max()))).astype(int)
        images.append(np.asarray(Image.fromarray(square).resize((width, height))))
    return tuple(images)


def _sampled(
    key: Key[Array, ""],
    ids: Int[Array, " n"],
    sizes: Int[np.ndarray, "n 2"],
    views: Sequence[ConfigDict],
    boxes: Int[np.ndarray, "n views 4"] | None,
) -> list[tuple[Float[np.ndarray, "n 4 2"], tuple[tuple[str, ...], ...]]]:
    """Returns each view's corners in pixels of the images, and the notes of each image.

    `boxes` are the host's; None if they are sampled on the device.
    """
    height, width = (int(side) for side in sizes[0])  # on the device all images have one size

    def sample(
        key: Key[Array, ""], number: int, view: ConfigDict
    ) -> tuple[dict[str, Array], Float[Array, "n 4 2"]]:
        keys = view_keys(key, ids, number)
        if boxes is None:
            geometry = jax.vmap(lambda key: sample_geometry(key, height, width, view))(keys)
        else:
            geometry = {name: jnp.asarray(boxes[:, number, i]) for i, name in enumerate(_BOX)}
        parameters = jax.vmap(lambda key: augment.sample_parameters(key, view))(keys)
        parameters.pop("noise_key", None)  # no number to show
        return {**geometry, **parameters}, view_corners(geometry, height, width)

    sample_all = jax.jit(lambda key: [sample(key, *view) for view in enumerate(views)])
    result = []
    for view, (parameters, corners) in zip(views, jax.device_get(sample_all(key)), strict=True):
        each = [{name: x[i] for name, x in parameters.items()} for i in range(len(sizes))]
        result.append((corners, tuple(describe(one, view) for one in each)))
    return result


def describe(parameters: Mapping[str, Any], view: ConfigDict) -> tuple[str, ...]:
    """Describes what was done to one image, in the order applied.

    Args:
      parameters: of this image, from `augment.sample_parameters` and `device_crop.sample_geometry`.
      view: config of the view.

    Returns:
      A short text per change.
    """
    notes = []
    if view.crop.sampler != "none":
        top, left, height, width = (parameters[name] for name in _BOX)
        notes.append(f"crop {left},{top} {width}x{height}")
    if view.affine.degrees:
        notes.append(f"rotate {parameters['degrees']:z.0f}°")
    if view.affine.shear:
        notes.append(f"shear {parameters['shear']:z.0f}°")
    if view.affine.translate:
        notes.append(f"shift {parameters['shift_x']:z.1f},{parameters['shift_y']:z.1f}")
    return (*notes, *augment.describe(parameters, view))


@dataclasses.dataclass(frozen=True)
class _Cell:
    """A framed image, the views' outlines on it, (y, x) in its pixels, and lines of text below."""

    lines: Sequence[_Line]
    image: Picture | None = None
    frame: str = _FRAME
    outlines: Sequence[Float[np.ndarray, "4 2"]] = ()

    @property
    def width(self) -> int:
        return 0 if self.image is None else self.image.shape[1] + 2 * _EDGE

    @property
    def height(self) -> int:
        text = sum(map(_line_height, self.lines))
        return text if self.image is None else text + len(self.image) + 2 * _EDGE + 8

    def place(self, figure: Figure, x: int, y: int) -> None:
        """Draws it with its top left corner at (x, y), in pixels from the figure's bottom left."""
        pixels = IdentityTransform()
        if self.image is not None:
            tall, wide = self.image.shape[:2]
            y -= tall + 2 * _EDGE
            size = (wide + 2 * _EDGE, tall + 2 * _EDGE)
            frame = Rectangle((x, y), *size, color=self.frame, lw=0, zorder=-1, transform=pixels)
            figure.add_artist(frame)
            figure.figimage(self.image, x + _EDGE, y + _EDGE, origin="upper")
            for line_width, rim in ((4.5, "white"), (2.25, "")):  # a rim shows on anything
                for number, (down, right) in enumerate(corners.T for corners in self.outlines):
                    points = np.stack([x + _EDGE + right, y + _EDGE + tall - down], axis=-1)
                    outline = Polygon(points, fill=False, transform=pixels, joinstyle="round")
                    outline.set(ec=rim or _color(number), lw=line_width * 72 / _DPI)
                    figure.add_artist(outline)
            y -= 8
        for line in self.lines:
            text, style = line
            y -= _line_height(line)
            written = figure.text(x, y + 0.4 * style.size, text, color=style.color, font=style.font)
            written.set(size=style.size * 72 / _DPI, transform=pixels, parse_math=False)


def draw(samples: Samples, title: str, command: str = "") -> Image.Image:
    """Lays out a row per image: the original, then its views with their parameters below.

    Small images are enlarged by whole factors; large views are shown pixel by pixel. Views are
    outlined on the original in their colors.

    Args:
      samples: from `collect`.
      title: of the picture.
      command: that drew it; "" for none.

    Returns:
      An RGB image.
    """
    columns = [_original_column(samples)]
    columns += [_view_column(view, _color(i)) for i, view in enumerate(samples.views)]
    widths = [column[0].width for column in columns]
    table = sum(widths) + _GAP * (len(widths) - 1)
    shown = {note.split()[0] for view in samples.views for notes in view.notes for note in notes}
    legend = [text for word, text in _LEGEND.items() if word in shown]
    head = [*_lines([title], _TITLE, table), *_lines([command], _GRAY, table)]
    foot = _lines(legend, _GRAY, table)
    rows = [[_Cell(head)], *map(list, zip(*columns, strict=True)), [_Cell(foot)]]
    heights = [max(cell.height for cell in row) for row in rows]
    width, height = table + 2 * _MARGIN, sum(heights) + _GAP * (len(rows) - 1) + 2 * _MARGIN
    figure = Figure((width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    y = height - _MARGIN
    for row, row_height in zip(rows, heights, strict=True):
        x = _MARGIN
        for cell, column_width in zip(row, widths, strict=False):
            cell.place(figure, x, y)
            x += column_width + _GAP
        y -= row_height + _GAP
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _original_column(samples: Samples) -> list[_Cell]:
    sizes = [max(view.pixels.shape[1:3]) for view in samples.views]
    side = max(_zoom(size) * size for size in sizes)
    corners = np.stack([view.corners for view in samples.views], axis=1)
    # How far affine views reach beyond the image, as a fraction of its side.
    beyond = max(-corners.min(), corners.max() - 1)
    cells = []
    for row, original in enumerate(samples.originals):
        image = _fitted(original, side)
        space = math.ceil(beyond * max(image.size)) + 4 if beyond > _ROUNDING else 0
        outlines = corners[row] * (image.height, image.width) + space
        image = ImageOps.expand(image, space, _OUTSIDE)
        width = max(image.width, _COLUMN)
        tall, wide = samples.sizes[row]
        lines = _lines([samples.labels[row]], _HEAD, width)
        name, id = samples.names[row], str(samples.ids[row])
        lines += _lines([f"image {id}, {tall}x{wide}", *[name] * (name != id)], _GRAY, width)
        cells.append(_Cell(lines, np.asarray(image), outlines=tuple(outlines)))
    width = max(_COLUMN, *(cell.width for cell in cells))
    return [_heading("original", "outlines of its views", _NOTE.color, width), *cells]


def _view_column(view: View, color: str) -> list[_Cell]:
    tall, wide = view.pixels.shape[1:3]
    size = str(tall) if tall == wide else f"{tall}x{wide}"
    zoom = _zoom(max(tall, wide))
    width = max(zoom * wide + 2 * _EDGE, _COLUMN)
    scale = f", enlarged {zoom}x" if zoom > 1 else ""
    cells = [_heading(view.title, f"{size} px{scale}", color, width)]
    for pixels, notes in zip(rgb(view.pixels), view.notes, strict=True):
        image = pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)
        cells.append(_Cell(_lines(notes or ["unchanged"], _NOTE, width), image))
    return cells


def _heading(title: str, about: str, color: str, width: int) -> _Cell:
    bar = Image.new("RGB", (width - 2 * _EDGE, 1), color)
    lines = [*_lines([title], _HEAD, width), *_lines([about], _GRAY, width)]
    return _Cell(lines, np.asarray(bar), frame=color)


def _zoom(size: int) -> int:
    """Returns the factor by which views of a size are enlarged."""
    return max(1, round(_SIDE / size))


def _fitted(original: Picture, side: int) -> Image.Image:
    """Resizes an original to about the size of the views, a small one by a whole factor."""
    tall, wide = original.shape[:2]
    scale = min(4 / 3 * side / wide, side / tall)
    enlarge = scale >= 1
    method = Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
    size = [int(scale) * x if enlarge else max(1, round(scale * x)) for x in (wide, tall)]
    return Image.fromarray(original).resize((size[0], size[1]), method)


def _lines(items: Sequence[str], style: _Style, width: int) -> list[_Line]:
    """Puts each item on a line of its own; breaks an item that is longer than a line."""
    font = get_font(findfont(style.font))
    items = ["".join(c if font.get_char_index(ord(c)) else "?" for c in item) for item in items]
    letter, indent = (0.64, "  ") if style.font is _MONO else (0.75, "")  # 0.64: its width
    wrapper = textwrap.TextWrapper(
        int(width / (letter * style.size)), subsequent_indent=indent, break_on_hyphens=False
    )
    wrapped = map(wrapper.wrap, items)
    return [(line, style) for lines in wrapped for line in lines]


def _line_height(line: _Line) -> int:
    return round(1.45 * line[1].size)


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]
