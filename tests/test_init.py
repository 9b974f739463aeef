"""`import ssl_jax` is quick; its modules and `load` are imported on first use."""

import subprocess
import sys

import pytest

import ssl_jax


def test_modules_are_imported_on_first_use():
    code = (
        "import sys, ssl_jax\n"
        "assert {'load', 'losses', 'train', '__version__'} <= {*dir(ssl_jax)}\n"
        "assert 'jax' not in sys.modules\n"
        "assert ssl_jax.losses.nt_xent and ssl_jax.data.augment.color and 'jax' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_names_are_attribute_errors():
    assert not hasattr(ssl_jax, "loses") and not hasattr(ssl_jax.data, "augmnet")
    with pytest.raises(AttributeError, match="No ssl_jax attribute loses"):
        _ = ssl_jax.loses
