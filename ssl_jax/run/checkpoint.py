"""Checkpoints of the whole train state, written in the background by Orbax, with checksums."""

import contextlib
import errno
import json
import logging
import os
import shutil
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from ssl_jax.errors import UserError, first_line
from ssl_jax.files import replacing

Pytree = Any
_SUMS = "checksums.json"
_UNSEALED = ("_CHECKPOINT_METADATA", _SUMS)  # Orbax writes the first again when all is there
_POLL_S = 0.05
_log = logging.getLogger("ssl_jax.run.checkpoint")


class Checkpoints:
    """The checkpoints of a run: the newest few, and the best one by kNN accuracy.

    What to keep is stated as a policy: with Orbax's `best_fn` and `max_to_keep` the newest
    checkpoint, from which a run continues, can be the one that is deleted.
    """

    def __init__(self, directory: Path, keep: int = 2, read_only: bool = False) -> None:
        """Opens the directory.

        Args:
          directory: of the checkpoints; made if it doesn't exist, unless `read_only`.
          keep: how many of the newest to keep.
          read_only: leave everything as it is: a run may be going on in it.

        Raises:
          UserError: what it holds can't be read.
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
        # Orbax warns of what read_only means each time it is asked for.
        logger = logging.getLogger("absl")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                # Only then are metrics kept, from which the best is known after a restart.
                best_fn=lambda metrics: metrics["knn"],
                best_mode="max",
                # An interrupted write leaves a temporary directory behind.
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"The checkpoints in {self.directory} can't be read ({_reason(error)})"
                f"{_corrupt_steps(self.directory)}."
            ) from error
        finally:
            logger.setLevel(level)
        self._sealing: threading.Thread | None = None
        self._written = threading.Event()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, which may still be written; None if there is none."""
        step: int | None = self._manager.latest_step()
        return step

    @property
    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Pytree, knn: float | None = None) -> None:
        """Starts writing a checkpoint; returns once the state is copied off the devices.

        Args:
          step: optimiser steps done.
          state: a pytree of arrays, which may be donated afterwards.
          knn: accuracy at this step if known, by which the best is kept.
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
        """What went wrong in writing a checkpoint, maybe the one before, in a sentence."""
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # another process is lost, or a device's memory is full
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"A checkpoint can't be written to {self.directory} ({_reason(error)}): see that "
                "there is space and that it may be written to; the same command continues from "
                "the newest that is whole."
            ) from error

    def _sealed(self) -> None:
        """Returns once the last checkpoint has its checksums; its writing has ended, or failed."""
        self._written.set()
        if self._sealing is not None:
            self._sealing.join()

    def restore(self, step: int, like: Pytree, verify: bool = True) -> Pytree:
        """Reads a checkpoint.

        Args:
          step: one of `steps`.
          like: a pytree of arrays with the shapes, dtypes and shardings wanted.
          verify: compare its files with their checksums first.

        Returns:
          The state, placed as `like` is.

        Raises:
          UserError: the checkpoint doesn't fit, is corrupt, or can't be read.
        """
        corrupt = damage(self.directory / str(step)) if verify else ""
        if corrupt:
            others = [n for n in self.steps if not damage(self.directory / str(n))]
            raise UserError(
                f"The checkpoint of step {step} in {self.directory} is corrupt ({corrupt}): take "
                f"another of its steps, {others}."
            )
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except jax.errors.JaxRuntimeError:
            raise  # another process is lost, or a device's memory is full
        except Exception as error:  # corrupt arrays raise this very class
            raise UserError(
                f"The checkpoint of step {step} in {self.directory} can't be read "
                f"({_reason(error)}): if "
                "another version of ssl_jax wrote it (config.json says which one), use that "
                "version; otherwise delete that step's directory to continue from the one before."
            ) from error

    def restore_newest(self, like: Pytree, aside: Path) -> tuple[int, Pytree, list[str]]:
        """Reads the checkpoint that a run continues from, and writes its checksums if it has none.

        One without, of a process that was killed right after it, which can't be read is moved away
        as a corrupt one is, if one before it can be read; not among several processes, which may
        not have failed alike.

        Args:
          like: as `restore` takes it.
          aside: folder that it is moved to.

        Returns:
          The step, the state, and a sentence for each that was moved away.

        Raises:
          UserError: as `restore` does.
        """
        step, *before = self.steps[::-1]
        said: list[str] = []
        try:
            state = self.restore(step, like, verify=False)
        except UserError:
            whole = [n for n in before if not damage(self.directory / str(n))]
            sealed = (self.directory / str(step) / _SUMS).exists()
            if sealed or not whole or jax.process_count() > 1:
                raise
            # Nothing is moved if this one doesn't fit either.
            state = self.restore(whole[0], like, verify=False)
            for n in (step, *before[: before.index(whole[0])]):
                why = damage(self.directory / str(n)) or "it can't be read"
                said.append(_quarantine(self.directory / str(n), why, aside))
            self._manager.reload()
            step = whole[0]
        folder = self.directory / str(step)
        if jax.process_index() == 0 and not (folder / _SUMS).exists():
            _seal(folder, self._written)
        return step, state, said

    def wait(self) -> None:
        """Returns when what was saved is on disk; raises what the writing raised."""
        with self._writing():
            self._manager.wait_until_finished()
        self._sealed()

    def close(self) -> None:
        """Waits, and lets go of the directory."""
        try:
            with self._writing():
                self._manager.wait_until_finished()
        finally:
            self._sealed()
        self._manager.close()


def _reason(error: Exception) -> str:
    """What went wrong with checkpoints, short: libraries name long paths before they say it."""
    told = str(error)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
        if os.strerror(code) in told:
            return os.strerror(code)
    return first_line(error)[:300]


def _seal(folder: Path, written: threading.Event) -> None:
    """Writes a checkpoint's checksums once it is complete: Orbax gives it its name then."""
    while not folder.exists():
        if written.wait(_POLL_S) and not folder.exists():
            return
    try:
        sums = json.dumps(_checksums(folder))
        with replacing(folder / _SUMS) as file:
            file.write_text(sums)
    except FileNotFoundError:
        return  # a newer one has taken its place
    except OSError as error:
        _log.warning(
            "warning: the checkpoint of step %s has no checksums, which can't be written (%s): "
            "damage to it may not be found.",
            folder.name,
            error.strerror,
        )


