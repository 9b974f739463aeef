"""Sources of images and labels.

Every source is read by sample id; only `data.index` determines a run's order. An array source is
held whole on the devices and needs neither a host pipeline nor TensorFlow; a host source decodes
and crops image files and yields uint8 views.
"""

import queue
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import lazy_loader
import numpy as np
from jaxtyping import Bool, Int, Shaped
from ml_collections import ConfigDict

from ssl_jax.config import require_source
from ssl_jax.data.arrays import ArraySource
from ssl_jax.data.custom import CustomSource
from ssl_jax.data.folder import FolderSource
from ssl_jax.data.hf import hf_sources
from ssl_jax.data.host import HostSource
from ssl_jax.data.labels import (
    NO_COMMON_CLASS,
    NO_LABEL,
    Targets,
    common_targets,
    require_same_classes,
    targets_of,
)
from ssl_jax.data.packed import packed_source
from ssl_jax.data.path_list import PathsSource
from ssl_jax.data.reader import read_all
from ssl_jax.data.records import RecordsSource
from ssl_jax.data.registry import Images, registered_opener
from ssl_jax.data.tfds import tfds_sources
from ssl_jax.errors import UserError, counted
from ssl_jax.files import CHECK_PATH, reading

_HOLD_OUT = (
    "Set config.data.test_dir (TFDS: config.data.test_split). Before training, "
    "config.data.validation=0.2 holds out a share of the training images instead."
)
sklearn = lazy_loader.load("sklearn")  # slow to import, and only digits need it


class Source(Protocol):
    """A split of a dataset with ids 0 … N-1.

    Attributes:
      num_examples: number of images, N.
      num_classes: number of classes; 0 if no image has a label.
      labels: class of each id, int32 [N], in 0 … num_classes-1, or -1 for an image without a label;
        None if no image has one. TFDS labels are read on first use.
      class_names: names of the classes, in the order of the labels.
      targets: instead of these three, the labels of images of several classes each; optional, None
        for others.
      labels_from: where the labels come from, in words.
      bad: names of the undecodable images found so far and replaced.
      fingerprint: changes with the order, number, labels or contents of the images; a run resumes
        only with `same_images`.
    """

    num_examples: int
    class_names: tuple[str, ...]
    labels_from: str
    bad: list[str]
    fingerprint: str

    @property
    def num_classes(self) -> int:
        """See the class."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """See the class."""
        ...

    def names(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The images' paths in the folder of the data, or their ids in the dataset as strings.

        An unreadable image has the name of the image that replaces it.
        """
        ...

    def device_data(self) -> dict[str, np.ndarray]:
        """Arrays to copy whole to every device, uint8 or uint16: {"image": [N, H, W, C]}, or {}."""
        ...

    def batches(self, steps: Iterator[tuple[int, np.ndarray]]) -> Iterator[dict[str, Any]]:
        """This process's batches, in order, each in arrays of its own: they are read ahead.

        Args:
          steps: pairs of a step and the ids, int32 [n], that this process needs for it.

        Yields:
          "id" int32 [n]; "label" int32 [n] if any image of the source has a label; from a host
          source also "views", a tuple of uint8, or float32 in [0, 1], [n, H, W, C] in the order of
          `config.flat_views`.
        """
        ...

    def eval_transform(self, ids: Sequence[int] | np.ndarray) -> Shaped[np.ndarray, "n h w c"]:
        """Unaugmented images for evaluation, for `pipeline.prepare_eval`."""
        ...

    def eval_batches(
        self, batches: Iterator[Int[np.ndarray, " n"]]
    ) -> Iterator[Shaped[np.ndarray, "n h w c"]]:
        """`eval_transform` of batches of ids, in order; read ahead."""
        ...

    def image_sizes(self, ids: Sequence[int] | np.ndarray) -> Int[np.ndarray, "n 2"]:
        """Height and width of images as stored, without undecodable ones."""
        ...


