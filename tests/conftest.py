"""What must be set before JAX is first imported: eight simulated devices and a compilation cache.

The tests run in one process or in several (pytest-xdist). The first sets the environment, which the
others inherit, and so do the commands that tests start.
"""

import os
import shutil
import tempfile
from importlib import metadata

import pytest
import threadpoolctl

FIRST_PROCESS = "PYTEST_XDIST_WORKER" not in os.environ

if FIRST_PROCESS:
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Programs of tests run for less time than it takes to optimise their machine code.
    os.environ["XLA_FLAGS"] = " ".join(
        [
            os.environ.get("XLA_FLAGS", ""),
            "--xla_force_host_platform_device_count=8",
            "--xla_backend_optimization_level=0",
            "--xla_llvm_disable_expensive_passes=true",
            "--xla_cpu_parallel_codegen_split_count=1",
            # Half of the compiler's work in these small programs; later versions have it no more.
            *["--xla_cpu_use_fusion_emitters=false"]
            * metadata.version("jaxlib").startswith("0.10."),
        ]
    ).strip()
    # `matrix + vector` is an error: broadcasts are written out, as matrix + vector[None, :].
    os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
    # scikit-learn's fits of small features: threads wait for each other longer than they work.
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
    threadpoolctl.threadpool_limits(1)  # a plugin of pytest's may have loaded NumPy before
    # Processes that tests start would each compile the package's source.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # TensorFlow: no banner about the CPU's instructions.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    # Shared by all processes, so that a program which several tests compile is compiled once. New,
    # so that no run depends on an earlier one, unless the caller names a directory, as CI does for
    # its stages. Small programs too: a child process compiles hundreds of them.
    OWN_CACHE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
    if OWN_CACHE:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ssl_jax_compiled_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# In tests each call checks arrays against their annotations: library, dtype, and shape. A NumPy
# array is accepted for a JAX array, as by JAX itself. The package must not have been imported yet.
# Installed here because the option of jaxtyping's pytest plugin doesn't reach the workers of
# pytest-xdist (jaxtyping 0.3.11).
import jax  # noqa: E402 - after the environment that it reads
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

# As every command sets it for itself: a run in a process that computed before would otherwise
# differ in its last bits from the same run in a process of its own.
from ssl_jax.cli.backend import tune_cpu  # noqa: E402 - the hook comes first

tune_cpu()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the cache once all processes are done."""
    if FIRST_PROCESS and OWN_CACHE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory):
    """A run of `encoders.pretrain_simclr`, made once per process: tests work on copies of it."""
    from encoders import pretrain_simclr

    return pretrain_simclr(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def unchecked_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """No checks of annotations, for what functions themselves answer to arrays of wrong shapes."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
