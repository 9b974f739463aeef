"""A step whose loss or gradients are not finite: it stops the run, or is skipped."""

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Int

from ssl_jax.errors import UserError
from ssl_jax.files import replacing
from ssl_jax.run.processes import error_on_all_processes, is_primary

# Of the step's metrics: how many steps were not finite so far, and the newest of them, from 1.
COUNT, STEP = "nonfinite_steps", "nonfinite_step"


class NonFiniteError(UserError):
    """The run has stopped at a step that was not finite."""


class NonfiniteGuard:
    """Follows a run's steps that were not finite.

    The state counts them, so that none is missed between the steps that are logged, nor after the
    run was continued.
    """

    def __init__(
        self,
        allowed: int,
        workdir: Path,
        ids_of: Callable[[int], Int[np.ndarray, " n"]],
        seen: int = 0,
    ) -> None:
        """Starts with those that are known.

        Args:
          allowed: how many may be skipped (`config.max_nonfinite_steps`).
          workdir: gets `nonfinite.json` when the run stops.
          ids_of: the images of a step, counted from 0.
          seen: such steps before the checkpoint from which the run goes on.
        """
        self._allowed, self._file, self._ids_of = allowed, workdir / "nonfinite.json", ids_of
        self._seen = int(seen)

    def check(self, step: int, metrics: dict[str, float], saved: int | None) -> list[str]:
        """Takes the two numbers out of fetched metrics, and looks at them.

        Args:
          step: of the metrics.
          metrics: of the step, changed in place.
          saved: step of the newest checkpoint, if there is one.

        Returns:
          Sentences about steps that were skipped.

        Raises:
          NonFiniteError: more of them than are allowed; the images and the metrics are written.
        """
        count, at = int(metrics.pop(COUNT)), int(metrics.pop(STEP))
        new, self._seen = count - self._seen, count
        if not new:
            return []
        if count <= self._allowed:
            return [
                f"warning: step {at} was not finite and changed nothing ({count} of at most "
                f"{self._allowed} such steps, config.max_nonfinite_steps)."
            ]
        if is_primary():
            with contextlib.suppress(OSError):  # what has gone wrong first is told
                self._write(at, step, metrics)
        kept = f"the checkpoint of step {saved} is as it was" if saved else "nothing was saved yet"
        raise error_on_all_processes(
            f"The loss or its gradients are not finite at step {at}; {kept}, and {self._file} has "
            "the step's images and metrics: let config.max_nonfinite_steps skip such steps, or "
            "start anew with a lower config.optim.lr.",
            NonFiniteError,
        )

    def _write(self, at: int, step: int, metrics: dict[str, float]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        said = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
        record = {"step": at, "ids": self._ids_of(at - 1).tolist(), f"metrics of step {step}": said}
        with replacing(self._file) as file:
            file.write_text(json.dumps(record) + "\n")
