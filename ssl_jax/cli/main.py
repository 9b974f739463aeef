"""The command line: `ssl-jax COMMAND ...`, and `run_pretrain.py`."""

import argparse
import contextlib
import itertools
import json
import logging
import os
import re
import runpy
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ssl_jax.cli import backend, evals, interop
from ssl_jax.cli.parser import Parser, add_keys, require_folder_of, require_known, require_run
from ssl_jax.config import close_path, flatten, load_config, schema_keys, to_json
from ssl_jax.errors import UserError, did_you_mean
from ssl_jax.plan.chips import Topology, parse_topology
from ssl_jax.version import __version__

_OVERRIDE = "--config."
_WITHOUT_CONFIG = ("report", "data", "doctor", *interop.NAMES)
_LONGEST = 300  # characters of an unexpected error's message
_AFTER = """\
example:
  ssl-jax pretrain --config=configs/simclr_digits.py --workdir=runs/a
  ssl-jax knn --from=runs/a
  ssl-jax COMMAND --help

README.md and docs/ in the repository say what each command is for.
Exit codes: 0 done, 1 an error that was not expected, 2 bad input, 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: its arguments, default those of the process.

    Returns:
      The exit code: 0, 1 for an error that was not expected, 2 for bad input, 130 when interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    return _exit_code(parser, argv, ["ssl-jax", *argv])


def _parser() -> Parser:
    parser = Parser(
        prog="ssl-jax", description="Self-supervised image pretraining on JAX.", epilog=_AFTER
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, does: str, example: str) -> Parser:
        return parser.add_command(commands, name, does, example)

    digits = "--config=configs/simclr_digits.py"
    does = "pretrain an encoder, or continue the run in a folder"
    _add_pretrain(add("pretrain", does, f"{digits} --workdir=runs/a"))
    does = "print the keys of a config with their values, and the defaults that it changes"
    _add_shown(add("config", does, f"{digits} --config.optim.lr=0.5"))
    _add_report(add("report", "write a run's report.html anew, or compare runs", "runs/a runs/b"))
    does = "draw images and the views that training sees of them"
    _add_views(add("views", does, f"{digits} --out=views.png"))
    does = "compile a run for hardware that is not here: memory, time, exchanges"
    example = "--config=configs/simclr_imagenet.py:8192 --topology=v4:4x4x4"
    _add_plan(add("plan", does, example))
    evals.add(parser, commands)
    interop.add(parser, commands)
    _add_data(add("data", "prepare images for training", "pack cifar10/train train.npz"))
    does = "show versions, devices, and what is missing for which feature"
    _add_doctor(add("doctor", does, ""))
    return parser


def pretrain_main(argv: Sequence[str] | None = None) -> int:
    """`python run_pretrain.py`: the same as `ssl-jax pretrain`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        prog="run_pretrain.py",
        description="Pretrain an encoder, or continue the run in a folder.",
        epilog="example:\n  python run_pretrain.py --config=configs/simclr_digits.py "
        "--workdir=runs/a",
    )
    _add_pretrain(parser)
    parser.set_defaults(command="pretrain")
    return _exit_code(parser, argv, ["python", "run_pretrain.py", *argv])


def _add_pretrain(parser: Parser) -> None:
    _add_config(parser)
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")


