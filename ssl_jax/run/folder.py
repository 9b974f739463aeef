"""A run's folder: one run at a time in it, and one config for its whole life."""

import contextlib
import fcntl
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ssl_jax.config import differences, from_json, to_json
from ssl_jax.errors import UserError
from ssl_jax.files import replacing
from ssl_jax.version import __version__

# Of a run's folder: what config.json holds beside the config, and the tree of checkpoints. It is
# raised with either, and tests/run/test_run_folder.py holds the tree to it. A config's own keys may
# grow without it (`ssl_jax.config.from_json`).
FORMAT = 1
# Of what is derived: judges the run, and changes nothing in it.
_JUDGING = ("derived.trivial_loss:", "derived.patience:")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml_collections", "numpy")


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds a run's folder for this process.

    The lock is the operating system's, so a killed run leaves none behind.

    Args:
      workdir: made if it doesn't exist.

    Raises:
      UserError: another run holds it (named), or it can't be written.
    """
    lock = workdir / ".lock"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = lock.open("a+")
    except OSError as error:
        raise UserError(
            f"The workdir {workdir} can't be written ({error.strerror}): choose another --workdir."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"A run is going on in {workdir} already ({holder}): wait for it, or choose "
                "another --workdir."
            ) from error
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = f"process {os.getpid()} on {socket.gethostname()}, started {started}"
        with _writing(lock):
            file.truncate(0)
            os.write(file.fileno(), holder.encode())  # past the buffer, which closing would write
        yield


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What went wrong in writing, in a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} can't be written ({error.strerror}): see that there is space and that it may "
            "be written to; the same command goes on."
        ) from error


def lock_text(workdir: Path, patience_s: float = 10.0) -> str:
    """Who holds a run's folder, as another process sees it; "" if nobody.

    Args:
      workdir: of the run.
      patience_s: seconds for which a file may be late on a network's file system.
    """
    until = time.monotonic() + patience_s
    while True:
        with contextlib.suppress(OSError):
            if text := (workdir / ".lock").read_text():
                return text
        if time.monotonic() > until:
            return ""
        time.sleep(0.2)


def write_config(
    workdir: Path,
    config: ConfigDict,
    command: str,
    data: str = "",
    derived: dict[str, Any] | None = None,
) -> None:
    """Writes `config.json`, or checks that the run in the folder has the same config.

    Args:
      workdir: of the run.
      config: resolved.
      command: that started the run, for "how to reproduce".
      data: fingerprint of the training data.
      derived: what the config comes to on these devices, for the record.

    Raises:
      UserError: the folder holds a run with another config, or on other data; the differences are
        listed.
    """
    path = workdir / "config.json"
    kept = any(folder.name.isdigit() for folder in (workdir / "checkpoints").glob("*"))
    if path.exists():
        record = read_record(workdir)
        changed = differences(to_json(from_json(record["config"])), to_json(config))
        if record.get("data", data) != data:
            changed.append(f"the training data: {record['data']} -> {data}")
        if changed:
            hint = "" if kept else "; this one has no checkpoint yet, deleting it loses nothing"
            raise UserError(
                f"{workdir} holds a run with another config ({'; '.join(changed)}): "
                f"use its config, or choose another --workdir{hint}."
            )
        return
    if kept:
        raise UserError(
            f"{workdir} has checkpoints but no config.json, so nothing tells what they are of: "
            "bring it back, or choose another --workdir."
        )
    record = {
        "format": FORMAT,
        "config": to_json(config),
        "derived": derived or {},
        "data": data,
        "command": command,
        **environment(),
    }
    _write_record(workdir, record)


def read_record(workdir: Path) -> dict[str, Any]:
    """What `write_config` wrote.

    Raises:
      UserError: there is no run in the folder, its record is corrupt, or of another format.
    """
    path = workdir / "config.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
            raise ValueError("no config in it")
    except FileNotFoundError:
        raise UserError(f"There is no run in {workdir}: it has no config.json.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}): restore it, or start anew.") from error
    written = record.get("format", 1)  # absent from the first runs
    if written != FORMAT:
        versions = record.get("versions")
        by = versions.get("ssl_jax", "?") if isinstance(versions, dict) else "?"
        raise UserError(
            f"{workdir} is a run of format {written!r}, written by ssl_jax {by}, and this version "
            f"({__version__}) reads format {FORMAT}: use the version that wrote it, or choose "
            "another --workdir."
        )
    return record


def note_continuation(workdir: Path, step: int, derived: dict[str, Any] | None = None) -> list[str]:
    """Records that the run is continued, and on what.

    Args:
      workdir: of the run.
      step: it continues from.
      derived: what the config comes to on these devices.

    Returns:
      The differences to the environment in which it began, on which bit-equality depends.
    """
    record, now = read_record(workdir), {"derived": derived or {}, **environment()}
    record.setdefault("continued", []).append({"step": step, **now})
    _write_record(workdir, record)
    changed = differences({key: record.get(key) for key in now}, now)
    return [line for line in changed if not line.startswith(_JUDGING)]


def _write_record(workdir: Path, record: dict[str, Any]) -> None:
    """Replaces `config.json` as a whole, so that a kill leaves the old one or the new one."""
    path = workdir / "config.json"
    with _writing(path), replacing(path) as file:
        file.write_text(json.dumps(record, indent=2) + "\n")


def read_config(workdir: Path) -> ConfigDict:
    """The config of the run in a folder."""
    return from_json(read_record(workdir)["config"])


def environment() -> dict[str, Any]:
    """All that a bit-exact repetition depends on beside the config."""
    devices = jax.devices()
    return {
        "versions": {
            "ssl_jax": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _PACKAGES},
        },
        "git": git_revision(),
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
            "cpu_cores": os.cpu_count(),
        },
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def git_revision() -> str:
    """Revision of the source tree this package runs from, "" if it is none."""
    commands = (
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        # Installed packages may lie inside somebody else's repository.
        ["git", "ls-files", "--error-unmatch", "errors.py"],
    )
    try:
        here = Path(__file__).parents[1]
        runs = [subprocess.run(c, cwd=here, capture_output=True, text=True) for c in commands]
    except OSError:  # no git here
        return ""
    return "" if any(run.returncode for run in runs) else runs[0].stdout.strip()
