"""`ssl-jax doctor`: versions, devices, and missing packages per feature.

Nothing in this file imports packages that may be missing or broken (the command line around it
needs lazy_loader and ml_collections). JAX and the other required packages are imported in a
subprocess, `python -m ssl_jax.cli.doctor`, which may crash or hang.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from ssl_jax.cli import backend
from ssl_jax.errors import UserError
from ssl_jax.version import __version__

# Required packages: distribution and module.
_CORE = {
    "jax": "jax",
    "jaxlib": "jaxlib",
    "flax": "flax",
    "optax": "optax",
    "orbax-checkpoint": "orbax.checkpoint",
    "ml_collections": "ml_collections",
    "numpy": "numpy",
    "scipy": "scipy",
    "scikit-learn": "sklearn",
    "jaxtyping": "jaxtyping",
    "flatbuffers": "flatbuffers",
    "humanize": "humanize",
    "jinja2": "jinja2",
    "lazy_loader": "lazy_loader",
    "pillow": "PIL",
    "safetensors": "safetensors",
    "tensorboardX": "tensorboardX",
    "threadpoolctl": "threadpoolctl",
}
_CUDA = ("jax_cuda13_plugin", "jax_cuda12_plugin")
# Optional packages: alternative modules, each with the distributions that contain it.
_OPTIONAL: dict[str, dict[str, tuple[str, ...]]] = {
    "tensorflow": {"tensorflow": ("tensorflow", "tensorflow-cpu")},
    "tensorflow-datasets": {"tensorflow_datasets": ("tensorflow-datasets",)},
    "array_record": {"array_record": ("array_record",)},
    "matplotlib": {"matplotlib": ("matplotlib",)},
    "datasets": {"datasets": ("datasets",)},
    "pyarrow": {"pyarrow": ("pyarrow",)},
    "tifffile": {"tifffile": ("tifffile",)},
    "imagecodecs": {"imagecodecs": ("imagecodecs",)},
    "libtpu": {"libtpu": ("libtpu",)},
    "jax-cuda-plugin": {name: (name.replace("_", "-"),) for name in _CUDA},
    "torch": {"torch": ("torch",)},
    "torchvision": {"torchvision": ("torchvision",)},
    "timm": {"timm": ("timm",)},
    "wandb": {"wandb": ("wandb",)},
}
# Variables by which processes find each other, and what sets them.
_CLUSTERS = {
    "JAX_COORDINATOR_ADDRESS": "set manually",
    "SLURM_JOB_ID": "Slurm",
    "OMPI_MCA_orte_hnp_uri": "Open MPI",
    "KUBERNETES_SERVICE_HOST": "Kubernetes",
    "TPU_WORKER_HOSTNAMES": "TPU pod",
}
_MAX_TIMEOUT = 86_400  # seconds
_GIB = 2**30  # formatted by hand: humanize may be missing


@dataclasses.dataclass(frozen=True)
class _Feature:
    """A feature that may need optional packages.

    Attributes:
      name: The feature's name.
      use: How it is used.
      needs: Names in `_OPTIONAL`.
      extra: The extra of this package that installs them; "" to install them by name.
    """

    name: str
    use: str
    needs: tuple[str, ...]
    extra: str = ""


_FEATURES = (
    _Feature("images on disk", "config.data.name=folder", ("tensorflow",), "data"),
    _Feature("records", "config.data.name=records", ("tensorflow", "array_record"), "data"),
    _Feature(
        "TensorFlow Datasets",
        "config.data.name=tfds",
        ("tensorflow", "tensorflow-datasets", "array_record"),
        "data",
    ),
    _Feature("Hugging Face datasets", "config.data.name=hf", ("tensorflow", "datasets"), "hf"),
    _Feature("plot of views", "ssl-jax views", ("matplotlib",), "pictures"),
    _Feature(
        "TIFFs of other channels than Pillow reads",
        "config.data.channels",
        ("tifffile", "imagecodecs"),
        "tiff",
    ),
    _Feature("features as Parquet", "ssl-jax features --out=FILE.parquet", ("pyarrow",), "parquet"),
    _Feature("plans for TPUs", "ssl-jax plan --topology=v4:4x4x4", ("libtpu",), "plan"),
    _Feature("Weights & Biases", "config.wandb=PROJECT", ("wandb",), "wandb"),
    _Feature("export to PyTorch", "ssl-jax export --format=torch", ()),
    _Feature("export to MMDetection", "ssl-jax export --format=pth", ("torch",)),
    _Feature("PyTorch, to load exports", "docs/interop.md", ("torch",)),
)


def run(args: argparse.Namespace) -> int:
    """Prints the diagnosis; returns 0 if everything required works, else 1."""
    if not 0 < args.timeout <= _MAX_TIMEOUT:
        raise UserError(
            f"--timeout is {args.timeout}: set it above 0, and to at most {_MAX_TIMEOUT} seconds."
        )
    found = examine(args.timeout)
    print(json.dumps(found, indent=1) if args.json else text(found, brief=args.quiet))
    return 0 if found["healthy"] else 1


def examine(timeout: float = 60.0) -> dict[str, Any]:
    """Examines this machine and the installed packages.

    Args:
      timeout: Seconds that the import of JAX and a computation on each device may take.

    Returns:
      Plain JSON types: "python", "platform", "cpu_cores", "memory" and "disk_free" (bytes),
      "versions" (name to version, None if missing), "jax" (the result of `probe`, or "error"),
      "xla_flags", "cpu_convolutions", "features" (a list of "name", "use", "available", "note",
      "install") and "healthy", whether all required packages and all devices work.
    """
    given = os.environ.get("XLA_FLAGS", "")
    backend.tune_cpu()
    flags = os.environ.get("XLA_FLAGS", "")
    versions = {name: _version(name) for name in _CORE}
    versions |= {name: _found(name) for name in _OPTIONAL}
    jax = _probed(timeout)
    works = bool(jax.get("devices")) and not jax["broken"]
    works = works and all(device["computes"] for device in jax["devices"])
    return {
        "ssl_jax": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "folder": os.getcwd(),
        "disk_free": shutil.disk_usage(".").free,
        "versions": versions,
        "jax": jax,
        "xla_flags": flags,
        "cpu_convolutions": _convolutions(given, flags),
        "features": [*_features(versions), *_hardware(versions, jax), _processes()],
        "healthy": works and all(versions[name] for name in _CORE),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except Exception:  # a corrupt installation may raise anything
        return None


def _found(name: str) -> str | None:
    """Returns the version of one of `_OPTIONAL`; None if its module can't be found."""
    for module, distributions in _OPTIONAL[name].items():
        try:
            installed = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            installed = False
        if installed:
            return next(filter(None, map(_version, distributions)), "unknown version")
    return None


