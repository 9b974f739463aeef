"""The error of a device that is out of memory, with suggestions."""

import contextlib
from collections.abc import Iterator, Sequence

import jax
from ml_collections import ConfigDict

from ssl_jax.errors import UserError, first_line


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


def step_suggestions(config: ConfigDict, devices: int) -> list[str]:
    """Options not yet in use that reduce the memory of a run's step.

    Args:
      config: of the run.
      devices: in the mesh.

    Returns:
      Command-line flags, the most effective first.
    """
    most = (config.microbatch or config.batch_size) // 2
    fitting = [n for n in range(devices, most + 1, devices) if config.batch_size % n == 0]
    suggestions = [f"--config.microbatch={fitting[-1]}"] if fitting else []
    suggestions += [] if config.remat else ["--config.remat=True"]
    suggestions += [] if config.dtype == "bfloat16" else ["--config.dtype=bfloat16"]
    return suggestions
