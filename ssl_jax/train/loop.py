"""The loop of a run, and nothing but the loop."""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ssl_jax.config import is_due, to_json
from ssl_jax.data.pipeline import Prefetcher
from ssl_jax.diagnostics import CollapseDetector
from ssl_jax.errors import UserError
from ssl_jax.evals.evaluator import Evaluator, evaluated_variables, evaluation_table
from ssl_jax.interop.initial_weights import load_initial_weights
from ssl_jax.report import write_report
from ssl_jax.run import processes
from ssl_jax.run.checkpoint import Checkpoints, quarantine_corrupt
from ssl_jax.run.folder import lock_text, locked, note_continuation, write_config
from ssl_jax.run.log import Fetcher, MetricsLog, NoLog, Progress, read_metrics
from ssl_jax.run.memory import enough_memory, step_suggestions
from ssl_jax.run.nonfinite import COUNT, STEP, NonfiniteGuard
from ssl_jax.run.wandb import WandbWriter
from ssl_jax.step import TrainState
from ssl_jax.train import summary
from ssl_jax.train.setup import Setup

_PLAN = "; `ssl-jax plan` tells what a step needs, and the largest microbatch, without the hardware"
_SHORT = (
    "warning: the warmup of {} steps (config.optim.warmup_epochs) is not shorter than the run: "
    "the learning rate never reaches its peak."
)


def pretrain(
    config: ConfigDict, workdir: str | Path, command: str = "", *, verbosity: str = "all"
) -> TrainState:
    """Pretrains an encoder, or continues the run in `workdir`; evaluates it and writes the report.

    SIGTERM stops it after a checkpoint. Several processes that `jax.distributed.initialize` has
    joined, each of which calls this, are one run; the first writes and speaks.

    Args:
      config: validated, of the whole run.
      workdir: the run's folder; made if it doesn't exist.
      command: recorded there, for "how to reproduce".
      verbosity: how much is printed, as `Progress` takes it.

    Returns:
      The final state, or that at which the run was stopped.

    Raises:
      UserError: bad input, in one sentence, on all processes; nothing is overwritten.
    """
    workdir = Path(workdir)
    with contextlib.ExitStack() as folder, processes.Stop() as stop:
        # Whatever is wrong with the config shows here, before the folder is touched.
        with processes.raise_on_all_processes():
            setup = Setup(config)
        with processes.raise_on_all_processes():
            if processes.is_primary():
                folder.enter_context(locked(workdir))
                write_config(workdir, setup.config, command, setup.train.fingerprint, setup.derived)
        same = {"workdir": lock_text(workdir), "config": json.dumps(to_json(config))}
        processes.require_same(same)
        suggestions = step_suggestions(config, setup.spmd.size)
        with enough_memory("The step", suggestions, _PLAN):
            run = Run(setup, workdir, verbosity)
            try:
                state = run.train(stop)
            except BaseException as error:
                # Several finish together what is being written, which one that was lost can't. What
                # has gone wrong first is told.
                if (
                    jax.process_count() == 1
                    or isinstance(error, UserError)
                    and error.on_all_processes
                ):
                    with contextlib.suppress(UserError, OSError):
                        run.close(failed=True)
                raise
        run.close()
        with contextlib.suppress(processes.StoppedError), stop.at_once():
            if not run.stopped:
                run.finish(workdir, stop)
                processes.wait_for_all()
                return state
        run.note_stop()
        processes.wait_for_all()
    return state


