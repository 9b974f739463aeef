"""The summaries that a run prints at its start and end, as rows of a heading and a text."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from humanize import intword, metric, naturalsize, precisedelta
from jaxtyping import Int
from ml_collections import ConfigDict

from ssl_jax.config import flat_views, size_text, view_size
from ssl_jax.data.labels import Targets, targets_of
from ssl_jax.data.sources import Source, why_not_scored
from ssl_jax.errors import UserError, counted
from ssl_jax.memory import device_memory
from ssl_jax.plan.flops import traced_flops
from ssl_jax.plan.plan import memory_kinds
from ssl_jax.run.log import read_metrics
from ssl_jax.step import batchnorm_advice
from ssl_jax.train.setup import Setup

Row = tuple[str, str]
# Keys with the number of past features in a method's loss, and how many an image adds per step.
_QUEUES = {"moco": ("queue", 1), "swav": ("queue", 1), "simclr": ("memory_bank", 2)}
_FEW = 16  # images that BatchNorm's statistics should average over at least
_SHOWN = 10  # class names
_SAMPLED = 8  # images whose size is read
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def lines(rows: Iterable[Row]) -> list[str]:
    """The rows as aligned lines."""
    return [f"{heading:<12}{text}" for heading, text in rows]


def start_rows(setup: Setup, params: Any, workdir: Path, start: int) -> Iterator[Row]:
    """Summarizes a run before anything is compiled.

    Args:
      setup: of the run.
      params: its parameters, by network.
      workdir: its folder.
      start: the step that it resumes from; 0 for a new run.
    """
    config, schedule, devices = setup.config, setup.schedule, setup.spmd.size
    each = flat_views(config)
    views = counted(len(each), "view")
    texts = {view_size(view): size_text(view) for view in each}
    sizes = ", ".join(texts[size] for size in sorted(texts, reverse=True))
    network = setup.method.encoder_name
    yield "method", f"{config.method}, {network}, {views} of {sizes} px, {config.dtype}"
    encoder, frozen = _count(params["encoder"]), setup.method.frozen
    trained = sum(_count(tree) for name, tree in params.items() if name not in frozen)
    counts = [intword(number, "%.3g") for number in (encoder, trained)]
    yield "parameters", "{} in the encoder, {} trainable in total".format(*counts)
    yield from data_rows(setup)
    part = config.microbatch
    cut = f" in microbatches of {part}" if 0 < part < config.batch_size else ""
    yield (
        "batch",
        f"{config.batch_size:,}, {config.batch_size // devices:,} per device{cut}, BatchNorm over "
        f"{setup.derived['batchnorm_images']} images",
    )
    among = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    idle = "; moco.shuffle has no effect on one device"
    one_group = devices == 1 and config.model.bn_splits == 1
    idle *= one_group and config.method == "moco" and config.moco.shuffle
    yield "devices", f"{devices} × {jax.devices()[0].device_kind}{among}{idle}"
    total, epoch = schedule.total_steps, float(schedule.exact_epoch or schedule.steps_per_epoch)
    left = f", {total - start:,} remaining" if start else ""
    epochs = "1 epoch" if total == epoch else f"{total / epoch:.4g} epochs"
    length = f"{epoch:,.2f}".rstrip("0").rstrip(".") + (" step" if epoch == 1 else " steps")
    yield "steps", f"{total:,}{left}, {epochs} of {length}"
    yield "workdir", str(workdir)


def data_rows(setup: Setup) -> Iterator[Row]:
    """Summarizes the data as it was read: numbers, sizes, classes, labels, held-out images."""
    train, test = setup.train, setup.test
    yield "images", f"{train.num_examples:,} for training, {_sizes(train)}{_values(setup.config)}"
    if targets := targets_of(train):
        yield "classes", f"{_several(targets)}; labels: {train.labels_from}"
    elif not train.num_classes:
        yield "classes", "unknown, no labels"
    else:
        # TFDS's labels are inside the records, all of which would be read.
        known = None if setup.config.data.name == "tfds" else train.labels
        yield "classes", f"{_classes(train, known)}; labels: {train.labels_from}"
    held_out = "none"
    if test is not None:
        held_out = f"{test.num_examples:,} images, {_sizes(test)}"
        held_out += "" if test.num_classes or targets_of(test) else ", no labels"
    if share := setup.config.data.validation:
        held_out += f", {share:g} of the training images (config.data.validation)"
    yield "held out", held_out


def _several(targets: Targets) -> str:
    """Names and numbers of images of the first classes, of which an image may have several."""
    shown = [
        f"{name} {count:,}"
        for name, count in zip(targets.names[:_SHOWN], targets.counts, strict=False)
    ]
    more = ["…"] if len(targets.names) > _SHOWN else []
    return f"{len(targets.names):,} ({', '.join(shown + more)}), several per image"


def _classes(source: Source, labels: Int[np.ndarray, " n"] | None) -> str:
    """The number of classes and the names of the first, with numbers of images if known."""
    shown = list(source.class_names[:_SHOWN])
    if labels is not None:
        counts = np.bincount(labels[labels >= 0], minlength=source.num_classes)
        shown = [f"{name} {count:,}" for name, count in zip(shown, counts, strict=False)]
    more = ["…"] if source.num_classes > _SHOWN else []
    text = f"{source.num_classes:,} ({', '.join(shown + more)})"
    missing = 0 if labels is None else int(np.sum(labels < 0))
    return f"{text}; {missing:,} images have no label" if missing else text


def _values(config: ConfigDict) -> str:
    """Channels, bits and range of the images, unless they are 8-bit RGB."""
    data = config.data
    text = "" if data.channels == 3 else f", {counted(data.channels, 'channel')}"
    text += "" if data.bits <= 8 else f", {data.bits} bits"
    return text + (", values {:g} to {:g}".format(*data.range) if data.range else "")


def _sizes(source: Source) -> str:
    """Height and width of the images, of a sample of a source that reads files."""
    ids = np.linspace(0, source.num_examples - 1, min(_SAMPLED, source.num_examples))
    sizes = sorted({(h, w) for h, w in source.image_sizes(ids.astype(int)).tolist()})
    ends = [f"{h}×{w}" for h, w in sizes[:: max(1, len(sizes) - 1)]]
    return f"{' to '.join(ends) or 'unreadable'} px"


def data_warnings(setup: Setup) -> list[str]:
    """Warnings of classes that are probably a mistake."""
    train, data, found = setup.train, setup.config.data, []
    splits = [name for name in train.class_names if name.lower() in _SPLITS]
    if len(splits) > 1 or splits and len(splits) == train.num_classes:
        found.append(
            f"warning: the classes of config.data.dir ({data.dir}) are called "
            f"{' and '.join(splits)}. If they are splits, set config.data.dir and "
            "config.data.test_dir to one of them each."
        )
    if train.num_classes == 1:
        found.append(f"warning: {why_not_scored(train, setup.test)}")
    classes = setup.config.data.num_classes
    if (
        setup.config.method == "supervised"
        and classes > train.num_classes
        and not targets_of(train)
    ):
        found.append(
            f"warning: the classifier has {classes:,} outputs (config.data.num_classes) for "
            f"{train.num_classes:,} classes. Set config.data.num_classes=0 for one per class."
        )
    return found


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def start_warnings(setup: Setup) -> Iterator[str]:
    """Warns of settings with which a run probably learns less than it could."""
    config, images = setup.config, setup.train.num_examples
    warmup = setup.schedule.steps(config.optim.warmup_epochs)
    if warmup - config.optim.warmup_inclusive >= setup.schedule.total_steps:
        yield (
            f"warning: the warmup of {warmup} steps (config.optim.warmup_epochs) is not shorter "
            "than the run, so the learning rate never reaches its peak."
        )
    queue, each = _QUEUES.get(config.method, ("", 0))
    if queue and config[config.method][queue] > each * images:
        key, step = f"config.{config.method}.{queue}", each * config.batch_size
        yield (
            f"warning: {key} is {config[config.method][queue]:,}, but there are {images:,} "
            "training images, so every image is compared with older features of itself. Set "
            f"--{key}={step * max(1, each * images // 2 // step)}."
        )
    shared = setup.derived["batchnorm_images"]
    if shared < _FEW and not config.supervised.freeze:
        yield (
            f"warning: BatchNorm averages over only {shared} images. Use at least {_FEW}: "
            f"{batchnorm_advice(config, setup.spmd.size)}."
        )


def settings_notes(changed: Sequence[str], start: int) -> list[str]:
    """A note on a resumed run whose settings have changed.

    Args:
      changed: differences, as `changed_settings` returns them.
      start: the step that the run resumes from; 0 without a checkpoint.
    """
    if not changed:
        return []
    note = f"Settings changed ({'; '.join(changed)}); config.json records it."
    if start and any(line.startswith(("init_from.", "distill.")) for line in changed):
        note += " The run keeps its weights: initial weights are loaded only when a run starts."
    return [note]


def environment_notes(changed: Sequence[str]) -> list[str]:
    """A note on a resumed run whose environment has changed: how close its losses will be.

    Args:
      changed: differences, as `note_resumption` returns them.
    """
    if not changed:
        return []
    effect = "Resuming with the same data order; losses match up to floating-point rounding."
    if any(line.startswith("derived.") for line in changed):
        effect = (
            "Resuming with the same data order, but BatchNorm averages over a different number of "
            "images, so losses will differ."
        )
    return [f"The environment changed since this run started ({'; '.join(changed)}). {effect}"]


def compiled(
    step: Callable[..., Any], arguments: Sequence[Any], devices: int
) -> tuple[Callable[..., Any], list[Row]]:
    """Compiles a train step, once, and summarizes its cost.

    Args:
      step: of `Program`.
      arguments: of the first step; later ones have the same shapes.
      devices: in the mesh.

    Returns:
      The compiled step and the rows; `step` itself and no rows under pmap, or if JAX must see each
      operation (JAX_DISABLE_JIT, JAX_DEBUG_NANS).

    Raises:
      UserError: the step changes shapes or dtypes of the state.
    """
    options: Any = jax.config
    if options.jax_disable_jit or options.jax_debug_nans or not hasattr(step, "trace"):
        return step, []
    flops = traced_flops(step, *arguments)
    traced = step.trace(*arguments)  # cached: the step is traced once
    _require_same(arguments[0], traced.out_info[0])
    since = time.perf_counter()
    program = traced.lower().compile()
    seconds = time.perf_counter() - since
    rows = [
        ("compilation", precisedelta(seconds, format="%.3g")),
        (
            "FLOPs",
            f"{metric(flops)} per step, {metric(flops / devices)} per device (convolutions and "
            "matrix products)",
        ),
    ]
    if analysis := program.memory_analysis():  # not on every backend
        rows.append(("memory", _memory(analysis)))
    return program, rows


def _require_same(before: Any, after: Any) -> None:
    leaves = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    for (path, old), new in leaves:
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise UserError(
                f"The step changes {jax.tree_util.keystr(path)} of the state from {old.dtype} "
                f"{list(old.shape)} to {new.dtype} {list(new.shape)}. Make the method's update "
                "keep the shapes and dtypes of its init."
            )


def _memory(analysis: Any) -> str:
    """A compiled program's memory per device: total, available, and its two largest parts."""
    kinds = memory_kinds(analysis)
    kinds = {"state and data": kinds.pop("arguments"), **kinds}
    whole = device_memory()
    of = f" of {naturalsize(whole, binary=True)}" if whole else ""
    largest = sorted(kinds.items(), key=lambda item: -item[1])[:2]
    parts = ", ".join(f"{name} {naturalsize(n, binary=True)}" for name, n in largest)
    return f"{naturalsize(sum(kinds.values()), binary=True)}{of} per device ({parts})"


