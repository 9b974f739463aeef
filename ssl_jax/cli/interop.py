"""The commands that take encoders elsewhere and from there: export, import."""

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from ssl_jax.cli.parser import Parser, add_from, require_encoder, require_folder_of
from ssl_jax.config import did_you_mean
from ssl_jax.errors import UserError

NAMES = ("export", "import")
FORMATS = {
    "torch": "safetensors with torchvision's and timm's names",
    "jax": "all networks, for ssl_jax.load and config.init_from.path",
    "program": "a program with its weights, for JAX alone",
    "folder": "as on the Hugging Face hub, with a model card",
}


def add(parser: Parser, commands: Any) -> None:
    """Adds the commands to the parser's.

    Args:
      parser: of the command line.
      commands: what its `add_subparsers` gave.
    """
    export = parser.add_command(
        commands,
        "export",
        "write a run's encoder for PyTorch, JAX or the hub",
        "--from=runs/a --format=torch --out=encoder.safetensors",
    )
    add_from(export)
    formats = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    export.add_argument("--format", required=True, type=_format, metavar="FORMAT", help=formats)
    export.add_argument("--out", required=True, type=Path, help="file or folder to write")
    export.add_argument("--step", type=int, help="of the run's checkpoint (default: the newest)")
    export.add_argument(
        "--projector-layer",
        type=int,
        default=0,
        help="of --format=program: go on to this hidden layer of the projector "
        "(default: 0, the encoder's features)",
    )
    imported = parser.add_command(
        commands,
        "import",
        "read an encoder that another code has trained",
        "moco_v2_800ep_pretrain.pth.tar --out=moco.safetensors",
    )
    imported.add_argument("file", type=Path, help="weights, or the beginning of a checkpoint")
    imported.add_argument(
        "--out", required=True, type=Path, metavar="FILE.safetensors", help="file to write"
    )
    imported.add_argument(
        "--kind", default="", help="whose it is, moco, solo, ... (default: as its names tell)"
    )
    imported.add_argument("--json", action="store_true", help="print JSON and nothing else")


def _format(name: str) -> str:
    if name not in FORMATS:
        raise argparse.ArgumentTypeError(f"there is no '{name}'.{did_you_mean(name, FORMATS)}")
    return name


def run(args: argparse.Namespace) -> None:
    """Does what the command asks for and prints it.

    Raises:
      UserError: bad input, in one sentence.
    """
    _import(args) if args.command == "import" else _export(args)


def _export(args: argparse.Namespace) -> None:
    args.run = args.run.expanduser()
    require_encoder(args.run)
    require_folder_of(args.out)
    if args.projector_layer and args.format != "program":
        raise UserError("--projector-layer is for --format=program: leave it out.")
    # After the backend's flags are set; it takes seconds to import.
    from ssl_jax.interop import export

    if args.format == "torch":
        lines = export.export_torch(args.run, args.out, step=args.step)
        beside = " and torch_encoder.py beside it" if "torch_encoder" in lines[0] else ""
        print(f"{args.out}{beside}, which these lines load:")
        print("\n".join(f"    {line}" for line in lines))
    elif args.format == "jax":
        export.export_tree(args.run, args.out, step=args.step)
        print(f'{args.out}, for ssl_jax.load("{args.out}") and --config.init_from.path={args.out}')
    elif args.format == "program":
        told = export.export_program(
            args.run, args.out, step=args.step, projector_layer=args.projector_layer
        )
        print(
            f"{args.out}: uint8 images [n, {told['size']}, {told['size']}, 3] to features "
            f"[n, {told['features']}]; jax.export.deserialize reads it"
        )
    else:
        export.export_folder(args.run, args.out, step=args.step)
        print(f"{args.out}: choose a licence in its README.md before you publish it")


def _import(args: argparse.Namespace) -> None:
    require_encoder(args.file)
    require_folder_of(args.out)
    from ssl_jax.interop.import_weights import read_weights
    from ssl_jax.interop.metadata import preprocessing
    from ssl_jax.interop.weights import write_weights
    from ssl_jax.models.resnet import resnet_name

    weights = read_weights(args.file, args.kind)
    write_weights(weights, args.out)
    model = weights.config.model
    told = {
        "file": str(args.out),
        "source": weights.source,
        "networks": sorted(weights.params),
        "model": model.to_dict(),
        "preprocessing": preprocessing(weights.config),
        "left_out": list(weights.left_out),
    }
    if args.json:
        print(json.dumps(told))
        return
    print(f"{args.out} of {weights.source or args.file}")
    print(
        f"  {resnet_name(model)}, {model.stem} stem, "
        f"{model.padding} padding; networks: {', '.join(told['networks'])}"
    )
    how = told["preprocessing"]
    mean = f"mean {how['mean']}, std {how['std']}" if how["mean"] else "no mean and std"
    print(f"  images: {how['size']} pixels, {how['interpolation']}, {mean}")
    if weights.left_out:
        print(f"  left out: {_grouped(weights.left_out)}")


def _grouped(names: tuple[str, ...]) -> str:
    """Names by their beginning, with how many there are."""
    counts = Counter("".join(re.split(r"([./])", name)[:3]) for name in names)
    return ", ".join(f"{name} ({n})" if n > 1 else name for name, n in counts.items())