def _convolutions(given: str, flags: str) -> str:
    if flags != given:
        return "XLA's own (ssl_jax adds a flag)"
    if "ynn_fusion" in given:
        return "set by XLA_FLAGS"
    return "JAX's default (an accelerator may be used, or this jaxlib is untested)"


def _probed(timeout: float) -> dict[str, Any]:
    """Returns the result of `probe` in a subprocess; "error" if that crashes or hangs."""
    command = [sys.executable, "-m", "ssl_jax.cli.doctor"]
    try:
        # Another run may leave little GPU memory.
        env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
    except subprocess.TimeoutExpired:
        error = (
            f"JAX and its devices did not respond within {timeout:g} s. On a busy machine, raise "
            "--timeout; on a pod, run this on all hosts"
        )
        return {"broken": {}, "error": error}
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    except (IndexError, ValueError):
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        last = lines[-1].strip()[:200] if lines else "no output"
        return {"broken": {}, "error": f"JAX exited with code {done.returncode}: {last}"}


def probe() -> dict[str, Any]:
    """Imports the required packages and computes on each device.

    Returns:
      "broken", the modules that can't be imported, with reasons; and "backend" and "devices" (each
      "kind", "memory" in bytes or None, "computes", "seconds", "error"), or "error".
    """
    broken = {}
    for module in _CORE.values():
        try:
            importlib.import_module(module)
        except BaseException as error:
            broken[module] = _one_line(error)
    found: dict[str, Any] = {"broken": broken}
    if "jax" in broken or "jaxlib" in broken:
        return found | {"error": "JAX can't be imported"}
    import jax

    try:
        devices = jax.local_devices()
        found["backend"] = jax.default_backend()
    except Exception as error:
        return found | {"error": _one_line(error)}
    return found | {"devices": [_computed(jax, device) for device in devices]}


def _computed(jax: Any, device: Any) -> dict[str, Any]:
    """Describes a device and whether it computes."""
    found: dict[str, Any] = {"kind": device.device_kind, "memory": None, "computes": False}
    found["error"] = ""
    since = time.perf_counter()
    try:
        found["memory"] = (device.memory_stats() or {}).get("bytes_limit")
        ones = jax.device_put(jax.numpy.ones((64, 64)), device)
        total = float(jax.jit(lambda x: (x @ x).sum())(ones))
        found["computes"] = total == 64.0**3
        found["error"] = "" if found["computes"] else f"wrong result, {total} instead of {64**3}"
    except Exception as error:
        found["error"] = _one_line(error)
    return found | {"seconds": time.perf_counter() - since}


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _features(versions: dict[str, str | None]) -> Iterator[dict[str, Any]]:
    for feature in _FEATURES:
        missing = [name for name in feature.needs if versions[name] is None]
        yield {
            "name": feature.name,
            "use": feature.use,
            "available": not missing,
            "note": f"missing {', '.join(missing)}" if missing else "",
            "install": _install(feature.extra, missing) if missing else "",
        }


