"""A run's log: metrics fetched from the devices, metrics files, TensorBoard, the progress line."""

import contextlib
import json
import secrets
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

from ssl_jax.files import appending, open_regular, reading, replacing, writing

Pytree = Any
_MAX_STEP = 2**53
_MAX_LINE = 2**20  # bytes of a line of metrics.jsonl


class Fetcher:
    """Copies arrays from the devices to the host; the only way in the loop, so it can be counted.

    Attributes:
      count: fetches so far.
    """

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, tree: Pytree) -> Pytree:
        """Returns the values of a pytree of device arrays; waits for them."""
        self.count += 1
        return jax.device_get(tree)


class Writer(Protocol):
    """Receives a run's metrics, in addition to the files in its folder."""

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Logs the metrics of a step."""
        ...

    def picture(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Logs an RGB picture."""
        ...

    def close(self, failed: bool = False) -> None:
        """Ends the log of a run that has failed or finished."""
        ...


class MetricsLog:
    """`metrics.jsonl`, one JSON object per line, with the same scalars as TensorBoard events."""

    def __init__(self, workdir: Path, resume_step: int = 0, others: Sequence[Writer] = ()) -> None:
        """Opens the log for appending.

        Args:
          workdir: of the run.
          resume_step: step of the restored checkpoint. Lines of later steps are dropped, as those
            steps are repeated.
          others: writers that receive the same scalars and pictures.
        """
        self._others = tuple(others)
        self._path = workdir / "metrics.jsonl"
        keep = [r for r in read_metrics(self._path) if r["step"] <= resume_step]
        with writing(self._path.parent):
            with replacing(self._path) as file:
                file.write_text("".join(json.dumps(record) + "\n" for record in keep))
            self._file = appending(self._path)
            # Written in this thread: tensorboardX's writer thread dies silently on a full disk.
            # An unpredictable name, so that nobody can have put a link there.
            self._events = EventsWriter(str(workdir / f"events.{secrets.token_hex(8)}"))
            # TensorBoard then discards events of later steps, written before the interruption.
            began = {"step": resume_step + 1, "wall_time": time.time()}
            self._events.write_event(Event(file_version="brain.Event:2", **began))
            log = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(session_log=log, **began))

    def write(self, step: int, scalars: dict[str, Any]) -> None:
        """Appends the metrics of a step.

        Args:
          step: steps done.
          scalars: numbers, or lists with one number per process, of which TensorBoard gets the
            largest.
        """
        values = {
            name: list(map(float, value)) if isinstance(value, list) else float(value)
            for name, value in scalars.items()
        }
        numbers = {n: max(v) if isinstance(v, list) else v for n, v in values.items()}
        with writing(self._path.parent):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, number in numbers.items():
                at = {"step": step, "wall_time": time.time()}
                self._events.write_event(Event(summary=summary.scalar(name, number), **at))
            self._events.flush()
        for other in self._others:
            other.write(step, numbers)

    def picture(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Adds a picture to the TensorBoard events.

        Args:
          step: steps done.
          name: title of the picture.
          image: RGB.
        """
        with writing(self._path.parent):
            shown = summary.image(name, image, dataformats="HWC")
            self._events.write_event(Event(summary=shown, step=step, wall_time=time.time()))
            self._events.flush()
        for other in self._others:
            other.picture(step, name, image)

    def close(self, failed: bool = False) -> None:
        """Closes the files and the other writers, with whether the run has failed."""
        try:
            with writing(self._path.parent):
                self._file.close()
                self._events.close()
        finally:
            for other in self._others:
                other.close(failed)


class NoLog:
    """The log of a process that is not the primary."""

    def write(self, step: int, scalars: dict[str, Any]) -> None:
        """Does nothing."""

    def picture(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Does nothing."""

    def close(self, failed: bool = False) -> None:
        """Does nothing."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl` of any size; skips lines that are corrupt or cut off."""
    with reading(path):
        if not path.is_file():
            return []
        with open_regular(path, sys.maxsize) as file:
            lines = iter(lambda: file.readline(_MAX_LINE), b"")
            return [record for line in lines if (record := parse_record(line)) is not None]


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record in a line of `metrics.jsonl`; None for any other line.

    Returns:
      An object with a "step", a whole number that floats represent exactly.
    """
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, nested too deeply
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and 0 <= step <= _MAX_STEP else None


# Kinds of text that each level prints, besides warnings.
_VERBOSITY = {
    "all": {"starting", "line", "note", "result"},
    "line": {"line"},  # for a run that is one part of a larger command
    "quiet": {"result"},
    "warnings": set(),
}
_BAR = (4, 20)  # least and greatest number of columns
_UPDATE_S = 30.0  # seconds without output after which an update is printed in a log
_WAITING = 0.01  # share of time spent waiting for data from which on it is shown


class Progress:
    """Terminal output: a progress line that is overwritten, or plain lines without a terminal."""

    def __init__(self, out: TextIO | None = None, verbosity: str = "all") -> None:
        """Opens the output; `begin` follows once the run's length is known.

        Args:
          out: stream to write to, default standard output.
          verbosity: "all"; "line", only the progress line; "quiet", only the result; or
            "warnings", which every level prints.
        """
        self._out, self._verbosity = out or sys.stdout, _VERBOSITY[verbosity]
        self._live = self._out.isatty()
        self._width = 0  # of the progress line
        self._written = time.monotonic()

    def begin(self, total_steps: int, steps_per_epoch: int, batch_size: int) -> None:
        """Sets the run's length, and images per step; starts the clock."""
        self._total, self._per_epoch, self._batch = total_steps, steps_per_epoch, batch_size
        self.start(0, 0.0)

    def start(self, step: int, waited: float) -> None:
        """Restarts the clock of `rates`, after `step` steps and `waited` seconds for data."""
        self._since, self._step, self._waited = time.perf_counter(), step, waited

    def rates(self, step: int, waited: float) -> dict[str, float]:
        """Measures speed, and the share of time spent waiting for data, since the last call.

        Args:
          step: steps done.
          waited: seconds waited for data so far.

        Returns:
          "images_per_s" and "data_wait"; empty if no step was timed.
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
        """Excludes the time of the block from `rates`."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def show(self, step: int, scalars: dict[str, Any]) -> None:
        """Shows a step's loss, learning rate, speed, time left and data wait, with a bar."""
        parts = [f"step {step}/{self._total}", f"epoch {step / self._per_epoch:.1f}"]
        parts.append(f"loss {scalars['loss']:.4g}")
        if "learning_rate" in scalars:
            parts.append(f"lr {scalars['learning_rate']:.3g}")
        if "images_per_s" in scalars:
            seconds = round((self._total - step) * self._batch / scalars["images_per_s"])
            eta = str(timedelta(seconds=seconds)).removeprefix("0:").removeprefix("0")
            parts += [f"{scalars['images_per_s']:,.0f} img/s", f"ETA {eta}"]
            wait = f"data wait {100 * scalars['data_wait']:.1f}%"
            shares = scalars.get("process_data_wait", ())
            if shares and max(shares) > _WAITING:
                longest = max(range(len(shares)), key=shares.__getitem__)
                wait += f" (process {longest}: {100 * shares[longest]:.1f}%)"
            # A terminal has little room.
            parts += [wait] if not self._live or scalars["data_wait"] > _WAITING else []
        text = " | ".join(parts)
        self.line(self._bar(step / self._total, text) + text)

    def _bar(self, done: float, text: str) -> str:
        """A bar in the columns that a line leaves free on a terminal; "" if they are too few."""
        free = shutil.get_terminal_size().columns - 1 - len(f"[] {text}")
        if not self._live or free < _BAR[0]:
            return ""
        columns = min(free, _BAR[1])
        return f"[{'#' * round(columns * done):<{columns}}] "

    def starting(self, text: str) -> None:
        """Shows what a run does before its first step, until the next text."""
        if "starting" in self._verbosity:
            self._write(text, end="" if self._live else "\n")

    def line(self, text: str) -> None:
        """Shows a text until the next one."""
        if "line" in self._verbosity:
            self._write(text, end="" if self._live else "\n")

    def update(self, text: str) -> None:
        """Shows a text of many, most of which are left out without a terminal."""
        if self._live or time.monotonic() - self._written > _UPDATE_S:
            self.line(text)

    def note(self, *texts: str) -> None:
        """Prints lines."""
        if "note" in self._verbosity:
            self._print(texts)

    def result(self, text: str) -> None:
        """Prints a line that is also printed at verbosity "quiet"."""
        if "result" in self._verbosity:
            self._print([text])

    def warn(self, *texts: str) -> None:
        """Prints lines at every verbosity."""
        self._print(texts)

    def _print(self, texts: Sequence[str]) -> None:
        for text in texts:
            self._write(text, end="\n")

    def end(self) -> None:
        """Ends the progress line, so that other output starts on a line of its own."""
        if self._width:
            # One part of a larger command leaves nothing behind.
            gone = f"\r{' ' * self._width}\r"
            self._width = 0
            self._out.write("\n" if "note" in self._verbosity else gone)
            self._out.flush()

    def _write(self, text: str, end: str) -> None:
        self._written = time.monotonic()
        if not self._live:
            self._out.write(text + end)
        else:
            # A line that wraps could not be overwritten.
            most = shutil.get_terminal_size().columns - 1
            text = text if end else text[:most]
            covering = text.ljust(min(self._width, most))
            self._width = 0 if end else len(text)
            self._out.write("\r" + covering + end)
        self._out.flush()
