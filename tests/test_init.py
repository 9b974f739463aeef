"""`import ssl_jax` is quick; its modules, `load` and slow packages are imported on first use."""

import subprocess
import sys

import pytest

import ssl_jax

# A package that is imported lazily is in `sys.modules`, but not its modules.
SLOW = {"IPython", "datasets", "matplotlib", "pandas", "pyarrow", "scipy.sparse", "scipy.stats"}
SLOW |= {"sklearn.base", "tensorflow", "torch", "wandb"}


def test_modules_and_slow_packages_are_imported_on_first_use():
    code = (
        "import sys, ssl_jax\n"
        "assert {'load', 'losses', 'train', '__version__'} <= {*dir(ssl_jax)}\n"
        "assert 'jax' not in sys.modules\n"
        "assert ssl_jax.losses.nt_xent and ssl_jax.data.augment.color and 'jax' in sys.modules\n"
        "import ssl_jax.cli.evals, ssl_jax.cli.pretrain\n"
        f"assert not {SLOW} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_names_are_attribute_errors():
    assert not hasattr(ssl_jax, "loses") and not hasattr(ssl_jax.data, "augmnet")
    with pytest.raises(AttributeError, match="No ssl_jax attribute loses"):
        _ = ssl_jax.loses
