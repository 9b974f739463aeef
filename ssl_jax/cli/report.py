"""`ssl-jax report`."""

import argparse

from ssl_jax.report import write_comparison, write_report


def run(args: argparse.Namespace) -> None:
    """Writes the report of a run, or a comparison of several runs along with their reports."""
    if args.others:
        print(write_comparison([args.workdir, *args.others], args.out))
    else:
        print(write_report(args.workdir))
