"""Features of a run's frozen encoder, and kNN and linear accuracy on them."""

import dataclasses
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int8
from ml_collections import ConfigDict

from ssl_jax.config import apply_overrides
from ssl_jax.data.labels import common_targets, targets_of
from ssl_jax.data.registry import Images
from ssl_jax.data.sources import (
    Source,
    labeled,
    make_sources,
    require_labels,
    require_measurable,
)
from ssl_jax.errors import UserError, counted, install_extra
from ssl_jax.evals.evaluator import Evaluator
from ssl_jax.evals.knn import knn_votes
from ssl_jax.evals.linear import PENALTIES, fit_linear, fit_multi_label
from ssl_jax.evals.metrics import classification_metrics
from ssl_jax.evals.multi_label import MULTI_LABEL_METRICS
from ssl_jax.files import writing_output
from ssl_jax.interop.load import config_at, load
from ssl_jax.run.log import Progress
from ssl_jax.spmd import make_spmd

# Prefixes of the config keys that change a frozen encoder's features, and the keys of its first
# view that do.
_IMAGES = ("batch_size", "crop_fraction", "interpolation", "projector_layer", "network")
SEEN = ("data.", "dtype", *(f"eval.{key}" for key in _IMAGES))
_SEEN_OF_VIEW = ("size", "mean", "std", "crop.sampler")


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of the two splits of a dataset.

    Attributes:
      train, test: float32 [n, d] and [m, d]; `test` is None without a held-out split.
      train_labels, test_labels: int32 [n] and [m], -1 for an image without a label; None if no
        image has one.
      train_targets, test_targets: int8 [n, c] and [m, c] of images of several classes each, see
        `Targets.values`; else None.
      class_names: by label, or by column of the targets.
      step: of the checkpoint.
      train_names, test_names: of the images, as `Source.names`; empty without a held-out split.
      skipped: names of images that can't be decoded, whose rows hold the next readable image.
    """

    train: Float[np.ndarray, "n d"]
    train_labels: Int[np.ndarray, " n"] | None
    test: Float[np.ndarray, "m d"] | None
    test_labels: Int[np.ndarray, " m"] | None
    class_names: tuple[str, ...]
    step: int
    train_names: Sequence[str] = ()
    test_names: Sequence[str] = ()
    skipped: Sequence[str] = ()
    train_targets: Int8[np.ndarray, "n c"] | None = None
    test_targets: Int8[np.ndarray, "m c"] | None = None

    def save(self, file: Path) -> None:
        """Writes an `.npz` of the attributes that are not None, or a `.parquet` of a row per image.

        Columns of the rows: split ("train" or "test"), row (in the split), name, label and class
        (null without labels), targets (a list, null without targets) and features. The file's
        metadata has "step", and "skipped" and "class_names" as JSON lists.

        Raises:
          UserError: the file can't be written.
        """
        with writing_output(file) as temporary:
            if file.suffix == ".parquet":
                self._write_parquet(temporary)
                return
            texts = ("class_names", "train_names", "test_names", "skipped")
            arrays = {name: value for name, value in vars(self).items() if value is not None}
            arrays |= {name: np.array(arrays[name], str) for name in texts}
            with temporary.open("wb") as handle:
                np.savez(handle, **arrays)

    def _write_parquet(self, file: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        width = self.train.shape[1]
        kinds = {"split": pyarrow.string(), "row": pyarrow.int64(), "name": pyarrow.string()}
        kinds |= {"label": pyarrow.int32(), "class": pyarrow.string()}
        kinds["targets"] = pyarrow.list_(pyarrow.int8())
        kinds["features"] = pyarrow.list_(pyarrow.float32(), width)
        about = {"step": str(self.step), "skipped": json.dumps(list(self.skipped))}
        about["class_names"] = json.dumps(list(self.class_names))  # of the targets' columns
        schema = pyarrow.schema(kinds, metadata=about)
        with parquet.ParquetWriter(file, schema) as writer:
            for split in ("train", "test"):
                features = getattr(self, split)
                if features is None:
                    continue
                labels, rows = getattr(self, f"{split}_labels"), len(features)
                columns = [[split] * rows, range(rows), getattr(self, f"{split}_names")]
                columns += [[None] * rows] * 2 if labels is None else [labels, self._named(labels)]
                targets = getattr(self, f"{split}_targets")
                columns.append([None] * rows if targets is None else targets.tolist())
                flat = pyarrow.array(features.reshape(-1))
                arrays = [
                    pyarrow.array(column, kind)
                    for column, kind in zip(columns, kinds.values(), strict=False)
                ]
                arrays.append(pyarrow.FixedSizeListArray.from_arrays(flat, width))
                writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))

    def _named(self, labels: Int[np.ndarray, " n"]) -> list[str | None]:
        """The classes' names; None for a label without a name."""
        names = dict(enumerate(self.class_names))
        return [names.get(label) for label in labels.tolist()]


