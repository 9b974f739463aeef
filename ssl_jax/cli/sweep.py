"""`ssl-jax sweep`: one run per combination of a grid's values, then their comparison.

Each run is a child process, which is `ssl-jax pretrain`: its memory is free for the next run, and a
crash or a lack of memory ends that run only. This process doesn't use the devices.
"""

import argparse
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from ssl_jax.cli.grid import Setting
from ssl_jax.config import differences, to_json
from ssl_jax.errors import UserError
from ssl_jax.evals.results import LAST_FILE
from ssl_jax.report import write_comparison
from ssl_jax.run.folder import read_config

_MOST = 64  # runs of a comparison
# A run fills these in where its config leaves them open.
_FILLED_IN = (
    "data.num_classes: 0 ->",
    "model.vit.image_size: 0 ->",
    "supervised.projector_hidden: 0 ->",
    # The teacher's networks.
    *("distill.depth:", "distill.width:", "distill.sk:", "distill.stem:", "distill.padding:"),
    *("distill.project_first:", "distill.projector_layer:", "distill.projector_hidden:"),
)


def run(args: argparse.Namespace) -> None:
    """Runs what has not finished, or prints the commands; compares the runs."""
    commands = [_command(args, setting) for setting in args.settings]
    if args.print:
        print("\n".join(shlex.join(["ssl-jax", *command]) for command in commands))
        return
    failed: list[str] = []
    stop: list[int] = []
    for number, (setting, command) in enumerate(zip(args.settings, commands, strict=True), 1):
        workdir, heading = args.workdir / setting.name, f"run {number} of {len(commands)}"
        if is_finished(workdir, setting.config):
            _say(args, f"{heading}, {setting.name}: has finished")
            continue
        _say(args, f"{heading}, {setting.name}")
        code = _wait([sys.executable, "-m", "ssl_jax.cli", *command, *_flags(args)], stop)
        finished = is_finished(workdir, setting.config)
        if stop or code == -signal.SIGTERM or code == 0 and not finished:
            print(f"Stopped at {setting.name}. Rerun the same command to resume.")
            return
        if code:
            failed.append(setting.name)
            print(f"{setting.name} failed with exit code {code}.", flush=True)
    _compare(args)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(commands)} runs failed ({', '.join(failed)}); their errors are "
            "above. Correct the cause, then rerun the same command, which skips the finished runs."
        )


def is_finished(workdir: Path, config: ConfigDict) -> bool:
    """Whether a folder has the finished run of a config.

    Args:
      workdir: of the run.
      config: as it is given to the run, which may fill in keys.
    """
    if not (workdir / LAST_FILE).exists():  # an extended run moves it away until its new end
        return False
    try:
        recorded = to_json(read_config(workdir))
    except UserError:
        return False  # the run itself reports what is wrong
    changed = differences(to_json(config), recorded, ignore=("nothing",))
    return all(line.startswith(_FILLED_IN) for line in changed)


def _command(args: argparse.Namespace, setting: Setting) -> list[str]:
    words = ["pretrain", f"--config={args.config}", f"--workdir={args.workdir / setting.name}"]
    if args.imported:
        words.append(f"--import={args.imported}")
    return words + [f"--config.{override}" for override in setting.overrides]


def _flags(args: argparse.Namespace) -> list[str]:
    return ["--quiet"] * args.quiet + ["--debug"] * args.debug


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(text, flush=True)


def _wait(command: Sequence[str], stop: list[int]) -> int:
    """Runs a command to its end, passing SIGTERM on to it; returns the exit code.

    Args:
      command: the program and its arguments.
      stop: gets the number of the signal.
    """
    with subprocess.Popen(command) as process:

        def pass_on(number: int, frame: object) -> None:
            stop.append(number)
            process.terminate()

        before = signal.signal(signal.SIGTERM, pass_on)
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()  # it has been interrupted, too, and finishes its writes
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def _compare(args: argparse.Namespace) -> None:
    """Writes the comparison of the runs that have started, and prints its path."""
    workdirs = [args.workdir / setting.name for setting in args.settings]
    started = [workdir for workdir in workdirs if (workdir / "config.json").is_file()]
    if len(started) > _MOST:
        print(f"A comparison takes up to {_MOST} runs: pass some of them to `ssl-jax report`.")
    elif len(started) > 1:
        print(f"Comparison: {write_comparison(started, args.workdir / 'comparison.html')}")
