"""The loop of a run, and nothing but the loop."""

from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ssl_jax.checkpoint import Checkpoints
from ssl_jax.config import from_json, is_due, run_schedule, to_json
from ssl_jax.data.index import Index
from ssl_jax.data.pipeline import Prefetcher, make_prepare
from ssl_jax.data.sources import Source, make_sources
from ssl_jax.diagnostics import CollapseWatch
from ssl_jax.errors import UserError
from ssl_jax.evals.run import Evaluator, evaluated_variables, evaluation_table
from ssl_jax.metrics import Fetcher, MetricsLog, Progress
from ssl_jax.report import write_report
from ssl_jax.spmd import AXIS, device_groups, make_spmd
from ssl_jax.step import (
    TrainState,
    assemble,
    batchnorm_images,
    init_state,
    make_train_step,
)
from ssl_jax.workdir import locked, note_continuation, write_config

_SHORT = (
    "\nwarning: the warmup of {} steps (config.optim.warmup_epochs) is not shorter than the run: "
    "the learning rate never reaches its peak."
)


def pretrain(config: ConfigDict, workdir: str | Path, command: str = "") -> TrainState:
    """Pretrains an encoder, or continues the run in `workdir`; evaluates it and writes the report.

    Args:
      config: validated, of the whole run.
      workdir: the run's folder; made if it doesn't exist.
      command: recorded there, for "how to reproduce".

    Returns:
      The final state.

    Raises:
      UserError: bad input, in one sentence; nothing is overwritten.
    """
    workdir = Path(workdir)
    # Whatever is wrong with the config shows here, before the folder is touched.
    plan = Plan(config)
    with locked(workdir):
        write_config(workdir, plan.config, command, plan.train.fingerprint, plan.derived)
        run = Run(plan, workdir)
        try:
            state = run.train()
        finally:
            run.close()
        run.finish(workdir)
    return state


class Plan:
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
        groups = device_groups(self.spmd.size, config.model.bn_group)
        self.derived = {"batchnorm_images": batchnorm_images(config, self.spmd.size)}
        if self.derived["batchnorm_images"] < 2:
            raise UserError(
                "BatchNorm would see one image at a time: make config.batch_size, "
                "config.microbatch or config.model.bn_group larger."
            )
        self.method, self.optimizer, learning_rate = assemble(config, self.schedule, AXIS, groups)
        self.train_step = self.spmd.map(
            make_train_step(self.method, self.optimizer, make_prepare(config), learning_rate),
            inputs=("replicated", "sharded", "replicated"),
            outputs=("replicated", "replicated"),
            donate=(0,),
        )


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


