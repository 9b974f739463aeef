"""All commands: their help, arguments, and the checks that run before JAX is imported.

A command's implementation is the `run(args)` of its module in `ssl_jax.cli`, which `main` imports
once the arguments are valid.
"""

import argparse
import os
import runpy
from pathlib import Path
from typing import Any

from ssl_jax.cli import backend
from ssl_jax.cli.grid import make_settings, parse_axis
from ssl_jax.cli.parser import (
    Parser,
    add_from,
    add_import,
    add_json,
    add_keys,
    path_argument,
    require_encoder,
    require_folder_of,
    require_run,
)
from ssl_jax.config import close_path, load_config
from ssl_jax.data.listing import require_data
from ssl_jax.errors import UserError, did_you_mean
from ssl_jax.files import local_path, reading
from ssl_jax.plan.chips import parse_topology, require_compiler

FAST = "lbfgs"  # the `linear` recipe that fits on features, without training a run
FORMATS = {
    "torch": "safetensors with the parameter names of torchvision and timm",
    "jax": "all networks, for ssl_jax.load and config.init_from.path",
    "program": "compiled program with its weights, needs only JAX",
    "folder": "Hugging Face Hub layout with a model card",
    "detectron2": "pickle for detectron2's MODEL.WEIGHTS",
    "pth": "torch.save with the names of torchvision and MMDetection, needs torch",
}


def add_commands(parser: Parser) -> None:
    """Adds all commands to the parser of `ssl-jax`."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, example: str, *implementation: Any) -> Parser:
        return parser.add_command(commands, name, summary, example, *implementation)

    digits = "--config=configs/simclr_digits.py"
    summary = "pretrain an encoder, or resume the run in a folder"
    add_pretrain(add("pretrain", summary, f"{digits} --workdir=runs/a"))
    summary = "pretrain once per combination of some config values, and compare the runs"
    example = f"{digits} --workdir=runs/sweep --grid=optim.lr=0.1,0.3 --grid=seed=0,1"
    _add_sweep(add("sweep", summary, example, "sweep", _prepare_sweep))
    summary = "print all config keys, and the default where a value differs"
    example = f"{digits} --config.optim.lr=0.5"
    _add_config_keys(add("config", summary, example, "config", _prepare_experiment))
    summary = "rewrite a run's report.html, or compare runs"
    _add_report(add("report", summary, "runs/a runs/b", "report", _prepare_report))
    summary = "plot images and their augmented training views"
    _add_views(add("views", summary, f"{digits} --out=views.png", "views", _prepare_views))
    summary = "compile a run for other hardware: memory, step time, collectives"
    example = "--config=configs/simclr_imagenet.py:8192 --topology=v4:4x4x4"
    _add_plan(add("plan", summary, example, "plan", _prepare_plan))
    for name, (summary, example) in _EVALUATIONS.items():
        example = f"--from=runs/a {example}"
        _add_evaluation(name, add(name, summary, example, "evals", _prepare_evaluation))
    summary = "export a run's encoder to PyTorch, JAX or the Hugging Face Hub"
    example = "--from=runs/a --format=torch --out=encoder.safetensors"
    _add_export(add("export", summary, example, "interop", _prepare_export))
    summary = "convert pretrained weights from another library"
    example = "moco_v2_800ep_pretrain.pth.tar --out=moco.safetensors"
    _add_import(add("import", summary, example, "interop", _prepare_import))
    _add_data(add("data", "prepare images for training", "pack cifar10/train train.npz"))
    summary = "show versions, devices, and missing packages per feature"
    _add_doctor(add("doctor", summary, "", "doctor"))


def resumes(args: argparse.Namespace) -> bool:
    """Returns whether a command trains in a folder, where the same command resumes."""
    if args.command == "linear":
        return bool(args.recipe != FAST)
    if args.command == "transfer":
        return bool(args.finetune)
    return args.command in ("pretrain", "sweep", "finetune", "distill")


def _add_path(parser: Parser, name: str, what: str, **settings: Any) -> None:
    parser.add_argument(name, type=path_argument, help=what, **settings)


def _add_config(parser: Parser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:VARIANT]", help="config file, see configs/"
    )
    add_keys(
        parser,
        "set a config key, e.g. --config.optim.lr=0.1; `ssl-jax config` prints all keys "
        "(default: the config file's values)",
    )
    add_import(parser)


def _run_imported(file: Path | None) -> None:
    """Runs the user's file that registers a method, an encoder or a source of images."""
    if file is None:
        return
    if not file.is_file():
        raise UserError(f"There is no file {file} (--import).{close_path(file)}")
    with reading(file):
        runpy.run_path(str(file))


