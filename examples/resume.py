"""Resumes a stopped run: python examples/resume.py RUN.

The run's config.json is all it needs; a finished run is left unchanged.
"""

import sys
from pathlib import Path

from ssl_jax.run.folder import read_config
from ssl_jax.train import pretrain

run = Path(sys.argv[1])
result = pretrain(read_config(run), run)
print(f"{run}: step {result.step}")
