"""XLA settings that must precede its first use; nothing here imports JAX."""

import importlib.util
import os
from importlib import metadata

# YNNPACK's convolutions take most of a step's time on a CPU; XLA's own are faster.
_CPU_FLAG = "xla_cpu_experimental_ynn_fusion_type"
_CPU_VALUE = "-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
# XLA aborts on an unknown flag, so only versions with which it was tested.
_VERSIONS_WITH_FLAG = ("0.10.2", "0.11.2", "0.12.0.1")
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
