"""Reads in daemon threads: a file system that stalls blocks neither signals nor the process's end.

The threads of `concurrent.futures` won't do: Python joins them at exit.
"""

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from ssl_jax.errors import UserError

_DEPTH = 1  # items waiting, besides the one being read
_SLOW_S = 30.0  # seconds without an item until a warning is logged
_log = logging.getLogger("ssl_jax.data")

S = TypeVar("S")
T = TypeVar("T")


class Reader(Generic[T]):
    """Iterates in a daemon thread, ahead of time; items wait on the host.

    Attributes:
      wait_seconds: total time that `next` has waited for items and placed them.
    """

    def __init__(
        self,
        items: Iterator[Any],
        timeout_s: float = 0.0,
        place: Callable[[Any], T] = lambda item: item,
    ) -> None:
        """Starts reading.

        Args:
          items: to read.
          timeout_s: maximum time that `next` waits, in seconds; 0 for no limit.
          place: applied to each item when it is asked for, such as to put it on the devices, whose
            memory then holds no item ahead of time.
        """
        self._place = place
        self.wait_seconds, self._timeout_s, self._warned = 0.0, timeout_s, False
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=_DEPTH)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(items,), daemon=True)
        self._thread.start()

    def _read(self, items: Iterator[Any]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
            self._put(RuntimeError("the source ended early"))
        except BaseException as error:  # `next` raises it in the main thread
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def next(self) -> T:
        """Returns the next item, placed; raises errors of the thread.

        Raises:
          UserError: no item within `timeout_s` seconds.
        """
        start = time.perf_counter()
        item = self._wait()
        if isinstance(item, BaseException):
            raise item
        placed = self._place(item)
        self.wait_seconds += time.perf_counter() - start
        return placed

    def _wait(self) -> Any:
        """The next item; warns once if it is late."""
        limit = self._timeout_s or float("inf")
        patience = min(_SLOW_S, limit)
        with contextlib.suppress(queue.Empty):
            return self._queue.get(timeout=patience)
        if limit > patience and not self._warned:
            self._warned = True
            _log.warning(
                "warning: no images for %g s. Still waiting; check the file system, or whether the "
                "machine is busy.",
                patience,
            )
        with contextlib.suppress(queue.Empty):
            return self._queue.get(timeout=limit - patience if self._timeout_s else None)
        raise UserError(
            f"Data loader timed out: no batch for {self._timeout_s:g} s "
            "(config.data.timeout_s). Check the file system, then rerun the same command to "
            "resume."
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join(timeout=10)


def read_all(items: Iterator[T], timeout_s: float = 0.0) -> list[T]:
    """Lists the items of an iterator, read in a daemon thread.

    Args:
      items: to read.
      timeout_s: maximum time per item, in seconds; 0 for no limit.

    Raises:
      UserError: no item within `timeout_s` seconds.
    """
    done, read = object(), []
    with Reader[Any](itertools.chain(items, [done]), timeout_s) as reader:
        while (item := reader.next()) is not done:
            read.append(item)
    return read


def in_parallel(function: Callable[[S], T], items: Sequence[S], threads: int) -> list[T]:
    """Maps a function over items, in daemon threads of its own; raises the first error."""
    threads = min(threads, len(items))
    results: list[Any] = [None] * len(items)
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def work(first: int) -> None:
        try:
            for number in range(first, len(items), threads):
                results[number] = function(items[number])
        except BaseException as error:  # raised in the caller's thread
            ended.put(error)
        else:
            ended.put(None)

    for first in range(threads):
        threading.Thread(target=work, args=(first,), daemon=True).start()
    for error in [ended.get() for _ in range(threads)]:
        if error is not None:
            raise error
    return results