def _add_shown(parser: Parser) -> None:
    _add_config(parser)
    parser.add_argument(
        "key", nargs="?", default="", metavar="KEY", help="only this key or group, with its meaning"
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def _show(args: argparse.Namespace, overrides: list[str]) -> None:
    """Prints a config, one key per line as typed on the command line."""
    config = load_config(args.config, overrides)
    if args.json and args.key:
        raise UserError(f"--json prints the whole config. Leave out '{args.key}'.")
    if args.json:
        print(json.dumps(to_json(config), indent=1))
        return
    keys, values = schema_keys(), flatten(config.to_dict())
    wanted = args.key.removeprefix("config.")
    shown = [name for name in values if not wanted or f"{name}.".startswith(f"{wanted}.")]
    if not shown:
        raise UserError(f"config has no key '{wanted}'.{did_you_mean(wanted, values)}")
    for name in shown:
        key = keys[re.sub(r"^views\.[^.]+", "views.*", name)]
        if wanted:
            print(f"# {key.meaning}")
        note = "" if values[name] == key.default else f"  # default: {key.default}"
        print(f"--config.{name}={values[name]}{note}")


def _register(file: Path) -> None:
    """Runs a file of the user's that registers a method."""
    if not file.is_file():
        raise UserError(f"There is no file {file} (--import).{close_path(file)}")
    runpy.run_path(str(file))


def _add_report(parser: Parser) -> None:
    parser.add_argument("workdir", type=Path, help="the run's folder")
    parser.add_argument(
        "others", nargs="*", type=Path, metavar="OTHER", help="folders of runs to compare it with"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help="comparison to write (default: comparison.html in the first folder)",
    )


def _report(args: argparse.Namespace) -> None:
    """Writes a run's report, or that of several, whose own are written as well."""
    for workdir in (args.workdir, *args.others):
        require_run(workdir)
    from ssl_jax.report import write_comparison, write_report

    if args.others:
        print(write_comparison([args.workdir, *args.others], args.out))
    elif args.out:
        raise UserError(
            "--out names the page that compares runs: name another run too, or leave it out."
        )
    else:
        print(write_report(args.workdir))


def _add_views(parser: Parser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE.png", help="picture to write"
    )
    parser.add_argument("--images", type=int, default=8, help="how many of the step's batch")
    parser.add_argument("--step", type=int, default=0, help="whose views, counted from 0")


def _add_plan(parser: Parser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:SHAPE",
        help="the hardware: v4:4x4x4, v5e:4x4, h100:8",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=0,
        help="in the training set (default: 0, as many as the data set has)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument(
        "--compare",
        metavar="OTHER",
        help="a plan that --json has written, or another topology (default: none)",
    )


def _add_doctor(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds that JAX and its devices are given"
    )


def _add_config(parser: Parser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:VARIANT]", help="the experiment, see configs/"
    )
    add_keys(
        parser,
        "sets a key, --config.optim.lr=0.1; `ssl-jax config` prints all of them "
        "(default: as the experiment has it)",
    )


