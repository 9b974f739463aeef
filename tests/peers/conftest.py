"""Comparisons with other packages, run by `make peers` in a separate environment."""

import importlib.util

if importlib.util.find_spec("torch"):
    from loss import tolerate_missing_operators

    # torchvision's wheel lacks its C++ operators with torch for CPUs; the tests use none of them.
    tolerate_missing_operators()
