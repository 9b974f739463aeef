"""A run's folder: it is locked by one run at a time, and keeps its config."""

import contextlib
import fcntl
import json
import logging
import os
import platform
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ssl_jax.config import close_path, differences, from_json, to_json
from ssl_jax.data.fingerprint import describe_change, same_images
from ssl_jax.errors import UserError
from ssl_jax.files import (
    InTheWayError,
    appending,
    own_folder,
    read_regular,
    reason,
    replacing,
    writing,
)
from ssl_jax.version import __version__

# Version of a run's folder: the keys of config.json other than the config, and the tree of
# checkpoints, which tests/run/test_run_folder.py checks. Raise it when either changes; new config
# keys don't need it (`ssl_jax.config.from_json`).
FORMAT = 4
# Derived values that affect warnings, not training.
_WARNING_ONLY = ("derived.trivial_loss:", "derived.patience:")
_MAX_LOCK = 4096  # bytes
# Folders that a run writes.
_SUBFOLDERS = ("checkpoints", "corrupt", "earlier", "evals", "projector", "wandb")
# A run's length, which `pretrain(..., extend=True)` may change.
_LENGTH = ("epochs: ", "steps: ")
_log = logging.getLogger("ssl_jax.run.folder")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml_collections", "numpy")


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[Callable[[], None]]:
    """Holds a run's folder for this process.

    The lock is the operating system's, so a killed run leaves none behind. On file systems without
    locks (Lustre mounted without `flock`, for example) a warning is logged instead.

    Args:
      workdir: created if it doesn't exist.

    Yields:
      A function that raises a `UserError` if the folder has been renamed or removed since. What is
      written by its path would otherwise end up in a second folder.

    Raises:
      UserError: another run (named in the message) holds it, it can't be written, or it has a link
        where the run writes a folder.
    """
    lock = workdir / ".lock"
    with writing(workdir, "or choose another --workdir"):
        workdir.mkdir(parents=True, exist_ok=True)
    for name in _SUBFOLDERS:  # before anything is computed or moved
        own_folder(workdir, name)
    with writing(lock, "or choose another --workdir"):
        try:
            file = appending(lock)
        except InTheWayError as error:
            raise UserError(
                f"Cannot write {lock} ({reason(error)}). Move it away if no run is using "
                f"{workdir}, or choose another --workdir."
            ) from error
    with file, _require_in_place(workdir) as require_in_place:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read(_MAX_LOCK).strip() or "another process"
            raise UserError(
                f"Another run is using {workdir} ({holder}). Wait for it to finish, or choose "
                "another --workdir."
            ) from error
        except OSError as error:
            _log.warning(
                "warning: cannot lock %s (%s), so a second run in this folder would go unnoticed.",
                workdir,
                reason(error),
            )
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = f"process {os.getpid()} on {socket.gethostname()}, started {started}"
        with writing(lock):
            file.truncate(0)
            os.write(file.fileno(), holder.encode())  # unbuffered, or closing would write it
        yield require_in_place


@contextlib.contextmanager
def _require_in_place(workdir: Path) -> Iterator[Callable[[], None]]:
    # Some network file systems keep a folder's number only while it is open.
    descriptor = os.open(workdir, os.O_RDONLY | os.O_DIRECTORY)

    def require() -> None:
        with contextlib.suppress(OSError):
            moved = True
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                moved = not os.path.samestat(os.fstat(descriptor), os.stat(workdir))
            if moved:
                raise UserError(
                    f"{workdir} was renamed or removed while its run was in progress. Rename it "
                    "back, or pass its new path as --workdir, then rerun the command to resume."
                )

    try:
        yield require
    finally:
        os.close(descriptor)


def lock_text(workdir: Path, patience_s: float = 10.0) -> str:
    """Reads which process holds a run's folder; "" if none does.

    Args:
      workdir: of the run.
      patience_s: seconds to wait for the file, which may appear late on a network file system.
    """
    until = time.monotonic() + patience_s
    while True:
        with contextlib.suppress(OSError, ValueError):
            if text := read_regular(workdir / ".lock", _MAX_LOCK).decode():
                return text
        if time.monotonic() > until:
            return ""
        time.sleep(0.2)


