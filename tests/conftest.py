"""Sets up JAX before its first import: eight simulated devices and a compilation cache.

Tests run in one or several processes (pytest-xdist). The first sets the environment, which the
workers and the commands started by tests inherit.
"""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata

import pytest
import threadpoolctl

FIRST_PROCESS = "PYTEST_XDIST_WORKER" not in os.environ

if FIRST_PROCESS:
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Optimizing the tests' programs would take longer than running them.
    os.environ["XLA_FLAGS"] = " ".join(
        [
            os.environ.get("XLA_FLAGS", ""),
            "--xla_force_host_platform_device_count=8",
            "--xla_backend_optimization_level=0",
            "--xla_llvm_disable_expensive_passes=true",
            "--xla_cpu_parallel_codegen_split_count=1",
            # Fusion emitters take half of the compile time; the flag is gone in later versions.
            *["--xla_cpu_use_fusion_emitters=false"]
            * metadata.version("jaxlib").startswith("0.10."),
        ]
    ).strip()
    # `matrix + vector` is an error; write matrix + vector[None, :].
    os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
    # In scikit-learn's small fits, threads spend more time waiting than working.
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
    threadpoolctl.threadpool_limits(1)  # a pytest plugin may have loaded NumPy
    # Otherwise each process that tests start would compile the package's source to bytecode.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # Silences TensorFlow's banner about CPU instructions.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    # Shared by all processes, so that each program is compiled once. A new directory, so that runs
    # don't depend on earlier ones, unless the caller names one, as CI does for its stages. Small
    # programs are cached too, because a child process compiles hundreds of them.
    OWN_CACHE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
    if OWN_CACHE:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ssl_jax_compiled_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # Programs are lowered faster without the Python stack of each operation.
    os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

# Traced programs are millions of objects that live as long as the process. A search for garbage
# that touches them takes seconds, so each file's garbage is searched for once, at its end.
gc.disable()

# Check arrays against their annotations (library, dtype, shape) in every call. NumPy arrays are
# accepted as JAX arrays, as in JAX. This must precede the first import of the package. It is here
# because the option of jaxtyping's pytest plugin doesn't reach pytest-xdist's workers (0.3.11).
import jax  # noqa: E402 - reads the environment set above
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402

jaxtyping.Array = jax.Array | np.ndarray
CHECKED = (
    "losses",
    "loss_kernels",
    "methods",
    "models",
    "step",
    "evals",
    "ema",
    "diagnostics",
    "optim",
)
CHECKED += ("data.augment", "data.device_crop", "data.index")
jaxtyping.install_import_hook([f"ssl_jax.{name}" for name in CHECKED], "array_checks.check_arrays")

# Every command sets this flag. Without it, a run in a process that had computed before would differ
# in its last bits from the same run in a new process.
from ssl_jax.cli.backend import tune_cpu  # noqa: E402 - the hook comes first

tune_cpu()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the cache when all processes have finished."""
    if FIRST_PROCESS and OWN_CACHE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory):
    """A run of `encoders.pretrain_simclr`, once per process; tests work on copies."""
    from encoders import pretrain_simclr

    return pretrain_simclr(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(autouse=True, scope="module")
def collected_garbage() -> Iterator[None]:
    """Collects a file's garbage; what is left is not looked at again."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def restored_environment() -> Iterator[None]:
    """Undoes what commands set, such as one simulated device, before other tests inherit it."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    changed = {name: value for name, value in before.items() if os.environ.get(name) != value}
    os.environ.update(changed)


@pytest.fixture
def unchecked_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns array checks off, to test how functions themselves handle wrong shapes."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
