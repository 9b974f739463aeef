"""Several processes that form one run: how they join, agree, and stop together.

JAX discovers the processes on TPU pods, under Slurm and Open MPI and on Kubernetes; nothing is
launched here. In a run of one process every function returns immediately.
"""

import contextlib
import logging
import os
import re
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

_TEXT = 1024  # bytes of an error message that processes share
# For clusters that JAX doesn't know. JAX itself reads only the first one.
_COORDINATOR, _COUNT, _ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# The number of processes that Open MPI's mpirun or Slurm's srun has started, in JAX's order.
_LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_log = logging.getLogger("ssl_jax.run.processes")


def join(heartbeat_timeout_s: float) -> None:
    """Joins the processes of the run. Call it before any other use of JAX.

    Does nothing without a cluster, or if the caller has already joined. The variables
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID describe
    a cluster that JAX doesn't know; JAX_NUM_PROCESSES=1 by itself stays out of any cluster.

    Args:
      heartbeat_timeout_s: seconds after which a silent process counts as lost, which ends
        the other processes.

    Raises:
      UserError: the variables are incomplete, or the other processes can't be reached.
    """
    counts = (os.environ[name] for name in (_COUNT, *_LAUNCHED) if name in os.environ)
    if jax.distributed.is_initialized() or next(counts, "") == "1":
        return
    given: dict[str, Any] = {}
    if uses_all_devices():
        given["local_device_ids"] = []
    if _COUNT in os.environ:
        try:
            given["num_processes"] = int(os.environ[_COUNT])
            given["process_id"] = int(os.environ[_ID])
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{_COUNT} is set without a valid {_ID} and {_COORDINATOR}. Set them to a number "
                "and to host:port of process 0."
            ) from error
    seconds = max(1, round(heartbeat_timeout_s))
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=seconds)
    except ValueError as error:
        # JAX's message if it finds no cluster to join.
        explicit = "num_processes" in given or _COORDINATOR in os.environ
        if explicit or "should be defined" not in str(error):
            raise UserError(f"Cannot join the other processes ({first_line(error)}).") from error
    except RuntimeError as error:
        if "must be called before" in str(error):
            return  # a script has already used JAX in a single process
        raise UserError(
            f"Cannot join the other processes ({first_line(error)}). Check that all of them are "
            f"running, or set {_COUNT}=1 to run a single process."
        ) from error


def uses_all_devices() -> bool:
    """Whether this process uses every GPU that it may see.

    By default JAX gives each process under Slurm or Open MPI the one GPU whose number is the
    process's rank on its node. That is wrong if there is one process per node, or if the launcher
    shows each process its own GPUs only. Otherwise, a warning is logged if GPUs are left over.
    """
    processes, found = _processes_on_node(), os.environ
    if processes is None or "JAX_LOCAL_DEVICE_IDS" in found:
        return False  # JAX's own rules
    listed = found.get("CUDA_VISIBLE_DEVICES", "")
    gpus = int(found.get("SLURM_GPUS_ON_NODE", "0")) or listed.count(",") + 1
    if processes == 1 or (listed and listed.count(",") + 1 < gpus):
        return True
    if gpus > processes and found.get("SLURM_PROCID", "0") == "0":
        _log.warning(
            "warning: %d processes on this node use one GPU each, so %d of %d GPUs are idle. Start "
            "one process per GPU (Slurm: --ntasks-per-node=%d), or one per node, which uses all.",
            *(processes, gpus - processes, gpus, gpus),
        )
    return False


def _processes_on_node() -> int | None:
    """The number of the run's processes on this node; None if the launcher doesn't set it."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in os.environ:
        return int(os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"])
    # "4(x2),3": four tasks on each of two nodes and three on the last.
    counts: list[int] = []
    listed = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", listed):
        counts += [int(tasks)] * int(nodes or 1)
    node = int(os.environ.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else None


def is_primary() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def gather(values: Any) -> np.ndarray:
    """All-gathers equally shaped arrays over processes, [processes, ...]; all must call it."""
    array = np.asarray(values)
    if jax.process_count() == 1:
        return array[None]
    return np.asarray(multihost_utils.process_allgather(array))


def pace(step_seconds: float, data_wait: float) -> dict[str, list[float]]:
    """Gathers every process's step time in seconds and share of time waiting for data."""
    both = gather(np.array([step_seconds, data_wait], np.float32))
    return {"process_step_s": both[:, 0].tolist(), "process_data_wait": both[:, 1].tolist()}


