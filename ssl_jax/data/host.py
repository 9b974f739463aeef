"""Sources whose images are decoded and cropped on the host, by tf.data.

What differs between them is where an image's file is: `HostSource` does the rest. Every image can
be asked for by its id, so a run that goes on at step s reads what step s needs, and nothing before.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from ssl_jax.config import flat_views
from ssl_jax.data import views
from ssl_jax.data.tensorflow import load_tensorflow, tf
from ssl_jax.errors import UserError

Step: TypeAlias = tuple[int, Int[np.ndarray, " n"]]
# Of a file's contents, the step and the id: what to make of an image.
PerImage: TypeAlias = "Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, ...]]"

_log = logging.getLogger("ssl_jax.data")
# Of glibc's mallopt, bytes: what is free at the top of a heap stays up to this (M_TRIM_THRESHOLD);
# heaps grow by this, and a thread's emptied heaps stay (M_TOP_PAD, not below their size of 64 MiB);
# no smaller block is mapped by itself (M_MMAP_THRESHOLD, the largest that it takes).
_MALLOC = {-1: 2**30, -2: 2**26, -3: 2**25}


class HostSource:
    """Images in files, decoded and cropped on the host. A subclass says where they are.

    With `config.data.on_bad_image` "skip", the id of an image that can't be decoded stands for that
    of the next id whose image can (after the last id comes the first), with its label; which ones
    they are depends on the files alone, not on what was read before.

    Attributes:
      num_examples: N.
      num_classes: how many classes the labels tell apart; 0 without labels.
      class_names: of the labels.
      bad: the images found so far that can't be decoded.
      fingerprint: changes when the images' order, number or labels do.
    """

    class_names: tuple[str, ...] = ()
    num_classes: int = 0

    def __init__(self, config: ConfigDict, where: str, num_examples: int, names: bytes) -> None:
        """Opens nothing.

        Args:
          config: of the run.
          where: the config's keys and values that tell where the images are, for messages.
          num_examples: N.
          names: what the images are called, for the fingerprint.

        Raises:
          UserError: a view that can't be made on the host.
        """
        load_tensorflow()  # fails here if it is not installed, not in a thread later
        _refuse_affine(config)
        keep_freed_memory()
        self._config, self._where = config, where
        self._views = flat_views(config)
        self.num_examples = num_examples
        self.bad: list[str] = []
        self.fingerprint = f"{num_examples} images, checksum of names {zlib.crc32(names):08x}"
        # The id whose image stands for each.
        self._source_id = np.arange(num_examples, dtype=np.int32)
        self._lock = threading.Lock()
        self._threads = config.data.threads or len(os.sched_getaffinity(0))

    def handles(self, ids: Int[np.ndarray, " n"]) -> tuple[Sequence[bytes], Int[np.ndarray, " n"]]:
        """What `contents` needs to know of each image, and its label, -1 for none or not known yet.

        It is called in one thread, ahead of what is decoded.
        """
        raise NotImplementedError

    def contents(self, handle: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The image's file, a scalar string, and its label, as TensorFlow ops."""
        raise NotImplementedError

    def name(self, id: int) -> str:
        """Where to find an image, for messages."""
        raise NotImplementedError

    @property
    def labels(self) -> Int[np.ndarray, " N"] | None:
        """Class of each id, int32 [N]; None where there are none."""
        return self._labels[self._source_id] if self.num_classes else None

    @functools.cached_property
    def _labels(self) -> Int[np.ndarray, " N"]:
        """Class of each image; a subclass that knows them beforehand sets it.

        Else they come from the images' records when they are first asked for; nothing is decoded.
        """
        nothing: PerImage = lambda contents, step, id: ()  # noqa: E731
        parts = np.array_split(np.arange(self.num_examples), -(-self.num_examples // 1024))
        steps = ((0, part) for part in parts)
        return np.concatenate([labels for _, labels, _ in self._read(steps, nothing)])

    def device_data(self) -> dict[str, np.ndarray]:
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

        for ids, labels, made in self._read(steps, crop):
            batch: dict[str, Any] = {"id": ids, "views": made}
            if self.num_classes:
                batch["label"] = labels
            yield batch

    def eval_transform(self, ids: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "n size size 3"]:
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
            return (views.center_crop(image, view, how.crop_fraction, how.interpolation),)

        _, _, (images,) = next(self._read(iter([(0, np.asarray(ids))]), prepare))
        return images

    def boxes(
        self, step: int, ids: Sequence[int] | np.ndarray
    ) -> tuple[Int[np.ndarray, "n views 4"], Int[np.ndarray, "n 2"]]:
        """Where the views of a step are cut out of their images.

        Args:
          step: counted from 0 over the whole run.
          ids: which images, at least one.

        Returns:
          Boxes (top, left, height, width), int32 [n, V, 4], and (height, width) of the images,
          int32 [n, 2], all in pixels.
        """
        seed, flat = self._config.seed, self._views

        def draw(contents: tf.Tensor, step: tf.Tensor, id: tf.Tensor) -> tuple[tf.Tensor, ...]:
            size = tf.shape(views.decode(contents))[:2]
            return views.draw_boxes(size, views.image_seed(seed, step, id), flat), size

        _, _, (boxes, sizes) = next(self._read(iter([(step, np.asarray(ids))]), draw))
        return boxes, sizes

    def _read(
        self, steps: Iterator[Step], make: PerImage
    ) -> Iterator[tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], tuple[np.ndarray, ...]]]:
        """The ids of each step, their labels, and what was made of their images.

        An image that can't be decoded ends the pipeline with an error; once its substitute is
        known, a new pipeline goes on with the step that failed.
        """
        feed = _Feed(steps)
        while (size := feed.next_size()) is not None:
            known = len(self.bad)
            try:
                for labels, *made in self._pipeline(feed, size, make).as_numpy_iterator():
                    _, ids = feed.done()
                    yield ids, labels, tuple(made)
            except tf.errors.OpError:
                self._replace_undecodable(feed.pending[0][1])
                if len(self.bad) == known:  # something else is wrong
                    raise

    def _pipeline(self, feed: _Feed, size: int, make: PerImage) -> tf.data.Dataset:
        def arrays() -> Iterator[tuple[Any, ...]]:
            for step, ids in feed.items():
                handles, labels = self.handles(self._source_id[ids])
                yield np.full(len(ids), step, np.int64), ids.astype(np.int64), handles, labels

        @tf.autograph.experimental.do_not_convert  # nothing to convert, and it takes a while
        def image(
            step: tf.Tensor, id: tf.Tensor, handle: tf.Tensor, label: tf.Tensor
        ) -> tuple[tf.Tensor, ...]:
            contents, label = self.contents(handle, label)
            return label, *make(contents, step, id)

        options = tf.data.Options()
        # Images are what is parallel, not the ops of an image.
        options.threading.max_intra_op_parallelism = 1
        options.threading.private_threadpool_size = self._threads
        kinds = (tf.int64, tf.int64, tf.string, tf.int32)
        spec = tuple(tf.TensorSpec([size], kind) for kind in kinds)
        return (
            tf.data.Dataset.from_generator(arrays, output_signature=spec)
            .unbatch()
            .map(image, num_parallel_calls=self._threads, deterministic=True)
            .batch(size)
            .prefetch(1)
            .with_options(options)
        )

    def _replace_undecodable(self, ids: Int[np.ndarray, " n"]) -> None:
        """Finds the bad images among some ids' and replaces them, or refuses to go on."""
        with self._lock:  # training and evaluation may both be reading
            with ThreadPoolExecutor(self._threads) as pool:
                ids = np.unique(ids)
                bad = ids[list(pool.map(self._is_undecodable, ids))]
            if len(bad) and self._config.data.on_bad_image == "fatal":
                more = f" (nor can {len(bad) - 1} more in the same step)" if len(bad) > 1 else ""
                raise UserError(
                    f"{self.name(bad[0])} can't be decoded as a JPEG or PNG image"
                    f"{more}: repair or remove it, or set config.data.on_bad_image to 'skip'."
                )
            for id in bad:
                if self._is_undecodable(id):  # else it went with the one before
                    self._replace(id)

    def _replace(self, id: int) -> None:
        """Lets the next good id stand for a bad one and for the bad ones right after it."""
        run, good = [id], (id + 1) % self.num_examples
        while self._is_undecodable(good):
            if good == id:
                raise UserError(
                    f"No image under {self._where} can be decoded: give JPEG or PNG files."
                )
            run.append(good)
            good = (good + 1) % self.num_examples
        good = self._source_id[good]
        for bad in run:
            self.bad.append(self.name(bad))
            _log.warning(
                "%s can't be decoded: %s is used in its place.", self.bad[-1], self.name(good)
            )
            self._source_id[bad] = good

    def _is_undecodable(self, id: int) -> bool:
        try:
            views.decode(self.read(self._source_id[id]))
        except tf.errors.InvalidArgumentError:
            return True
        return False

    def read(self, id: int) -> bytes:
        """An image's file.

        Raises:
          UserError: it can't be read.
        """
        (handle,), (label,) = self.handles(np.array([id]))
        contents, _ = self.contents(tf.constant(handle), tf.constant(label))
        return contents.numpy()


@functools.cache
def keep_freed_memory() -> bool:
    """Lets this process keep the memory of images for the next ones, where the C library is glibc.

    An image and its views are some megabytes that are freed as soon as they are used. By default
    glibc gives them back to the system, which then hands out the same pages anew, cleared: a third
    of the time of an image. What is kept is some tens of megabytes per thread.

    Returns:
      Whether it was done; False where a variable `MALLOC_...` or `GLIBC_TUNABLES` says that the
      user has decided, and without glibc.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return all([mallopt(parameter, value) for parameter, value in _MALLOC.items()])


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


def _refuse_affine(config: ConfigDict) -> None:
    for name in sorted(config.views):
        for key, value in config.views[name].affine.items():
            if value:
                raise UserError(
                    f"config.views.{name}.affine.{key} is {value}, but these images are "
                    "cropped on the host, where they can't be turned, sheared or shifted: set it "
                    "to 0."
                )
