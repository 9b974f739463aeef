"""The command line: `ssl-jax COMMAND ...`, and `run_pretrain.py`."""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ssl_jax import __version__, backend
from ssl_jax.config import load_config
from ssl_jax.errors import UserError

_OVERRIDE = "--config."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 2 for bad input, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="ssl-jax", description="Self-supervised image pretraining on JAX."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_pretrain(
        commands.add_parser(
            "pretrain",
            help="pretrain an encoder, or continue a run",
            epilog="example: ssl-jax pretrain --config=configs/simclr_digits.py --workdir=runs/a",
        )
    )
    report = commands.add_parser(
        "report",
        help="write a run's report.html anew",
        epilog="example: ssl-jax report runs/a",
    )
    report.add_argument("workdir", type=Path, help="the run's folder")
    return _run(parser, argv, ["ssl-jax", *argv])


def pretrain_main(argv: Sequence[str] | None = None) -> int:
    """`python run_pretrain.py`: the same as `ssl-jax pretrain`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="run_pretrain.py",
        description="Pretrain an encoder, or continue the run in a folder.",
        epilog="example: python run_pretrain.py --config=configs/simclr_digits.py --workdir=runs/a",
    )
    _add_pretrain(parser)
    parser.set_defaults(command="pretrain")
    return _run(parser, argv, ["python", "run_pretrain.py", *argv])


def _add_pretrain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:VARIANT]", help="the experiment, see configs/"
    )
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")
    # Read before argparse sees them; here for the help alone.
    parser.add_argument(
        "--config.KEY", dest="_overrides", metavar="VALUE", help="sets a key, --config.optim.lr=0.1"
    )


def _run(parser: argparse.ArgumentParser, argv: list[str], command: list[str]) -> int:
    overrides, rest = _split_overrides(argv)
    args = parser.parse_args(rest)
    if overrides and args.command != "pretrain":
        parser.error(f"--config.{overrides[0]} is for pretrain alone")
    backend.tune_cpu()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # Orbax and absl announce every step of every checkpoint.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        if args.command == "pretrain":
            # After the flags are set, and only when it is needed: it takes seconds to import.
            from ssl_jax.train import pretrain

            config = load_config(args.config, overrides)
            pretrain(config, args.workdir, shlex.join(command))
        else:
            from ssl_jax.report import write_report

            print(write_report(args.workdir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted; the same command continues the run.", file=sys.stderr)
        return 130
    return 0


def _split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Takes `--config.a.b=V` and `--config.a.b V` out of the arguments."""
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


if __name__ == "__main__":
    sys.exit(main())
