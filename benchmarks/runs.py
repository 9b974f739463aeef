"""The runs and other commands that a benchmark starts."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ssl_jax.evals.results import LAST_FILE

INTERRUPTED_S = 30.0  # until a command that goes on after Ctrl-C is stopped by SIGTERM
PROGRAM = Path(__file__).parent.parent / "run_pretrain.py"


def pretrain(
    workdir: Path, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> None:
    """Makes a run of `run_pretrain.py`, or resumes it; exits unless it finishes.

    The exit code isn't enough: that of a run which SIGTERM has stopped is 0.

    Args:
      workdir: the run's folder.
      arguments: the program's, without the folder.
      environment: variables to set in addition to this process's.
    """
    execute([sys.executable, str(PROGRAM), f"--workdir={workdir}", *arguments], environment)
    if not (workdir / LAST_FILE).exists():
        sys.exit(f"The run in {workdir} was stopped. Rerun the same command to resume it.")


def execute(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Runs a command to its end; exits if it fails.

    If this process is interrupted or gets SIGTERM, the command ends first.
    """
    print("$", *command, file=sys.stderr, flush=True)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    process = subprocess.Popen(command, env=os.environ | (environment or {}))
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # A terminal has interrupted the command, too, which finishes its writes.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(INTERRUPTED_S)
        sys.exit(128 + signal.SIGINT)
    finally:
        process.terminate()
        process.wait()
        signal.signal(signal.SIGTERM, before)
    if code:
        sys.exit(f"The command ended with exit code {code}. See the output above.")
