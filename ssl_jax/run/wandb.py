"""Metrics and pictures of a run to Weights & Biases, where `config.wandb` asks for it.

The package is imported only then: nothing else knows it, and nothing is sent without it.
"""

import importlib.util
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ssl_jax.errors import UserError, first_line

_ID_FILE = "wandb_id"


def require_wandb(project: str) -> None:
    """Checks that what `config.wandb` asks for is installed.

    Args:
      project: the key's value.

    Raises:
      UserError: it isn't.
    """
    spec = importlib.util.find_spec("wandb") if project else None
    # A folder `wandb/`, which the package leaves where it has run, is found too, without an origin.
    if project and (spec is None or spec.origin is None):
        raise UserError(
            f"config.wandb is '{project}', but the package wandb is not installed: "
            "pip install ssl_jax[wandb], or leave the key empty."
        )


class WandbWriter:
    """A run of Weights & Biases, the same one whenever the run in the folder goes on.

    If it fails once it has started, the training goes on without it: `metrics.jsonl` has all.
    """

    def __init__(
        self,
        project: str,
        workdir: Path,
        config: dict[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        """Starts or continues it.

        Where it goes (a server, or files alone) is told to wandb by its own environment variables.

        Args:
          project: its name there.
          workdir: of the run; keeps the id in `wandb_id`, and the package's own files in `wandb/`.
          config: shown with the run.
          warn: is told, once, that nothing more is sent.

        Raises:
          UserError: wandb can't start it.
        """
        require_wandb(project)
        import wandb

        self._image, self._warn, self._broken = wandb.Image, warn, False
        try:
            file = workdir / _ID_FILE
            if not file.exists():
                file.write_text(secrets.token_hex(4) + "\n")
            self._run = wandb.init(
                project=project,
                id=file.read_text().strip(),
                name=workdir.resolve().name,
                dir=str(workdir),
                config=config,
                resume="allow",
                settings=wandb.Settings(console="off"),
            )
        except (wandb.Error, OSError, ValueError) as error:
            raise UserError(
                f"Weights & Biases can't start a run in project '{project}' "
                f"({first_line(error)}): see `wandb login` and WANDB_MODE, or leave "
                "config.wandb empty."
            ) from error
        # Steps since the checkpoint come again when a run goes on; wandb's own step only rises.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Logs what was measured at a step."""
        if not self._broken:
            with self._surviving():
                self._run.log({"step": step, **scalars})

    def picture(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Logs a picture, RGB."""
        if not self._broken:
            with self._surviving():
                self._run.log({"step": step, name: self._image(image)})

    def close(self, failed: bool = False) -> None:
        """Ends the run, as failed or as finished; what is left to send is sent first."""
        with self._surviving():
            self._run.finish(exit_code=int(failed))

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """Whatever fails inside, the service gone or a bug of the package, is a warning."""
        try:
            yield
        except Exception as error:
            if not self._broken:
                self._warn(
                    f"warning: Weights & Biases has failed ({first_line(error)}): nothing more is "
                    "sent to it; metrics.jsonl has everything."
                )
            self._broken = True