class Subset:
    """A subset of a source's images, renumbered 0 … n-1."""

    def __init__(self, source: Source, ids: Int[np.ndarray, " n"]) -> None:
        self._source, self._ids = source, np.asarray(ids, np.int32)
        self.num_examples = len(ids)
        self.class_names, self.labels_from = source.class_names, source.labels_from
        self.bad = source.bad
        checksum = zlib.crc32(self._ids.tobytes())
        self.fingerprint = f"{source.fingerprint}; subset of {len(ids)}, checksum {checksum:08x}"

    @property
    def labels(self) -> np.ndarray | None:
        """Class of each image of the subset; None if none of them has a label."""
        labels = self._source.labels
        if labels is None or (labels[self._ids] == NO_LABEL).all():
            return None
        return labels[self._ids]

    @property
    def targets(self) -> Targets | None:
        """Labels of the subset's images if they are of several classes each."""
        targets = targets_of(self._source)
        return targets and targets.of(self._ids)

    @property
    def bits(self) -> int:
        """Bits per value of the source's images."""
        return bits_of(self._source)

    @property
    def num_classes(self) -> int:
        """Number of the source's classes; 0 if no image of the subset has a label."""
        return 0 if self.labels is None else self._source.num_classes

    def names(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The images' names in the source."""
        return self._source.names(self._ids[np.asarray(ids)])

    def device_data(self) -> dict[str, np.ndarray]:
        """The subset's images, if the source keeps its images on the devices."""
        return {name: array[self._ids] for name, array in self._source.device_data().items()}

    def batches(self, steps: Iterator[tuple[int, np.ndarray]]) -> Iterator[dict[str, Any]]:
        """The source's batches of these images, with the subset's ids."""
        pending: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()

        def in_source() -> Iterator[tuple[int, np.ndarray]]:
            for step, ids in steps:
                pending.put(ids)
                yield step, self._ids[ids]

        for batch in self._source.batches(in_source()):
            yield {**batch, "id": pending.get()}

    def eval_transform(self, ids: Sequence[int] | np.ndarray) -> Shaped[np.ndarray, "n h w c"]:
        """Unaugmented images for evaluation, as the source's."""
        return self._source.eval_transform(self._ids[np.asarray(ids)])

    def image_sizes(self, ids: Sequence[int] | np.ndarray) -> Int[np.ndarray, "n 2"]:
        """Height and width of images, as the source's."""
        return self._source.image_sizes(self._ids[np.asarray(ids)])

    def eval_batches(
        self, batches: Iterator[Int[np.ndarray, " n"]]
    ) -> Iterator[Shaped[np.ndarray, "n h w c"]]:
        """`eval_transform` of batches of ids, in order; read ahead."""
        return self._source.eval_batches(self._ids[ids] for ids in batches)


def labeled(source: Source, has_label: Bool[np.ndarray, " N"] | None = None) -> Source:
    """The images of a source that have labels; the source itself if all of them have.

    Args:
      source: with at least one label.
      has_label: which images have one; None: read from the source.
    """
    if has_label is None:
        labels = source.labels
        assert labels is not None
        has_label = labels != NO_LABEL
    return source if has_label.all() else Subset(source, np.flatnonzero(has_label))


def why_not_scored(train: Source, test: Source | None, *, learned: bool = True) -> str:
    """Why accuracies on held-out images can't be measured, and the fix; "" if they can.

    Args:
      train: the split to learn from.
      test: the held-out split.
      learned: whether the labels of `train` are needed.
    """
    reasons, fixes = [], []
    if targets_of(train if learned else test):
        return (
            "The images have several labels each, so there is no accuracy of one class per image. "
            "Mean average precision is measured by `ssl-jax linear`, `ssl-jax finetune` and "
            "`ssl-jax transfer`; for anything else, give one label per image."
        )
    if test is None:
        reasons.append("there are no held-out images")
        fixes.append(_HOLD_OUT)
    splits = {"training": train if learned else None, "held-out": test}
    unlabeled = [name for name, split in splits.items() if split and not split.num_classes]
    one_class = learned and train.num_classes == 1
    if unlabeled:
        reasons.append(f"the {' and '.join(unlabeled)} images have no labels")
    if one_class:
        reasons.append(f"all training images are of one class ({train.class_names[0]})")
    if unlabeled or one_class:
        fixes.append("Give labels of two or more classes, such as one subfolder per class.")
    because = " and ".join(reasons)
    return " ".join([f"{because[0].upper()}{because[1:]}.", *fixes]) if reasons else ""


def require_labels(train: Source, test: Source | None, *, learned: bool = True) -> None:
    """Refuses data on which accuracies can't be measured; see `why_not_scored`.

    Raises:
      UserError: names what is missing, and the fix.
    """
    if why := why_not_scored(train, test, learned=learned):
        raise UserError(why)


def several_labels(train: Source, test: Source | None) -> bool:
    """Whether both splits have images of several classes each."""
    return bool(targets_of(train) and targets_of(test))


def why_no_mean_ap(train: Source, test: Source | None) -> str:
    """Why average precision can't be measured on images of several classes; "" if it can."""
    if test is None:
        return f"There are no held-out images. {_HOLD_OUT}"
    first, second = targets_of(train), targets_of(test)
    if not (first and second):
        return (
            "Only one of the training and the held-out images has several labels per image. Use "
            "two splits of one dataset."
        )
    try:
        first, second = common_targets(first, second)
    except UserError as error:
        return str(error)
    if ((first.counts > 0) & (second.counts > 0)).any():
        return ""
    return NO_COMMON_CLASS


def require_targets(train: Source, test: Source | None) -> None:
    """Refuses images of several classes on which average precision can't be measured.

    Raises:
      UserError: there are no held-out images, only one split has several labels per image, or no
        class has images in both splits.
    """
    if why := why_no_mean_ap(train, test):
        raise UserError(why)


def require_measurable(train: Source, test: Source | None) -> None:
    """Refuses data on which a classifier can't be measured.

    Images of several classes are measured by average precision, see `require_targets`; others by
    accuracy, see `require_labels`.

    Raises:
      UserError: names what is missing, and the fix.
    """
    if targets_of(train) or targets_of(test):
        require_targets(train, test)
    else:
        require_labels(train, test)


def stratified_subset(
    labels: Int[np.ndarray, " n"], share: float, seed: int = 0
) -> Int[np.ndarray, " kept"]:
    """Samples a share of the images, with the same number of each class and at least one.

    Args:
      labels: class of each image; those without a label (-1) are left out.
      share: share of the labeled images, above 0 and at most 1; classes with too few images are
        used whole.
      seed: sampling seed. With the same seed, a larger share contains the smaller one.

    Returns:
      Ids, ascending.
    """
    known = labels[labels != NO_LABEL]
    classes = np.unique(known)
    each = max(1, round(share * len(known) / len(classes)))
    generators = (np.random.default_rng([seed, int(c)]) for c in classes)
    ids = [
        generator.permutation(np.flatnonzero(labels == c))[:each]
        for c, generator in zip(classes, generators, strict=True)
    ]
    return np.sort(np.concatenate(ids)).astype(np.int32)


def held_out_ids(
    labels: Int[np.ndarray, " n"] | None, count: int, share: float
) -> Int[np.ndarray, " held"]:
    """Samples a fixed share of each class, but never a whole class.

    Args:
      labels: class of each image; images without a label count as a class of their own.
      count: number of images.
      share: share of each class to hold out.

    Returns:
      Ids, ascending.
    """
    classes = np.zeros(count, np.int32) if labels is None else labels
    ids = []
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        held = min(round(share * len(members)), len(members) - 1)
        ids.append(np.random.default_rng([0, abs(int(label))]).permutation(members)[:held])
    return np.sort(np.concatenate(ids)).astype(np.int32)


def digits(config: ConfigDict) -> tuple[Source, Source]:
    """scikit-learn's 1,797 scans of handwritten digits, 8×8, in a fixed stratified split.

    The split doesn't depend on `config.seed`: runs with different seeds are compared on the same
    held-out images.
    """
    data = sklearn.datasets.load_digits()
    gray = np.round(data.images * (255 / 16)).astype(np.uint8)
    # Gray also where its equal channels are not the three of color files.
    images = np.repeat(gray[..., None], config.data.channels, axis=-1)
    try:
        train, test = sklearn.model_selection.train_test_split(
            np.arange(len(images)),
            test_size=config.data.test_fraction,
            random_state=0,
            stratify=data.target,
        )
    except ValueError as error:
        raise UserError(
            f"config.data.test_fraction is {config.data.test_fraction:g}, with which a split lacks "
            "images of a class. Use 0.01 to 0.99."
        ) from error
    names = [str(name) for name in data.target_names]
    own = {"labels_from": "scikit-learn"}
    return (
        ArraySource(images[train], data.target[train], names, **own),
        ArraySource(images[test], data.target[test], names, **own),
    )


def make_sources(
    config: ConfigDict, train: Source | Images | None = None, test: Source | Images | None = None
) -> tuple[Source, Source | None]:
    """Opens the training and held-out splits of a config.

    Args:
      config: the run's config.
      train: the training images, given in Python; None: `config.data` names them.
      test: the held-out images to `train`, if any.

    Returns:
      The training source, reduced to the share `config.data.subset`, and the source to evaluate on
      or None.

    Raises:
      UserError: an unknown name, a missing or empty folder or file, or objects that are no images.
    """

    def opened(config: ConfigDict) -> tuple[Source, Source | None]:
        splits = _named_sources(config) if train is None else _given_sources(config, train, test)
        for split in splits:
            if isinstance(split, ArraySource):
                _require_channels(config, split)
        _share_bits(config, *splits)
        return splits

    # In a thread, or Ctrl-C would have to wait for a file system that stalls.
    ((learned, held_out),) = read_all(map(opened, [config]))
    share = config.data.validation
    if share:
        held = held_out_ids(learned.labels, learned.num_examples, share)
        rest = np.setdiff1d(np.arange(learned.num_examples), held)
        if not len(held):
            raise UserError(
                f"config.data.validation={share:g} holds out none of {learned.num_examples} "
                "training images. Increase it."
            )
        learned, held_out = Subset(learned, rest), Subset(learned, held)
    share, seed = config.data.subset, config.data.subset_seed
    if share == 1:
        return learned, held_out
    if learned.labels is None:
        order = np.random.default_rng(seed).permutation(learned.num_examples)
        kept = np.sort(order[: max(1, round(share * learned.num_examples))])
        return Subset(learned, kept), held_out
    return Subset(learned, stratified_subset(learned.labels, share, seed)), held_out


def _require_channels(config: ConfigDict, source: ArraySource) -> None:
    found, expected = source.channels, config.data.channels
    if found != expected:
        raise UserError(
            f"{source.where} has images of {counted(found, 'channel')}, but "
            f"config.data.channels is {expected}. Set config.data.channels={found}, or convert the "
            "images."
        )


def _share_bits(config: ConfigDict, train: Source, test: Source | None) -> None:
    """Makes held-out files keep the bits of the training images; they aren't looked at before use.

    Raises:
      UserError: arrays of another number of bits than `config.data.bits` or the training images.
    """
    if isinstance(train, HostSource | ArraySource) and isinstance(test, HostSource):
        test.bits_from = train
    for split in (train, test):
        found: int = getattr(split, "array_bits", 0)
        set_bits = config.data.bits
        if found and found != (set_bits or bits_of(train)):
            where = getattr(split, "where", "test" if split is test else "train")
            expected = (
                f"config.data.bits is {set_bits}. Set config.data.bits=0"
                if set_bits
                else f"the training images of {bits_of(train)}. Give both the same dtype"
            )
            raise UserError(
                f"{where} has arrays of uint{found}, but {expected}, or convert the arrays to "
                f"uint{set_bits or bits_of(train)}."
            )


def bits_of(source: Source) -> int:
    """Bits per value of a source's images: 8, also of a source that doesn't know, or 16."""
    return int(getattr(source, "bits", 8))


def given_data(config: ConfigDict, train: object, test: object) -> ConfigDict:
    """The config of a run whose images may be given in Python, which it then records.

    Args:
      config: of the run.
      train: the training images; None: `config.data` names them.
      test: the held-out images to `train`, if any.

    Raises:
      UserError: held-out images without training images.
    """
    if train is None:
        if test is not None:
            raise UserError("test is given without train. Give both, or set config.data.")
        return config
    config = ConfigDict(config.to_dict()).lock()
    config.data.update(name="python", dir="", test_dir="")
    return config


def _given_sources(
    config: ConfigDict, train: Source | Images, test: Source | Images | None
) -> tuple[Source, Source | None]:
    source = _as_source(config, train, "train")
    if test is None:
        return source, None
    held_out = _as_source(config, test, "test")
    require_same_classes(source, held_out, "train and test")
    return source, held_out


def _as_source(config: ConfigDict, images: Any, where: str) -> Source:
    """A source as it is, or of an object with a length and `read(ids)`."""
    if hasattr(images, "batches"):
        return images
    if not (hasattr(images, "__len__") and callable(getattr(images, "read", None))):
        raise UserError(
            f"{where} is of type {type(images).__name__}, which has no length or no read(ids). "
            "Implement both (ssl_jax.data.registry.Images), or use ArraySource(images) for arrays."
        )
    return CustomSource(config, images, where)


def _registered_source(config: ConfigDict, key: str) -> Source:
    name, path = config.data.name, config.data[key]
    opener = registered_opener(name)
    assert opener is not None
    where = f"config.data.{key} ({name}: {path})"
    with reading(where, CHECK_PATH):
        return _as_source(config, opener(path), where)


def _named_sources(config: ConfigDict) -> tuple[Source, Source | None]:
    openers: dict[str, Callable[[ConfigDict, str], Source]] = {
        "folder": FolderSource,
        "packed": packed_source,
        "paths": PathsSource,
        "records": RecordsSource,
    }
    makers = {"digits": digits, "hf": hf_sources, "tfds": tfds_sources}
    name = config.data.name
    if name in makers:
        return makers[name](config)
    if name == "python":
        raise UserError(
            "The images of this run are objects that were given in Python. Give them again, as "
            "train=…, or register a source and set config.data.name (docs/data.md)."
        )
    require_source(name)
    return _dir_sources(config, openers.get(name, _registered_source))


def _dir_sources(
    config: ConfigDict, open_source: Callable[[ConfigDict, str], Source]
) -> tuple[Source, Source | None]:
    """The sources in `config.data.dir` and `config.data.test_dir`; None if the latter is empty."""
    train = open_source(config, "dir")
    if not config.data.test_dir:
        return train, None
    test = open_source(config, "test_dir")
    dirs = f"config.data.dir ({config.data.dir}) and config.data.test_dir ({config.data.test_dir})"
    require_same_classes(train, test, dirs)
    return train, test
