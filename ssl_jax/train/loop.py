"""The training loop: set up, restore, train, evaluate, report."""

import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ssl_jax.config import is_due, to_json
from ssl_jax.data.pipeline import Prefetcher
from ssl_jax.data.registry import Images
from ssl_jax.data.sources import Source, given_data
from ssl_jax.errors import UserError
from ssl_jax.evals.results import has_results
from ssl_jax.files import local_path
from ssl_jax.interop.initial_weights import source_fingerprints
from ssl_jax.memory import enough_memory, step_suggestions
from ssl_jax.report import evaluation_table, images_settings, write_images, write_report
from ssl_jax.run import processes
from ssl_jax.run.folder import (
    has_checkpoint,
    lock_text,
    locked,
    started_config,
    started_weights,
    write_config,
)
from ssl_jax.run.log import Progress
from ssl_jax.run.nonfinite import COUNT, STEP
from ssl_jax.step import TrainState
from ssl_jax.train import summary
from ssl_jax.train.extension import require_longer
from ssl_jax.train.result import PretrainResult
from ssl_jax.train.setup import Setup
from ssl_jax.train.start import Run, start_run

_PLAN = "; `ssl-jax plan` reports a step's memory, and the largest microbatch, without the hardware"
_STOPPED = (
    "Stopped by SIGTERM at step {} of {}{}. The checkpoint is saved; rerun the same command to "
    "resume."
)
_NOT_EVALUATED = (
    "warning: The run is trained and its checkpoint saved, but its evaluation failed. `ssl-jax "
    "report` and `ssl-jax knn` work on it; rerun the same command to evaluate it again."
)


def pretrain(
    config: ConfigDict,
    workdir: str | Path,
    command: str = "",
    *,
    extend: bool = False,
    train: Source | Images | None = None,
    test: Source | Images | None = None,
    verbosity: str = "all",
) -> PretrainResult:
    """Pretrains an encoder, or resumes the run in `workdir`; evaluates it and writes the report.

    SIGTERM stops the run after a checkpoint. Joined processes (`jax.distributed.initialize`) all
    call this and form one run, whose primary process writes and prints.

    Args:
      config: of the whole run, validated.
      workdir: the run's folder; created if it doesn't exist.
      command: recorded in the workdir, for the report's "how to reproduce".
      extend: train the run in `workdir` on to the end of `config`; see `ssl_jax.train.extension`.
      train: the training images, an object of your own (`ssl_jax.data.registry.Images`); None:
        `config.data` names them. A run that is resumed needs it again.
      test: the held-out images to `train`, if any.
      verbosity: how much to print; see `Progress`.

    Returns:
      The run, finished or stopped: its encoder, its metrics and its state.

    Raises:
      UserError: bad input; raised on all processes, and nothing is overwritten.
    """
    workdir = local_path(workdir)
    out = None if processes.is_primary() else open(os.devnull, "w")  # closed with the process
    progress = Progress(out, verbosity)
    with contextlib.ExitStack() as stack:
        stack.callback(progress.end)
        progress.starting("Opening the data …")
        with processes.raise_on_all_processes():
            started = started_config(workdir, extend)
            config = given_data(config, train, test)
            setup = Setup(config, started, train, test)
        check_folder, begun = _claim_folder(setup, config, workdir, command, stack, extend)
        with enough_memory("The step", step_suggestions(config, setup.spmd.size), _PLAN):
            run, state = start_run(setup, workdir, progress, check_folder)
            begun.set()
            # Until here SIGTERM ends the process at once: no step would be lost.
            stop = stack.enter_context(processes.Stop())
            with run.closing():
                state, step = run_steps(run, state, stop)
        # The state is saved, so from here on SIGTERM stops the evaluation at once.
        total, when = setup.schedule.total_steps, ""
        if step == total:
            with contextlib.suppress(processes.StoppedError), stop.at_once():
                finish(run, state, stop)
                processes.wait_for_all()
                return PretrainResult(workdir, step, True, state)
            when = ", before it was evaluated"
        progress.warn(_STOPPED.format(step, total, when))
        processes.wait_for_all()
    return PretrainResult(workdir, step, False, state)


