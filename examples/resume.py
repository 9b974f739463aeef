"""Goes on with a run that was stopped: python examples/resume.py RUN.

The run's own config.json says all that is needed; a run that is done is left as it is.
"""

import sys
from pathlib import Path

from ssl_jax.run.folder import read_config
from ssl_jax.train import pretrain

run = Path(sys.argv[1])
state = pretrain(read_config(run), run)
print(f"{run}: step {int(state.step)}")