def evaluation_line(setup: Setup, step: int, measured: dict[str, float]) -> str:
    """The terminal line of an evaluation during training."""
    parts = [f"step {step}/{setup.schedule.total_steps}"]
    names = {
        "knn": "kNN",
        "knn_online": "online network",
        "test_accuracy": "top-1",
        "test_mean_ap": "mAP",
        "probe_accuracy": "online probe",
    }
    for key, name in names.items():
        if key in measured:
            parts.append(f"{name} {100 * measured[key]:.2f}%")
    parts.append(f"RankMe {measured['rankme']:.1f}")
    return " | ".join([*parts, f"data wait {100 * measured['eval_data_wait']:.1f}%"])


def end_rows(workdir: Path, seconds: float, start: int) -> Iterator[Row]:
    """Summarizes a finished run from its metrics.

    Args:
      workdir: of the run.
      seconds: that it took; 0 if it had finished before.
      start: the step that it resumed from.
    """
    records = read_metrics(workdir / "metrics.jsonl")
    if seconds:
        since = f" since step {start:,}" if start else ""
        yield "time", f"{precisedelta(seconds, format='%.3g')}{since}"
    if speeds := [r["images_per_s"] for r in records if "images_per_s" in r]:
        yield "speed", f"{np.median(speeds):,.0f} img/s (median)"
    if measured := [(r["knn"], r["step"]) for r in records if "knn" in r]:
        best, at = max(measured, key=lambda pair: pair[0])
        yield "kNN", f"{100 * measured[-1][0]:.2f}% (best {100 * best:.2f}% at step {at:,})"