def _hardware(versions: dict[str, str | None], jax: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Reports whether JAX uses accelerators, and if not, whether the machine seems to have any."""
    accelerators = {
        "NVIDIA GPUs": ("gpu", "cuda", "jax-cuda-plugin", _any(("/dev/nvidia0", "/dev/dxg"))),
        "TPUs": ("tpu", "tpu", "libtpu", _any(("/dev/accel0", "/dev/vfio/0"))),
    }
    for name, (platform_name, extra, package, present) in accelerators.items():
        used = jax.get("backend") == platform_name
        if used:
            note = "in use"
        elif not present:
            note = "none found on this machine"
        elif versions[package] is None:
            note = f"found, but {package} is missing"
        else:
            note = "found, but JAX does not use it"
        install = _install(extra, []) if present and not used else ""
        yield {"name": name, "use": "", "available": used, "note": note, "install": install}


def _any(paths: tuple[str, ...]) -> bool:
    return any(os.path.exists(path) for path in paths)


def _processes() -> dict[str, Any]:
    """Reports the cluster in whose processes a run would take part."""
    set_by = [f"{what} ({name})" for name, what in _CLUSTERS.items() if os.environ.get(name)]
    count = os.environ.get("JAX_NUM_PROCESSES", "")
    absent = [n for n in ("JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS") if n not in os.environ]
    note = f"found: {', '.join(set_by)}" if set_by else "no cluster found, runs use one process"
    if count == "1":
        note = "JAX_NUM_PROCESSES=1, runs use one process"
    elif count and absent:
        note = f"JAX_NUM_PROCESSES is set without {' and '.join(absent)}"
    return {
        "name": "multiple processes",
        "use": "docs/pods.md",
        "available": not (absent and count not in ("", "1")),
        "note": note,
        "install": "",
    }


def _install(extra: str, missing: list[str]) -> str:
    """Returns the command that installs an extra of this package, or packages by name."""
    pip = f"{sys.executable} -m pip install"
    if not extra:
        return f"{pip} {' '.join(missing)}"
    root = Path(__file__).parents[2]
    if not (root / "constraints.txt").is_file():
        return f"{pip} 'ssl_jax[{extra}]'"
    # A clone pins the tested versions. A TPU VM has versions of its own, and an environment with
    # another JAX keeps it.
    tested = f"jax=={_version('jax')}\n" in (root / "constraints.txt").read_text()
    pins = f"-c {root}/constraints.txt " if tested and extra != "tpu" else ""
    return f"{pip} {pins}-e '{root}[{extra}]'"


def text(found: dict[str, Any], brief: bool = False) -> str:
    """Formats a diagnosis for the terminal.

    Args:
      found: The result of `examine`.
      brief: Whether to list only problems and the verdict.
    """
    rows = [] if brief else [*_machine(found), "", *_devices(found["jax"]), "", *_table(found), ""]
    return "\n".join([*rows, *_verdict(found)])


def _machine(found: dict[str, Any]) -> Iterator[str]:
    yield f"ssl_jax {found['ssl_jax']}, Python {found['python']}, {found['platform']}"
    yield (
        f"{found['cpu_cores']} CPU cores, {found['memory'] / _GIB:.1f} GiB of memory, "
        f"{found['disk_free'] / _GIB:.1f} GiB of free disk space in {found['folder']}"
    )
    yield ""
    yield "versions"
    for name, version in found["versions"].items():
        yield f"  {name:<22}{version or '-'}"


def _devices(jax: dict[str, Any]) -> Iterator[str]:
    yield "devices"
    if "error" in jax:
        yield f"  {jax['error']}"
    for number, device in enumerate(jax.get("devices", ())):
        memory = f", {device['memory'] / _GIB:.1f} GiB" if device["memory"] else ""
        state = f"works ({device['seconds']:.2f} s)" if device["computes"] else device["error"]
        yield f"  {jax['backend']} {number}: {device['kind']}{memory}, {state}"


def _table(found: dict[str, Any]) -> Iterator[str]:
    yield f"XLA_FLAGS              {found['xla_flags'] or '-'}"
    yield f"CPU convolutions       {found['cpu_convolutions']}"
    yield ""
    yield "features"
    for feature in found["features"]:
        available = "yes" if feature["available"] else "no"
        yield f"  {available:<5}{feature['name']}: {feature['note'] or feature['use']}"
        if feature["install"]:
            yield f"         {feature['install']}"


def _verdict(found: dict[str, Any]) -> Iterator[str]:
    broken = found["jax"]["broken"]
    for module, reason in broken.items():
        yield f"broken: {module} can't be imported ({reason})"
    for name in _CORE:
        if found["versions"][name] is None and _CORE[name] not in broken:
            yield f"broken: {name} is not an installed package"
    if "error" in found["jax"]:
        yield f"broken: {found['jax']['error']}"
    for number, device in enumerate(found["jax"].get("devices", ())):
        if not device["computes"]:
            yield f"broken: device {number} does not compute ({device['error']})"
    if found["healthy"]:
        yield "All required packages are installed and all devices work."
    else:
        yield "Some required packages or devices do not work. Fix what is marked broken above."


if __name__ == "__main__":
    sys.stdout.write(json.dumps(probe()) + "\n")