def _claim_folder(
    setup: Setup,
    config: ConfigDict,
    workdir: Path,
    command: str,
    stack: contextlib.ExitStack,
    extend: bool,
) -> tuple[Callable[[], None], threading.Event]:
    """Locks the run's folder until the stack closes, and writes its config or compares it.

    Also compares the folder and `config`, as it was given, between processes. Errors of the config
    have surfaced before, in `Setup`.

    Returns:
      A check that the folder is still in place, see `locked`; and what to set once the run has
      begun: until then, an error withdraws the config of a new run.
    """
    begun = threading.Event()
    check_folder: Callable[[], None] = lambda: None  # noqa: E731
    with processes.raise_on_all_processes():
        if processes.is_primary():
            check_folder = stack.enter_context(locked(workdir))
            if not (workdir / "config.json").exists():
                stack.push(_withdrawing(workdir, check_folder, begun))
            data = (setup.train.fingerprint, setup.test.fingerprint if setup.test else "")
            weights = source_fingerprints(setup.config, started_weights(workdir))
            more: Any = {"weights": weights, "evaluated": has_results(workdir), "extend": extend}
            write_config(workdir, setup.config, command, *data, setup.derived, **more)
            if extend:
                require_longer(setup, workdir)
    same = to_json(config)
    same["data"] |= {"dir": "", "test_dir": ""}  # compared by the images' fingerprints
    processes.require_same({"workdir": lock_text(workdir), "config": json.dumps(same)})
    return check_folder, begun


def _withdrawing(
    workdir: Path, check_folder: Callable[[], None], begun: threading.Event
) -> Callable[..., None]:
    """An exit of a new run that removes its config if the run was refused before it had begun.

    Its folder then takes the corrected config.
    """

    def withdraw(kind: type[BaseException] | None, *_: Any) -> None:
        refused = kind is not None and issubclass(kind, UserError)
        if refused and not begun.is_set() and not has_checkpoint(workdir):
            with contextlib.suppress(UserError, OSError):
                check_folder()
                (workdir / "config.json").unlink()

    return withdraw


def run_steps(run: Run, state: TrainState, stop: processes.Stop) -> tuple[TrainState, int]:
    """Trains from the run's first step to its last, or until a stop is requested.

    Returns:
      The state, saved in a checkpoint, and the number of steps done.
    """
    setup, config, total = run.setup, run.setup.config, run.setup.schedule.total_steps
    evaluate_every = setup.schedule.every(config.eval.knn_every_epochs)
    save_every = setup.schedule.every(config.checkpoint.every_epochs)
    step, first, place = run.start, run.start + 1, setup.place_batch
    metrics: dict[str, jax.Array] = {}
    unlogged: dict[str, jax.Array] | None = None
    if run.owes_evaluation(evaluate_every):
        evaluate(run, state, run.start)
    # The cadence, after each step:
    # 1. Log the previous step, one step late. Fetching metrics waits for their step; meanwhile the
    #    devices are busy with the step just dispatched.
    # 2. Check for a stop request. All processes check at every step, so they stop at the same one.
    # 3. Before an evaluation or a checkpoint, log this step right away, or at least check it: a
    #    state that isn't finite must not be measured or saved, and a resumed run doesn't repeat
    #    the step.
    # 4. Evaluate, then save: the best checkpoint is chosen by kNN accuracy. If a stop is requested,
    #    only save, because little time may be left.
    # 5. Stop. The last step is always logged, evaluated and saved.
    span = (run.start, total, config.data.timeout_s)
    with Prefetcher(setup.train, setup.index, setup.rows, place, *span) as batches:
        for step in range(first, total + 1):
            batch = batches.next()
            if step == first:
                train_step = _compiled(run, state, batch)
            before, (state, metrics) = metrics, train_step(state, batch, run.device_data)
            # At most two steps are in flight: each keeps its batch in memory.
            jax.block_until_ready(before)
            if step == first:  # warmup, which rates exclude
                jax.block_until_ready(metrics)
                run.progress.start(step, batches.wait_seconds)
            if unlogged is not None:
                run.log_step(step - 1, unlogged, batches.wait_seconds)
                unlogged = None
            last = step == total
            stopping = stop.asked(step) and not last
            logging = is_due(step, config.log_every) or last
            evaluating = (is_due(step, evaluate_every) or last) and not stopping
            saving = is_due(step, save_every) or last or stopping
            if logging and (evaluating or saving):
                run.log_step(step, metrics, batches.wait_seconds)
            elif logging:
                unlogged = metrics
            elif evaluating or saving:
                run.check_finite(step, {name: metrics[name] for name in (COUNT, STEP)})
            evaluate_and_save(run, state, step, evaluating, saving)
            if stopping:
                break
    return state, step


