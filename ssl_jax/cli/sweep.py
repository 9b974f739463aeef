"""`ssl-jax sweep`: one run per combination of a grid's values, then their comparison.

Each run is a child process, which is `ssl-jax pretrain`: its memory is free for the next run, and a
crash or a lack of memory ends that run only. This process doesn't use the devices.
"""

import argparse
import codecs
import contextlib
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from ml_collections import ConfigDict

from ssl_jax.cli.grid import Setting
from ssl_jax.config import differences, to_json
from ssl_jax.errors import UserError
from ssl_jax.evals.results import LAST_FILE
from ssl_jax.files import appending, writing
from ssl_jax.report import write_comparison
from ssl_jax.run.folder import read_config

_MOST = 64  # runs of a comparison
_INTERRUPTED_S = 30.0  # until a run that goes on after Ctrl-C is stopped by SIGTERM
_PRINT_S = 0.5  # between looks for a run's new warnings
# A run fills these in where its config leaves them open.
_FILLED_IN = (
    "data.bits: 0 ->",
    "data.num_classes: 0 ->",
    "model.vit.image_size: 0 ->",
    "supervised.projector_hidden: 0 ->",
    "supervised.sigmoid: False ->",
    # The teacher's networks.
    *("distill.depth:", "distill.width:", "distill.sk:", "distill.stem:", "distill.padding:"),
    *("distill.project_first:", "distill.projector_layer:", "distill.projector_hidden:"),
)


def run(args: argparse.Namespace) -> None:
    """Runs what has not finished, or prints the commands; compares the runs."""
    commands = [_command(args, setting) for setting in args.settings]
    if args.print:
        _print(commands)
        return
    failed: list[str] = []
    error: Exception | None = None
    try:
        if _run_all(args, commands, failed):
            _compare(args)
    except Exception as caught:  # must not hide which runs failed
        error = caught
    except KeyboardInterrupt:
        if failed:
            print(_failures(failed, len(commands)), file=sys.stderr)
        raise
    if error and failed:
        print(f"error: {error}", file=sys.stderr)
    if failed:
        raise UserError(_failures(failed, len(commands))) from error
    if error:
        raise error


def _failures(failed: Sequence[str], count: int) -> str:
    return (
        f"{len(failed)} of {count} runs failed: {'; '.join(failed)}. Correct the cause, then rerun "
        "the same command, which skips the finished runs."
    )


def _print(commands: Sequence[Sequence[str]]) -> None:
    for command in commands:
        if broken := [word for word in command if "\n" in word]:
            raise UserError(f"{broken[0]!r} has a line break, but --print writes a line per run.")
    print("\n".join(shlex.join(["ssl-jax", *command]) for command in commands))


def _run_all(args: argparse.Namespace, commands: list[list[str]], failed: list[str]) -> bool:
    """Runs the settings one after the other; returns False if one was stopped.

    Args:
      args: of the command.
      commands: of the runs, without the program.
      failed: gets name, exit code and log of each run that failed.
    """
    stop: list[int] = []
    for number, (setting, command) in enumerate(zip(args.settings, commands, strict=True), 1):
        workdir, heading = args.workdir / setting.name, f"run {number} of {len(commands)}"
        if is_finished(workdir, setting.config):
            _say(args, f"{heading}, {setting.name}: has finished")
            continue
        _say(args, f"{heading}, {setting.name}")
        log = args.workdir / f"{setting.name}.log"
        program = [sys.executable, "-m", "ssl_jax.cli", *command, *_flags(args)]
        code = _wait(program, stop, log)
        finished = is_finished(workdir, setting.config)
        if stop or code == -signal.SIGTERM or code == 0 and not finished:
            print(f"Stopped at {setting.name}. Rerun the same command to resume.")
            return False
        if code:
            failed.append(f"{setting.name} ({_ending(code)}, see {log})")
            print(f"{setting.name} failed: {_ending(code)}.", flush=True)
    return True


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"killed by {name}" + (", often for lack of memory" if name == "SIGKILL" else "")


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


def _wait(command: Sequence[str], stop: list[int], log: Path) -> int:
    """Runs a command to its end, passing signals on to it; returns the exit code.

    Args:
      command: the program and its arguments.
      stop: gets the number of the signal if SIGTERM was received.
      log: a file for its errors, which are also printed as they come. It is removed if the command
        succeeds.
    """
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        errors = appending(log)
        errors.truncate(0)
    with errors, _printed(log):
        code = _wait_writing(command, stop, errors)
    if not code:
        with contextlib.suppress(OSError):  # the run itself has succeeded
            log.unlink(missing_ok=True)
    return code


@contextlib.contextmanager
def _printed(log: Path) -> Iterator[None]:
    """Prints what is appended to a file to stderr, all of it when the block ends.

    Not a pipe, without whose reader a run would fail.
    """
    ended, decoder = threading.Event(), codecs.getincrementaldecoder("utf-8")("replace")

    def follow() -> None:
        with log.open("rb") as file:
            last = False
            while not last:
                last = ended.wait(_PRINT_S)
                if text := decoder.decode(file.read(), last):
                    print(text, end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _wait_writing(command: Sequence[str], stop: list[int], errors: IO[str]) -> int:
    with subprocess.Popen(command, stderr=errors) as process:

        def pass_on(number: int, frame: object) -> None:
            stop.append(number)
            process.terminate()

        before = signal.signal(signal.SIGTERM, pass_on)
        try:
            return process.wait()
        except KeyboardInterrupt:
            # A terminal has interrupted it, too, and it finishes its writes; kill -INT has not.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_INTERRUPTED_S)
            process.terminate()
            process.wait()
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