def _prepare_experiment(args: argparse.Namespace) -> None:
    _run_imported(args.imported)
    args.experiment = load_config(args.config, args.overrides)


def _prepare_with_data(args: argparse.Namespace) -> None:
    _prepare_experiment(args)
    # Several processes check together after they have joined: the others would wait for one that
    # has ended before.
    if not any(name in os.environ for name in backend.RANKS):
        require_data(args.experiment)


def add_pretrain(parser: Parser) -> None:
    """Adds the arguments of `pretrain`, which are also those of `run_pretrain.py`."""
    _add_config(parser)
    _add_path(parser, "--workdir", "folder of the run", required=True)
    parser.add_argument(
        "--extend",
        action="store_true",
        help="train the run in the folder, finished or not, to a larger --config.epochs or "
        "--config.steps",
    )
    parser.set_defaults(module="pretrain", prepare=_prepare_with_data)


def _add_sweep(parser: Parser) -> None:
    _add_config(parser)
    _add_path(parser, "--workdir", "folder of the runs' folders", required=True)
    parser.add_argument(
        "--grid",
        action="append",
        required=True,
        type=parse_axis,
        metavar="KEY=V1,V2",
        help="config key and its values; give it once per key",
    )
    only = "print the runs' commands, one per line, and run none"
    parser.add_argument("--print", action="store_true", help=only)


def _prepare_sweep(args: argparse.Namespace) -> None:
    _run_imported(args.imported)
    args.settings = make_settings(args.config, args.overrides, args.grid)
    if not args.print:  # commands may be for another machine
        if args.workdir.exists() and not args.workdir.is_dir():
            raise UserError(f"{args.workdir} (--workdir) is a file. Choose another --workdir.")
        for setting in args.settings:
            local_path(args.workdir / setting.name)  # raises if the path is too long
        data = {str(setting.config.data): setting.config for setting in args.settings}
        for config in data.values():
            require_data(config)


def _add_config_keys(parser: Parser) -> None:
    _add_config(parser)
    parser.add_argument(
        "key", nargs="?", default="", metavar="KEY", help="only this key or group, with its meaning"
    )
    add_json(parser)


def _add_report(parser: Parser) -> None:
    _add_path(parser, "workdir", "folder of the run")
    _add_path(parser, "others", "folders of runs to compare with", nargs="*", metavar="OTHER")
    comparison = "comparison to write (default: comparison.html in the first folder)"
    _add_path(parser, "--out", comparison, metavar="FILE.html")


def _prepare_report(args: argparse.Namespace) -> None:
    for workdir in (args.workdir, *args.others):
        require_run(workdir)
    if args.out and not args.others:
        raise UserError("--out is only for comparisons. Add another run, or remove --out.")


def _add_views(parser: Parser) -> None:
    _add_config(parser)
    _add_path(parser, "--out", "image file to write", required=True, metavar="FILE.png")
    parser.add_argument("--images", type=int, default=8, help="number of images in the plot")
    parser.add_argument("--step", type=int, default=0, help="training step, counted from 0")


def _prepare_views(args: argparse.Namespace) -> None:
    require_folder_of(args.out)
    _prepare_with_data(args)


def _add_plan(parser: Parser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--topology",
        required=True,
        type=parse_topology,
        metavar="CHIP:SHAPE",
        help="target hardware: v4:4x4x4, v5e:4x4, h100:8",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=0,
        help="size of the training set (default: 0, the dataset's own size)",
    )
    add_json(parser)
    parser.add_argument(
        "--compare",
        metavar="OTHER",
        type=os.path.expanduser,
        help="plan to compare with: a file from --json, or another topology (default: none)",
    )


def _prepare_plan(args: argparse.Namespace) -> None:
    args.other = None
    if args.compare and args.json:
        raise UserError("--json prints a single plan. Remove --compare.")
    if args.compare and not local_path(args.compare).exists():
        if ":" not in args.compare:
            raise UserError(f"--compare={args.compare} is neither a file nor a topology.")
        args.other = parse_topology(args.compare)
        if args.topology.is_tpu != args.other.is_tpu:
            raise UserError(
                "One process can't compile for both TPUs and GPUs. Save one plan with --json "
                "and compare with that file."
            )
    topologies = [each for each in (args.topology, args.other) if each is not None]
    for topology in topologies:
        require_compiler(topology)
    largest = max(each.chips for each in topologies)
    # JAX reads the environment when it is imported, which a config may do.
    backend.compile_elsewhere(0 if args.topology.is_tpu else largest)
    _prepare_experiment(args)


