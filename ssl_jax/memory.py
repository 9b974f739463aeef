"""Errors of too little memory, on a device or on the host, with suggestions."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from humanize import naturalsize
from ml_collections import ConfigDict

from ssl_jax.errors import UserError, first_line
from ssl_jax.spmd import microbatches


@contextlib.contextmanager
def enough_memory(what: str, suggestions: Sequence[str], rest: str = "") -> Iterator[None]:
    """Turns a device's out-of-memory error into a `UserError` with suggestions.

    Args:
      what: what the block computes, the subject of the message.
      suggestions: options that reduce memory, the most effective first.
      rest: appended to the message.

    Raises:
      UserError: a device is out of memory; other errors pass.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
            raise
        raise UserError(
            f"{what} doesn't fit in the memory of {jax.devices()[0].device_kind} "
            f"({first_line(error)[:200]}). Try {', '.join(suggestions) or 'more devices'}{rest}."
        ) from error


def require_host_memory(size: int, what: str, fix: str) -> None:
    """Refuses arrays that can't fit in this machine's memory, before they are computed.

    Args:
      size: of the arrays, in bytes.
      what: names the arrays in the plural, as the subject of the message.
      fix: how to use less memory, the end of the message.

    Raises:
      UserError: the memory of this machine, or of this container, is smaller.
    """
    if size > (whole := host_memory()):
        kept, of = (naturalsize(each, binary=True) for each in (size, whole))
        raise UserError(f"{what} take {kept}, but this machine has {of} of memory. {fix}")


def require_device_memory(arrays: Any) -> None:
    """Refuses arrays of which every device holds a copy that can't fit in its memory.

    Args:
      arrays: a tree of arrays or shapes.

    Raises:
      UserError: naming the largest array.
    """
    sizes = {
        f"{jax.tree_util.keystr(path)} {list(x.shape)}": x.size * x.dtype.itemsize
        for path, x in jax.tree_util.tree_leaves_with_path(arrays)
    }
    size, whole = sum(sizes.values()), device_memory()
    if jax.local_devices()[0].platform == "cpu":
        whole = host_memory() // jax.local_device_count()
    if whole and size > whole:
        kept, of = (naturalsize(each, binary=True) for each in (size, whole))
        raise UserError(
            f"The train state and the data on the devices take {kept} on each, which has {of}. The "
            f"largest array is {max(sizes, key=sizes.__getitem__)}. Use a smaller network, queue "
            "or dataset."
        )


def device_memory() -> int:
    """The memory of one of this process's devices, in bytes; 0 if unknown, as on a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)


def host_memory() -> int:
    """The memory that this process may use, in bytes: the machine's, or the container's limit."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups v2 and v1
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            whole = min(whole, int((Path("/sys/fs/cgroup") / name).read_text()))
    return whole


def step_suggestions(config: ConfigDict, devices: int) -> list[str]:
    """Options not yet in use that reduce the memory of a run's step.

    Args:
      config: of the run.
      devices: in the mesh.

    Returns:
      Command-line flags, the most effective first.
    """
    most = (config.microbatch or config.batch_size) // 2
    fitting = microbatches(config.batch_size, devices, most)
    suggestions = [f"--config.microbatch={fitting[-1]}"] if fitting else []
    suggestions += [] if config.remat else ["--config.remat=True"]
    suggestions += [] if config.dtype == "bfloat16" else ["--config.dtype=bfloat16"]
    return suggestions
