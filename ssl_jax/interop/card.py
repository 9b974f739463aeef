"""A model card from a run's records: data, recipe, results with their baselines."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ssl_jax.config import Schedule, flat_views, size_text, view_size
from ssl_jax.data.augment import augmentations
from ssl_jax.errors import UserError, counted
from ssl_jax.evals.metrics import interval_text
from ssl_jax.evals.results import EVALUATION, Evaluation, read_evaluation, read_results
from ssl_jax.files import local_path
from ssl_jax.interop.load import results_folder
from ssl_jax.interop.metadata import has_torch_loader, in_timm, preprocessing
from ssl_jax.interop.weights import Weights
from ssl_jax.methods import METHODS, make_method, title
from ssl_jax.report.evaluation import accuracy, measure_name, measures, row_name
from ssl_jax.run.folder import read_record

# Methods by the code that wrote an imported file, where the names differ.
_METHODS = {"moco_v3": "mocov3", "supcontrast": "supcon"}
_TOP = """---
# license: choose one, it is yours to give
library_name: {library}
pipeline_tag: image-feature-extraction
tags:
- self-supervised
- {method}
- image-feature-extraction
---
"""


def model_card(path: str | Path, weights: Weights) -> str:
    """Writes a model card in Markdown.

    Args:
      path: of the run or the exported file.
      weights: the exported weights.

    Returns:
      The text, without facts that are unknown; the license is left to choose.
    """
    config = weights.config
    kind = weights.source.partition(":")[0] or config.method
    kind = kind.removeprefix("ssl_jax (").removesuffix(")")  # a network exported for PyTorch
    kind = _METHODS.get(kind, kind)
    name = title(kind)
    paper = METHODS[kind].citation if kind in METHODS else ""
    plain = in_timm(config)
    lines = [
        _TOP.format(library="timm" if plain else "ssl_jax", method=kind),
        f"# {make_method(config, Schedule(1, 1)).encoder_name}, {name}",
        "",
        f"An image encoder; {_size(weights)}.",
        "",
        f"Method: {name}{f' ({paper})' if paper else ''}.",
        *_network(weights),
        *_origin(weights),
        "",
        "## Use",
        "",
        *_use(config, plain),
        "",
        "## Images",
        "",
        _images(config),
        "",
        *_training(path, weights),
        *_results(path, weights.step),
    ]
    return "\n".join(lines) + "\n"


def _size(weights: Weights) -> str:
    features = make_method(weights.config, Schedule(1, 1)).num_features
    count = sum(leaf.size for leaf in jax.tree.leaves(weights.params["encoder"]))
    return f"{features:,} features per image, {count:,} parameters"


def _network(weights: Weights) -> list[str]:
    named = {
        "target": "Network: the target, an average of the online network's weights over training.",
        "online": "Network: the online one, which was trained, not its target.",
    }
    return [named[weights.network]] if weights.network in named else []


def _origin(weights: Weights) -> list[str]:
    return [f"Imported from {weights.source}."] if weights.source else []


def _use(config: ConfigDict, plain: bool) -> Iterator[str]:
    yield "```python"
    if plain:
        yield "import timm"
        yield ""
        yield 'net = timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)'
        yield "```"
        yield ""
        yield "```python"
    if has_torch_loader(config):
        if config.data.channels == 3 and config.data.bits <= 8:
            yield "from PIL import Image"
        yield "from torch_encoder import load, preprocess  # in this folder"
        yield ""
        yield 'net = load("model.safetensors")'
        if config.data.channels == 3 and config.data.bits <= 8:
            yield 'features = net(preprocess(Image.open("picture.jpg"), net)[None])'
        else:
            yield "features = net(preprocess(array, net)[None])  # a NumPy array [H, W, C]"
        yield "```"
        yield ""
        yield "```python"
    yield "import ssl_jax"
    if config.model.name not in ("resnet", "vit"):
        yield f"# First import the file that registers the encoder '{config.model.name}'."
    yield ""
    yield 'encoder = ssl_jax.load("ssl_jax.safetensors")'
    dtype = "uint16" if config.data.bits > 8 else "uint8"
    shape = f"[n, H, W, {config.data.channels}]"
    yield f"features = encoder.apply(images)  # {dtype} {shape} to float32 [n, d]"
    yield "```"


def _images(config: ConfigDict) -> str:
    how = preprocessing(config)
    normalized = (
        f"normalized by mean {_numbers(how['mean'])} and standard deviation {_numbers(how['std'])}"
        if how["mean"]
        else "not normalized further"
    )
    others = ["crops these"] * (how["crop_fraction"] < 1)
    others += ["is smoother"] * (not how["antialias"])
    height, width = view_size(flat_views(config)[0])
    square = height == width
    part = "of the shorter side" if square else f"of the largest {height}:{width} rectangle"
    size = f"{height}×{width}" if square else f"height {height} and width {width}"
    return (
        f"The central {100 * how['crop_fraction']:g} % {part}, resized to {size} "
        f"({how['interpolation']}, "
        f"{'antialiased' if how['antialias'] else 'not antialiased'}), {_values(how)}, "
        f"{normalized}; images that already have that size are not cropped."
        + (f" The preprocessing of timm and the hub {' and '.join(others)}." if others else "")
    )


def _values(how: dict[str, Any]) -> str:
    """The channels of images, and the integers that become 0 and 1 unless those of 8 bits."""
    names = "RGB" if how["channels"] == 3 else counted(how["channels"], "channel")
    low, high = how["values"]
    return f"{names} in 0 to 1" + (
        f" from values {low:g} to {high:g}" if (low, high) != (0, 255) else ""
    )


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _training(path: str | Path, weights: Weights) -> Iterator[str]:
    if weights.source:
        return
    config = weights.config
    yield "## Training"
    yield ""
    yield f"- Data: {_data(path, config)}; labels were {_labels(config)}."
    length = (
        f"{config.steps:,} steps"
        if config.steps
        else f"{config.epochs:g} epoch{'' if config.epochs == 1 else 's'}"
    )
    yield f"- {length}, batch size {config.batch_size:,}; weights of step {weights.step:,}."
    yield from _views(config)
    # In a method from outside the package, the option may mean anything.
    temperature = config.get(config.method, {}).get("temperature")
    known = isinstance(temperature, int | float)
    yield f"- {f'Temperature {temperature:g}, seed' if known else 'Seed'} {config.seed}."
    optim = config.optim
    scaling = f"{optim.lr_scaling} scaling" if optim.lr_scaling != "none" else "not scaled"
    others = optim.norm_bias_lr
    rates = f"{optim.lr:g}{f', of biases and normalization {others:g}' if others else ''}"
    decay = f"{optim.weight_decay:g}"
    if optim.weight_decay_end:
        decay += f" to {optim.weight_decay_end:g} by a cosine"
    limit = optim.clip_norm_per_tensor
    clipped = f", gradients clipped to a norm of {limit:g} per tensor" if limit else ""
    yield (
        f"- {optim.name}, learning rate {rates} ({scaling}), "
        f"{optim.schedule}, {optim.warmup_epochs:g} epochs of warmup, "
        f"weight decay {decay}{clipped}, {config.dtype}."
    )
    if config.init_from.path:
        yield f"- Initial weights: {Path(config.init_from.path).name}."
    if config.method == "distill":
        yield f"- Teacher: {Path(config.distill.teacher).name}, trained with labels."
    record = _record(path)
    if record:
        versions = record.get("versions", {})
        devices = record.get("devices", {})
        yield (
            f"- ssl_jax {versions.get('ssl_jax', '?')}"
            + (f" ({record['git']})" if record.get("git") else "")
            + f", JAX {versions.get('jax', '?')}, {devices.get('count', '?')} × "
            f"{devices.get('kind', '?')}."
        )
    yield ""


def _views(config: ConfigDict) -> Iterator[str]:
    """The recipe of each view; views with the same recipe share a line."""
    recipes: dict[str, list[str]] = {}
    for name in sorted(config.views):
        view = config.views[name]
        several = f"{name} ({view.count} times)" if view.count > 1 else name
        recipes.setdefault(_view(view), []).append(several)
    for recipe, names in recipes.items():
        yield f"- {', '.join(names)}: {recipe}."


def _view(view: ConfigDict) -> str:
    """The operations that make a view, in order; a number after a name is a probability."""
    crop = view.crop
    low, high = (100 * share for share in crop.area)
    parts = [
        "the whole image"
        if crop.sampler == "none"
        else f"a crop of {low:g} to {high:g} % of the area ({crop.sampler}'s sampler)"
    ]
    parts[0] += f" at {size_text(view)} pixels ({crop.interpolation})"
    affine = {name: value for name, value in view.affine.items() if value}
    if affine:
        parts.append("affine (" + ", ".join(f"{k} {v:g}" for k, v in affine.items()) + ")")
    for entry in augmentations(view):
        settings = entry.settings(view)
        parts.append(
            f"{entry.name} {entry.probability(view):g}{f' ({settings})' if settings else ''}"
        )
    return ", ".join(parts)


def _record(path: str | Path) -> dict[str, Any]:
    try:
        return read_record(local_path(path))
    except UserError:
        return {}


def _data(path: str | Path, config: ConfigDict) -> str:
    """The dataset's name and size, without paths."""
    data = config.data
    named = data.dataset if data.name == "tfds" else data.name
    size = str(_record(path).get("data", "")).partition(",")[0]
    share = f", {100 * data.subset:g} % of it" if data.subset < 1 else ""
    if data.validation:
        share += f", without {100 * data.validation:g} % that are held out"
    return f"{named} ({size})" + share if size else f"{named}{share}"


