"""Error messages of the command line: one line on stderr, with the traceback kept or on request."""

import argparse
import contextlib
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from ssl_jax.errors import UserError
from ssl_jax.files import appending

_MAX_MESSAGE = 300  # characters of an unexpected error's message


def exit_code(command: Callable[[], int], argv: Sequence[str]) -> int:
    """Runs a command; prints whatever goes wrong on one line.

    Args:
      command: The command, which returns an exit code.
      argv: The command line, for --debug and --workdir: it may not have been parsed.

    Returns:
      The command's code, or 1 after an unexpected error, 2 after bad input, 130 after Ctrl-C.
    """
    debug = "--debug" in argv
    try:
        return command()
    except UserError as error:
        if debug:
            traceback.print_exc()
        if error.printed_here:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("\n" + "; ".join(["Interrupted", *map(str, error.args)]) + ".", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Otherwise Python reports the closed pipe again when it flushes stdout on exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("error: The reader of the output has closed the pipe.", file=sys.stderr)
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(_unexpected(error, _workdir_in(argv)), file=sys.stderr)
        return 1


def failure_printer(args: argparse.Namespace) -> Callable[[str], None]:
    """Returns a function that prints why one of several processes exits."""
    debug, workdir = args.debug, getattr(args, "workdir", None)

    def print_failure(text: str) -> None:
        error = sys.exception()
        # The text of an unexpected error is its traceback.
        unexpected = text.startswith("Traceback ")
        if debug and not unexpected:
            traceback.print_exc()
        short = _unexpected(error, workdir) if unexpected and not debug else text
        print(short, file=sys.stderr)

    return print_failure


def _unexpected(error: BaseException | None, workdir: Path | None) -> str:
    """Formats an unexpected error on one line; appends its traceback to `workdir`/error.txt."""
    text = " ".join(str(error).split())
    text = text[:_MAX_MESSAGE] + "…" * (len(text) > _MAX_MESSAGE)
    where = "use --debug for the traceback"
    with contextlib.suppress(OSError):
        if workdir is not None and workdir.is_dir():
            with appending(workdir / "error.txt") as file:
                file.write("".join(traceback.format_exception(error)) + "\n")
            where = f"traceback in {workdir / 'error.txt'}"
    return f"error: Unexpected {type(error).__name__}: {text} ({where})"


def _workdir_in(argv: Sequence[str]) -> Path | None:
    for word, following in itertools.pairwise([*argv, ""]):
        if word == "--workdir":
            return Path(following).expanduser()
        if word.startswith("--workdir="):
            return Path(word.partition("=")[2]).expanduser()
    return None
