"""What has to be said to XLA before its first use; nothing here imports JAX."""

import importlib.util
import os
from importlib import metadata

# YNNPACK's convolutions take most of a step's time on a CPU; XLA's own are faster.
_CPU_FLAG = "xla_cpu_experimental_ynn_fusion_type"
_CPU_VALUE = "-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
# An unknown flag ends the process, so only versions in which it was seen to work.
_VERSIONS_WITH_FLAG = ("0.10.2", "0.11.2")
_ACCELERATOR_PACKAGES = ("libtpu", "jax_cuda13_plugin", "jax_cuda12_plugin", "jax_rocm7_plugin")


def tune_cpu() -> None:
    """Speeds up convolutions where the backend will be the CPU; call before JAX is used.

    Leaves `XLA_FLAGS` alone where it names the flag already, where an accelerator may be used, and
    where this jaxlib may not know the flag.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _CPU_FLAG in flags or not _cpu_only():
        return
    if metadata.version("jaxlib") in _VERSIONS_WITH_FLAG:
        os.environ["XLA_FLAGS"] = f"{flags} --{_CPU_FLAG}={_CPU_VALUE}".strip()


def _cpu_only() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms == "cpu"
    return not any(importlib.util.find_spec(name) for name in _ACCELERATOR_PACKAGES)