# Summary and example; all take --from.
_EVALUATIONS = {
    "features": ("extract features of all images", "--out=features.npz"),
    "knn": ("evaluate frozen features with a kNN classifier", "--k=20"),
    "linear": ("train a linear classifier on a frozen encoder", "--recipe=moco"),
    "finetune": (
        "fine-tune encoder and classifier on labeled images",
        "--labels=0.1 --config.batch_size=64",
    ),
    "distill": ("distill a fine-tuned run into a student network", "--config.model.depth=18"),
    "transfer": ("evaluate on other datasets, frozen and fine-tuned", "--sets=sets.json"),
}


def _add_evaluation(name: str, parser: Parser) -> None:
    add_from(parser)
    add_json(parser)
    if name in ("features", "knn", "linear", "transfer"):
        _add_step(parser)
    if name in ("features", "knn", "linear", "finetune"):
        depth = (
            "hidden projector layers to keep (default: 1 of SimCLR's 3 if --labels < 1, else 0)"
            if name == "finetune"
            else "use the output of this hidden projector layer (default: the run's "
            "config.eval.projector_layer)"
        )
        parser.add_argument("--projector-layer", type=int, metavar="LAYER", help=depth)
    add_keys(parser, "set a config key, e.g. --config.batch_size=64 (default: the run's values)")
    if name == "features":
        out = "file to write; the name ends in .npz, or .parquet (extra 'parquet')"
        _add_path(parser, "--out", out, required=True, metavar="FILE")
        return
    results = "folder that keeps the results, if not the run's (default: RUN, or FILE_evals)"
    _add_path(parser, "--results", results, metavar="DIR")
    if name == "knn":
        _add_knn(parser)
    elif name == "linear":
        _add_linear(parser)
    elif name == "transfer":
        _add_transfer(parser)
    else:
        folder = "finetune_LABELS" if name == "finetune" else "distill"
        _add_path(parser, "--workdir", f"folder of the new run (default: RUN/{folder})")
    if name == "finetune":
        parser.add_argument(
            "--labels", type=float, default=1.0, help="fraction of the training labels to use"
        )


def _add_step(parser: Parser) -> None:
    parser.add_argument("--step", type=int, help="checkpoint step (default: the newest)")


def _add_knn(parser: Parser) -> None:
    parser.add_argument(
        "--k", type=int, help="number of neighbors (default: the run's config.eval.knn_k)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        help="votes are weighted by exp(similarity / temperature) "
        "(default: the run's config.eval.knn_temperature)",
    )
    parser.add_argument("--majority", action="store_true", help="weight all votes equally")


def _add_linear(parser: Parser) -> None:
    parser.add_argument(
        "--recipe",
        default=FAST,
        help="simclr, simclr_cifar, moco, swav, byol, simsiam, mocov3, mocov3_vit, barlow or "
        "vicreg: the official recipe, trained on random crops and flips (default: "
        f"{FAST}, fitted on features, with the penalty chosen on held-out training images)",
    )
    _add_path(parser, "--workdir", "folder of a recipe's run (default: RUN/linear_RECIPE)")


def _add_transfer(parser: Parser) -> None:
    datasets = "list of datasets, see docs/evaluate.md"
    _add_path(parser, "--sets", datasets, required=True, metavar="FILE.json")
    _add_path(parser, "--workdir", "folder of the fine-tuned runs (default: RUN/transfer)")
    parser.add_argument(
        "--rates",
        type=_numbers,
        metavar="X,Y",
        help="candidate learning rates for fine-tuning, per batch of 256 (default: 0.1,0.01,0.001)",
    )
    parser.add_argument(
        "--decays",
        type=_numbers,
        metavar="X,Y",
        help="candidate weight decays for fine-tuning (default: 0,0.0001)",
    )
    only = "fit linear classifiers only"
    parser.add_argument("--no-finetune", dest="finetune", action="store_false", help=only)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list such as 0.1,0.01") from None


def _prepare_evaluation(args: argparse.Namespace) -> None:
    require_encoder(args.run)
    if args.command == "features":
        require_folder_of(args.out)
    elif args.command == "knn":
        _require_vote(args)
    elif args.command == "finetune" and not 0 < args.labels <= 1:
        raise UserError(
            f"--labels={args.labels:g} is not a fraction of the training labels. Set it above 0 "
            "and up to 1, such as --labels=0.1."
        )
    elif args.command == "linear" and args.workdir and args.recipe == FAST:
        raise UserError(f"--recipe={FAST} creates no run. Remove --workdir, or choose a recipe.")
    elif args.command == "transfer":
        if not args.sets.is_file():
            raise UserError(
                f"There is no dataset list at {args.sets} (--sets).{close_path(args.sets)}"
            )
        for flag in ("rates", "decays", "workdir"):
            if not args.finetune and getattr(args, flag) is not None:
                raise UserError(f"--{flag} is for fine-tuning. Remove it or --no-finetune.")
    _run_imported(args.imported)


