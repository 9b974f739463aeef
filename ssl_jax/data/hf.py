"""Datasets in the formats of Hugging Face's `datasets` package, on a local disk.

The package is imported only here and only when it is needed. Nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from ssl_jax.config import close_path
from ssl_jax.data.custom import CustomSource
from ssl_jax.data.labels import NO_LABEL, numbered, of_lists, require_same_classes
from ssl_jax.data.listing import named_path, read_image
from ssl_jax.errors import UserError, did_you_mean, first_line, importing
from ssl_jax.files import local_path

# Files that `save_to_disk` writes for a dataset, and for a dictionary of its splits.
_SAVED = ("state.json", "dataset_dict.json")


def hf_sources(config: ConfigDict) -> tuple[CustomSource, CustomSource | None]:
    """Opens the splits `config.data.split` and `config.data.test_split`.

    The held-out split is read from `config.data.test_dir`, or from `config.data.dir` if that is
    empty.

    Args:
      config: the run's config.

    Returns:
      The training source, and the held-out one or None if both `config.data.test_split` and
      `config.data.test_dir` are empty.

    Raises:
      UserError: the package is missing, there is no dataset in the folder, an unknown split or
        column, or a view that can't be made on the host.
    """
    data = config.data
    train = _source(config, "dir", _splits(data.dir, "dir"), "split")
    if not data.test_split and not data.test_dir:
        return train, None
    key = "test_dir" if data.test_dir else "dir"
    test = _source(config, key, _splits(data[key], key), "test_split")
    require_same_classes(train, test, "the training and held-out images")
    return train, test


class HfImages:
    """A split as `ssl_jax.data.registry.Images`: encoded images, as they are stored."""

    def __init__(self, dataset: Any, image: str, label: str, root: Path, where: str) -> None:
        """Finds the columns and reads the labels.

        Args:
          dataset: a `datasets.Dataset`.
          image: column of the images.
          label: column of the labels; "" for none.
          root: folder of the dataset, to which paths of images are relative.
          where: the dataset, for messages.

        Raises:
          UserError: a column is missing or of another type.
        """
        import datasets

        features = dataset.features
        images = [name for name, feature in features.items() if _is_image(feature, datasets)]
        if image not in images:
            raise UserError(
                f"config.data.image_key is '{image}', which is not a column of images of {where}."
                + (did_you_mean(image, images) if images else " It has no column of images.")
            )
        self.class_names: tuple[str, ...] = ()
        self.labels: Int[np.ndarray, " n"] | Int[np.ndarray, "n c"] | None = None
        if label:
            if label not in features:
                hint = did_you_mean(label, [name for name in features if name != image])
                raise UserError(
                    f"config.data.label_key is '{label}', which is not a column of {where}.{hint} "
                    "For no labels, set it to ''."
                )
            self.labels, self.class_names = _labels(dataset, label, where)
        column = dataset.select_columns([image]).with_format(None)
        self._images = column.cast_column(image, datasets.Image(decode=False))
        self._key, self._root, self._where = image, root, where

    def __len__(self) -> int:
        """The number of images."""
        return len(self._images)

    def read(self, ids: Int[np.ndarray, " n"]) -> list[bytes]:
        """Reads the bytes of images from the dataset, or from the files that it names."""
        return [
            self._contents(stored, id)
            for id, stored in zip(ids, self._images[ids.tolist()][self._key], strict=True)
        ]

    def _contents(self, stored: dict[str, Any] | None, id: int) -> bytes:
        stored = stored or {}
        if stored.get("bytes"):
            return stored["bytes"]
        path = stored.get("path") or ""
        if "://" in path or not path:
            reason = f"is at {path}, which needs a network" if path else "is missing"
            raise UserError(
                f"Image {id} of {self._where} {reason}. Make the column an Image() and save the "
                "dataset with `save_to_disk`, which stores the images."
            )
        return read_image(self._root / path)


def _datasets() -> Any:
    """The package, set to use no network.

    Raises:
      UserError: it can't be imported.
    """
    # Read once, when the packages are first imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with importing("datasets", "hf"):
        import datasets
    return datasets


def _splits(path: str, key: str) -> Mapping[str, Any]:
    """The splits of a saved dataset, or of data files in a folder."""
    key = f"config.data.{key}"
    package = _datasets()
    root = named_path(path, key, "Set it to the folder of a dataset.")
    if not root.is_dir():
        raise UserError(
            f"{key} is {path}, which is not a folder here, and nothing is downloaded."
            f"{close_path(root)} Download the dataset first, such as with `hf download --repo-type "
            "dataset NAME --local-dir FOLDER`."
        )
    try:
        if any((root / name).exists() for name in _SAVED):
            found = package.load_from_disk(str(root))
        else:
            found = package.load_dataset(str(root))
    except Exception as error:  # corrupt and unknown files fail in many ways
        raise UserError(
            f"{key} is {path}, which the package datasets can't read ({first_line(error)}). Set it "
            "to a folder from `save_to_disk`, or to one of Parquet, Arrow or CSV files, WebDataset "
            "tars or images."
        ) from error
    return found if isinstance(found, Mapping) else {"train": found}


def _source(
    config: ConfigDict, key: str, splits: Mapping[str, Any], split_key: str
) -> CustomSource:
    data, path = config.data, config.data[key]
    name = data[split_key] or (next(iter(splits)) if len(splits) == 1 else "")
    if name not in splits:
        raise UserError(
            f"config.data.{split_key} is '{name}', which is not a split of {path}."
            f"{did_you_mean(name, splits)}"
        )
    where = f"config.data.{key} ({path}, split {name})"
    images = HfImages(splits[name], data.image_key, data.label_key, local_path(path), where)
    source = CustomSource(config, images, where)
    if source.num_classes:
        source.labels_from = f"column '{data.label_key}'"
    return source


def _is_image(feature: Any, datasets: Any) -> bool:
    """Whether a column can hold images: encoded, or their paths."""
    if isinstance(feature, datasets.Image):
        return True
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("binary", "large_binary", "string", "large_string")
    return isinstance(feature, dict) and {"bytes", "path"} >= set(feature)


def _labels(
    dataset: Any, key: str, where: str
) -> tuple[Int[np.ndarray, " n"] | Int[np.ndarray, "n c"], tuple[str, ...]]:
    """Labels of a column of classes, integers or strings; -1 where it is null.

    Of a column of lists of classes, targets: a column per class.
    """
    import datasets

    feature = dataset.features[key]
    classes = getattr(feature, "feature", None)  # of a List or a Sequence
    if isinstance(classes, datasets.ClassLabel):
        lists = dataset.select_columns([key]).with_format("arrow")[:][key].to_pylist()
        return of_lists(lists, classes.num_classes), tuple(classes.names)
    named = isinstance(feature, datasets.ClassLabel)
    dtype = getattr(feature, "dtype", "")
    if not (named or dtype in ("string", "large_string") or "int" in str(dtype)):
        raise UserError(
            f"config.data.label_key is '{key}', which holds {feature} in {where}. Set it to a "
            "column of class labels, lists of them, integers or strings, or to '' for no labels."
        )
    values = dataset.select_columns([key]).with_format("arrow")[:][key].to_pylist()
    if "string" in str(dtype):
        return numbered([value or "" for value in values])
    labels = np.array([NO_LABEL if value is None else value for value in values], np.int64)
    return labels, tuple(feature.names or ()) if named else ()