def require_format(file: Path) -> None:
    """Refuses a file that `Features.save` can't write.

    Raises:
      UserError: another suffix, a folder, or a missing package.
    """
    if file.suffix not in (".npz", ".parquet"):
        raise UserError(f"--out is {file}. Give it a name that ends in .npz or .parquet.")
    if file.is_dir():
        raise UserError(f"--out is {file}, which is a folder. Name a file.")
    if file.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            f"Writing {file} needs the package pyarrow, which is not installed. "
            f"{install_extra('parquet')}, or write an .npz."
        )


def run_features(
    path: str | Path,
    *,
    step: int | None = None,
    projector_layer: int | None = None,
    overrides: Iterable[str] = (),
    labeled_only: bool = False,
    multi_label: bool = False,
    train: Source | Images | None = None,
    test: Source | Images | None = None,
    progress: Progress | None = None,
) -> Features:
    """Extracts the features of a dataset with a run's encoder.

    Args:
      path: the run's workdir.
      step: of the checkpoint; default the newest.
      projector_layer: see `ssl_jax.load`.
      overrides: strings `a.b=VALUE` that change the run's config: `data.…` names other data
        or a share of it, `eval.…` how images are prepared.
      labeled_only: leave out images without a label.
      multi_label: allow images of several classes with `labeled_only`.
      train: training images given in Python, as to `pretrain`; None: the config names them.
      test: the held-out images to `train`, if any.
      progress: shows how many images have been encoded; None for nothing.

    Returns:
      The features, in the order of the sources.

    Raises:
      UserError: the run, the data or, with `labeled_only`, a held-out split or labels are missing,
        or an override is bad or doesn't change features; raised before anything is computed.
    """
    overrides = tuple(overrides)
    require_channels(trained := config_at(path), overrides)
    _require_seen(config := apply_overrides(trained, overrides), overrides)
    if projector_layer is not None:
        config.eval.projector_layer = projector_layer
    learned, held_out = make_sources(config, train, test)
    if labeled_only:
        learned, held_out = _labeled(learned, held_out, multi_label)
    *targets, class_names = _targets(learned, held_out)  # first, as it may refuse them
    chosen = {key: config.eval[key] for key in ("projector_layer", "network")}
    encoder = load(path, step, **chosen)
    evaluator = Evaluator(config, spmd := make_spmd(), learned, held_out, progress=progress)
    seen = spmd.replicate(encoder.variables)
    splits = [evaluator.features(seen, split) for split in (learned, held_out) if split]
    # Names last: what replaces an unreadable image is known once all have been read.
    return Features(
        splits[0],
        learned.labels,
        splits[1] if held_out else None,
        held_out.labels if held_out else None,
        class_names,
        encoder.step,
        _names(learned),
        () if held_out is None else _names(held_out),
        tuple(dict.fromkeys((*learned.bad, *(held_out.bad if held_out else ())))),
        *targets,
    )


def _labeled(train: Source, test: Source | None, multi_label: bool) -> tuple[Source, Source | None]:
    """The labeled images; those of several classes each are all kept."""
    (require_measurable if multi_label else require_labels)(train, test)
    if targets_of(train):
        return train, test
    return labeled(train), test and labeled(test)


