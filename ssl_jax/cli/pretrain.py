"""`ssl-jax pretrain` and `run_pretrain.py`."""

import argparse

from ssl_jax.cli.failures import failure_printer
from ssl_jax.run import processes
from ssl_jax.train import pretrain


def run(args: argparse.Namespace) -> None:
    """Pretrains an encoder, or resumes the run in its workdir."""
    processes.join(args.experiment.heartbeat_timeout_s)
    with processes.alone_on_failure(failure_printer(args)):
        pretrain(
            args.experiment,
            args.workdir,
            args.command_line,
            extend=args.extend,
            verbosity="quiet" if args.quiet else "all",
        )
