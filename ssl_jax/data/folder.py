"""A folder of image files as a source: decoded and cropped on the host, by tf.data."""

import logging
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from ssl_jax.config import flat_views
from ssl_jax.data import views
from ssl_jax.data.views import tf
from ssl_jax.errors import UserError

Step = tuple[int, Int[np.ndarray, " n"]]
# Of a file's contents, the step and the id: what to make of an image.
PerImage = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, ...]]

_SUFFIXES = (".jpg", ".jpeg", ".png")
_log = logging.getLogger("ssl_jax.data")


def folder_sources(config: ConfigDict) -> tuple["FolderSource", "FolderSource | None"]:
    """The images under `config.data.dir` and `config.data.test_dir`.

    Args:
      config: of the run.

    Returns:
      The training source and the held-out one, None where `config.data.test_dir` is empty.

    Raises:
      UserError: a missing folder, one without images, class folders that differ between the two, or
        a view that can't be made on the host.
    """
    train = FolderSource(config, "dir")
    if not config.data.test_dir:
        return train, None
    test = FolderSource(config, "test_dir")
    differing = sorted(set(train.class_names) ^ set(test.class_names))
    if differing:
        raise UserError(
            f"config.data.dir ({config.data.dir}) and config.data.test_dir "
            f"({config.data.test_dir}) must have the same class folders, but only one of them has "
            f"{_some(differing)}: add or remove it."
        )
    return train, test


