"""Checkpoints of the train state, written in the background by Orbax, with checksums."""

import contextlib
import json
import logging
import os
import re
import shutil
import stat
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from ssl_jax.errors import UserError
from ssl_jax.files import (
    MAX_JSON,
    cannot_write,
    read_regular,
    reason,
    replacing,
    subfolder,
    unreachable,
)

Pytree = Any
_SUMS = "checksums.json"
_UNSEALED = ("_CHECKPOINT_METADATA", _SUMS)  # Orbax rewrites the first one at the end
_STEP = re.compile("0|[1-9][0-9]*")  # Orbax's names, without padding
_POLL_S = 0.05
_log = logging.getLogger("ssl_jax.run.checkpoint")


class _ReadError(UserError):
    """The file system doesn't answer; the checkpoint may be intact."""


class Checkpoints:
    """The checkpoints of a run: the newest few, and the best one by kNN accuracy.

    They are kept by an explicit preservation policy: Orbax's `best_fn` with `max_to_keep` may
    delete the newest checkpoint, from which a run resumes.
    """

    def __init__(self, directory: Path, keep: int = 2, read_only: bool = False) -> None:
        """Opens the directory; Orbax synchronizes the processes of a run here.

        Args:
          directory: of the checkpoints; created if it doesn't exist, unless `read_only`.
          keep: how many of the newest checkpoints to keep.
          read_only: change nothing, as a run may be using the directory.

        Raises:
          UserError: the directory can't be read, or has a link, a pipe or a device in it.
        """
        policy = policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep),
                policies.BestN(
                    n=1,
                    get_metric_fn=lambda metrics: metrics["knn"],
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self.directory = directory.absolute()
        # Orbax 0.12 logs a warning about read_only each time it is set.
        logger = logging.getLogger("absl")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            if not read_only:
                _refuse_links(self.directory)
            if irregular := _irregular(self.directory):
                raise UserError(
                    f"{irregular} is a link, a pipe or a device, which isn't read in a checkpoint. "
                    "Put the file or folder itself there, or move it away."
                )
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                # Without best_fn metrics aren't stored, and a restart doesn't know the best one.
                best_fn=lambda metrics: metrics["knn"],
                best_mode="max",
                # Interrupted writes leave temporary directories behind.
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"Cannot read the checkpoints in {self.directory} ({reason(error)})."
                f"{_corrupt_steps(self.directory)}"
            ) from error
        finally:
            logger.setLevel(level)
        self._sealing: threading.Thread | None = None
        self._written = threading.Event()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, which may still be in progress; None without one."""
        step: int | None = self._manager.latest_step()
        return step

    @property
    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Pytree, knn: float | None = None) -> None:
        """Starts writing a checkpoint; returns once the state has been copied to the host.

        Args:
          step: optimizer steps done.
          state: a pytree of arrays, which may be donated afterwards.
          knn: accuracy at this step, if known, which selects the best checkpoint.
        """
        metrics = None if knn is None else {"knn": float(knn)}
        with self._writing():
            self._manager.wait_until_finished()
        self._sealed()  # before Orbax deletes older ones
        with self._writing():
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics)
        if jax.process_index() == 0:
            folder, self._written = self.directory / str(step), threading.Event()
            self._sealing = threading.Thread(
                target=_seal, args=(folder, self._written), daemon=True
            )
            self._sealing.start()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns errors of writing this checkpoint, or the previous one, into a `UserError`."""
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # a process is lost, or a device is out of memory
        except (OSError, ValueError, RuntimeError) as error:
            raise cannot_write(self.directory, error) from error

    def _sealed(self) -> None:
        """Waits for the checksums of the last checkpoint, whose writing has ended or failed."""
        self._written.set()
        if self._sealing is not None:
            self._sealing.join()

    def restore(self, step: int, like: Pytree, verify: bool = True) -> Pytree:
        """Reads a checkpoint.

        Args:
          step: one of `steps`.
          like: a pytree of arrays or `jax.ShapeDtypeStruct` with the desired shapes, dtypes and
            shardings; NumPy arrays are restored on the host.
          verify: compare its files with their checksums first.

        Returns:
          The state, placed as `like`.

        Raises:
          UserError: the checkpoint doesn't fit, is corrupt, or can't be read.
        """
        corrupt = damage(self.directory / str(step)) if verify else ""
        if corrupt:
            others = [n for n in self.steps if not damage(self.directory / str(n))]
            fix = f"Use another step: {others}." if others else "Restore it from a backup."
            raise UserError(
                f"The checkpoint of step {step} in {self.directory} is corrupt ({corrupt}). {fix}"
            )
        try:
            _require_shapes(self.directory / str(step) / "default", like)
            return self._manager.restore(step, args=ocp.args.StandardRestore(like))
        except jax.errors.JaxRuntimeError:
            raise  # a process is lost, or a device is out of memory
        except Exception as error:  # corrupt arrays raise a plain Exception
            if unreachable(error):
                raise _unreadable(self.directory / str(step), error) from error
            raise UserError(
                f"Cannot read the checkpoint of step {step} in {self.directory} "
                f"({reason(error)}). If another version of ssl_jax wrote it (see config.json), use "
                "that version; otherwise delete the step's directory to resume from the previous "
                "checkpoint."
            ) from error

    def restore_newest(self, like: Pytree, aside: Path) -> tuple[int, Pytree, list[str]]:
        """Reads the newest checkpoint, and writes its checksums if it has none.

        A checkpoint lacks checksums if the process was killed right after writing it. If it can't
        be read, it is moved away like a corrupt one and the previous checkpoint is read; not among
        several processes, which may have failed differently.

        Args:
          like: as `restore` takes it.
          aside: folder for checkpoints that are moved away.

        Returns:
          The step, the state, and a warning for each checkpoint moved away.

        Raises:
          UserError: as `restore` does.
        """
        step, *before = self.steps[::-1]
        warnings: list[str] = []
        try:
            state = self.restore(step, like, verify=False)
        except _ReadError:
            raise
        except UserError:
            whole = [n for n in before if not damage(self.directory / str(n))]
            sealed = (self.directory / str(step) / _SUMS).exists()
            if sealed or not whole or jax.process_count() > 1:
                raise
            # Restored first: nothing is moved if this one can't be read either.
            state = self.restore(whole[0], like, verify=False)
            for n in (step, *before[: before.index(whole[0])]):
                why = damage(self.directory / str(n)) or "it can't be read"
                warnings.append(_quarantine(self.directory / str(n), why, aside))
            self._manager.reload()
            step = whole[0]
        folder = self.directory / str(step)
        if jax.process_index() == 0 and not (folder / _SUMS).exists():
            _seal(folder, self._written)
        return step, state, warnings

    def wait(self) -> None:
        """Waits until saved checkpoints are on disk; raises the errors of writing them."""
        with self._writing():
            self._manager.wait_until_finished()
        self._sealed()

    def close(self) -> None:
        """Waits, and closes the directory."""
        try:
            with self._writing():
                self._manager.wait_until_finished()
        finally:
            self._sealed()
        with self._writing():  # it raises what failed in the background since
            self._manager.close()


