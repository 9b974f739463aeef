"""What other packages compute, beside ours: run by `make peers`, in an environment of its own."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("torch"):
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    from loss import tolerate_missing_operators

    # torchvision's wheel has no C++ operators beside a CPU's torch; the tests use none of them.
    tolerate_missing_operators()
