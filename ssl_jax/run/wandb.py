"""Logs a run's metrics and pictures to Weights & Biases if `config.wandb` names a project.

The package is imported only then, and nothing is sent otherwise.
"""

import importlib.util
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ssl_jax.errors import UserError, first_line, install_extra
from ssl_jax.files import read_regular, replacing, subfolder

_ID_FILE = "wandb_id"


def require_wandb(project: str) -> None:
    """Checks that wandb is installed if it is needed.

    Args:
      project: value of `config.wandb`; "" needs nothing.

    Raises:
      UserError: wandb is not installed.
    """
    spec = importlib.util.find_spec("wandb") if project else None
    # A folder `wandb/`, which the package creates where it runs, is found too; it has no origin.
    if project and (spec is None or spec.origin is None):
        raise UserError(
            f"config.wandb is '{project}', but the package wandb is not installed. "
            f"{install_extra('wandb')}, or leave the key empty."
        )


class WandbWriter:
    """A run of Weights & Biases, resumed together with the run in the folder.

    If it fails after it has started, training continues without it; `metrics.jsonl` is complete.
    """

    def __init__(
        self,
        project: str,
        workdir: Path,
        config: dict[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        """Starts or resumes the run; wandb's environment variables choose server or offline mode.

        Args:
          project: name of the wandb project.
          workdir: of the run; keeps the id in `wandb_id`, and the package's own files in `wandb/`.
          config: shown with the run.
          warn: called once with a message if logging stops.

        Raises:
          UserError: wandb can't start the run.
        """
        require_wandb(project)
        import wandb

        self._image, self._warn, self._broken = wandb.Image, warn, False
        try:
            subfolder(workdir, "wandb")  # not a link
            file = workdir / _ID_FILE
            if not file.exists():
                with replacing(file) as temporary:
                    temporary.write_text(secrets.token_hex(4) + "\n")
            self._run = wandb.init(
                project=project,
                id=read_regular(file, 100).decode().strip(),
                name=workdir.resolve().name,
                dir=str(workdir),
                config=config,
                resume="allow",
                settings=wandb.Settings(console="off"),
            )
        except (wandb.Error, OSError, ValueError) as error:
            raise UserError(
                f"Weights & Biases can't start a run in project '{project}' "
                f"({first_line(error)}). Check `wandb login` and WANDB_MODE, or leave "
                "config.wandb empty."
            ) from error
        # Resumed runs repeat the steps since the checkpoint; wandb's own step can only increase.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Logs the metrics of a step."""
        if not self._broken:
            with self._surviving():
                self._run.log({"step": step, **scalars})

    def picture(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Logs an RGB picture."""
        if not self._broken:
            with self._surviving():
                self._run.log({"step": step, name: self._image(image)})

    def close(self, failed: bool = False) -> None:
        """Sends pending data and ends the run as failed or finished."""
        with self._surviving():
            self._run.finish(exit_code=int(failed))

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """Turns any failure, of the service or the package, into a single warning."""
        try:
            yield
        except Exception as error:
            if not self._broken:
                self._warn(
                    f"warning: Weights & Biases has failed ({first_line(error)}). Nothing more is "
                    "sent to it; metrics.jsonl is complete."
                )
            self._broken = True