def write_config(
    workdir: Path,
    config: ConfigDict,
    command: str,
    data: str = "",
    test_data: str = "",
    derived: dict[str, Any] | None = None,
    weights: dict[str, dict[str, Any]] | None = None,
    evaluated: bool = False,
    extend: bool = False,
) -> None:
    """Writes `config.json`, or checks that the run in the folder can be resumed with this config.

    Keys that don't affect training may differ; `note_resumption` records them.

    Args:
      workdir: of the run.
      config: resolved.
      command: command line that started the run, for "how to reproduce".
      data: fingerprint of the training data.
      test_data: fingerprint of the held-out data; "" if there is none.
      derived: values that follow from the config and the devices, for the record.
      weights: fingerprints of the run's initial weights and teacher, by the name of their group.
      evaluated: the run's results have been measured, so its held-out data is fixed.
      extend: the run's length may differ, too.

    Raises:
      UserError: the folder holds a run with a different config or data; the message lists the
        differences.
    """
    path = workdir / "config.json"
    kept = has_checkpoint(workdir)
    if path.exists():
        record, began = read_record(workdir), started_weights(workdir)
        changed = _affecting_training(record, config, began, weights or {}, extend)
        if evaluated and record.get("test_data"):
            changed += _other_held_out(record, test_data)
        _require_unchanged(workdir, changed, str(record.get("data", data)), data, kept)
        if not kept and record.get("weights", {}) != (weights or {}):  # it starts from these now
            _write_record(workdir, record | {"weights": weights or {}})
        return
    if kept:
        raise UserError(
            f"{workdir} has checkpoints but no config.json to describe them. Restore that file, or "
            "choose another --workdir."
        )
    record = {
        "format": FORMAT,
        "config": to_json(config),
        "derived": derived or {},
        "data": data,
        "test_data": test_data,
        "weights": weights or {},
        "command": command,
        **environment(),
    }
    _write_record(workdir, record)


def _require_unchanged(workdir: Path, changed: list[str], old: str, new: str, kept: bool) -> None:
    """Raises a UserError if config or images differ; "old" and "new" are the images'."""
    hint = "" if kept else "; this one has no checkpoint yet and can be deleted"
    if changed:
        lengths = kept and all(line.startswith(_LENGTH) for line in changed)
        extending = ", pass --extend if it is to be longer" if lengths else ""
        raise UserError(
            f"{workdir} holds a run with a different config ({'; '.join(changed)}). "
            f"Use its config{extending}, or choose another --workdir{hint}."
        )
    if not same_images(old, new):
        raise UserError(
            f"{workdir} holds a run on other training images ({describe_change(old, new)}). "
            f"Restore its images, or choose another --workdir{hint}."
        )


def _affecting_training(
    record: dict[str, Any],
    config: ConfigDict,
    started: dict[str, dict[str, Any]],
    found: dict[str, dict[str, Any]],
    extend: bool,
) -> list[str]:
    """Differences with which a run can't be resumed, or extended."""
    before, now = to_json(from_json(record["config"])), to_json(config)
    changed = differences(before, now, ignore=("results", "nothing"))
    if extend:
        changed = [line for line in changed if not line.startswith(_LENGTH)]
    return changed + _other_sources(before, now, started, found)


def _other_sources(
    before: dict[str, Any],
    now: dict[str, Any],
    started: dict[str, dict[str, Any]],
    found: dict[str, dict[str, Any]],
) -> list[str]:
    """Sources of weights other than those that a run was started from.

    A source may have been renamed, or removed since.
    """
    changed = []
    for group, key in (("init_from", "path"), ("distill", "teacher")):
        old, new = before[group][key], now[group][key]
        if bool(old) != bool(new):
            changed.append(f"{group}.{key}: {old!r} -> {new!r}")
        elif group in started and started[group] != found.get(group, started[group]):
            changed.append(f"{group}.{key}: {old} -> {new}, which has other weights")
        elif group in started and group not in found and old != new:
            step = started[group].get("step")
            where = f"step {step} of which" if step else "which"
            changed.append(f"{group}.{key}: {old} -> {new}, {where} can't be read to compare them")
    return changed


def has_checkpoint(workdir: Path) -> bool:
    """Whether the run in a folder has saved a checkpoint, intact or not."""
    return any(folder.name.isdecimal() for folder in (workdir / "checkpoints").glob("*"))


def started_config(workdir: Path, extend: bool = False) -> ConfigDict | None:
    """The config of the run that will be resumed in a folder; None for a new run.

    Args:
      workdir: the folder; nothing is created in it.
      extend: whether there must be a run.

    Raises:
      UserError: there must be a run, but it has no config or no checkpoint.
    """
    named = (workdir / "config.json").exists()
    if named and has_checkpoint(workdir):
        return read_config(workdir)
    if extend:
        why = f"as it has no {'checkpoint' if named else 'config.json'}"
        why = why if workdir.exists() else "as it doesn't exist"
        raise UserError(
            f"{workdir} contains no run to extend, {why}.{close_path(workdir)} Set --workdir to "
            "the folder of a run, or remove --extend to start a new one."
        )
    return None