def _require_vote(args: argparse.Namespace) -> None:
    if args.k is not None and args.k < 1:
        raise UserError(f"--k={args.k} is not a number of neighbors. Set it to 1 or more.")
    if args.temperature is not None and not args.temperature > 0:  # nor NaN
        raise UserError(f"--temperature={args.temperature} is not positive. Set it above 0.")
    weighted = args.temperature is not None
    weighted |= any(override.startswith("eval.knn_temperature=") for override in args.overrides)
    if args.majority and weighted:
        raise UserError("--majority has no temperature. Remove one of the two options.")


def _add_export(parser: Parser) -> None:
    add_from(parser)
    formats = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    parser.add_argument("--format", required=True, type=_format, metavar="FORMAT", help=formats)
    _add_path(parser, "--out", "file or folder to write", required=True)
    _add_step(parser)
    parser.add_argument(
        "--projector-layer",
        type=int,
        metavar="LAYER",
        default=0,
        help="with --format=program: output of this hidden projector layer "
        "(default: 0, the encoder's features)",
    )
    parser.add_argument(
        "--network",
        choices=("online", "target"),
        default="default",
        help="network of a method with a target (default: the run's config.eval.network)",
    )


def _format(name: str) -> str:
    if name not in FORMATS:
        raise argparse.ArgumentTypeError(f"unknown format '{name}'.{did_you_mean(name, FORMATS)}")
    return name


def _prepare_export(args: argparse.Namespace) -> None:
    require_encoder(args.run)
    require_folder_of(args.out)
    if args.projector_layer and args.format != "program":
        raise UserError("--projector-layer is for --format=program only. Remove it.")
    _run_imported(args.imported)


def _add_import(parser: Parser) -> None:
    _add_path(parser, "file", "weights file, or prefix of a TensorFlow checkpoint")
    _add_path(parser, "--out", "file to write", required=True, metavar="FILE.safetensors")
    parser.add_argument(
        "--kind",
        default="",
        help="source library: moco, solo, ... (default: inferred from the parameter names)",
    )
    parser.add_argument(
        "--heads",
        type=int,
        default=0,
        help="attention heads of a ViT (default: those of its width, 64 features each)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        default=0,
        help="image size that a ViT's positions belong to (default: inferred from their number)",
    )
    add_import(parser)
    add_json(parser)


def _prepare_import(args: argparse.Namespace) -> None:
    _run_imported(args.imported)
    require_encoder(args.file)
    require_folder_of(args.out)


def _add_data(parser: Parser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    pack = parser.add_command(
        actions,
        "pack",
        "pack small images of one size into one file, for config.data.name=packed",
        "cifar10/train cifar10_train.npz",
        "pack",
        _prepare_data,
    )
    images = "image folder, one subfolder per class or flat; or a list of images (.csv, .tsv, .txt)"
    _add_path(pack, "folder", images, metavar="IMAGES")
    _add_path(pack, "out", "file to write", metavar="FILE.npz")
    pack.add_argument(
        "--channels", type=int, default=3, help="config.data.channels of the runs (default: 3)"
    )
    convert = parser.add_command(
        actions,
        "convert",
        "convert image files to a few large files, for config.data.name=records",
        "imagenet/train gs://bucket/imagenet/train",
        "convert",
        _prepare_data,
    )
    convert.add_argument("folder", help=images, metavar="IMAGES")
    convert.add_argument("out", help="folder to write, on disk or in a bucket")
    convert.add_argument(
        "--shards",
        type=int,
        default=0,
        help="number of files to write (default: 0, files of about 128 MiB)",
    )
    for each in (pack, convert):
        keys = (("image", "paths"), ("label", "labels, or '' for none"))
        for name, what in keys:
            text = f"column of a .csv or .tsv list with the {what} (default: {name})"
            each.add_argument(f"--{name}-key", default=name, metavar="COLUMN", help=text)
        text = "text between the classes of an image in that column, such as ';'"
        each.add_argument("--label-separator", default="", metavar="TEXT", help=text)


def _prepare_data(args: argparse.Namespace) -> None:
    if "://" not in str(args.folder) and not local_path(args.folder).exists():
        raise UserError(
            f"{args.folder} doesn't exist: name a folder or a list of images."
            f"{close_path(args.folder)}"
        )


def _add_doctor(parser: Parser) -> None:
    add_json(parser)
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds to wait for JAX and its devices"
    )
