"""`ssl-jax data pack`."""

import argparse

from ssl_jax.data.image_list import Columns
from ssl_jax.data.packed import pack


def run(args: argparse.Namespace) -> None:
    """Packs small images into one file."""
    columns = Columns(args.image_key, args.label_key, args.label_separator, flags=True)
    print(f"{args.out}: {pack(args.folder, args.out, args.channels, columns):,} images")
