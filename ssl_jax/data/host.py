"""Sources that decode and crop image files on the host with tf.data.

Subclasses of `HostSource` differ only in where an image's file is. Images are read by id, so a run
that resumes at step s reads nothing of the earlier steps.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import logging
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int, Shaped
from ml_collections import ConfigDict

from ssl_jax.config import flat_views
from ssl_jax.data import views
from ssl_jax.data.decode import ChannelsError, image_bits, image_size
from ssl_jax.data.fingerprint import images_fingerprint, sampled_ids
from ssl_jax.data.labels import Targets
from ssl_jax.data.listing import IMAGES_IN_WORDS, utf8
from ssl_jax.data.reader import in_parallel, read_all
from ssl_jax.data.tensorflow import load_tensorflow, tf
from ssl_jax.data.values import is_float
from ssl_jax.errors import UserError, counted

Step: TypeAlias = tuple[int, Int[np.ndarray, " n"]]
# (file contents, step, id) -> the tensors to return for an image.
PerImage: TypeAlias = "Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, ...]]"

_log = logging.getLogger("ssl_jax.data")
_CHUNK = 16  # images that `eval_transform` reads at once
# Options of glibc's mallopt, in bytes. M_TRIM_THRESHOLD (-1): free memory to keep at the top of a
# heap. M_TOP_PAD (-2): how much heaps grow by; from their size of 64 MiB on, a thread's empty heaps
# are kept too. M_MMAP_THRESHOLD (-3): smaller blocks get no mapping of their own; the maximum.
_MALLOC = {-1: 2**30, -2: 2**26, -3: 2**25}


class HostSource:
    """Image files decoded and cropped on the host. A subclass locates them.

    With `config.data.on_bad_image` "skip", an image that can't be decoded is replaced, label
    included, by the image of the next decodable id (the first id follows the last). Replacements
    depend only on the files, not on what was read before.

    Attributes:
      num_examples: number of images, N.
      num_classes: number of classes; 0 if no image has a label.
      class_names: names of the classes, in the order of the labels.
      labels_from: where the labels come from, in words.
      bad: names of the undecodable images found so far.
      fingerprint: changes with the order, number, names, labels or contents of the images.
      channels: number of channels, C.
      bits_from: for held-out files, the training images, whose `bits` they take; else None.
    """

    bits_from: Any = None
    class_names: tuple[str, ...] = ()
    num_classes: int = 0
    labels_from: str = ""
    _targets: Targets | None = None

    def __init__(self, config: ConfigDict, where: str, num_examples: int, fingerprint: str) -> None:
        """Opens nothing.

        Args:
          config: the run's config.
          where: the config keys and values that locate the images, for messages.
          num_examples: number of images, N.
          fingerprint: `contents_fingerprint` of the images.

        Raises:
          UserError: TensorFlow isn't installed, a view can't be made on the host, or there are
            2**31 images or more.
        """
        load_tensorflow()  # if it is not installed, fails here and not later in a thread
        _refuse_affine(config)
        keep_freed_memory()
        if num_examples >= 2**31:
            raise UserError(f"{where} has {num_examples} images: use fewer than {2**31}.")
        self._config, self._where = config, where
        self._views = flat_views(config)
        self.channels: int = config.data.channels
        self.num_examples = num_examples
        self.bad: list[str] = []
        self.fingerprint = fingerprint
        # For each id, the id whose image is used.
        self._source_id = np.arange(num_examples, dtype=np.int32)
        self._lock = threading.Lock()
        self._threads = config.data.threads or len(os.sched_getaffinity(0))
        self._timeout_s = config.data.timeout_s
        self._pipelines: dict[tuple[int, PerImage], _Pipeline] = {}
        self._other_channels = ""  # what is wrong if all images have another number

    def handles(self, ids: Int[np.ndarray, " n"]) -> tuple[Sequence[bytes], Int[np.ndarray, " n"]]:
        """Arguments of `contents` per image: a handle, and a label or -1 if none or unknown yet.

        Called in one thread, ahead of decoding.
        """
        raise NotImplementedError

    def contents(self, handle: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The image file's bytes, a scalar string, and its label, as TensorFlow ops."""
        raise NotImplementedError

    def decode(self, contents: tf.Tensor) -> views.Image:
        """Decodes what `contents` returns to uint8, or float32 in [0, 1], [height, width, C]."""
        limits = tuple(self._config.data.range)
        if self.channels == 3 and not is_float(self.bits, limits):
            return views.decode(contents)
        return views.decode_channels(contents, self.channels, self.bits, limits)

    @functools.cached_property
    def bits(self) -> int:
        """Bits per value that are kept: `config.data.bits`, or of a few images, evenly spread."""
        if self._config.data.bits:
            return int(self._config.data.bits)
        if self.bits_from is not None:
            return int(self.bits_from.bits)
        ids = sampled_ids(self.num_examples)
        parts = (in_parallel(self._bits, part, len(part)) for part in [ids])  # read in its thread
        (found,) = read_all(parts, self._timeout_s)
        return 16 if max(found) > 8 else 8

    def _bits(self, id: int) -> int:
        # Raised, or skipped, when the image is read for a batch.
        with contextlib.suppress(OSError, UserError, ValueError, TypeError, tf.errors.OpError):
            bits = image_bits(self.read(id))
            return bits if bits <= 16 else 8  # others can't be decoded
        return 8

    def name(self, id: int) -> str:
        """An image's location, for messages."""
        raise NotImplementedError

    def file_name(self, id: int) -> str:
        """An image's path in the folder of the data; its id where images are no files."""
        return str(id)

    def names(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The names of the images that are used for these ids."""
        return [utf8(self.file_name(id)) for id in self._source_id[np.asarray(ids)].tolist()]

    @property
    def labels(self) -> Int[np.ndarray, " N"] | None:
        """Class of each id, int32 [N], -1 for none; None if no image has a label."""
        return self._labels[self._source_id] if self.num_classes else None

    @property
    def targets(self) -> Targets | None:
        """Labels of images of several classes; None if images have at most one class."""
        return self._targets and self._targets.of(self._source_id)

    @functools.cached_property
    def _labels(self) -> Int[np.ndarray, " N"]:
        """Class of each image; a subclass sets it, or reads it on first use."""
        raise NotImplementedError

    def device_data(self) -> dict[str, np.ndarray]:
        """Empty: images come with the batches."""
        return {}

    def batches(self, steps: Iterator[Step]) -> Iterator[dict[str, Any]]:
        """This process's batches, in order.

        Args:
          steps: pairs of a step and the ids, int32 [n], that this process needs for it.

        Yields:
          "id" int32 [n], "label" int32 [n] if there are labels, and "views", a tuple of uint8, or
          float32 in [0, 1], [n, height, width, C] in the order of `config.flat_views`.

        Raises:
          UserError: a file can't be read, or can't be decoded and isn't skipped.
        """
        for ids, labels, made in self._read(steps, self._crop):
            batch: dict[str, Any] = {"id": ids, "views": made}
            if self.num_classes:
                batch["label"] = labels
            yield batch

    def eval_transform(self, ids: Sequence[int] | np.ndarray) -> Shaped[np.ndarray, "n h w c"]:
        """Images for evaluation: `device_crop.eval_box`, resized to the first view's size.

        Args:
          ids: at least one id.

        Returns:
          uint8, or float32 in [0, 1], [n, height, width, C].

        Raises:
          UserError: a file can't be read, or can't be decoded and isn't skipped; or
            `config.data.timeout_s` has passed.
        """
        # Always the same size, because each has a pipeline of its own.
        padded = np.pad(np.asarray(ids), (0, -len(ids) % _CHUNK), mode="edge")
        chunks = iter(padded.reshape(-1, _CHUNK))
        return np.concatenate(read_all(self.eval_batches(chunks), self._timeout_s))[: len(ids)]

    def eval_batches(
        self, batches: Iterator[Int[np.ndarray, " n"]]
    ) -> Iterator[Shaped[np.ndarray, "n h w c"]]:
        """`eval_transform` of batches of ids, in order; read and decoded ahead."""
        for _, _, (images,) in self._read(((0, ids) for ids in batches), self._prepare):
            yield images

    def image_sizes(self, ids: Sequence[int] | np.ndarray) -> Int[np.ndarray, "n 2"]:
        """Height and width of images, read from their headers, without undecodable ones.

        Raises:
          UserError: a file can't be read, or `config.data.timeout_s` has passed.
        """
        found = read_all((image_size(self.read(id)) for id in ids), self._timeout_s)
        sizes = [size for size in found if size is not None]
        return np.array(sizes, np.int32).reshape(-1, 2)

    def boxes(
        self, step: int, ids: Sequence[int] | np.ndarray
    ) -> tuple[Int[np.ndarray, "n views 4"], Int[np.ndarray, "n 2"]]:
        """Crop boxes of the views at a step.

        Args:
          step: counted from 0 over the whole run.
          ids: at least one id.

        Returns:
          Boxes (top, left, height, width), int32 [n, V, 4], and image sizes (height, width), int32
          [n, 2], all in pixels.
        """
        steps = iter([(step, np.asarray(ids))])
        ((_, _, (boxes, sizes)),) = read_all(self._read(steps, self._draw), self._timeout_s)
        return boxes, sizes

    # Each is a `PerImage`. They are methods, not closures, so that every pass finds its pipeline.

    def _nothing(
        self, contents: tf.Tensor, step: tf.Tensor, id: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        return ()

    def _crop(self, contents: tf.Tensor, step: tf.Tensor, id: tf.Tensor) -> tuple[tf.Tensor, ...]:
        seed = views.image_seed(self._config.seed, step, id)
        return views.make_views(self.decode(contents), seed, self._views)

    def _prepare(
        self, contents: tf.Tensor, step: tf.Tensor, id: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        image, options = self.decode(contents), self._config.eval
        crop, interpolation = options.crop_fraction, options.interpolation
        return (views.center_crop(image, self._views[0], crop, interpolation),)

    def _draw(self, contents: tf.Tensor, step: tf.Tensor, id: tf.Tensor) -> tuple[tf.Tensor, ...]:
        size = tf.shape(self.decode(contents))[:2]
        seed = views.image_seed(self._config.seed, step, id)
        return views.draw_boxes(size, seed, self._views), size

    def _read(
        self, steps: Iterator[Step], make: PerImage
    ) -> Iterator[tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], tuple[np.ndarray, ...]]]:
        """Yields for each step its ids, their labels and the results of `make`.

        An undecodable image ends the run of the tf.data pipeline with an error. Once its
        replacement is known, a new run resumes at the step that failed.
        """
        feed = _Feed(steps)
        while (size := feed.next_size()) is not None:
            known = len(self.bad)
            try:
                for labels, *made in self._pipeline(size, make).run(self._arrays(feed)):
                    _, ids = feed.done()
                    yield ids, labels, tuple(made)
            except tf.errors.OpError:
                if feed.failed is not None:
                    raise feed.failed from None
                self._replace_undecodable(feed.pending[0][1])
                if len(self.bad) == known:  # something else is wrong
                    raise

    def _arrays(self, feed: _Feed) -> Iterator[tuple[Any, ...]]:
        for step, ids in feed.items():
            try:
                handles, labels = self.handles(self._source_id[ids])
            except Exception as error:  # of which tf.data would keep only the text
                feed.failed = error
                raise
            yield np.full(len(ids), step, np.int64), ids.astype(np.int64), handles, labels

    def _pipeline(self, size: int, make: PerImage) -> _Pipeline:
        if (size, make) not in self._pipelines:

            @tf.autograph.experimental.do_not_convert  # slow, and there is nothing to convert
            def image(
                step: tf.Tensor, id: tf.Tensor, handle: tf.Tensor, label: tf.Tensor
            ) -> tuple[tf.Tensor, ...]:
                contents, label = self.contents(handle, label)
                return label, *make(contents, step, id)

            self._pipelines[size, make] = _Pipeline(image, size, self._threads)
        return self._pipelines[size, make]

    def _replace_undecodable(self, ids: Int[np.ndarray, " n"]) -> None:
        """Finds and replaces the undecodable images of some ids, or raises a UserError."""
        with self._lock:  # training and evaluation may both be reading
            ids = np.unique(ids)
            bad = ids[in_parallel(self._is_undecodable, ids.tolist(), self._threads)]
            if len(bad) and self._config.data.on_bad_image == "fatal":
                more = f" (and {len(bad) - 1} more in the same step)" if len(bad) > 1 else ""
                raise UserError(
                    f"Cannot decode {self.name(bad[0])}{more} as an image ({IMAGES_IN_WORDS}). "
                    "Repair it, or add --config.data.on_bad_image=skip, then rerun the command."
                )
            for id in bad:
                if self._is_undecodable(id):  # else replaced with the previous one
                    self._replace(id)

    def _replace(self, id: int) -> None:
        """Replaces a bad id, and the bad ones right after it, by the next good id."""
        run, good = [id], (id + 1) % self.num_examples
        while self._is_undecodable(good):
            if good == id:
                raise UserError(
                    self._other_channels
                    or f"Cannot decode any image of {self._where}. Set it to images "
                    f"({IMAGES_IN_WORDS})."
                )
            run.append(good)
            good = (good + 1) % self.num_examples
        good = self._source_id[good]
        for bad in run:
            self.bad.append(utf8(self.name(bad)))
            _log.warning("Cannot decode %s; using %s instead.", self.bad[-1], utf8(self.name(good)))
            self._source_id[bad] = good

    def _is_undecodable(self, id: int) -> bool:
        try:
            self.decode(self.read(self._source_id[id]))
        except ChannelsError as error:
            self._other_channels = (
                f"{self.name(self._source_id[id])} has {counted(error.found, 'channel')}, but "
                f"config.data.channels is {self.channels}. Set it to that of your images, or "
                "convert this one."
            )
            if self._config.data.on_bad_image == "fatal":
                raise UserError(self._other_channels) from None
            return True  # a damaged file may say any number
        except UserError as error:
            raise UserError(f"{self.name(self._source_id[id])}: {error}") from error
        except (tf.errors.InvalidArgumentError, ValueError):
            return True
        return False

    def read(self, id: int) -> bytes:
        """Reads an image's file.

        Raises:
          UserError: the file can't be read.
        """
        (handle,), (label,) = self.handles(np.array([id]))
        contents, _ = self.contents(tf.constant(handle), tf.constant(label))
        return contents.numpy()


def contents_fingerprint(
    config: ConfigDict, count: int, identity: bytes, read: Callable[[int], bytes]
) -> str:
    """`images_fingerprint` of a source; reads the contents of up to 16 images.

    Args:
      config: the run's config.
      count: number of images.
      identity: see `images_fingerprint`.
      read: returns what is stored of an image, by id; several are read at a time. One that raises
        an `OSError` or a `UserError` is reported when it is read for a batch.

    Raises:
      UserError: `config.data.timeout_s` has passed.
    """

    def checksum(id: int) -> int | None:
        with contextlib.suppress(OSError, UserError):
            return zlib.crc32(read(id))
        return None

    def checksums() -> Iterator[list[int | None]]:
        ids = sampled_ids(count)
        yield in_parallel(checksum, ids, len(ids))

    (found,) = read_all(checksums(), config.data.timeout_s)
    return images_fingerprint(count, identity, found)


@functools.cache
def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory for the next images instead of returning it to the system.

    An image and its views are several megabytes, freed right after use. By default glibc returns
    them to the system, which hands out the same pages again, cleared; that is a third of the time
    per image. The memory kept is some tens of megabytes per thread.

    Returns:
      Whether the options were set. False without glibc, and if the user has set an environment
      variable `MALLOC_...` or `GLIBC_TUNABLES`.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return all([mallopt(parameter, value) for parameter, value in _MALLOC.items()])


class _Pipeline:
    """A tf.data pipeline over images, which may run many times.

    TensorFlow keeps the Python functions of a pipeline until the process ends (`numpy_function` in
    TensorFlow 2.21 appends them to the default graph): a new one for every pass would leak. What it
    keeps refers to no source.
    """

    def __init__(
        self, image: Callable[..., tuple[tf.Tensor, ...]], size: int, threads: int
    ) -> None:
        """Builds the pipeline.

        Args:
          image: makes the results of an image from its step, id, handle and label.
          size: of the batches.
          threads: images to process at a time.
        """
        options = tf.data.Options()
        # Parallel over images, not within one.
        options.threading.max_intra_op_parallelism = 1
        options.threading.private_threadpool_size = threads
        dtypes = (tf.int64, tf.int64, tf.string, tf.int32)
        spec = tuple(tf.TensorSpec([size], dtype) for dtype in dtypes)
        self._starting = threading.Lock()
        self._waiting: deque[Iterator[tuple[Any, ...]]] = deque(maxlen=1)
        self._dataset = (
            tf.data.Dataset.from_generator(self._waiting.pop, output_signature=spec)
            .unbatch()
            .map(image, num_parallel_calls=threads, deterministic=True)
            .batch(size)
            .prefetch(1)
            .with_options(options)
        )

    def run(self, batches: Iterator[tuple[Any, ...]]) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields the results of batches of steps, ids, handles and labels; reads ahead."""
        with self._starting:  # until tf.data has taken this run's batches
            self._waiting.append(batches)
            iterator = self._dataset.as_numpy_iterator()
            first = list(itertools.islice(iterator, 1))
        yield from first
        yield from iterator


class _Feed:
    """Feeds steps to tf.data and keeps them until their batches come out.

    Attributes:
      pending: steps fed but not done, oldest first.
      failed: the error of the images' `handles`, if it failed.
    """

    def __init__(self, steps: Iterator[Step]) -> None:
        self.pending: deque[Step] = deque()
        self.failed: Exception | None = None
        self._steps = steps
        self._error: BaseException | None = None
        self._reader: object = None
        self._lock = threading.Lock()

    def next_size(self) -> int | None:
        """Number of ids in the next step; None at the end. Raises errors of the steps' iterator."""
        with self._lock:
            self._reader = None
            if not self.pending:
                self._fetch()
            if self.pending:
                return len(self.pending[0][1])
            if self._error is not None:
                raise self._error
            return None

    def items(self) -> Iterator[Step]:
        """Yields pending steps, then new ones, while they have the size of the first.

        tf.data calls this in its own thread. A failed pipeline that still iterates gets nothing.
        """
        with self._lock:
            reader = self._reader = object()
            waiting = deque(self.pending)
        size = len(waiting[0][1])
        while True:
            if not waiting:
                with self._lock:
                    if self._reader is not reader or not self._fetch():
                        return
                    waiting.append(self.pending[-1])
            step = waiting.popleft()
            if len(step[1]) != size:
                return
            yield step

    def done(self) -> Step:
        """Removes and returns the oldest step."""
        return self.pending.popleft()

    def _fetch(self) -> bool:
        if self._error is not None:
            return False
        try:
            self.pending.append(next(self._steps))
        except StopIteration:
            return False
        except Exception as error:  # raised by next_size, after the earlier steps
            self._error = error
            return False
        return True


def _refuse_affine(config: ConfigDict) -> None:
    on = [
        f"--config.views.{name}.affine.{key}=0"
        for name in sorted(config.views)
        for key, value in config.views[name].affine.items()
        if value
    ]
    if on:
        raise UserError(
            "The views have affine transforms, which crops on the host don't support. Use packed "
            f"images, or add {' '.join(on)}."
        )
