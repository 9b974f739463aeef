"""`ssl-jax data convert`, apart from `pack` because it needs TensorFlow."""

import argparse

from ssl_jax.data.image_list import Columns
from ssl_jax.data.records import convert


def run(args: argparse.Namespace) -> None:
    """Converts image files to a few large files."""
    columns = Columns(args.image_key, args.label_key, args.label_separator, flags=True)
    print(f"{args.out}: {convert(args.folder, args.out, args.shards, columns):,} images")