def _add_data(parser: Parser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    pack = parser.add_command(
        actions,
        "pack",
        "write small images of one size into one file, for config.data.name=packed",
        "cifar10/train cifar10_train.npz",
    )
    pack.add_argument("folder", type=Path, help="of images, one sub-folder per class or flat")
    pack.add_argument("out", type=Path, metavar="FILE.npz", help="file to write")
    convert = parser.add_command(
        actions,
        "convert",
        "copy image files into a few large ones, for config.data.name=records",
        "imagenet/train gs://bucket/imagenet/train",
    )
    convert.add_argument("folder", help="of images, one sub-folder per class or flat")
    convert.add_argument("out", help="folder to write, on a disk or a bucket")
    convert.add_argument(
        "--shards",
        type=int,
        default=0,
        help="files to write (default: 0, files of about 128 MiB)",
    )


def _exit_code(parser: Parser, argv: list[str], command: list[str]) -> int:
    """Runs a command; whatever goes wrong is told in a line, with its trace where that is asked."""
    debug = "--debug" in argv
    try:
        return _run(parser, argv, shlex.join(command))
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
        # Else Python would complain once more when it flushes.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("error: nobody reads what is printed any longer.", file=sys.stderr)
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(_unexpected(error, _workdir_in(argv)), file=sys.stderr)
        return 1


def _unexpected(error: BaseException | None, workdir: Path | None) -> str:
    """An error that nobody foresaw, in a line; its trace is kept in the run's folder."""
    text = " ".join(str(error).split())
    text = text[:_LONGEST] + "…" * (len(text) > _LONGEST)
    where = "--debug shows where"
    if workdir is not None and workdir.is_dir():
        with contextlib.suppress(OSError), (workdir / "error.txt").open("a") as file:
            file.write("".join(traceback.format_exception(error)) + "\n")
            where = f"{file.name} says where"
    return f"error: unexpected {type(error).__name__}: {text} ({where})"


def _workdir_in(argv: Sequence[str]) -> Path | None:
    """The folder that a command line names, whether it could be parsed or not."""
    for word, following in itertools.pairwise([*argv, ""]):
        if word == "--workdir":
            return Path(following)
        if word.startswith("--workdir="):
            return Path(word.partition("=")[2])
    return None


def _teller(args: argparse.Namespace) -> Callable[[str], None]:
    """Shows why one of several processes ends."""
    debug, workdir = args.debug, getattr(args, "workdir", None)

    def tell(text: str) -> None:
        error = sys.exception()
        # Of what was not expected the text is the trace.
        trace = text.startswith("Traceback ")
        if debug and not trace:
            traceback.print_exc()
        print(text if debug or not trace else _unexpected(error, workdir), file=sys.stderr)

    return tell


def _run(parser: Parser, argv: list[str], command: str) -> int:
    overrides, rest = _split_overrides(argv)
    require_known(parser, rest)
    args = parser.parse_args(rest)
    args.quiet, args.debug = "--quiet" in rest, "--debug" in rest
    if overrides and args.command in _WITHOUT_CONFIG:
        raise UserError(f"--config.{overrides[0]}: {args.command} takes no config, leave it out.")
    if args.command == "doctor":
        return _doctor(args)
    backend.tune_cpu()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # Orbax and absl announce every step of every checkpoint, and tell what they raise as well.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if getattr(args, "imported", None):
        _register(args.imported)
    try:
        _do(args, overrides, command)
    except KeyboardInterrupt as error:
        if not _trains(args):
            raise
        told = "the same command continues the run, from its newest checkpoint if it has one"
        raise KeyboardInterrupt(told) from error
    return 0


def _trains(args: argparse.Namespace) -> bool:
    """Whether a command trains in a folder, where the same command goes on."""
    if args.command == "linear":
        return bool(args.recipe != "lbfgs")
    if args.command == "transfer":
        return bool(args.finetune)
    return args.command in ("pretrain", "finetune", "distill")


def _do(args: argparse.Namespace, overrides: list[str], command: str) -> None:
    """Does what a command asks for."""
    if args.command == "pretrain":
        _pretrain(args, overrides, command)
    elif args.command == "config":
        _show(args, overrides)
    elif args.command == "views":
        _views(args, overrides, command)
    elif args.command == "data":
        print(f"{args.out}: {_prepare_data(args):,} images")
    elif args.command == "plan":
        _plan(args, overrides)
    elif args.command in evals.NAMES:
        evals.run(args, overrides, command, _teller(args))
    elif args.command in interop.NAMES:
        interop.run(args)
    else:
        _report(args)


def _pretrain(args: argparse.Namespace, overrides: list[str], command: str) -> None:
    # Before what takes seconds to import, so that a wrong key is told at once.
    config = load_config(args.config, overrides)
    from ssl_jax.run import processes
    from ssl_jax.train import pretrain

    processes.join(config.heartbeat_timeout_s)
    with processes.alone_on_failure(_teller(args)):
        pretrain(config, args.workdir, command, verbosity="quiet" if args.quiet else "all")


def _views(args: argparse.Namespace, overrides: list[str], command: str) -> None:
    require_folder_of(args.out)
    config = load_config(args.config, overrides)
    from ssl_jax.report.picture import write_views

    drawn = write_views(config, args.out, images=args.images, step=args.step, command=command)
    print(f"{args.out}: {drawn} images and their views at step {args.step}")


def _prepare_data(args: argparse.Namespace) -> int:
    """Does what `ssl-jax data ACTION` asks for; returns the number of images."""
    if "://" not in str(args.folder) and not Path(args.folder).expanduser().is_dir():
        raise UserError(
            f"The folder to {args.action} is {args.folder}, which is not a folder: give one with "
            f"images in it.{close_path(args.folder)}"
        )
    if args.action == "pack":
        from ssl_jax.data.packed import pack

        return pack(args.folder, args.out)
    from ssl_jax.data.records import convert

    return convert(args.folder, args.out, args.shards)


def _doctor(args: argparse.Namespace) -> int:
    from ssl_jax.cli import doctor

    found = doctor.examine(args.timeout)
    print(json.dumps(found, indent=1) if args.json else doctor.text(found, brief=args.quiet))
    return 0 if found["healthy"] else 1


def _plan(args: argparse.Namespace, overrides: list[str]) -> None:
    """Prints a plan."""
    topology = parse_topology(args.topology)
    other = None
    if args.compare and args.json:
        raise UserError("--json prints one plan: give it without --compare.")
    if args.compare and not Path(args.compare).exists():
        if ":" not in args.compare:
            raise UserError(f"--compare={args.compare} is neither a file nor a topology.")
        other = parse_topology(args.compare)
        if topology.is_tpu != other.is_tpu:
            raise UserError("TPUs and GPUs are compiled for apart: compare with a file of --json.")
    largest = max(t.chips for t in (topology, other) if t is not None)
    backend.compile_elsewhere(0 if topology.is_tpu else largest)
    # After the environment is set, which JAX reads when it is imported; a config may import it.
    config = load_config(args.config, overrides)
    from ssl_jax.plan import plan as plans

    def say(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr)

    def of(topology: Topology) -> dict[str, Any]:
        return plans.fitting(config, topology, args.images, say)

    known = plans.read_plan(Path(args.compare)) if args.compare and other is None else None
    plan = of(topology)
    if args.json:
        print(json.dumps(plan, indent=1))
        return
    print(plans.report(plan))
    if args.compare:
        print("\n" + plans.compare(plan, of(other) if other else known or {}))


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