def wait_for_all() -> None:
    """A barrier: a process that exits must not leave others in a collective."""
    gather(np.zeros(1, np.int32))


def decided(choice: bool) -> bool:
    """Broadcasts the primary process's choice."""
    return bool(gather(np.array([choice]))[0, 0])


def from_first(values: dict[str, float]) -> dict[str, float]:
    """Broadcasts the primary process's numbers; the names are the same on all processes."""
    if jax.process_count() == 1:
        return values
    names = sorted(values)
    sent = array_from_first(np.array([values[name] for name in names], np.float32))
    return dict(zip(names, sent.tolist(), strict=True))


def array_from_first(array: np.ndarray) -> np.ndarray:
    """Broadcasts the primary process's array; shape and dtype are the same on all processes."""
    if jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


@contextlib.contextmanager
def raise_on_all_processes() -> Iterator[None]:
    """Raises a `UserError` of any process on all of them, so that none waits in vain.

    The block must not contain collectives.

    Raises:
      UserError: that of the lowest-numbered process that raised one, named in the message.
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
    message = np.frombuffer(wrong.encode()[:_TEXT], np.uint8)
    text[: len(message)] = message
    for each in gather(text):
        if each.any():
            raise error_on_all_processes(bytes(each[each > 0]).decode(errors="replace"))


def error_on_all_processes(message: str, kind: type[UserError] = UserError) -> UserError:
    """Makes an error that all processes raise and the primary prints."""
    error = kind(message)
    error.on_all_processes, error.printed_here = True, is_primary()
    return error


def require_same(values: dict[str, str]) -> None:
    """Checks that all processes see the same values.

    Args:
      values: by a name for the message.

    Raises:
      UserError: two processes differ; raised on all of them.
    """
    names = list(values)
    seen = gather(np.array([zlib.crc32(values[name].encode()) for name in names], np.uint32))
    for number, name in enumerate(names):
        other = np.flatnonzero(seen[:, number] != seen[0, number])
        if len(other):
            raise error_on_all_processes(
                f"Process {other[0]} sees a different {name} than process 0. Give all hosts the "
                "same command and data, and one --workdir on a shared file system."
            )


def is_shared(error: BaseException) -> bool:
    """Whether all processes of the run see this error, so that they can still work together."""
    if jax.process_count() == 1:
        return True
    return isinstance(error, UserError) and error.on_all_processes


@contextlib.contextmanager
def alone_on_failure(show: Callable[[str], None]) -> Iterator[None]:
    """Exits this process at once on an error that the other processes don't share.

    A regular exit would wait for them while they wait for this one in a collective. Errors raised
    on all processes, and any error in a run of one process, pass through.

    Args:
      show: prints a text for the user.
    """
    try:
        yield
    except BaseException as error:
        if is_shared(error):
            raise
        if isinstance(error, UserError):
            show(f"error: Process {jax.process_index()}: {error}")
        elif isinstance(error, jax.errors.JaxRuntimeError):
            show(
                f"error: Process {jax.process_index()} failed; another process may be lost "
                f"({first_line(error)}). Rerun the same command on all hosts to resume from the "
                "last checkpoint."
            )
        else:
            show(traceback.format_exc())
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(2 if isinstance(error, UserError) else 1)


class StoppedError(BaseException):
    """SIGTERM while nothing is lost by stopping at once; libraries must not swallow it."""


class Stop:
    """Whether the run has been asked to stop, by SIGTERM to any of its processes.

    A context manager: it handles the signal in a run of one process. Among several processes JAX's
    preemption service shares the request, and all of them see it at the same step.
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
        """Whether to stop after a step; all processes must ask after every step."""
        if jax.process_count() == 1:
            return self._asked
        return bool(multihost_utils.reached_preemption_sync_point(step))

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raises `StoppedError` in the block as soon as the run is asked to stop."""
        self._at_once = True
        try:
            if self._asked:
                raise StoppedError
            yield
        finally:
            self._at_once = False
