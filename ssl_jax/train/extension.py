"""Extending a run: training it for longer than planned, `pretrain(..., extend=True)`.

The state and the data order continue as if nothing had happened. Everything that depends on the
run's length, the learning rate, a weight decay with an end and a method's EMA decay, follows from
there on the schedule of a run of the new length. So only the length has to be recorded, and the
extended run is resumed as any other, by the same call or by one without `extend`. All other keys
that affect training must be those of the run.
"""

import dataclasses
from pathlib import Path

from ssl_jax.config import run_schedule
from ssl_jax.errors import UserError
from ssl_jax.evals.results import set_aside_results
from ssl_jax.optim import learning_rate_schedule
from ssl_jax.run.folder import read_config, read_record
from ssl_jax.run.log import Progress
from ssl_jax.train.setup import Setup


def require_longer(setup: Setup, workdir: Path) -> None:
    """Checks that a run can be extended, once its other keys have been compared.

    The run may have been extended to this length before: then it is resumed.

    Args:
      setup: of the extended run.
      workdir: of the run, which has been started.

    Raises:
      UserError: it is as long, or longer.
    """
    before, now = _recorded_steps(setup, workdir), setup.schedule.total_steps
    again = any("extended_from" in each for each in read_record(workdir).get("resumed", []))
    if now > before or now == before and again and not _length_differs(setup, workdir):
        return
    config = setup.config
    length = f"config.steps={config.steps}" if config.steps else f"config.epochs={config.epochs:g}"
    key = length.partition("=")[0]
    raise UserError(
        f"{length} makes {now:,} steps, but the run in {workdir} is {before:,} steps long. Set a "
        f"larger --{key}, or remove --extend to resume the run with its own config."
    )


def begin(setup: Setup, workdir: Path, start: int, progress: Progress) -> int:
    """Prints what changes if the run is longer than recorded, and moves results of its end away.

    Args:
      setup: of the run.
      workdir: of the run.
      start: the step of the restored checkpoint.
      progress: prints.

    Returns:
      The recorded length in steps, to be recorded as `extended_from`; 0 if it hasn't changed.
    """
    if not _length_differs(setup, workdir):
        return 0
    before = _recorded_steps(setup, workdir)
    if set_aside_results(workdir, before):
        progress.note(f"The report and results of step {before:,} are in earlier/{before}.")
    note, warnings = schedule_change(setup, before, start)
    progress.note(note)
    progress.warn(*warnings)
    return before


def schedule_change(setup: Setup, before: int, start: int) -> tuple[str, list[str]]:
    """Describes how the learning rate changes where a run is extended.

    Args:
      setup: of the extended run.
      before: the run's length until now, in steps.
      start: steps done.

    Returns:
      A note, and a warning if a cosine schedule had already reached its end.
    """
    config, schedule, total = setup.config, setup.schedule, setup.schedule.total_steps
    shorter = dataclasses.replace(schedule, total_steps=before)
    old, new = (
        float(learning_rate_schedule(config.optim, config.batch_size, length)(step))
        for length, step in ((shorter, start - 1), (schedule, start))
    )
    note = (
        f"Extending the run from {before:,} to {total:,} steps. From step {start + 1:,} on, "
        f"schedules are those of a run of {total:,} steps: the learning rate goes from {old:.3g} "
        f"to {new:.3g}."
    )
    if config.optim.schedule != "cosine" or start < before or new <= old:
        return note, []
    return note, [
        f"warning: The cosine schedule had reached its end, and the learning rate rises again from "
        f"{old:.3g} to {new:.3g}. Expect the loss to rise at first, and a result that differs from "
        f"that of a run planned for {total:,} steps."
    ]


def _length_differs(setup: Setup, workdir: Path) -> bool:
    recorded = read_config(workdir)
    return any(recorded[key] != setup.config[key] for key in ("epochs", "steps"))


def _recorded_steps(setup: Setup, workdir: Path) -> int:
    return run_schedule(read_config(workdir), setup.train.num_examples).total_steps