class FolderSource:
    """The JPEG and PNG files of a folder: by class in its sub-folders, or without labels in itself.

    Ids follow the sorted names of the classes and, in each, the sorted paths of the files.

    With `config.data.on_bad_image` "skip", the id of a file that can't be decoded stands for the
    image and label of the next id whose file can (after the last id comes the first); which ones
    they are depends on the files alone, not on what was read before.

    Attributes:
      num_examples: N.
      labels: class of each id, int32 [N]; None for a folder without sub-folders.
      class_names: names of the sub-folders.
      bad: the files found so far that can't be decoded.
    """

    def __init__(self, config: ConfigDict, key: str = "dir") -> None:
        """Lists the folder; no file is opened.

        Args:
          config: of the run.
          key: which of `config.data` names the folder: "dir" or "test_dir".

        Raises:
          UserError: no such folder, no images in it or in one of its sub-folders, images beside
            class folders, or a view that can't be made on the host.
        """
        _refuse_affine(config)
        self._config, self._key = config, key
        self._views = flat_views(config)
        files, labels, self.class_names = _list_images(config.data[key], f"config.data.{key}")
        self.num_examples = len(files)
        self.labels = None if labels is None else np.array(labels, np.int32)
        self.bad: list[str] = []
        self._files = np.array([os.fsencode(file) for file in files], object)
        names = "\0".join(os.path.relpath(file, config.data[key]) for file in files)
        checksum = zlib.crc32(os.fsencode(names))
        self.fingerprint = f"{self.num_examples} images, checksum of names {checksum:08x}"
        self._lock = threading.Lock()

    def resident(self) -> dict[str, np.ndarray]:
        """Nothing: images come with the batches."""
        return {}

    def batches(self, steps: Iterator[Step]) -> Iterator[dict[str, Any]]:
        """This process's batches, in order.

        Args:
          steps: pairs of a step and the ids, int32 [n], that this process needs for it.

        Yields:
          {"id": int32 [n]}, "label" int32 [n] where there are labels, and "views": a tuple of uint8
          [n, size, size, 3] in the order of `config.flat_views`.

        Raises:
          UserError: a file that can't be read; or decoded, unless those are skipped.
        """
        seed, flat = self._config.seed, self._views

        def crop(contents: tf.Tensor, step: tf.Tensor, id: tf.Tensor) -> tuple[tf.Tensor, ...]:
            return views.make_views(views.decode(contents), views.image_seed(seed, step, id), flat)

        for ids, made in self._read(steps, crop):
            batch: dict[str, Any] = {"id": ids, "views": made}
            if self.labels is not None:
                batch["label"] = self.labels[ids]
            yield batch

    def clean(self, ids: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "n size size 3"]:
        """Images as they are evaluated: the central square, as large as the first view.

        Args:
          ids: which ones, at least one.

        Returns:
          uint8 [n, size, size, 3].

        Raises:
          UserError: a file that can't be read; or decoded, unless those are skipped.
        """
        view, how = self._views[0], self._config.eval

        def prepare(contents: tf.Tensor, step: tf.Tensor, id: tf.Tensor) -> tuple[tf.Tensor, ...]:
            image = views.decode(contents)
            return (views.clean_view(image, view, how.crop_fraction, how.interpolation),)

        _, (images,) = next(self._read(iter([(0, np.asarray(ids))]), prepare))
        return images

    def _read(
        self, steps: Iterator[Step], make: PerImage
    ) -> Iterator[tuple[Int[np.ndarray, " n"], tuple[np.ndarray, ...]]]:
        """The ids of each step and what was made of their images.

        A file that can't be decoded ends the pipeline with an error; once its substitute is known,
        a new pipeline goes on with the step that failed.
        """
        feed = _Feed(steps)
        while (size := feed.next_size()) is not None:
            known = len(self.bad)
            try:
                for made in self._pipeline(feed, size, make).as_numpy_iterator():
                    _, ids = feed.done()
                    yield ids, made
            except tf.errors.OpError:
                self._replace_undecodable(feed.pending[0][1])
                if len(self.bad) == known:  # something else is wrong
                    raise

    def _pipeline(self, feed: "_Feed", size: int, make: PerImage) -> tf.data.Dataset:
        def arrays() -> Iterator[tuple[np.ndarray, ...]]:
            for step, ids in feed.items():
                yield np.full(len(ids), step, np.int64), ids.astype(np.int64), self._files[ids]

        @tf.autograph.experimental.do_not_convert  # nothing to convert, and it takes a while
        def image(step: tf.Tensor, id: tf.Tensor, file: tf.Tensor) -> tuple[tf.Tensor, ...]:
            return make(tf.io.read_file(file), step, id)

        threads = self._config.data.threads
        options = tf.data.Options()
        # Images are what is parallel, not the ops of an image.
        options.threading.max_intra_op_parallelism = 1
        if threads:
            options.threading.private_threadpool_size = threads
        spec = tuple(tf.TensorSpec([size], kind) for kind in (tf.int64, tf.int64, tf.string))
        return (
            tf.data.Dataset.from_generator(arrays, output_signature=spec)
            .unbatch()
            .map(image, num_parallel_calls=threads or tf.data.AUTOTUNE, deterministic=True)
            .batch(size)
            .prefetch(1)
            .with_options(options)
        )

    def _replace_undecodable(self, ids: Int[np.ndarray, " n"]) -> None:
        """Finds the bad files among some ids' and replaces them, or refuses to go on."""
        with self._lock:  # training and evaluation may both be reading
            with ThreadPoolExecutor(self._config.data.threads or os.cpu_count()) as pool:
                ids = np.unique(ids)
                bad = ids[list(pool.map(self._is_undecodable, ids))]
            if len(bad) and self._config.data.on_bad_image == "fatal":
                more = f" (nor can {len(bad) - 1} more in the same step)" if len(bad) > 1 else ""
                raise UserError(
                    f"{os.fsdecode(self._files[bad[0]])} can't be decoded as a JPEG or PNG image"
                    f"{more}: repair or remove it, or set config.data.on_bad_image to 'skip'."
                )
            for id in bad:
                if self._is_undecodable(id):  # else it went with the one before
                    self._replace(id)

    def _replace(self, id: int) -> None:
        """Gives a bad id, and the bad ones right after it, the next good id's file and label."""
        run, good = [id], (id + 1) % self.num_examples
        while self._is_undecodable(good):
            if good == id:
                raise UserError(
                    f"No image under config.data.{self._key} ({self._config.data[self._key]}) can "
                    "be decoded: give a folder of JPEG or PNG files."
                )
            run.append(good)
            good = (good + 1) % self.num_examples
        for bad in run:
            self.bad.append(os.fsdecode(self._files[bad]))
            _log.warning(
                "%s can't be decoded: %s is used in its place.",
                self.bad[-1],
                os.fsdecode(self._files[good]),
            )
            self._files[bad] = self._files[good]
            if self.labels is not None:
                self.labels[bad] = self.labels[good]

    def _is_undecodable(self, id: int) -> bool:
        file = self._files[id]
        try:
            views.decode(Path(os.fsdecode(file)).read_bytes())
        except OSError as error:
            raise UserError(
                f"{os.fsdecode(file)} can't be read ({error.strerror}): see that it stays there."
            ) from error
        except tf.errors.InvalidArgumentError:
            return True
        return False


