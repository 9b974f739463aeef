"""A started run: its state is initialized or restored, its log open, its metrics followed."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ssl_jax.config import is_due, to_json
from ssl_jax.diagnostics import CollapseDetector
from ssl_jax.errors import UserError
from ssl_jax.evals.evaluator import Evaluator, evaluated_variables
from ssl_jax.interop.initial_weights import load_initial_weights
from ssl_jax.memory import require_device_memory
from ssl_jax.run import processes
from ssl_jax.run.checkpoint import Checkpoints, quarantine_corrupt
from ssl_jax.run.folder import changed_settings, note_resumption
from ssl_jax.run.log import Fetcher, MetricsLog, NoLog, Progress, read_metrics
from ssl_jax.run.nonfinite import NonfiniteGuard
from ssl_jax.run.wandb import WandbWriter
from ssl_jax.step import TrainState
from ssl_jax.train import extension, summary
from ssl_jax.train.setup import Setup


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a started run, and how its metrics are logged and checked.

    Attributes:
      setup: config, data, schedule and train step.
      workdir: the run's folder.
      start: the step of the restored checkpoint; 0 for a new run.
      device_data: the training set's arrays that stay on the devices, replicated.
      untrained: the evaluated variables before training, on the host; a baseline at the end.
      evaluator, checkpoints, progress, log: measure, save, print and write.
      guard, detector: follow the metrics for non-finite steps and for collapse.
      fetch: copies metrics to the host, counted.
      check_folder: raises a `UserError` if the folder was renamed; see `locked`.
      began: `time.perf_counter()` at the start.
    """

    setup: Setup
    workdir: Path
    start: int
    device_data: dict[str, jax.Array]
    untrained: Any
    evaluator: Evaluator
    checkpoints: Checkpoints
    progress: Progress
    log: MetricsLog | NoLog
    guard: NonfiniteGuard
    detector: CollapseDetector
    fetch: Fetcher
    check_folder: Callable[[], None]
    began: float

    def log_step(self, step: int, metrics: dict[str, jax.Array], waited: float) -> None:
        """Fetches, checks and logs the metrics of a step; `waited` is in seconds, for data.

        Raises:
          UserError: too many steps were not finite, or the run's folder was renamed.
        """
        self.require_in_place()
        scalars = self.check_finite(step, metrics)
        rates: dict[str, Any] = self.progress.rates(step, waited)
        if rates and jax.process_count() > 1:  # each process's rates, so that a slow one shows
            seconds = self.setup.config.batch_size / rates["images_per_s"]
            rates |= processes.pace(seconds, rates["data_wait"])
        self.log.write(step, scalars | rates)
        self.progress.show(step, scalars | rates)
        self.progress.warn(*self.detector.check(step, scalars))

    def check_finite(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, Any]:
        """Fetches the metrics of a step; without the counts of steps that were not finite.

        Raises:
          UserError: too many steps were not finite.
        """
        scalars: dict[str, Any] = self.fetch(metrics)
        self.progress.warn(*self.guard.check(step, scalars, self.checkpoints.latest_step))
        return scalars

    def require_in_place(self) -> None:
        """Raises a `UserError`, on all processes, if the run's folder was renamed or removed."""
        with processes.raise_on_all_processes():
            self.check_folder()

    def log_evaluation(self, step: int, measured: dict[str, float]) -> None:
        """Logs what was measured on the frozen encoder's features."""
        self.log.write(step, measured)
        self.progress.warn(*self.detector.check(step, measured))
        self.progress.note(summary.evaluation_line(self.setup, step, measured))

    def owes_evaluation(self, every: int) -> bool:
        """Whether the step that the run starts from is due to be evaluated and hasn't been.

        Either its evaluation failed, or a stop was requested before it.

        Args:
          every: steps between evaluations; 0: only at the end.
        """
        if not self.start:
            return False
        due = is_due(self.start, every) or self.start == self.setup.schedule.total_steps
        records = read_metrics(self.workdir / "metrics.jsonl") if due else []
        logged = any(r["step"] == self.start and "rankme" in r for r in records)
        return processes.decided(due and not logged)

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Finishes pending checkpoints and closes the log when the block ends or raises."""
        try:
            yield
        except BaseException as error:
            # Processes finish a checkpoint together, which they can't once one of them is lost.
            if processes.is_shared(error):
                with contextlib.suppress(UserError, OSError):  # the first error is reported
                    self._close(failed=True)
            raise
        self._close()

    def _close(self, failed: bool = False) -> None:
        self.progress.end()
        try:
            self.checkpoints.close()
        except BaseException:
            failed = True
            raise
        finally:
            self.log.close(failed)


def start_run(
    setup: Setup, workdir: Path, progress: Progress, check_folder: Callable[[], None] = lambda: None
) -> tuple[Run, TrainState]:
    """Restores the newest checkpoint or initializes the state, and opens the log.

    All processes of the run call it together.

    Args:
      setup: what the run is built from.
      workdir: the run's folder.
      progress: shows what is being done.
      check_folder: see `Run`.

    Raises:
      UserError: processes see different data or checkpoints, a checkpoint can't be read, or the
        train state doesn't fit in the devices' memory.
    """
    began, config, total = time.perf_counter(), setup.config, setup.schedule.total_steps
    primary = processes.is_primary()
    progress.begin(total, setup.schedule.steps_per_epoch, config.batch_size)
    progress.starting("Initializing the networks …")
    with processes.raise_on_all_processes():
        arrays = {"state": setup.program.state_shapes, "data": setup.train.device_data()}
        require_device_memory(arrays)
        if primary:
            progress.warn(*quarantine_corrupt(workdir / "checkpoints", workdir / "corrupt"))
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    device_data = setup.spmd.replicate(setup.train.device_data())
    state, start, untrained = _first_state(setup, workdir, checkpoints, progress)
    with processes.raise_on_all_processes():
        evaluator = Evaluator(config, setup.spmd, setup.train, setup.test, progress=progress)
    fetch = Fetcher()
    log: MetricsLog | NoLog = NoLog()
    with processes.raise_on_all_processes():
        if primary:
            log = _open_log(setup, workdir, start, progress)
            if not start:
                progress.starting("Augmenting the first images …")
                log.picture(0, "views", evaluator.view_grid(state))
    if start < total:
        progress.note(*summary.lines(summary.start_rows(setup, state.params, workdir, start)))
        progress.warn(*summary.data_warnings(setup), *summary.start_warnings(setup))
    run = Run(
        setup=setup,
        workdir=workdir,
        start=start,
        device_data=device_data,
        untrained=untrained,
        evaluator=evaluator,
        checkpoints=checkpoints,
        progress=progress,
        log=log,
        guard=_guard(setup, workdir, fetch(state.nonfinite)[0] if start else 0),
        detector=_detector(setup, workdir, start),
        fetch=fetch,
        check_folder=check_folder,
        began=began,
    )
    return run, state


def _guard(setup: Setup, workdir: Path, seen: int) -> NonfiniteGuard:
    allowed, rows = setup.config.max_nonfinite_steps, np.arange(setup.config.batch_size)
    return NonfiniteGuard(allowed, workdir, lambda step: setup.index.local_ids(step, rows), seen)


def _detector(setup: Setup, workdir: Path, start: int) -> CollapseDetector:
    """The detector after the steps before `start`, whose warnings have been given."""
    detector = CollapseDetector(**setup.watched)
    for record in read_metrics(workdir / "metrics.jsonl") if processes.is_primary() else []:
        if record["step"] <= start:
            detector.check(record["step"], record)
    return detector


def _first_state(
    setup: Setup, workdir: Path, checkpoints: Checkpoints, progress: Progress
) -> tuple[TrainState, int, Any]:
    """Restores the newest checkpoint, or initializes the state and loads initial weights.

    Each device has the state in memory once at all times.

    Returns:
      The state, replicated; its step; and the evaluated variables before training, on the host.
    """
    start, total = checkpoints.latest_step or 0, setup.schedule.total_steps
    held_out = setup.test.fingerprint if setup.test is not None else ""
    # Before the first program that the processes run together.
    processes.require_same(
        {
            "training set": setup.train.fingerprint,
            "held-out set": held_out,
            "newest checkpoint": str(start),
            "number of bits per value (config.data.bits)": str(setup.config.data.bits),
        }
    )
    state = setup.program.init()
    untrained = jax.device_get(evaluated_variables(setup.method, state))
    if not start:
        state = load_initial_weights(state, setup.config)  # frees the arrays that it replaces
        state = jax.tree.map(
            lambda x: x if isinstance(x, jax.Array) else setup.spmd.replicate(x), state
        )
    if start:
        start, state, warnings = checkpoints.restore_newest(_freed(state), workdir / "corrupt")
        progress.warn(*warnings)
        progress.note(f"Resuming from step {start} of {total}.")
    elif (workdir / "metrics.jsonl").exists():
        progress.note("No checkpoint found; restarting from step 0.")
    with processes.raise_on_all_processes():
        if processes.is_primary():
            changed = changed_settings(workdir, setup.config, held_out)
            if changed or 0 < start < total:
                before = extension.begin(setup, workdir, start, progress)
                now: Any = (setup.config, setup.derived, held_out, before)
                elsewhere = note_resumption(workdir, start, *now)
                progress.note(*summary.settings_notes(changed, start))
                progress.note(*summary.environment_notes(elsewhere if 0 < start < total else []))
    return state, start, untrained


def _freed(state: TrainState) -> TrainState:
    """Frees the memory of a state; returns its shapes, dtypes and shardings."""

    def free(x: jax.Array) -> jax.ShapeDtypeStruct:
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        x.delete()
        return shape

    freed: TrainState = jax.tree.map(free, state)
    return freed


def _open_log(setup: Setup, workdir: Path, start: int, progress: Progress) -> MetricsLog:
    """The run's log, and its run in Weights & Biases if there is anything left to train."""
    project = setup.config.wandb if start < setup.schedule.total_steps else ""
    others = []
    if project:
        others = [WandbWriter(project, workdir, to_json(setup.config), progress.warn)]
    return MetricsLog(workdir, start, others)
