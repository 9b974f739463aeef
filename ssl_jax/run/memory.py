"""What to do where a device's memory is full."""

import contextlib
from collections.abc import Iterator, Sequence

import jax
from ml_collections import ConfigDict

from ssl_jax.errors import UserError


@contextlib.contextmanager
def enough_memory(what: str, suggestions: Sequence[str], rest: str = "") -> Iterator[None]:
    """Tells what to do where a device's memory is full.

    Args:
      what: is computed inside, the sentence's subject.
      suggestions: options that make it need less, those that help most first.
      rest: added to the sentence.

    Raises:
      UserError: it is full; other errors pass.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        told = str(error)
        if "RESOURCE_EXHAUSTED" not in told and "out of memory" not in told.lower():
            raise
        raise UserError(
            f"{what} doesn't fit into the memory of {jax.devices()[0].device_kind} "
            f"({told.splitlines()[0][:200]}): try {', '.join(suggestions) or 'more devices'}{rest}."
        ) from error


def step_suggestions(config: ConfigDict, devices: int) -> list[str]:
    """Options with which a run's step needs less memory, of those that are left.

    Args:
      config: of the run.
      devices: in the mesh.
    """
    most = (config.microbatch or config.batch_size) // 2
    fitting = [n for n in range(devices, most + 1, devices) if config.batch_size % n == 0]
    suggestions = [f"--config.microbatch={fitting[-1]}"] if fitting else []
    suggestions += [] if config.remat else ["--config.remat=True"]
    suggestions += [] if config.dtype == "bfloat16" else ["--config.dtype=bfloat16"]
    return suggestions
