"""Comparisons with other packages, run by `make peers` in a separate environment."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("torch"):
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    from loss import tolerate_missing_operators

    # torchvision's wheel lacks its C++ operators with torch for CPUs; the tests use none of them.
    tolerate_missing_operators()