def _checksums(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of each file of a checkpoint."""
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


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files, "" where they are as they were written.

    One without checksums (the process was killed right after it was written) counts as whole, for
    nothing tells; a run that continues from it writes them (`Checkpoints.restore_newest`).
    """
    try:
        sums = json.loads((folder / _SUMS).read_text())
    except FileNotFoundError:
        return "" if any(file.is_file() for file in folder.rglob("*")) else "it is empty"
    except (OSError, ValueError):
        return f"its {_SUMS} can't be read"
    lists = isinstance(sums, dict) and all(isinstance(known, list) for known in sums.values())
    if not sums or not lists:
        return f"its {_SUMS} is none"
    for name, expected in sums.items():
        try:
            found = _checksum(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != expected:
            what = "other bytes" if found[:1] == expected[:1] else f"{found[0]:,} bytes"
            return f"{name} has {what}, not those that were written"
    return ""


def _steps_in(directory: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending, whether they can be read or not."""
    return sorted(int(folder.name) for folder in directory.glob("*") if folder.name.isdigit())


def _corrupt_steps(directory: Path) -> str:
    """What to do about the corrupt checkpoints of a folder, where there are any."""
    corrupt = [step for step in _steps_in(directory) if damage(directory / str(step))]
    return f": move those away that are corrupt, {corrupt}" if corrupt else ""


def quarantine_corrupt(directory: Path, aside: Path) -> list[str]:
    """Moves corrupt checkpoints away from the newest on, up to the first that is whole.

    Args:
      directory: of the checkpoints.
      aside: folder that they are moved to.

    Returns:
      A sentence for each.

    Raises:
      UserError: none is whole, or one can't be moved.
    """
    steps = _steps_in(directory)[::-1]
    found: dict[int, str] = {}
    for step in steps:
        corrupt = damage(directory / str(step))
        if not corrupt:
            break
        found[step] = corrupt
    if steps and len(found) == len(steps):
        raise UserError(
            f"No checkpoint in {directory} is whole (step {steps[0]}: {found[steps[0]]}): bring "
            "one back from a copy, or start anew in another workdir."
        )
    return [_quarantine(directory / str(step), corrupt, aside) for step, corrupt in found.items()]


def _quarantine(folder: Path, corrupt: str, aside: Path) -> str:
    """Moves a corrupt checkpoint away; returns what is told of it."""
    step = folder.name
    target, number = aside / step, 1
    while target.exists():
        target, number = aside / f"{step}_{number}", number + 1
    try:
        aside.mkdir(exist_ok=True)
        shutil.move(folder, target)
    except OSError as error:
        raise UserError(
            f"The checkpoint of step {step} is corrupt ({corrupt}) and can't be moved to "
            f"{target} ({error.strerror}): move it yourself."
        ) from error
    return (
        f"warning: the checkpoint of step {step} is corrupt ({corrupt}); it is in {target} "
        "now, and the one before takes its place."
    )