def _targets(
    train: Source, test: Source | None
) -> tuple[np.ndarray | None, np.ndarray | None, tuple[str, ...]]:
    """Targets of both splits, and the names of the classes or of the targets' columns."""
    first, second = targets_of(train), targets_of(test)
    if first and second:
        first, second = common_targets(first, second)
    values = [None if targets is None else targets.values for targets in (first, second)]
    if known := first or second:
        return values[0], values[1], known.names
    return None, None, train.class_names or (test.class_names if test else ())


def _names(source: Source) -> list[str]:
    return source.names(np.arange(source.num_examples))


def require_channels(trained: ConfigDict, overrides: Iterable[str]) -> None:
    """Refuses images of another number of channels than those that an encoder was trained on.

    Args:
      trained: config of the encoder's run.
      overrides: strings `a.b=VALUE` that name other data.

    Raises:
      UserError: naming both numbers.
    """
    for override in overrides:
        key, _, channels = override.partition("=")
        if key == "data.channels" and channels.strip() != str(trained.data.channels):
            raise UserError(
                f"config.data.channels is {channels}, but the encoder was trained on images of "
                f"{counted(trained.data.channels, 'channel')}. Use images of that number of "
                "channels."
            )


def _require_seen(config: ConfigDict, overrides: Iterable[str]) -> None:
    """Refuses keys that have no effect or would change the trained network."""
    first = sorted(config.views)[0]
    seen = (*SEEN, *(f"views.{first}.{key}" for key in _SEEN_OF_VIEW))
    for override in overrides:
        key = override.partition("=")[0]
        if not key.startswith(seen):
            raise UserError(
                f"config.{key} doesn't apply to a frozen encoder's features. Leave it out, or set "
                f"one of {', '.join(seen).replace('data.', 'data.…')}."
            )


def _both_splits(
    features: Features,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Features and labels of both splits, and the number of classes."""
    train, test = features.train_labels, features.test_labels
    assert features.test is not None and train is not None and test is not None
    return features.train, train, features.test, test, len(features.class_names)


def knn_metrics(
    features: Features, *, k: int = 200, temperature: float | None = 0.1
) -> dict[str, Any]:
    """`classification_metrics` of a vote of nearest neighbors; see `knn_classify`.

    Args:
      features: of labeled images only.
      k: see `knn_classify`.
      temperature: see `knn_classify`.
    """
    train, labels, test, test_labels, classes = _both_splits(features)
    votes = knn_votes(train, labels, test, num_classes=classes, k=k, temperature=temperature)
    # The softmax of their logarithms is the vote.
    return classification_metrics(np.log(np.maximum(votes, 1e-12)), test_labels)


def linear_metrics(
    features: Features,
    *,
    penalties: Iterable[float] = PENALTIES,
    seed: int = 0,
    metric: str = "top1",
) -> tuple[dict[str, Any], float]:
    """Metrics of a linear classifier and its penalty; see `fit_linear`.

    Args:
      features: of labeled images only, or of images of several classes each.
      penalties: see `fit_linear`.
      seed: see `fit_linear`.
      metric: see `fit_linear`.

    Returns:
      `classification_metrics`, or `multi_label_metrics` with targets, and the penalty.
    """
    if features.train_targets is not None and features.test_targets is not None:
        metric = metric if metric in MULTI_LABEL_METRICS else MULTI_LABEL_METRICS[0]
        assert features.test is not None
        return fit_multi_label(
            features.train,
            features.train_targets,
            features.test,
            features.test_targets,
            features.class_names,
            penalties=tuple(penalties),
            seed=seed,
            metric=metric,
        )
    train, labels, test, test_labels, classes = _both_splits(features)
    model = fit_linear(
        train, labels, num_classes=classes, penalties=tuple(penalties), seed=seed, metric=metric
    )
    return classification_metrics(model.scores(test), test_labels), model.penalty
