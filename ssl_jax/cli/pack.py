"""`ssl-jax data pack`."""

import argparse

import numpy as np

from ssl_jax.data.image_list import Columns
from ssl_jax.data.packed import pack
from ssl_jax.errors import counted

_SHOWN = 5  # class names


def run(args: argparse.Namespace) -> None:
    """Packs small images into one file, and prints its classes: a wrong separator shows there."""
    columns = Columns(args.image_key, args.label_key, args.label_separator, flags=True)
    packed = [counted(pack(args.folder, args.out, args.channels, columns), "image")]
    with np.load(args.out, allow_pickle=False) as arrays:
        names, several = arrays["class_names"].tolist(), arrays["labels"].ndim == 2
    if names:
        shown = ", ".join(names[:_SHOWN] + ["…"] * (len(names) > _SHOWN))
        packed.append(f"{len(names):,} classes ({shown})")
    print(f"{args.out}: {', '.join(packed)}{', several per image' if several else ''}")