class _Feed:
    """Steps on their way through tf.data, kept until they are out of it.

    Attributes:
      pending: steps drawn but not done, the oldest first.
    """

    def __init__(self, steps: Iterator[Step]) -> None:
        self.pending: deque[Step] = deque()
        self._steps = steps
        self._error: BaseException | None = None
        self._reader: object = None
        self._lock = threading.Lock()

    def next_size(self) -> int | None:
        """How many ids the next step has; None at the end. Raises what drawing a step raised."""
        with self._lock:
            self._reader = None
            if not self.pending:
                self._draw()
            if self.pending:
                return len(self.pending[0][1])
            if self._error is not None:
                raise self._error
            return None

    def items(self) -> Iterator[Step]:
        """Pending steps, then new ones, as long as they have the size of the first.

        tf.data calls this in a thread of its own; what an earlier pipeline still asks for after
        it has failed gets nothing.
        """
        with self._lock:
            reader = self._reader = object()
            waiting = deque(self.pending)
        size = len(waiting[0][1])
        while True:
            if not waiting:
                with self._lock:
                    if self._reader is not reader or not self._draw():
                        return
                    waiting.append(self.pending[-1])
            step = waiting.popleft()
            if len(step[1]) != size:
                return
            yield step

    def done(self) -> Step:
        """The oldest step, which is out."""
        return self.pending.popleft()

    def _draw(self) -> bool:
        if self._error is not None:
            return False
        try:
            self.pending.append(next(self._steps))
        except StopIteration:
            return False
        except Exception as error:  # raised where the steps are consumed, after those before it
            self._error = error
            return False
        return True


def _list_images(folder: str, key: str) -> tuple[list[str], list[int] | None, tuple[str, ...]]:
    """Files, their labels (None where there are no classes) and the names of the classes."""
    if not folder:
        raise UserError(f"{key} is empty: give the folder of the images by --{key}=FOLDER.")
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"{key} is {folder}, which is not a folder: give one with images in it.")
    flat, folders = _scan(root)
    by_class = {name: _walk(root / name) for name in folders}
    if not flat and not any(by_class.values()):
        raise UserError(f"{key} is {folder}, which has no images: put .jpg, .jpeg or .png there.")
    if flat and not any(by_class.values()):
        return [str(root / name) for name in flat], None, ()
    if flat:
        raise UserError(
            f"{key} is {folder}, which has both images ({_some(flat)}) and folders of images "
            f"({_some(folders)}): move the images into class folders."
        )
    empty = [name for name, files in by_class.items() if not files]
    if empty:
        raise UserError(
            f"{key} is {folder}, where {_some(empty)} has no .jpg, .jpeg or .png images: "
            "remove what is not a class folder."
        )
    files = [file for name in folders for file in by_class[name]]
    labels = [label for label, name in enumerate(folders) for _ in by_class[name]]
    return files, labels, tuple(folders)


def _scan(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the images and of the folders right in a folder, sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        seen = [(entry.name, entry.is_dir()) for entry in entries if entry.name[0] != "."]
    files = sorted(name for name, is_dir in seen if not is_dir)
    images = [name for name in files if name.lower().endswith(_SUFFIXES)]
    if len(images) < len(files):
        others = [name for name in files if not name.lower().endswith(_SUFFIXES)]
        _log.warning("%s: left out %s, not .jpg, .jpeg or .png.", folder, _some(others))
    return images, sorted(name for name, is_dir in seen if is_dir)


def _walk(folder: Path) -> list[str]:
    """Paths of the images in a folder and below, sorted."""
    images, folders = _scan(folder)
    below = [file for name in folders for file in _walk(folder / name)]
    return sorted([str(folder / name) for name in images] + below)


def _refuse_affine(config: ConfigDict) -> None:
    for name in sorted(config.views):
        for key, value in config.views[name].affine.items():
            if value:
                raise UserError(
                    f"config.views.{name}.affine.{key} is {value}, but images of a folder are "
                    "cropped on the host, where they can't be turned, sheared or shifted: set it "
                    "to 0."
                )


def _some(names: Sequence[str]) -> str:
    """The first of some names and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