class Run:
    """A run going on in a folder: its state, and what is written."""

    def __init__(self, setup: Setup, workdir: Path, verbosity: str = "all") -> None:
        """Makes the state, restored where there is a checkpoint.

        Raises:
          UserError: processes don't see the same data or checkpoints; or one can't be read.
        """
        self.began = time.perf_counter()
        self.setup, self.config, total = setup, setup.config, setup.schedule.total_steps
        self.evaluator = Evaluator(setup.config, setup.spmd, setup.train, setup.test)
        self.fetch = Fetcher()
        self.watch = CollapseDetector(**setup.watched)
        self.first, self.stopped = processes.is_primary(), False
        out = None if self.first else open(os.devnull, "w")  # closed with the process
        self.progress = Progress(total, setup.config.batch_size, out, verbosity)
        corrupt: list[str] = []
        with processes.raise_on_all_processes():
            if self.first:
                corrupt = quarantine_corrupt(workdir / "checkpoints", workdir / "corrupt")
        for warning in corrupt:
            self.progress.warn(warning)
        self.checkpoints = Checkpoints(workdir / "checkpoints", setup.config.checkpoint.keep)
        self.device_data = setup.spmd.replicate(setup.train.device_data())
        initial = setup.program.init()
        # The untrained encoder, a baseline at the end, waits on the host.
        layer = setup.config.eval.projector_layer
        self.initial = jax.device_get(evaluated_variables(initial, layer))
        self.start = self.checkpoints.latest_step or 0
        if not self.start:
            initial = load_initial_weights(initial, setup.config)
        self.state = setup.spmd.replicate(initial)
        processes.require_same(
            {"training set": setup.train.fingerprint, "newest checkpoint": str(self.start)}
        )
        if self.start:
            aside = workdir / "corrupt"
            self.start, self.state, corrupt = self.checkpoints.restore_newest(self.state, aside)
            for warning in corrupt:
                self.progress.warn(warning)
            # What the watch knew, it knew from these; its warnings have been given.
            for record in read_metrics(workdir / "metrics.jsonl"):
                if record["step"] <= self.start:
                    self.watch.check(record["step"], record)
            self.progress.note(f"Continuing from step {self.start} of {total}.")
            with processes.raise_on_all_processes():
                if self.first and self.start < total:
                    self.note_changes(note_continuation(workdir, self.start, setup.derived))
        elif (workdir / "metrics.jsonl").exists():
            self.progress.note(
                "The run was broken off before its first checkpoint: it starts anew."
            )
        self.done = self.start
        self.finite = NonfiniteGuard(
            setup.config.max_nonfinite_steps,
            workdir,
            lambda step: setup.index.local_ids(step, np.arange(setup.config.batch_size)),
            self.fetch(self.state.nonfinite)[0] if self.start else 0,
        )
        with processes.raise_on_all_processes():
            self.log = self.open_log(workdir) if self.first else NoLog()
        self.note_start(workdir)

    def note_start(self, workdir: Path) -> None:
        """Says what is run, where anything is left to do."""
        setup = self.setup
        if self.start == setup.schedule.total_steps:
            return
        self.tell(summary.start_rows(setup, self.state.params, workdir, self.start))
        warmup = round(self.config.optim.warmup_epochs * setup.schedule.steps_per_epoch)
        if warmup >= setup.schedule.total_steps:
            self.progress.warn(_SHORT.format(warmup))

    def open_log(self, workdir: Path) -> MetricsLog:
        """The log of the run, continued; one that begins has a picture of the first views."""
        project = self.config.wandb if self.start < self.setup.schedule.total_steps else ""
        others = []
        if project:
            others = [WandbWriter(project, workdir, to_json(self.config), self.progress.warn)]
        log = MetricsLog(workdir, self.start, others)
        if not self.start:
            log.picture(0, "views", self.evaluator.view_grid(self.state))
        return log

    def note_changes(self, changed: list[str]) -> None:
        """Says what is other than where the run began, and what that does."""
        if not changed:
            return
        equal = "and equal to rounding, not bit for bit."
        if any(line.startswith("derived.") for line in changed):
            equal = "but BatchNorm sees another number of them, and the losses will differ."
        self.progress.note(
            f"The run began elsewhere ({'; '.join(changed)}): it goes on with the same images, "
            + equal
        )

    def train(self, stop: processes.Stop) -> TrainState:
        """Steps from where the run stands to its end, or to where it is asked to stop."""
        setup, config, total = self.setup, self.config, self.setup.schedule.total_steps
        knn_every = setup.schedule.every(config.eval.knn_every_epochs)
        save_every = setup.schedule.every(config.checkpoint.every_epochs)
        pending: dict[str, jax.Array] | None = None
        place = setup.spmd.place_batch
        span = (self.start, total, config.data.timeout_s)
        with Prefetcher(setup.train, setup.index, setup.rows, place, *span) as batches:
            run_step = setup.program.step
            for step in range(self.start + 1, total + 1):
                batch = batches.next()
                if step == self.start + 1:
                    run_step = self.compiled(batch)
                self.state, metrics = run_step(self.state, batch, self.device_data)
                if step == self.start + 1:
                    # The first step warms up; rates and ETA are of those that follow.
                    jax.block_until_ready(metrics)
                    self.progress.start(step, batches.wait_seconds)
                if pending is not None:
                    # One step late: the devices are at work on the next step meanwhile.
                    self.report(step - 1, pending, batches.wait_seconds)
                last, self.done = step == total, step
                self.stopped = stop.asked(step) and not last
                pending = metrics if is_due(step, config.log_every) or last else None
                due = (is_due(step, knn_every) or last) and not self.stopped
                saving = is_due(step, save_every) or last or self.stopped
                # Before anything is measured or saved: what isn't finite is neither; and a run that
                # continues from the checkpoint won't do the step.
                if (due or saving) and pending is not None:
                    self.report(step, pending, batches.wait_seconds)
                    pending = None
                elif due or saving:
                    counted = {name: metrics[name] for name in (COUNT, STEP)}
                    self.require_finite(step, self.fetch(counted))
                knn = self.measure(step) if due else None
                if saving:
                    with self.progress.paused():
                        self.checkpoints.save(step, self.state, knn)
                if self.stopped:
                    break
        return self.state

    def compiled(self, batch: Any) -> Any:
        """The train step for such batches, compiled, which is told."""
        self.progress.line("Compiling the step …")
        arguments = (self.state, batch, self.device_data)
        step, rows = summary.compiled(self.setup.program.step, arguments, self.setup.spmd.size)
        self.tell(rows)
        return step

    def tell(self, rows: Iterable[tuple[str, str]]) -> None:
        """Writes rows of a name and a text."""
        for line in summary.lines(rows):
            self.progress.note(line)

    def finish(self, workdir: Path, stop: processes.Stop) -> None:
        """Evaluates the run and writes its report; a run that was done already only reports."""
        total = self.setup.schedule.total_steps
        done = self.start == total and self.evaluator.is_done(workdir)
        if not processes.decided(done):
            if self.config.eval.at_end:
                what = "the frozen encoder and its baselines"
                if not self.evaluator.has_labels:
                    what = "nothing but neighbours and a map, for the images have no labels"
                self.progress.note(f"Evaluating {what}.")
            # Several processes see a SIGTERM at the same row, counted on from the steps.
            asked = (stop.asked(step) for step in itertools.count(total + 1))
            self.evaluator.finish(workdir, self.initial, self.state, lambda: next(asked))
        if not self.first:
            return
        for line in evaluation_table(workdir):
            self.progress.note(line)
        seconds = 0.0 if done else time.perf_counter() - self.began
        self.tell(summary.end_rows(workdir, seconds, self.start))
        bad = self.setup.train.bad
        if bad:
            self.progress.warn(f"{len(bad)} images can't be read and were replaced: {bad[0]} …")
        self.progress.result(f"Report: {write_report(workdir)}")

    def note_stop(self) -> None:
        """Says where the run was stopped and how it goes on."""
        total = self.setup.schedule.total_steps
        unevaluated = "" if self.stopped else ", before it was evaluated"
        self.progress.warn(
            f"Stopped by SIGTERM at step {self.done} of {total}{unevaluated}; "
            "the checkpoint is written, and the same command continues the run."
        )

    def report(self, step: int, pending: Any, waited: float) -> None:
        """Fetches and writes the metrics of a step."""
        scalars = self.require_finite(step, self.fetch(pending)) | self.pace(step, waited)
        self.log.write(step, scalars)
        self.progress.show(step, scalars)
        for warning in self.watch.check(step, scalars):
            self.progress.warn(warning)

    def require_finite(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """Fetched metrics without those that count the steps which were not finite.

        Raises:
          UserError: there were too many.
        """
        for warning in self.finite.check(step, metrics, self.checkpoints.latest_step):
            self.progress.warn(warning)
        return metrics

    def pace(self, step: int, waited: float) -> dict[str, Any]:
        """Rates; among several processes each one's too, so that a slow one is seen."""
        rates: dict[str, Any] = self.progress.rates(step, waited)
        if rates and jax.process_count() > 1:
            seconds = self.config.batch_size / rates["images_per_s"]
            rates |= processes.pace(seconds, rates["data_wait"])
        return rates

    def measure(self, step: int) -> float | None:
        """Writes what is followed on features; returns the kNN accuracy where there are labels."""
        jax.block_until_ready(self.state)
        with self.progress.paused():
            measured = self.evaluator.measure(self.state)
        self.log.write(step, measured)
        for warning in self.watch.check(step, measured):
            self.progress.warn(warning)
        knn = measured.get("knn")
        accuracy = "" if knn is None else f"  kNN {100 * knn:.2f} %"
        for name, what in (("test_accuracy", "top-1"), ("probe_accuracy", "probe")):
            if name in measured:
                accuracy += f"  {what} {100 * measured[name]:.2f} %"
        total = self.setup.schedule.total_steps
        self.progress.note(f"step {step}/{total}{accuracy}  RankMe {measured['rankme']:.1f}")
        return knn

    def close(self, failed: bool = False) -> None:
        """Finishes what is being written, of a run that has failed or not."""
        self.progress.end()
        try:
            self.checkpoints.close()
        except BaseException:
            failed = True
            raise
        finally:
            self.log.close(failed)
