"""`python -m ssl_jax.cli COMMAND ...`, which is `ssl-jax COMMAND ...`."""

import sys

from ssl_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