def evaluate_and_save(
    run: Run, state: TrainState, step: int, evaluating: bool, saving: bool
) -> None:
    """Evaluates and saves a step, as due; if the evaluation fails, the step is saved all the same.

    The next start evaluates it again.
    """

    def save(knn: float | None) -> None:
        with run.progress.paused():
            run.require_in_place()
            run.checkpoints.save(step, state, knn)

    try:
        knn = evaluate(run, state, step) if evaluating else None
    except BaseException as error:
        if processes.is_shared(error):
            with contextlib.suppress(UserError, OSError):  # the first error is reported
                save(None)
        raise
    if saving:
        save(knn)


def evaluate(run: Run, state: TrainState, step: int) -> float | None:
    """Measures and logs the frozen encoder's features; returns the kNN accuracy, if any."""
    jax.block_until_ready(state)  # otherwise the pause would include pending steps
    with run.progress.paused():
        run.progress.update(f"Evaluating at step {step:,} …")
        measured = run.evaluator.measure(state)
    run.log_evaluation(step, measured)
    return measured.get("knn")


def _compiled(run: Run, state: TrainState, batch: Any) -> Any:
    """Compiles the train step and prints its cost."""
    run.progress.line("Compiling the step …")
    arguments = (state, batch, run.device_data)
    step, rows = summary.compiled(run.setup.program.step, arguments, run.setup.spmd.size)
    run.progress.note(*summary.lines(rows))
    return step


def finish(run: Run, state: TrainState, stop: processes.Stop) -> None:
    """Evaluates the run, unless it has been with the same settings, and writes its report.

    Raises:
      StoppedError: a stop was requested, in a run of several processes.
    """
    total = run.setup.schedule.total_steps
    done = run.start == total and run.evaluator.is_done(run.workdir, images_settings(run.workdir))
    if not processes.decided(done):
        if plan := run.evaluator.plan():
            run.progress.note(plan)
        # Rows are numbered after the last step, so that all processes stop before the same row.
        asked = (stop.asked(step) for step in itertools.count(total + 1))
        try:
            images = run.evaluator.finish(run.workdir, run.untrained, state, lambda: next(asked))
            if images:
                run.progress.line("Writing the report …")
                write_images(run.workdir, images, total)
        except Exception:
            run.progress.warn(_NOT_EVALUATED)
            raise
    if not processes.is_primary():
        return
    seconds = 0.0 if done else time.perf_counter() - run.began
    rows = summary.end_rows(run.workdir, seconds, run.start)
    run.progress.note(*evaluation_table(run.workdir), *summary.lines(rows))
    if bad := run.setup.train.bad:
        run.progress.warn(f"warning: {len(bad)} unreadable images were replaced: {bad[0]} …")
    run.progress.result(f"Report: {write_report(run.workdir)}")