def started_weights(workdir: Path) -> dict[str, dict[str, Any]]:
    """Fingerprints of the weights that the run in a folder was started from; {} for a new run."""
    if has_checkpoint(workdir) and (workdir / "config.json").exists():
        weights = read_record(workdir).get("weights")
        if isinstance(weights, dict):
            return {name: each for name, each in weights.items() if isinstance(each, dict)}
    return {}


def read_record(workdir: Path) -> dict[str, Any]:
    """Reads a run's `config.json`.

    Raises:
      UserError: the folder contains no run, or its record is corrupt or of another format.
    """
    path = workdir / "config.json"
    try:
        record: dict[str, Any] = json.loads(read_regular(path))
        if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
            raise ValueError("it contains no config")
        resumed = record.get("resumed", [])
        if not isinstance(resumed, list) or not all(isinstance(each, dict) for each in resumed):
            raise ValueError("resumed is not a list of groups of keys")
    except FileNotFoundError:
        raise UserError(f"There is no run in {workdir}: it has no config.json.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"Cannot read {path} ({reason(error)}). Restore it, or use a new --workdir."
        ) from error
    written = record.get("format")
    if written != FORMAT:
        versions = record.get("versions")
        by = versions.get("ssl_jax", "?") if isinstance(versions, dict) else "?"
        raise UserError(
            f"{workdir} has format {written!r}, written by ssl_jax {by}, but this version "
            f"({__version__}) reads format {FORMAT}. Use the version that wrote it, or choose "
            "another --workdir."
        )
    return record


def changed_settings(workdir: Path, config: ConfigDict, test_data: str | None = None) -> list[str]:
    """Compares a resumed run with what is recorded.

    Args:
      workdir: of the run.
      config: of the resumed run.
      test_data: fingerprint of its held-out data; None: not compared.

    Returns:
      The differences, as lines `key: old -> new`.
    """
    record = read_record(workdir)
    changed = differences(to_json(from_json(record["config"])), to_json(config))
    return changed + ([] if test_data is None else _other_held_out(record, test_data))


def _other_held_out(record: dict[str, Any], found: str) -> list[str]:
    old = record.get("test_data", found)
    if same_images(str(old), found):
        return []
    return [f"the held-out data: {describe_change(str(old), found)}"]


def note_resumption(
    workdir: Path,
    step: int,
    config: ConfigDict,
    derived: dict[str, Any] | None = None,
    test_data: str | None = None,
    extended_from: int = 0,
) -> list[str]:
    """Records that the run is resumed, with which changed settings, and in which environment.

    Args:
      workdir: of the run.
      step: of the restored checkpoint; 0 without one.
      config: replaces the recorded config.
      derived: values that follow from the config and the devices.
      test_data: fingerprint that replaces the recorded one of the held-out data; None: it stays.
      extended_from: the run's length before, in steps, if it is longer now; 0 if it isn't.

    Returns:
      Differences from the environment in which the run started, any of which may break bitwise
      equality.
    """
    record, now = read_record(workdir), {"derived": derived or {}, **environment()}
    changed = changed_settings(workdir, config, test_data)
    record["config"] = to_json(config)
    if test_data is not None:
        record["test_data"] = test_data
    resumed = {"step": step, "changed": changed, **now}
    if extended_from:
        resumed["extended_from"] = extended_from
    record.setdefault("resumed", []).append(resumed)
    _write_record(workdir, record)
    elsewhere = differences({key: record.get(key) for key in now}, now)
    return [line for line in elsewhere if not line.startswith(_WARNING_ONLY)]


def _write_record(workdir: Path, record: dict[str, Any]) -> None:
    path = workdir / "config.json"
    with writing(path), replacing(path) as file:
        file.write_text(json.dumps(record, indent=2) + "\n")


def read_config(workdir: Path) -> ConfigDict:
    """The config of the run in a folder."""
    return from_json(read_record(workdir)["config"])


def environment() -> dict[str, Any]:
    """Collects what bit-exact reproduction depends on besides the config."""
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
    """Git revision of the source tree this package runs from; "" if it is not in a repository."""
    commands = (
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        # An installed package may lie inside another project's repository.
        ["git", "ls-files", "--error-unmatch", "errors.py"],
    )
    try:
        here = Path(__file__).parents[1]
        runs = [subprocess.run(c, cwd=here, capture_output=True, text=True) for c in commands]
    except OSError:  # no git here
        return ""
    return "" if any(run.returncode for run in runs) else runs[0].stdout.strip()
