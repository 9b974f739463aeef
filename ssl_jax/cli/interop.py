"""`ssl-jax export` and `ssl-jax import`: encoders for and from other libraries."""

import argparse
import json
import re
from collections import Counter

from ssl_jax.config import flat_views, size_text
from ssl_jax.interop import export
from ssl_jax.interop.import_weights import read_weights
from ssl_jax.interop.metadata import preprocessing
from ssl_jax.interop.weights import write_weights
from ssl_jax.report.words import encoder_text

_DETECTORS = {
    "detectron2": ("detectron2", export.export_detectron2),
    "pth": ("MMDetection", export.export_pth),
}


def run(args: argparse.Namespace) -> None:
    """Executes the command and prints what it has written."""
    _import(args) if args.command == "import" else _export(args)


def _export(args: argparse.Namespace) -> None:
    chosen = {"step": args.step, "network": args.network}
    if args.format == "torch":
        lines = export.export_torch(args.run, args.out, **chosen)
        module = " and torch_encoder.py" if "torch_encoder" in lines[0] else ""
        print(f"{args.out}{module}; load with:")
        print("\n".join(f"    {line}" for line in lines))
    elif args.format in _DETECTORS:
        library, write = _DETECTORS[args.format]
        lines = write(args.run, args.out, **chosen)
        print(f"{args.out}; config for {library}:")
        print("\n".join(f"    {line}" for line in lines))
    elif args.format == "jax":
        export.export_tree(args.run, args.out, **chosen)
        out = args.out
        print(f'{out}; load with ssl_jax.load("{out}") or --config.init_from.path={out}')
    elif args.format == "program":
        shape = export.export_program(
            args.run, args.out, projector_layer=args.projector_layer, **chosen
        )
        sides = ", ".join(map(str, shape["shape"]))
        print(
            f"{args.out}: {shape['dtype']} images [n, {sides}] to features "
            f"[n, {shape['features']}]; load with jax.export.deserialize"
        )
    else:
        kept = export.export_folder(args.run, args.out, **chosen)
        print(f"{args.out}: choose a license in its README.md before you publish it")
        if kept:
            print("  its README.md was kept; for a new card, remove it and export again")


def _import(args: argparse.Namespace) -> None:
    weights = read_weights(args.file, args.kind, args.heads, args.image_size)
    write_weights(weights, args.out)
    model, images = weights.config.model, preprocessing(weights.config)
    networks = sorted(weights.params)
    if args.json:
        record = {
            "file": str(args.out),
            "source": weights.source,
            "networks": networks,
            "model": model.to_dict(),
            "preprocessing": images,
            "left_out": list(weights.left_out),
        }
        print(json.dumps(record))
        return
    print(f"{args.out} from {weights.source or args.file}")
    padding = f", {model.padding} padding" if model.name == "resnet" else ""
    print(f"  {encoder_text(model)}{padding}; networks: {', '.join(networks)}")
    mean = f"mean {images['mean']}, std {images['std']}" if images["mean"] else "not normalized"
    size = size_text(flat_views(weights.config)[0])
    channels = "" if images["channels"] == 3 else f", {images['channels']} channels"
    print(f"  images: {size} pixels{channels}, {images['interpolation']}, {mean}")
    if weights.left_out:
        print(f"  skipped parameters: {_grouped(weights.left_out)}")


def _grouped(names: tuple[str, ...]) -> str:
    """Groups parameter names by their first two parts, with counts."""
    counts = Counter("".join(re.split(r"([./])", name)[:3]) for name in names)
    return ", ".join(f"{name} ({n})" if n > 1 else name for name, n in counts.items())
