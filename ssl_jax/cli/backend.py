"""Settings of JAX and XLA that must precede their first use; nothing here imports JAX."""

import contextlib
import importlib.util
import os
from importlib import metadata
from pathlib import Path

from ssl_jax.files import private_folder, reason

# YNNPACK's convolutions take most of a step's time on a CPU; XLA's own are faster.
_CPU_FLAG = "xla_cpu_experimental_ynn_fusion_type"
_CPU_VALUE = "-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
# XLA aborts on an unknown flag, so only versions with which it was tested.
_VERSIONS_WITH_FLAG = ("0.10.2", "0.11.2", "0.12.0.1")
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_CACHE_BYTES = 2 << 30  # size to which the cache is cut when a command starts
# Numbers of this process among several, by JAX itself, Slurm, Open MPI, TPU pods and Kubernetes.
RANKS = (
    "JAX_PROCESS_ID",
    "SLURM_PROCID",
    "OMPI_COMM_WORLD_RANK",
    "TPU_WORKER_ID",
    "JOB_COMPLETION_INDEX",
)
_ACCELERATOR_PACKAGES = ("libtpu", "jax_cuda13_plugin", "jax_cuda12_plugin", "jax_rocm7_plugin")


def tune_cpu() -> None:
    """Speeds up convolutions on the CPU backend; call before JAX is used.

    `XLA_FLAGS` is unchanged if it contains the flag already, if an accelerator may be used, or if
    the flag is not known to work with this version of jaxlib.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _CPU_FLAG in flags or not _cpu_only():
        return
    if metadata.version("jaxlib") in _VERSIONS_WITH_FLAG:
        os.environ["XLA_FLAGS"] = f"{flags} --{_CPU_FLAG}={_CPU_VALUE}".strip()


def cache_compilations() -> str:
    """Makes JAX keep compiled programs in the user's cache folder; call before JAX is imported.

    `JAX_COMPILATION_CACHE_DIR` names another folder, or none if it is empty. Cached programs are
    run without checks, so nobody else may write to the folder.

    Returns:
      "", or a warning why nothing is cached.
    """
    if _CACHE in os.environ:
        return ""
    parent = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        if not parent.is_absolute():  # as the XDG specification requires
            parent = Path.home() / ".cache"
        folder = private_folder(parent / "ssl_jax")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        return (
            f"warning: compiled programs are not cached in {parent / 'ssl_jax'} ({reason(error)}). "
            f"Set {_CACHE} to a folder of your own, or to nothing."
        )
    os.environ[_CACHE] = str(folder)
    with contextlib.suppress(OSError):  # another command may be removing the same files
        _remove_oldest(folder, _CACHE_BYTES)
    return ""


def _remove_oldest(folder: Path, size: int) -> None:
    """Removes the files of a folder that were used least recently, until `size` bytes are left."""
    files = [entry for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)]
    for file in sorted(files, key=lambda file: file.stat().st_atime, reverse=True):
        size -= file.stat().st_size
        if size < 0:
            os.unlink(file)


def compile_elsewhere(simulated: int = 0) -> None:
    """Prepares the CPU for compiling for other devices; call before JAX is imported.

    Args:
      simulated: The number of devices that the CPU simulates; 0 to use the TPU compiler.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Without them, libtpu logs many warnings that this is not a TPU host.
    quiet = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_MIN_LOG_LEVEL": "3"}
    quiet |= {"TPU_STDERR_LOG_LEVEL": "3", "TPU_ACCELERATOR_TYPE": "v4-8"}
    # libtpu locks the TPU; several processes may compile without one.
    quiet["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    if simulated:
        flags = os.environ.get("XLA_FLAGS", "")
        flag = f"--xla_force_host_platform_device_count={simulated}"
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def _cpu_only() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms == "cpu"
    return not any(importlib.util.find_spec(name) for name in _ACCELERATOR_PACKAGES)
