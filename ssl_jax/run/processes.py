"""Several processes that are one run: how they join, agree, and stop together.

JAX finds the others itself, on TPU pods, under Slurm and Open MPI and on Kubernetes; nothing is
launched here. In a run of one process everything here is immediate.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ssl_jax.errors import UserError, first_line

_TEXT = 1024  # bytes of a sentence that processes tell each other
# Where JAX knows no cluster, these say which process of how many this is. JAX reads the first.
_COORDINATOR, _COUNT, _ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def join(heartbeat_timeout_s: float) -> None:
    """Joins the processes of the run; before JAX is used for anything else.

    Does nothing where there is no cluster, or where the caller has joined already. The variables
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID take the
    place of a cluster that JAX doesn't know; JAX_NUM_PROCESSES=1 alone stays out of any.

    Args:
      heartbeat_timeout_s: seconds after which a silent process counts as lost, which ends
        the others.

    Raises:
      UserError: the variables are incomplete, or the others can't be found.
    """
    if jax.distributed.is_initialized() or os.environ.get(_COUNT) == "1":
        return
    given: dict[str, Any] = {}
    if _COUNT in os.environ:
        try:
            given = {
                "num_processes": int(os.environ[_COUNT]),
                "process_id": int(os.environ[_ID]),
            }
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{_COUNT} is set, so {_ID} and {_COORDINATOR} are needed too: numbers, and "
                "host:port of process 0."
            ) from error
    seconds = max(1, round(heartbeat_timeout_s))
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=seconds)
    except ValueError as error:
        # What JAX says where it finds no cluster to join.
        if given or _COORDINATOR in os.environ or "should be defined" not in str(error):
            raise UserError(f"The other processes can't be joined: {error}") from error
    except RuntimeError as error:
        if "must be called before" in str(error):
            return  # a script has used JAX by itself already
        raise UserError(
            f"The other processes can't be joined ({first_line(error)}): see that all "
            f"of them were started, or set {_COUNT}=1 to run alone."
        ) from error


def is_primary() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def gather(values: Any) -> np.ndarray:
    """Every process's array of one shape, [processes, ...]; all of them have to call it."""
    array = np.asarray(values)
    if jax.process_count() == 1:
        return array[None]
    return np.asarray(multihost_utils.process_allgather(array))


def pace(step_seconds: float, data_wait: float) -> dict[str, list[float]]:
    """Every process's seconds for a step and share of time spent waiting for data, for the log."""
    both = gather(np.array([step_seconds, data_wait], np.float32))
    return {"process_step_s": both[:, 0].tolist(), "process_data_wait": both[:, 1].tolist()}


def wait_for_all() -> None:
    """Returns once all processes have called it: one that leaves must not find others at work."""
    gather(np.zeros(1, np.int32))


def decided(choice: bool) -> bool:
    """The first process's choice, on all of them."""
    return bool(gather(np.array([choice]))[0, 0])


def from_first(values: dict[str, float]) -> dict[str, float]:
    """The first process's numbers, on all of them; the names are the same everywhere."""
    if jax.process_count() == 1:
        return values
    names = sorted(values)
    sent = multihost_utils.broadcast_one_to_all(
        np.array([values[name] for name in names], np.float32)
    )
    return dict(zip(names, np.asarray(sent).tolist(), strict=True))


@contextlib.contextmanager
def raise_on_all_processes() -> Iterator[None]:
    """Raises on every process what was wrong on one of them, so that none waits for it.

    Inside nothing may wait for other processes.

    Raises:
      UserError: of this process, or else of the first that has one, named.
    """
    wrong = ""
    try:
        yield
    except UserError as error:
        if jax.process_count() == 1:
            raise
        wrong = str(error)
    if jax.process_count() == 1:
        return
    if wrong and not is_primary():
        wrong = f"Process {jax.process_index()} on {socket.gethostname()}: {wrong}"
    text = np.zeros(_TEXT, np.uint8)
    sentence = np.frombuffer(wrong.encode()[:_TEXT], np.uint8)
    text[: len(sentence)] = sentence
    for told in gather(text):
        if told.any():
            raise error_on_all_processes(bytes(told[told > 0]).decode(errors="replace"))


def error_on_all_processes(sentence: str, kind: type[UserError] = UserError) -> UserError:
    """An error that all processes raise, and one tells."""
    error = kind(sentence)
    error.on_all_processes, error.printed_here = True, is_primary()
    return error


def require_same(values: dict[str, str]) -> None:
    """Checks that all processes see the same.

    Args:
      values: what is seen, by a name that reads well in a sentence.

    Raises:
      UserError: on every process, where two of them differ.
    """
    names = list(values)
    seen = gather(np.array([zlib.crc32(values[name].encode()) for name in names], np.uint32))
    for number, name in enumerate(names):
        other = np.flatnonzero(seen[:, number] != seen[0, number])
        if len(other):
            raise error_on_all_processes(
                f"Process {other[0]} sees another {name} than process 0: all hosts need the same "
                "command and data, and one --workdir on a file system that they share."
            )


@contextlib.contextmanager
def alone_on_failure(tell: Callable[[str], None]) -> Iterator[None]:
    """Ends this process at once when something fails that the others don't know of.

    Leaving as usual would wait for them, and they wait for this one in a collective. What all
    processes have agreed on leaves as usual, and so does everything where there is one process.

    Args:
      tell: shows a text to the user.
    """
    try:
        yield
    except BaseException as error:
        alone = jax.process_count() == 1
        if alone or (isinstance(error, UserError) and error.on_all_processes):
            raise
        if isinstance(error, UserError):
            tell(f"error: Process {jax.process_index()}: {error}")
        elif isinstance(error, jax.errors.JaxRuntimeError):
            tell(
                f"error: Process {jax.process_index()} can't go on, another one may be lost "
                f"({first_line(error)}): the same command, on all hosts, continues from the last "
                "checkpoint."
            )
        else:
            tell(traceback.format_exc())
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(2 if isinstance(error, UserError) else 1)


class StoppedError(BaseException):
    """SIGTERM came where nothing is lost by stopping at once; no library is to swallow it."""


class Stop:
    """Whether the run has been asked to stop, by SIGTERM to any of its processes.

    A context: one process has a handler of its own inside of it; among several JAX's preemption
    service passes the request on, and lets all of them see it at one step.
    """

    def __init__(self) -> None:
        self._asked = self._at_once = False
        self._before: Any = None

    def __enter__(self) -> "Stop":
        alone = jax.process_count() == 1
        if alone and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._at_once:
            raise StoppedError

    def asked(self, step: int) -> bool:
        """Whether to stop after a step; asked of every step in turn, by all processes."""
        if jax.process_count() == 1:
            return self._asked
        return bool(multihost_utils.reached_preemption_sync_point(step))

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raises `StoppedError` inside as soon as the run is asked to stop."""
        self._at_once = True
        try:
            if self._asked:
                raise StoppedError
            yield
        finally:
            self._at_once = False