def _require_shapes(folder: Path, like: Pytree) -> None:
    """Compares shapes with the stored ones.

    Orbax 0.12 would find a difference while it reads other arrays, and print errors of those.

    Raises:
      ValueError: an array is stored with another shape.
    """
    stored = _by_name(ocp.StandardCheckpointHandler().metadata(folder))
    for name, wanted in _by_name(like).items():
        found = getattr(stored.get(name), "shape", wanted.shape)
        if tuple(found) != wanted.shape:
            raise ValueError(f"{name} has shape {tuple(found)}, not {wanted.shape}")


def _by_name(tree: Pytree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _refuse_links(directory: Path) -> None:
    """Creates the directory, and refuses links: Orbax would write through them."""
    links = [str(directory)] * directory.is_symlink()
    if not links:
        with os.scandir(subfolder(directory.parent, directory.name)) as entries:
            links = [entry.path for entry in entries if entry.is_symlink()]
    if links:
        raise UserError(
            f"{links[0]} is a link, through which a run doesn't write. Move the folder there; only "
            "the whole --workdir may be a link."
        )


def _irregular(directory: Path) -> str:
    """The path of an entry that is neither a regular file nor a folder; "" if there is none.

    Orbax opens whatever has the name of one of its files, when it opens a directory and when it
    restores: it would wait for the other end of a pipe, or read a device without end.
    """
    for folder, folders, files in os.walk(directory):
        for path in (os.path.join(folder, name) for name in (*folders, *files)):
            with contextlib.suppress(FileNotFoundError):  # a run is writing here
                mode = os.lstat(path).st_mode
                if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                    return path
    return ""


def _seal(folder: Path, written: threading.Event) -> None:
    """Writes a checkpoint's checksums once it is complete, when Orbax gives it its final name."""
    while not folder.exists():
        if written.wait(_POLL_S) and not folder.exists():
            return
    try:
        sums = json.dumps(_checksums(folder))
        with replacing(folder / _SUMS) as file:
            file.write_text(sums)
    except FileNotFoundError:
        return  # deleted in favor of a newer checkpoint
    except OSError as error:
        _log.warning(
            "warning: cannot write the checksums of the checkpoint of step %s (%s); damage to it "
            "may go unnoticed.",
            folder.name,
            reason(error),
        )


def _checksums(folder: Path) -> dict[str, list[int]]:
    """Size in bytes and CRC-32 of each file of a checkpoint."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {
        str(file.relative_to(folder)): _checksum(file)
        for file in sorted(files)
        if not file.name.startswith(_UNSEALED)
    }


def _checksum(file: Path) -> list[int]:
    crc = size = 0
    with file.open("rb") as opened:
        while part := opened.read(1 << 22):
            crc, size = zlib.crc32(part, crc), size + len(part)
    return [size, crc]


def fingerprint(folder: Path) -> str:
    """A checksum of a checkpoint's files, the same for a copy of it.

    Raises:
      OSError: a file can't be read.
    """
    sums: Any = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        sums = json.loads(read_regular(folder / _SUMS))
    text = json.dumps(sums or _checksums(folder), sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


def damage(folder: Path) -> str:
    """Describes the damage to a checkpoint's files; "" if they match their checksums.

    A checkpoint without checksums (the process was killed right after writing it) counts as intact;
    a run that resumes from it adds them (`Checkpoints.restore_newest`).

    Raises:
      UserError: a file exists but can't be read now, so it may be intact.
    """
    try:
        return _damage(folder)
    except OSError as error:
        raise _unreadable(error.filename or folder, error) from error


def _damage(folder: Path) -> str:
    if different := _differing(folder):
        return different
    path = _irregular(folder)
    return f"{os.path.relpath(path, folder)} is a link, a pipe or a device" if path else ""


def _differing(folder: Path) -> str:
    """The first difference from the checksums."""
    file = folder / _SUMS
    if not file.exists():
        return "" if any(file.is_file() for file in folder.rglob("*")) else "it is empty"
    if not file.is_file() or file.stat().st_size > MAX_JSON:  # a device may have no end
        return f"its {_SUMS} is invalid"
    try:
        sums = json.loads(read_regular(file))
    except (ValueError, RecursionError):
        return f"its {_SUMS} is unreadable"
    if not isinstance(sums, dict) or not sums:
        return f"its {_SUMS} is invalid"
    for name, expected in sums.items():
        if not _is_inside(folder, name) or not isinstance(expected, list) or len(expected) != 2:
            return f"its {_SUMS} is invalid"
        file = folder / name
        try:
            size = file.stat().st_size
        except (FileNotFoundError, NotADirectoryError) as error:
            return f"{name}: {error.strerror}"
        if not file.is_file():
            return f"{name} is not a file"
        if size != expected[0]:
            return f"{name} has a different size, {size:,} bytes"
        if _checksum(file) != expected:
            return f"{name} has different content"
    return ""


def _unreadable(file: Path, error: Exception) -> UserError:
    return _ReadError(
        f"Cannot read {file} ({reason(error)}). Check the file system, then rerun the same command."
    )


def _is_inside(folder: Path, name: str) -> bool:
    """Whether a name from `checksums.json` is of a file in the folder, not reached by a link."""
    try:
        file = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError):  # a name with a null byte, a loop of links
        return False
    sizes = [len(os.fsencode(part)) for part in file.parts]
    valid = max(sizes) < 256 and sum(sizes) + len(sizes) < 4096  # what Linux accepts
    return valid and file.is_relative_to(folder.resolve()) and file != folder.resolve()


def steps_in(directory: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending, readable or not.

    Unlike `Checkpoints.steps`, a single process of a run may call it: Orbax would wait for the
    others when it opens the folder.
    """
    names = (entry.name for entry in directory.glob("*"))
    return sorted(int(name) for name in names if _STEP.fullmatch(name))


def _corrupt_steps(directory: Path) -> str:
    """Advice about the corrupt checkpoints of a folder; "" without any."""
    corrupt = [step for step in steps_in(directory) if damage(directory / str(step))]
    return f" Move the corrupt checkpoints away: {corrupt}." if corrupt else ""


def quarantine_corrupt(directory: Path, aside: Path) -> list[str]:
    """Moves corrupt checkpoints away, newest first, until one is intact.

    Args:
      directory: of the checkpoints.
      aside: folder for the corrupt checkpoints.

    Returns:
      A warning for each checkpoint moved away.

    Raises:
      UserError: no checkpoint is intact, one can't be moved, or one or the directory is a link.
    """
    if directory.is_dir():
        _refuse_links(directory)  # behind a link, another run's checkpoints would be moved
    steps = steps_in(directory)[::-1]
    found: dict[int, str] = {}
    for step in steps:
        corrupt = damage(directory / str(step))
        if not corrupt:
            break
        found[step] = corrupt
    if steps and len(found) == len(steps):
        raise UserError(
            f"No checkpoint in {directory} is intact (step {steps[0]}: {found[steps[0]]}). Restore "
            "one from a backup, or start a new run in another --workdir."
        )
    return [_quarantine(directory / str(step), corrupt, aside) for step, corrupt in found.items()]


def _quarantine(folder: Path, corrupt: str, aside: Path) -> str:
    """Moves a corrupt checkpoint away; returns a warning."""
    step = folder.name
    target, number = aside / step, 1
    while os.path.lexists(target):
        target, number = aside / f"{step}_{number}", number + 1
    try:
        subfolder(aside.parent, aside.name)
        shutil.move(folder, target)
    except OSError as error:
        raise UserError(
            f"The checkpoint of step {step} is corrupt ({corrupt}) and can't be moved to "
            f"{target} ({reason(error)}). Move it away by hand."
        ) from error
    return (
        f"warning: the checkpoint of step {step} is corrupt ({corrupt}); moved it to {target}. "
        "The previous checkpoint is used instead."
    )
