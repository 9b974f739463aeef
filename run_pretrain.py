"""Pretrains an encoder: run_pretrain.py --config=configs/X.py --workdir=DIR [--config.a.b=V]."""

import sys

from ssl_jax.cli.main import pretrain_main

if __name__ == "__main__":
    sys.exit(pretrain_main())
