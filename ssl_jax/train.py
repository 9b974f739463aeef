"""The loop of a run, and nothing but the loop."""

import contextlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ssl_jax import cluster
from ssl_jax.checkpoint import Checkpoints
from ssl_jax.config import from_json, is_due, run_schedule, to_json
from ssl_jax.data.index import Index
from ssl_jax.data.pipeline import Prefetcher
from ssl_jax.data.sources import Source, make_sources
from ssl_jax.diagnostics import CollapseWatch
from ssl_jax.errors import UserError
from ssl_jax.evals.run import Evaluator, evaluated_variables, evaluation_table
from ssl_jax.metrics import Fetcher, MetricsLog, NoLog, Progress
from ssl_jax.report import write_report
from ssl_jax.spmd import make_spmd
from ssl_jax.step import Program, TrainState
from ssl_jax.workdir import lock_text, locked, note_continuation, write_config

_SHORT = (
    "\nwarning: the warmup of {} steps (config.optim.warmup_epochs) is not shorter than the run: "
    "the learning rate never reaches its peak."
)


def pretrain(config: ConfigDict, workdir: str | Path, command: str = "") -> TrainState:
    """Pretrains an encoder, or continues the run in `workdir`; evaluates it and writes the report.

    SIGTERM stops it after a checkpoint. Several processes that `jax.distributed.initialize` has
    joined, each of which calls this, are one run; the first writes and speaks.

    Args:
      config: validated, of the whole run.
      workdir: the run's folder; made if it doesn't exist.
      command: recorded there, for "how to reproduce".

    Returns:
      The final state, or that at which the run was stopped.

    Raises:
      UserError: bad input, in one sentence, on all processes; nothing is overwritten.
    """
    workdir = Path(workdir)
    with contextlib.ExitStack() as folder, cluster.Stop() as stop:
        # Whatever is wrong with the config shows here, before the folder is touched.
        with cluster.agreed():
            setup = Setup(config)
        with cluster.agreed():
            if cluster.is_first():
                folder.enter_context(locked(workdir))
                write_config(workdir, setup.config, command, setup.train.fingerprint, setup.derived)
        same = {"workdir": lock_text(workdir), "config": json.dumps(to_json(config))}
        cluster.require_same(same)
        run = Run(setup, workdir)
        try:
            state = run.train(stop)
        except BaseException:
            # Several finish together what is being written, which one that was lost can't.
            if jax.process_count() == 1:
                run.close()
            raise
        run.close()
        with contextlib.suppress(cluster.StoppedError), stop.at_once():
            if not run.stopped:
                run.finish(workdir, stop)
                cluster.wait_for_all()
                return state
        run.note_stop()
        cluster.wait_for_all()
    return state


class Setup:
    """What a config comes to on these devices and this data; nothing is written yet."""

    def __init__(self, config: ConfigDict) -> None:
        """Builds the step.

        Raises:
          UserError: anything in the config that can't be run.
        """
        self.spmd = make_spmd(
            config.spmd, batch_size=config.batch_size, microbatch=config.microbatch
        )
        self.train, self.test = make_sources(config)
        self.config = config = resolve(config, self.train)
        self.schedule = run_schedule(config, self.train.num_examples)
        self.index = Index(self.train.num_examples, config.batch_size, config.seed)
        self.rows = self.spmd.local_rows(config.batch_size)
        self.program = Program(config, self.schedule, self.spmd)
        self.method = self.program.method
        self.derived = {"batchnorm_images": self.program.batchnorm_images}


def resolve(config: ConfigDict, train: Source) -> ConfigDict:
    """A copy of the config with what only the data can tell.

    Raises:
      UserError: labels beyond `config.data.num_classes`.
    """
    config = from_json(to_json(config))
    if config.data.num_classes == 0:
        config.data.num_classes = train.num_classes
    elif train.num_classes > config.data.num_classes:
        raise UserError(
            f"config.data.num_classes is {config.data.num_classes}, but the training images have "
            f"labels up to {train.num_classes - 1}: set it to {train.num_classes}, or to 0."
        )
    return config


