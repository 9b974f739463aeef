"""`ssl-jax views`."""

import argparse

from ssl_jax.report.picture import write_views


def run(args: argparse.Namespace) -> None:
    """Plots images and their augmented views."""
    count = write_views(
        args.experiment,
        args.out,
        images=args.images,
        step=args.step,
        command=args.command_line,
    )
    print(f"{args.out}: {count} images and their views at step {args.step}")