class Run:
    """A plan going on in a folder: its state, and what is written."""

    def __init__(self, plan: Plan, workdir: Path) -> None:
        """Makes the state, restored where there is a checkpoint."""
        self.plan, self.config, total = plan, plan.config, plan.schedule.total_steps
        self.evaluator = Evaluator(plan.config, plan.spmd, plan.train, plan.test)
        self.fetch = Fetcher()
        # A loss that starts at that of constant outputs leaves it once the rate has risen.
        patience = plan.schedule.every(max(1.0, plan.config.optim.warmup_epochs))
        self.watch = CollapseWatch(
            plan.method.trivial_loss, max(patience, plan.config.optim.frozen_steps)
        )
        self.progress = Progress(total, plan.config.batch_size)
        self.checkpoints = Checkpoints(workdir / "checkpoints", plan.config.checkpoint.keep)
        self.resident = plan.spmd.replicate(plan.train.resident())
        initial = init_state(plan.method, plan.optimizer, plan.config)
        self.state = plan.spmd.replicate(initial)
        # The untrained encoder, a baseline at the end, waits on the host.
        layer = plan.config.eval.projector_layer
        self.initial = jax.device_get(evaluated_variables(initial, layer))
        self.start = self.checkpoints.latest_step or 0
        if self.start:
            self.state = self.checkpoints.restore(self.start, self.state)
            self.progress.note(f"Continuing from step {self.start} of {total}.")
            if self.start < total:
                self.note_changes(note_continuation(workdir, self.start, plan.derived))
        elif (workdir / "metrics.jsonl").exists():
            self.progress.note(
                "The run was broken off before its first checkpoint: it starts anew."
            )
        self.log = MetricsLog(workdir, self.start)
        if self.start < total:
            self.progress.note(self.summary())

    def summary(self) -> str:
        """What is run, in a line."""
        plan, config = self.plan, self.config
        encoder = jax.tree.leaves(self.state.params["encoder"])
        device = jax.devices()[0]
        warmup = round(config.optim.warmup_epochs * plan.schedule.steps_per_epoch)
        short = warmup >= plan.schedule.total_steps
        return (
            f"{config.method}, ResNet-{config.model.depth} ×{config.model.width:g} "
            f"({sum(leaf.size for leaf in encoder) / 1e6:.3g} M parameters), "
            f"{plan.train.num_examples:,} images, batch {config.batch_size} on {plan.spmd.size} × "
            f"{device.device_kind}{self.cut()}, BatchNorm over "
            f"{plan.derived['batchnorm_images']} images, "
            f"{plan.schedule.total_steps:,} steps; the first step compiles."
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

    def train(self) -> TrainState:
        """Steps from where the run stands to its end."""
        plan, config, total = self.plan, self.config, self.plan.schedule.total_steps
        knn_every = plan.schedule.every(config.eval.knn_every_epochs)
        save_every = plan.schedule.every(config.checkpoint.every_epochs)
        pending: dict[str, jax.Array] | None = None
        place = plan.spmd.place_batch
        with Prefetcher(plan.train, plan.index, place, self.start, total) as batches:
            for step in range(self.start + 1, total + 1):
                self.state, metrics = plan.train_step(self.state, batches.next(), self.resident)
                if step == self.start + 1:
                    # The first step compiles; rates and ETA are of those that follow.
                    jax.block_until_ready(metrics)
                    self.progress.start(step, batches.wait_seconds)
                if pending is not None:
                    # One step late: the devices are at work on the next step meanwhile.
                    self.report(step - 1, pending, batches.wait_seconds)
                last = step == total
                pending = metrics if is_due(step, config.log_every) or last else None
                knn = self.measure(step) if is_due(step, knn_every) or last else None
                if is_due(step, save_every) or last:
                    if pending is not None:
                        # Before the checkpoint: a run that continues from it won't do the step.
                        self.report(step, pending, batches.wait_seconds)
                        pending = None
                    with self.progress.paused():
                        self.checkpoints.save(step, self.state, knn)
        return self.state

    def finish(self, workdir: Path) -> None:
        """Evaluates the run and writes its report; a run that was done already only reports."""
        done = self.start == self.plan.schedule.total_steps
        if not (done and (workdir / "evaluation.json").exists()):
            self.progress.note("Evaluating the frozen encoder and its baselines.")
            self.evaluator.finish(workdir, self.initial, self.state)
        for line in evaluation_table(workdir):
            self.progress.note(line)
        bad = self.plan.train.bad
        if bad:
            self.progress.note(f"{len(bad)} images can't be read and were replaced: {bad[0]} …")
        self.progress.note(f"Report: {write_report(workdir)}")

    def report(self, step: int, pending: Any, waited: float) -> None:
        """Fetches and writes the metrics of a step."""
        scalars = self.fetch(pending) | self.progress.rates(step, waited)
        self.log.write(step, scalars)
        self.progress.show(step, scalars)
        for warning in self.watch.check(step, scalars):
            self.progress.note(warning)

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
        total = self.plan.schedule.total_steps
        self.progress.note(f"step {step}/{total}{accuracy}  RankMe {measured['rankme']:.1f}")
        return knn

    def close(self) -> None:
        """Finishes what is being written."""
        self.checkpoints.close()
        self.log.close()