def _labels(config: ConfigDict) -> str:
    return "used" if make_method(config, Schedule(1, 1)).needs_labels else "not used"


def _results(path: str | Path, step: int) -> Iterator[str]:
    """The results that were measured on this checkpoint."""
    folder = results_folder(path)
    found = [r for r in read_results(folder)[0] if r.get("step", step) == step]
    evaluation = _evaluation(folder, step)
    if not found and not evaluation:
        return
    yield "## Results"
    yield ""
    if evaluation:
        yield from _frozen(evaluation)
    if found:
        names = {"top1": "top-1", "mean_per_class": "mean per class", "mean_ap": "mAP"}
        names = {k: v for k, v in names.items() if any(k in r["metrics"] for r in found)}
        yield f"| evaluation | {' | '.join(names.values())} | images |"
        yield "| --- |" + " --- |" * (len(names) + 1)
        for record in found:
            metrics = record["metrics"]
            cells = [interval_text(metrics[key]) if key in metrics else "" for key in names]
            yield f"| {record['what']} | {' | '.join(cells)} | {metrics['examples']:,} |"
        yield ""
        yield "Percent, with 95 % intervals by bootstrap over the held-out images."


def _frozen(evaluation: Evaluation) -> Iterator[str]:
    images = evaluation.test_examples
    yield f"Accuracy of the frozen encoder and of two baselines on {images:,} held-out images, in"
    yield "percent, with 95 % intervals:"
    yield ""
    columns = measures(evaluation.rows)
    yield "| " + " | ".join(["", *map(measure_name, columns)]) + " |"
    yield "|" + " --- |" * (len(columns) + 1)
    for row in evaluation.rows:
        found = [accuracy(row, each, images) for each in columns]
        cells = [f"{value} ({spread})" if spread else value for value, spread in found]
        yield "| " + " | ".join([row_name(row), *cells]) + " |"
    yield ""
    yield "Intervals with few labels are over trials of the labeled images (Student's t), the"
    yield "others over the held-out images (Wilson; mAP by bootstrap)."
    yield ""


def _evaluation(folder: Path, step: int) -> Evaluation | None:
    """The run's last evaluation, if it is readable and of this checkpoint."""
    try:
        found = read_evaluation(folder / EVALUATION)
    except (OSError, ValueError):
        return None
    return found if found.step == step else None
