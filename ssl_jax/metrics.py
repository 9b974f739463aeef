"""What a run reports while it goes: fetching from the devices, files, the progress line."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import jax
from tensorboardX import SummaryWriter

Pytree = Any


class Fetcher:
    """The one way from the devices to the host in the steady state, so that it can be counted.

    Attributes:
      count: fetches so far.
    """

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, tree: Pytree) -> Pytree:
        """The values of a pytree of device arrays; waits for them."""
        self.count += 1
        return jax.device_get(tree)


class MetricsLog:
    """`metrics.jsonl`, one JSON object per line, and the same scalars as TensorBoard events."""

    def __init__(self, workdir: Path, resume_step: int = 0) -> None:
        """Opens the log to be continued.

        Args:
          workdir: of the run.
          resume_step: lines beyond this step were written after the checkpoint that the run
            continues from; they are dropped, for their steps will be done again.
        """
        self._path = workdir / "metrics.jsonl"
        keep = [r for r in read_metrics(self._path) if r["step"] <= resume_step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in keep))
        os.replace(temporary, self._path)
        self._file = self._path.open("a")
        self._events = SummaryWriter(str(workdir), purge_step=resume_step + 1, flush_secs=30)

    def write(self, step: int, scalars: dict[str, Any]) -> None:
        """Appends what was measured at a step.

        Args:
          step: after which.
          scalars: numbers, or lists with a number for each process, of which the events have the
            largest.
        """
        values = {
            name: list(map(float, value)) if isinstance(value, list) else float(value)
            for name, value in scalars.items()
        }
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            number = max(value) if isinstance(value, list) else value
            self._events.add_scalar(name, number, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        self._events.close()


class NoLog:
    """The log of a process that is not the first."""

    def write(self, step: int, scalars: dict[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


class Progress:
    """One line that is written over on a terminal, and plain lines elsewhere."""

    def __init__(self, total_steps: int, batch_size: int, out: TextIO | None = None) -> None:
        """Looks whether it writes to a terminal.

        Args:
          total_steps: of the run.
          batch_size: images in a step.
          out: where to write, default standard output.
        """
        self._out = out or sys.stdout
        self._total, self._batch = total_steps, batch_size
        self._live = self._out.isatty()
        self._width = 0
        self.start(0, 0.0)

    def start(self, step: int, waited: float) -> None:
        """Starts the clock of the next rates, after `step` steps and `waited` seconds for data."""
        self._since, self._step, self._waited = time.perf_counter(), step, waited

    def rates(self, step: int, waited: float) -> dict[str, float]:
        """Images per second, and the share of time spent waiting for data, since the last call.

        Args:
          step: steps done.
          waited: seconds waited for data so far.

        Returns:
          "images_per_s" and "data_wait"; nothing if no step was timed.
        """
        if step == self._step:
            return {}
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        images = (step - self._step) * self._batch
        rates = {
            "images_per_s": images / seconds,
            "data_wait": (waited - self._waited) / seconds,
        }
        self._since, self._step, self._waited = now, step, waited
        return rates

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what is done inside out of the rates."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def show(self, step: int, scalars: dict[str, Any]) -> None:
        """Writes the line of a step."""
        text = f"step {step}/{self._total}  loss {scalars['loss']:.4f}"
        if "images_per_s" in scalars:
            seconds = round((self._total - step) * self._batch / scalars["images_per_s"])
            text += (
                f"  {scalars['images_per_s']:,.0f} images/s  ETA {timedelta(seconds=seconds)}  "
                f"data wait {100 * scalars['data_wait']:.1f} %"
            )
            shares = scalars.get("process_data_wait", ())
            if shares and max(shares) > 0.01:
                longest = max(range(len(shares)), key=shares.__getitem__)
                text += f", of process {longest} {100 * shares[longest]:.1f} %"
        self._write(text, end="" if self._live else "\n")

    def note(self, text: str) -> None:
        """Writes a line that stays."""
        self._write(text, end="\n")

    def _write(self, text: str, end: str) -> None:
        start = "\r" if self._live else ""
        padded = text.ljust(self._width) if self._live else text
        self._width = 0 if end else len(text)
        self._out.write(start + padded + end)
        self._out.flush()
