"""The runs and other commands that a benchmark starts."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ssl_jax.evals.results import LAST_FILE

PROGRAM = Path(__file__).parent.parent / "run_pretrain.py"


def pretrain(
    workdir: Path, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> None:
    """Makes a run of `run_pretrain.py`, or resumes it; exits unless it finishes.

    A run that SIGTERM has stopped ends with exit code 0, so the code doesn't tell.

    Args:
      workdir: the run's folder.
      arguments: of the program, without the folder.
      environment: variables to set in addition to this process's.
    """
    execute([sys.executable, str(PROGRAM), f"--workdir={workdir}", *arguments], environment)
    if not (workdir / LAST_FILE).exists():
        sys.exit(f"The run in {workdir} was stopped. Rerun the same command to resume it.")


def execute(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Runs a command to its end; exits if it fails.

    It ends with this process, also if that gets SIGTERM.
    """
    print("$", *command, file=sys.stderr, flush=True)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    process = subprocess.Popen(command, env=os.environ | (environment or {}))
    try:
        code = process.wait()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)  # the command says what it does
    finally:
        process.terminate()
        process.wait()
        signal.signal(signal.SIGTERM, before)
    if code:
        sys.exit(f"The command ended with exit code {code}. See the output above.")
