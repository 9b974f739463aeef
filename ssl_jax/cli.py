"""The command line: `ssl-jax COMMAND ...`, and `run_pretrain.py`."""

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_jax import __version__, backend
from ssl_jax.chips import Topology, parse_topology
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
    _add_views(
        commands.add_parser(
            "views",
            help="draw images and the views that training sees of them",
            epilog="example: ssl-jax views --config=configs/simclr_digits.py --out=views.png",
        )
    )
    _add_plan(
        commands.add_parser(
            "plan",
            help="compile a run for hardware that is not here: memory, time, exchanges",
            epilog="example: ssl-jax plan --config=configs/simclr_imagenet.py:8192 "
            "--topology=v4:4x4x4",
        )
    )
    _add_data(commands.add_parser("data", help="prepare images"))
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
    _add_config(parser)
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")


def _add_views(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.png", help="to write")
    parser.add_argument("--images", type=int, default=8, help="of the step's batch; default: 8")
    parser.add_argument("--step", type=int, default=0, help="whose views; default: 0, the first")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--topology", required=True, metavar="CHIP:SHAPE", help="v4:4x4x4, v5e:4x4, h100:8"
    )
    parser.add_argument(
        "--images", type=int, default=0, help="in the training set, where it is not here to tell"
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument(
        "--compare", metavar="OTHER", help="a plan that --json has written, or another topology"
    )


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
    # After the environment is set, which JAX reads when it is imported.
    from ssl_jax import plan as plans

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    def of(topology: Topology) -> dict[str, Any]:
        say(f"Compiling for {topology.name}: minutes, for a large network …")
        config = load_config(args.config, overrides)
        return plans.fitting(config, topology, args.images, say)

    known = plans.read_plan(Path(args.compare)) if args.compare and other is None else None
    plan = of(topology)
    if args.json:
        print(json.dumps(plan, indent=1))
        return
    print(plans.report(plan))
    if args.compare:
        print("\n" + plans.compare(plan, of(other) if other else known or {}))


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:VARIANT]", help="the experiment, see configs/"
    )
    # Read before argparse sees them; here for the help alone.
    parser.add_argument(
        "--config.KEY", dest="_overrides", metavar="VALUE", help="sets a key, --config.optim.lr=0.1"
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    pack = actions.add_parser(
        "pack",
        help="small images of one size into one file, for config.data.name=packed",
        epilog="example: ssl-jax data pack cifar10/train cifar10_train.npz",
    )
    pack.add_argument("folder", type=Path, help="of images, one sub-folder per class or flat")
    pack.add_argument("out", type=Path, metavar="FILE.npz", help="to write")
    convert = actions.add_parser(
        "convert",
        help="image files into a few large ones, for config.data.name=records",
        epilog="example: ssl-jax data convert imagenet/train gs://bucket/imagenet/train",
    )
    convert.add_argument("folder", help="of images, one sub-folder per class or flat")
    convert.add_argument("out", help="folder to write, on a disk or a bucket")
    convert.add_argument(
        "--shards", type=int, default=0, help="files to write; default: of about 128 MiB each"
    )


def _prepare_data(args: argparse.Namespace) -> int:
    """Does what `ssl-jax data ACTION` asks for; returns the number of images."""
    if args.action == "pack":
        from ssl_jax.data.packed import pack

        return pack(args.folder, args.out)
    from ssl_jax.data.records import convert

    return convert(args.folder, args.out, args.shards)


def _run(parser: argparse.ArgumentParser, argv: list[str], command: list[str]) -> int:
    overrides, rest = _split_overrides(argv)
    args = parser.parse_args(rest)
    if overrides and args.command not in ("pretrain", "views", "plan"):
        parser.error(f"--config.{overrides[0]} is for pretrain, views and plan alone")
    backend.tune_cpu()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # Orbax and absl announce every step of every checkpoint.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        if args.command == "pretrain":
            # After the flags are set, and only when it is needed: it takes seconds to import.
            from ssl_jax import cluster
            from ssl_jax.train import pretrain

            config = load_config(args.config, overrides)
            cluster.join(config.heartbeat_s)
            with cluster.alone_on_failure(lambda text: print(text, file=sys.stderr)):
                pretrain(config, args.workdir, shlex.join(command))
        elif args.command == "views":
            from ssl_jax.picture import write_views

            config = load_config(args.config, overrides)
            drawn = write_views(
                config, args.out, images=args.images, step=args.step, command=shlex.join(command)
            )
            print(f"{args.out}: {drawn} images and their views at step {args.step}")
        elif args.command == "data":
            print(f"{args.out}: {_prepare_data(args):,} images")
        elif args.command == "plan":
            _plan(args, overrides)
        else:
            from ssl_jax.report import write_report

            print(write_report(args.workdir))
    except UserError as error:
        if error.told_here:
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
