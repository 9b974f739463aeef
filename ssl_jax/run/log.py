"""What a run reports while it goes: fetching from the devices, files, the progress line."""

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TextIO

import jax
import numpy as np
from jaxtyping import UInt8
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from ssl_jax.errors import UserError
from ssl_jax.files import replacing

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


class Writer(Protocol):
    """Is told what a run measures, beside the files in its folder."""

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """What was measured at a step."""
        ...

    def picture(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """A picture, RGB."""
        ...

    def close(self, failed: bool = False) -> None:
        """Nothing more will come, because the run has failed or is at its end."""
        ...


class MetricsLog:
    """`metrics.jsonl`, one JSON object per line, and the same scalars as TensorBoard events."""

    def __init__(self, workdir: Path, resume_step: int = 0, others: Sequence[Writer] = ()) -> None:
        """Opens the log to be continued.

        Args:
          workdir: of the run.
          resume_step: lines beyond this step were written after the checkpoint that the run
            continues from; they are dropped, for their steps will be done again.
          others: are told the same numbers and pictures.
        """
        self._others = tuple(others)
        self._path = workdir / "metrics.jsonl"
        keep = [r for r in read_metrics(self._path) if r["step"] <= resume_step]
        with self._writing():
            with replacing(self._path) as file:
                file.write_text("".join(json.dumps(record) + "\n" for record in keep))
            self._file = self._path.open("a")
            # Written here and not by a thread of its own, which on a full disk would end alone.
            self._events = EventsWriter(str(workdir / "events"))
            # Events from this step on, of before the run was broken off, count no longer.
            began = {"step": resume_step + 1, "wall_time": time.time()}
            self._events.write_event(Event(file_version="brain.Event:2", **began))
            log = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(session_log=log, **began))

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
        numbers = {n: max(v) if isinstance(v, list) else v for n, v in values.items()}
        with self._writing():
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, number in numbers.items():
                told = {"step": step, "wall_time": time.time()}
                self._events.write_event(Event(summary=summary.scalar(name, number), **told))
            self._events.flush()
        for other in self._others:
            other.write(step, numbers)

    def picture(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Adds a picture to the events.

        Args:
          step: after which it was made.
          name: of what it shows.
          image: RGB.
        """
        with self._writing():
            shown = summary.image(name, image, dataformats="HWC")
            self._events.write_event(Event(summary=shown, step=step, wall_time=time.time()))
            self._events.flush()
        for other in self._others:
            other.picture(step, name, image)

    def close(self, failed: bool = False) -> None:
        """Flushes and closes the files; the others are told whether the run has failed."""
        try:
            with self._writing():
                self._file.close()
                self._events.close()
        finally:
            for other in self._others:
                other.close(failed)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What went wrong in writing, in a sentence."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path} or the events beside it can't be written ({error.strerror}): see "
                "that there is space and that they may be written to; the same command continues "
                "from the newest checkpoint."
            ) from error


class NoLog:
    """The log of a process that is not the first."""

    def write(self, step: int, scalars: dict[str, Any]) -> None:
        """Nothing."""

    def picture(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Nothing."""

    def close(self, failed: bool = False) -> None:
        """Nothing."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, without lines that are none: cut off by a kill, corrupt."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):  # no UTF-8, no JSON
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


# What is shown, by how much a run is to tell. Warnings always are.
_VERBOSITY = {
    "all": {"line", "note", "result"},
    "line": {"line"},  # of a run that is part of something larger
    "quiet": {"result"},
    "warnings": set(),
}


class Progress:
    """One line that is written over on a terminal, and plain lines elsewhere."""

    def __init__(
        self, total_steps: int, batch_size: int, out: TextIO | None = None, verbosity: str = "all"
    ) -> None:
        """Looks whether it writes to a terminal.

        Args:
          total_steps: of the run.
          batch_size: images in a step.
          out: where to write, default standard output.
          verbosity: "all"; "line", only the progress line; "quiet", only the result; or
            "warnings", which every level prints.
        """
        self._out, self._verbosity = out or sys.stdout, _VERBOSITY[verbosity]
        self._total, self._batch = total_steps, batch_size
        self._live = self._out.isatty()
        self._width = 0  # of the line
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
        self.line(text)

    def line(self, text: str) -> None:
        """Writes what is going on, until the next text."""
        if "line" in self._verbosity:
            self._write(text, end="" if self._live else "\n")

    def note(self, text: str) -> None:
        """Writes a line that stays."""
        if "note" in self._verbosity:
            self._write(text, end="\n")

    def result(self, text: str) -> None:
        """Writes a line that stays, and is not left out where little is told."""
        if "result" in self._verbosity:
            self._write(text, end="\n")

    def warn(self, text: str) -> None:
        """Writes a line that stays, however little is told."""
        self._write(text, end="\n")

    def end(self) -> None:
        """Leaves the line, so that what others write doesn't begin behind it."""
        if self._width:
            # Of a run among others nothing stays.
            gone = f"\r{' ' * self._width}\r"
            self._width = 0
            self._out.write("\n" if "note" in self._verbosity else gone)
            self._out.flush()

    def _write(self, text: str, end: str) -> None:
        if not self._live:
            self._out.write(text + end)
        else:
            # A line that wraps would not be written over.
            most = shutil.get_terminal_size().columns - 1
            text = text if end else text[:most]
            covering = text.ljust(min(self._width, most))
            self._width = 0 if end else len(text)
            self._out.write("\r" + covering + end)
        self._out.flush()
