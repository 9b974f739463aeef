"""The command line: `ssl-jax COMMAND ...`, and `run_pretrain.py`.

Parsing needs no JAX, so help and errors in the arguments appear at once. Only then is the module
with the command's implementation imported.
"""

import argparse
import importlib
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TextIO

from ssl_jax.cli import backend
from ssl_jax.cli.commands import add_commands, add_pretrain, resumes
from ssl_jax.cli.failures import exit_code
from ssl_jax.cli.parser import Parser, require_known
from ssl_jax.errors import UserError
from ssl_jax.version import __version__

_OVERRIDE = "--config."
# Commands that don't import JAX, or start it in another process; and those that compile nothing
# for this machine.
_WITHOUT_JAX = ("config", "data", "doctor", "sweep")
_WITHOUT_CACHE = (*_WITHOUT_JAX, "plan", "report")
_EPILOG = """\
example:
  ssl-jax pretrain --config=configs/simclr_digits.py --workdir=runs/a
  ssl-jax knn --from=runs/a
  ssl-jax COMMAND --help

See README.md and docs/ in the repository for a guide to the commands.
Exit codes: 0 success, 1 unexpected error, 2 bad input, 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: The arguments; default: those of the process.

    Returns:
      The exit code: 0, 1 for an unexpected error, 2 for bad input, 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    return exit_code(lambda: _run(parser, argv, ["ssl-jax"]), argv)


def pretrain_main(argv: Sequence[str] | None = None) -> int:
    """Runs `python run_pretrain.py`, which is the same as `ssl-jax pretrain`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        prog="run_pretrain.py",
        description="Pretrain an encoder, or resume the run in a folder.",
        epilog="example:\n  python run_pretrain.py --config=configs/simclr_digits.py "
        "--workdir=runs/a",
    )
    add_pretrain(parser)
    parser.set_defaults(command="pretrain")
    return exit_code(lambda: _run(parser, argv, ["python", "run_pretrain.py"]), argv)


def _parser() -> Parser:
    parser = Parser(
        prog="ssl-jax", description="Self-supervised image pretraining on JAX.", epilog=_EPILOG
    )
    parser.add_argument("--version", action="version", version=__version__)
    add_commands(parser)
    return parser


def _run(parser: Parser, argv: list[str], program: list[str]) -> int:
    overrides, rest = _split_overrides(argv)
    require_known(parser, rest)
    args = parser.parse_args(rest)
    args.quiet, args.debug, args.overrides = "--quiet" in rest, "--debug" in rest, overrides
    args.command_line = shlex.join([*program, *argv])
    if overrides and not parser.commands.get(args.command, parser).takes_config:
        raise UserError(f"`{args.command}` takes no config. Remove --config.{overrides[0]}.")
    if args.command != "doctor":  # which shows what is set without this
        backend.tune_cpu()
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        # Orbax and absl log every step of every checkpoint, and every error that they raise.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    if args.command not in _WITHOUT_CACHE and (warning := backend.cache_compilations()):
        _print_once(warning, sys.stderr)
    try:
        return _execute(args)
    except KeyboardInterrupt as error:
        if not resumes(args):
            raise
        message = "rerun the same command to resume from the newest checkpoint, if there is one"
        raise KeyboardInterrupt(message) from error


def _execute(args: argparse.Namespace) -> int:
    args.prepare(args)
    if args.command not in _WITHOUT_JAX and "jax" not in sys.modules and not args.quiet:
        _announce_jax(args)
    implementation = importlib.import_module(f"ssl_jax.cli.{args.module}")
    return implementation.run(args) or 0


def _announce_jax(args: argparse.Namespace) -> None:
    """Prints why the next seconds are silent, where other progress is printed."""
    prints_progress = resumes(args) and not getattr(args, "json", False)
    if prints_progress or sys.stderr.isatty():  # otherwise stderr is for errors only
        _print_once("Starting JAX …", sys.stdout if prints_progress else sys.stderr)


def _print_once(text: str, file: TextIO) -> None:
    """Prints a line in the first of several processes, which haven't joined yet."""
    if all(os.environ.get(name, "0") == "0" for name in backend.RANKS):
        print(text, file=file, flush=True)


def _split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Separates `--config.a.b=V` and `--config.a.b V` from the other arguments."""
    overrides, rest = [], []
    remaining = iter(argv)
    for argument in remaining:
        if not argument.startswith(_OVERRIDE):
            rest.append(argument)
        elif "=" in argument:
            overrides.append(argument.removeprefix(_OVERRIDE))
        else:
            value = next(remaining, None)
            key = argument.removeprefix(_OVERRIDE)
            overrides.append(key if value is None else f"{key}={value}")
    return overrides, rest
