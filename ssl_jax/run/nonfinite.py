"""Steps whose loss or gradients are not finite: they stop the run or are skipped."""

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

# Metrics of the train step: the number of non-finite steps so far, and the newest one, from 1.
COUNT, STEP = "nonfinite_steps", "nonfinite_step"


class NonFiniteError(UserError):
    """The run has stopped at a non-finite step."""


class NonfiniteGuard:
    """Warns of non-finite steps, and stops the run if there are too many.

    The train state counts them, so none is missed between logged steps or after a resumption.
    """

    def __init__(
        self,
        allowed: int,
        workdir: Path,
        ids_of: Callable[[int], Int[np.ndarray, " n"]],
        seen: int = 0,
    ) -> None:
        """Starts from the count of the restored state.

        Args:
          allowed: how many steps may be skipped (`config.max_nonfinite_steps`).
          workdir: receives `nonfinite.json` when the run stops.
          ids_of: returns the sample ids of a step, counted from 0.
          seen: non-finite steps before the restored checkpoint.
        """
        self._allowed, self._file, self._ids_of = allowed, workdir / "nonfinite.json", ids_of
        self._seen = int(seen)

    def check(self, step: int, metrics: dict[str, float], saved: int | None) -> list[str]:
        """Removes the two counts from a step's metrics and checks them.

        Args:
          step: of the metrics.
          metrics: of the step, on the host; changed in place.
          saved: step of the newest checkpoint, if any.

        Returns:
          Warnings of skipped steps.

        Raises:
          NonFiniteError: more non-finite steps than allowed; the sample ids and metrics of the step
            are written.
        """
        count, at = int(metrics.pop(COUNT)), int(metrics.pop(STEP))
        new, self._seen = count - self._seen, count
        if not new:
            return []
        if count <= self._allowed:
            return [
                f"warning: step {at} was not finite and was skipped ({count} of at most "
                f"{self._allowed} such steps, config.max_nonfinite_steps)."
            ]
        if is_primary():
            with contextlib.suppress(OSError):  # the first error is reported
                self._write(at, step, metrics)
        kept = f"the checkpoint of step {saved} is unaffected" if saved else "nothing is saved yet"
        raise error_on_all_processes(
            f"The loss or its gradients are not finite at step {at}; {kept}. {self._file} has the "
            "step's images and metrics. Skip such steps with config.max_nonfinite_steps, or start "
            "a new run with a lower config.optim.lr.",
            NonFiniteError,
        )

    def _write(self, at: int, step: int, metrics: dict[str, float]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        plain = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}  # valid JSON
        ids = self._ids_of(at - 1).tolist()
        record = {"step": at, "ids": ids, f"metrics of step {step}": plain}
        with replacing(self._file) as file:
            file.write_text(json.dumps(record) + "\n")