def _among() -> str:
    """Says how many processes there are, where there are several."""
    count = jax.process_count()
    return f" of {count} processes" if count > 1 else ""


class Run:
    """A run going on in a folder: its state, and what is written."""

    def __init__(self, setup: Setup, workdir: Path) -> None:
        """Makes the state, restored where there is a checkpoint.

        Raises:
          UserError: processes don't see the same data or checkpoints; or one can't be read.
        """
        self.setup, self.config, total = setup, setup.config, setup.schedule.total_steps
        self.evaluator = Evaluator(setup.config, setup.spmd, setup.train, setup.test)
        self.fetch = Fetcher()
        # A loss that starts at that of constant outputs leaves it once the rate has risen.
        patience = setup.schedule.every(max(1.0, setup.config.optim.warmup_epochs))
        self.watch = CollapseWatch(
            setup.method.trivial_loss, max(patience, setup.config.optim.frozen_steps)
        )
        self.first, self.stopped = cluster.is_first(), False
        out = None if self.first else open(os.devnull, "w")  # closed with the process
        self.progress = Progress(total, setup.config.batch_size, out)
        self.checkpoints = Checkpoints(workdir / "checkpoints", setup.config.checkpoint.keep)
        self.resident = setup.spmd.replicate(setup.train.resident())
        initial = setup.program.init()
        self.state = setup.spmd.replicate(initial)
        # The untrained encoder, a baseline at the end, waits on the host.
        layer = setup.config.eval.projector_layer
        self.initial = jax.device_get(evaluated_variables(initial, layer))
        self.start = self.done = self.checkpoints.latest_step or 0
        cluster.require_same(
            {"training set": setup.train.fingerprint, "newest checkpoint": str(self.start)}
        )
        if self.start:
            self.state = self.checkpoints.restore(self.start, self.state)
            self.progress.note(f"Continuing from step {self.start} of {total}.")
            if self.first and self.start < total:
                self.note_changes(note_continuation(workdir, self.start, setup.derived))
        elif (workdir / "metrics.jsonl").exists():
            self.progress.note(
                "The run was broken off before its first checkpoint: it starts anew."
            )
        self.log = MetricsLog(workdir, self.start) if self.first else NoLog()
        if self.start < total:
            self.progress.note(self.summary())

    def summary(self) -> str:
        """What is run, in a line."""
        setup, config = self.setup, self.config
        encoder = jax.tree.leaves(self.state.params["encoder"])
        device = jax.devices()[0]
        warmup = round(config.optim.warmup_epochs * setup.schedule.steps_per_epoch)
        short = warmup >= setup.schedule.total_steps
        return (
            f"{config.method}, ResNet-{config.model.depth} ×{config.model.width:g} "
            f"({sum(leaf.size for leaf in encoder) / 1e6:.3g} M parameters), "
            f"{setup.train.num_examples:,} images, batch {config.batch_size} on "
            f"{setup.spmd.size} × {device.device_kind}{self.cut()}{_among()}, BatchNorm over "
            f"{setup.derived['batchnorm_images']} images, "
            f"{setup.schedule.total_steps:,} steps; the first step compiles."
            + (_SHORT.format(warmup) if short else "")
        )

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

    def cut(self) -> str:
        """Says that the batch is encoded in parts, where it is."""
        part = self.config.microbatch
        return f" in microbatches of {part}" if 0 < part < self.config.batch_size else ""

    def train(self, stop: cluster.Stop) -> TrainState:
        """Steps from where the run stands to its end, or to where it is asked to stop."""
        setup, config, total = self.setup, self.config, self.setup.schedule.total_steps
        knn_every = setup.schedule.every(config.eval.knn_every_epochs)
        save_every = setup.schedule.every(config.checkpoint.every_epochs)
        pending: dict[str, jax.Array] | None = None
        place = setup.spmd.place_batch
        with Prefetcher(setup.train, setup.index, setup.rows, place, self.start, total) as batches:
            for step in range(self.start + 1, total + 1):
                self.state, metrics = setup.program.step(self.state, batches.next(), self.resident)
                if step == self.start + 1:
                    # The first step compiles; rates and ETA are of those that follow.
                    jax.block_until_ready(metrics)
                    self.progress.start(step, batches.wait_seconds)
                if pending is not None:
                    # One step late: the devices are at work on the next step meanwhile.
                    self.report(step - 1, pending, batches.wait_seconds)
                last, self.done = step == total, step
                self.stopped = stop.asked(step) and not last
                pending = metrics if is_due(step, config.log_every) or last else None
                due = is_due(step, knn_every) and not self.stopped
                knn = self.measure(step) if due or last else None
                if is_due(step, save_every) or last or self.stopped:
                    if pending is not None:
                        # Before the checkpoint: a run that continues from it won't do the step.
                        self.report(step, pending, batches.wait_seconds)
                        pending = None
                    with self.progress.paused():
                        self.checkpoints.save(step, self.state, knn)
                if self.stopped:
                    break
        return self.state

    def finish(self, workdir: Path, stop: cluster.Stop) -> None:
        """Evaluates the run and writes its report; a run that was done already only reports."""
        total = self.setup.schedule.total_steps
        done = self.start == total and (workdir / "evaluation.json").exists()
        if not cluster.decided(done):
            self.progress.note("Evaluating the frozen encoder and its baselines.")
            # Several processes see a SIGTERM at the same row, counted on from the steps.
            asked = (stop.asked(step) for step in itertools.count(total + 1))
            self.evaluator.finish(workdir, self.initial, self.state, lambda: next(asked))
        if not self.first:
            return
        for line in evaluation_table(workdir):
            self.progress.note(line)
        bad = self.setup.train.bad
        if bad:
            self.progress.note(f"{len(bad)} images can't be read and were replaced: {bad[0]} …")
        self.progress.note(f"Report: {write_report(workdir)}")

    def note_stop(self) -> None:
        """Says where the run was stopped and how it goes on."""
        total = self.setup.schedule.total_steps
        unevaluated = "" if self.stopped else ", before it was evaluated"
        self.progress.note(
            f"Stopped by SIGTERM at step {self.done} of {total}{unevaluated}; "
            "the checkpoint is written, and the same command continues the run."
        )

    def report(self, step: int, pending: Any, waited: float) -> None:
        """Fetches and writes the metrics of a step."""
        scalars = self.fetch(pending) | self.pace(step, waited)
        self.log.write(step, scalars)
        self.progress.show(step, scalars)
        for warning in self.watch.check(step, scalars):
            self.progress.note(warning)

    def pace(self, step: int, waited: float) -> dict[str, Any]:
        """Rates; among several processes each one's too, so that a slow one is seen."""
        rates: dict[str, Any] = self.progress.rates(step, waited)
        if rates and jax.process_count() > 1:
            seconds = self.config.batch_size / rates["images_per_s"]
            rates |= cluster.pace(seconds, rates["data_wait"])
        return rates

    def measure(self, step: int) -> float | None:
        """Writes what is followed on features; returns the kNN accuracy where there are labels."""
        jax.block_until_ready(self.state)
        with self.progress.paused():
            measured = self.evaluator.measure(self.state)
        self.log.write(step, measured)
        for warning in self.watch.check(step, measured):
            self.progress.note(warning)
        knn = measured.get("knn")
        accuracy = "" if knn is None else f"  kNN {100 * knn:.2f} %"
        total = self.setup.schedule.total_steps
        self.progress.note(f"step {step}/{total}{accuracy}  RankMe {measured['rankme']:.1f}")
        return knn

    def close(self) -> None:
        """Finishes what is being written."""
        self.checkpoints.close()
        self.log.close()
