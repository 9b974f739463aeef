"""`ssl-jax data pack`."""

import argparse

from ssl_jax.data.packed import pack


def run(args: argparse.Namespace) -> None:
    """Packs small images into one file."""
    print(f"{args.out}: {pack(args.folder, args.out, args.channels):,} images")
