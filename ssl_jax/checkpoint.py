"""Checkpoints of the whole train state, written in the background by Orbax."""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from ssl_jax.errors import UserError

Pytree = Any


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
                # An interrupted write leaves a temporary directory behind.
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        finally:
            logger.setLevel(level)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
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
        self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics)

    def restore(self, step: int, like: Pytree) -> Pytree:
        """Reads a checkpoint.

        Args:
          step: one of `steps`.
          like: a pytree of arrays with the shapes, dtypes and shardings wanted.

        Returns:
          The state, placed as `like` is.

        Raises:
          UserError: the checkpoint doesn't fit, or can't be read.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError, OSError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"The checkpoint of step {step} in {self.directory} can't be read ({first}): "
                "delete that step's directory to continue from the one before."
            ) from error

    def wait(self) -> None:
        """Returns when what was saved is on disk; raises what the writing raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the directory."""
        self._manager.wait_until_finished()
        self._manager.close()
