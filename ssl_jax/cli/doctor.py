"""`ssl-jax doctor`: versions, devices, and what is missing for which feature.

Nothing in this file imports what may be missing or broken (the command line around it needs
ml_collections). JAX and the packages that everything needs are imported in a process of their own,
`python -m ssl_jax.cli.doctor`, which may end as it likes, or never.
"""

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
from ssl_jax.version import __version__

# What everything needs: distribution and module.
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
    "pillow": "PIL",
    "safetensors": "safetensors",
    "tensorboardX": "tensorboardX",
    "threadpoolctl": "threadpoolctl",
}
_CUDA = ("jax_cuda13_plugin", "jax_cuda12_plugin")
# What single features need: a name and the modules of which one is enough, with the
# distributions that bring them.
_MORE: dict[str, dict[str, tuple[str, ...]]] = {
    "tensorflow": {"tensorflow": ("tensorflow", "tensorflow-cpu")},
    "tensorflow-datasets": {"tensorflow_datasets": ("tensorflow-datasets",)},
    "array_record": {"array_record": ("array_record",)},
    "libtpu": {"libtpu": ("libtpu",)},
    "jax-cuda-plugin": {name: (name.replace("_", "-"),) for name in _CUDA},
    "torch": {"torch": ("torch",)},
    "torchvision": {"torchvision": ("torchvision",)},
    "timm": {"timm": ("timm",)},
    "wandb": {"wandb": ("wandb",)},
}
# Variables by which processes find each other, and what they are of.
_CLUSTERS = {
    "JAX_COORDINATOR_ADDRESS": "set by hand",
    "SLURM_JOB_ID": "Slurm",
    "OMPI_MCA_orte_hnp_uri": "Open MPI",
    "KUBERNETES_SERVICE_HOST": "Kubernetes",
    "TPU_WORKER_HOSTNAMES": "TPU pod",
}
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class _Feature:
    """Something that may need more than the core.

    Attributes:
      name: of it.
      use: how it is asked for.
      needs: names in `_MORE`.
      extra: of this package that brings them; "": they are installed by their own names.
    """

    name: str
    use: str
    needs: tuple[str, ...]
    extra: str = ""


_FEATURES = (
    _Feature("images on disk", "config.data.name=folder or records", ("tensorflow",), "data"),
    _Feature(
        "TensorFlow Datasets",
        "config.data.name=tfds",
        ("tensorflow", "tensorflow-datasets", "array_record"),
        "data",
    ),
    _Feature("plans for TPUs", "ssl-jax plan --topology=v4:4x4x4", ("libtpu",), "plan"),
    _Feature("Weights & Biases", "config.wandb=PROJECT", ("wandb",), "wandb"),
    _Feature("export for PyTorch", "ssl-jax export --format=torch", ()),
    _Feature("PyTorch, to use what is exported", "docs/interop.md", ("torch",)),
)


def examine(timeout: float = 60.0) -> dict[str, Any]:
    """Looks at this machine and what is installed.

    Args:
      timeout: seconds that the import of JAX and a computation on each device may take.

    Returns:
      Plain JSON types: "python", "platform", "cpu_cores", "memory" and "disk_free" (bytes),
      "versions" (name to version, None where it is missing), "jax" (what `probe` found, or
      "error"), "xla_flags", "cpu_convolutions", "features" (a list of "name", "use", "there",
      "told", "install") and "healthy", whether all that everything needs is there and works.
    """
    given = os.environ.get("XLA_FLAGS", "")
    backend.tune_cpu()
    flags = os.environ.get("XLA_FLAGS", "")
    versions = {name: _version(name) for name in _CORE}
    versions |= {name: _found(name) for name in _MORE}
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
    except Exception:  # of a corrupt installation, anything
        return None


def _found(name: str) -> str | None:
    """The version of one of `_MORE`; None where its module can't be found either."""
    for module, distributions in _MORE[name].items():
        try:
            there = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            there = False
        if there:
            return next(filter(None, map(_version, distributions)), "of unknown version")
    return None


def _convolutions(given: str, flags: str) -> str:
    if flags != given:
        return "XLA's own, by a flag that ssl_jax adds"
    if "ynn_fusion" in given:
        return "as XLA_FLAGS says"
    return "as JAX has them: an accelerator may be used, or the flag is not known for this jaxlib"


def _probed(timeout: float) -> dict[str, Any]:
    """What `probe` finds in a process of its own; "error" where that ends or stays away."""
    command = [sys.executable, "-m", "ssl_jax.cli.doctor"]
    try:
        # Beside a run that goes on, a GPU has little memory left.
        env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
    except subprocess.TimeoutExpired:
        told = f"JAX and its devices said nothing for {timeout:g} s (a pod's answer on all hosts)"
        return {"broken": {}, "error": told}
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    except (IndexError, ValueError):
        said = [line for line in done.stderr.splitlines() if line.strip()]
        last = said[-1].strip()[:200] if said else "nothing"
        return {"broken": {}, "error": f"JAX ended with code {done.returncode}, saying: {last}"}


def probe() -> dict[str, Any]:
    """Imports what everything needs and computes on each device.

    Returns:
      "broken", modules that can't be imported with the reason; and where JAX can: "backend",
      "devices" (each "kind", "memory" in bytes or None, "computes", "seconds", "error"), or
      "error".
    """
    broken = {}
    for module in _CORE.values():
        try:
            importlib.import_module(module)
        except BaseException as error:
            broken[module] = _told(error)
    found: dict[str, Any] = {"broken": broken}
    if "jax" in broken or "jaxlib" in broken:
        return found | {"error": "JAX can't be imported"}
    import jax

    try:
        devices = jax.local_devices()
        found["backend"] = jax.default_backend()
    except Exception as error:
        return found | {"error": _told(error)}
    return found | {"devices": [_computed(device) for device in devices]}


def _computed(device: Any) -> dict[str, Any]:
    """What a device is, and whether it computes."""
    import jax
    import jax.numpy as jnp

    told: dict[str, Any] = {"kind": device.device_kind, "memory": None, "computes": False}
    told["error"] = ""
    since = time.perf_counter()
    try:
        told["memory"] = (device.memory_stats() or {}).get("bytes_limit")
        ones = jax.device_put(jnp.ones((64, 64)), device)
        total = float(jax.jit(lambda x: (x @ x).sum())(ones))
        told["computes"] = total == 64.0**3
        told["error"] = "" if told["computes"] else f"a sum is {total} and not {64**3}"
    except Exception as error:
        told["error"] = _told(error)
    return told | {"seconds": time.perf_counter() - since}


def _told(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _features(versions: dict[str, str | None]) -> Iterator[dict[str, Any]]:
    for feature in _FEATURES:
        missing = [name for name in feature.needs if versions[name] is None]
        yield {
            "name": feature.name,
            "use": feature.use,
            "there": not missing,
            "told": f"without {', '.join(missing)}" if missing else "",
            "install": _install(feature.extra, missing) if missing else "",
        }


def _hardware(versions: dict[str, str | None], jax: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Accelerators: whether JAX uses them, and if it doesn't, whether they seem to be there."""
    seen = {
        "NVIDIA GPUs": ("gpu", "cuda", "jax-cuda-plugin", _any(("/dev/nvidia0", "/dev/dxg"))),
        "TPUs": ("tpu", "tpu", "libtpu", _any(("/dev/accel0", "/dev/vfio/0"))),
    }
    for name, (platform_name, extra, package, there) in seen.items():
        used = jax.get("backend") == platform_name
        if used:
            told = ""
        elif not there:
            told = "none seen on this machine"
        elif versions[package] is None:
            told = f"there is one, without {package}"
        else:
            told = "there is one, and JAX does not use it"
        install = _install(extra, []) if there and not used else ""
        yield {"name": name, "use": "used if seen", "there": used, "told": told, "install": install}


def _any(paths: tuple[str, ...]) -> bool:
    return any(os.path.exists(path) for path in paths)


def _processes() -> dict[str, Any]:
    """Several processes that are one run: what a cluster has set."""
    set_by = [f"{what} ({name})" for name, what in _CLUSTERS.items() if os.environ.get(name)]
    count = os.environ.get("JAX_NUM_PROCESSES", "")
    absent = [n for n in ("JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS") if n not in os.environ]
    told = f"found: {', '.join(set_by)}" if set_by else "no cluster found, a run is one process"
    if count == "1":
        told = "JAX_NUM_PROCESSES=1, a run is one process"
    elif count and absent:
        told = f"JAX_NUM_PROCESSES is set without {' and '.join(absent)}"
    return {
        "name": "several processes",
        "use": "docs/pods.md",
        "there": not (absent and count not in ("", "1")),
        "told": told,
        "install": "",
    }


def _install(extra: str, missing: list[str]) -> str:
    """The command that brings what is missing: an extra of this package, or by name."""
    pip = f"{sys.executable} -m pip install"
    if not extra:
        return f"{pip} {' '.join(missing)}"
    root = Path(__file__).parents[2]
    if not (root / "constraints.txt").is_file():
        return f"{pip} 'ssl_jax[{extra}]'"
    # In a clone, where the versions are pinned that were tested; a TPU's machine has its own, and
    # an environment with another JAX keeps it.
    ours = f"jax=={_version('jax')}\n" in (root / "constraints.txt").read_text()
    pinned = f"-c {root}/constraints.txt " if ours and extra != "tpu" else ""
    return f"{pip} {pinned}-e '{root}[{extra}]'"


def text(found: dict[str, Any], brief: bool = False) -> str:
    """What `examine` found in lines for people.

    Args:
      found: by `examine`.
      brief: only what is wrong, and the verdict.
    """
    rows = [] if brief else [*_machine(found), "", *_devices(found["jax"]), "", *_table(found), ""]
    return "\n".join([*rows, *_verdict(found)])


def _machine(found: dict[str, Any]) -> Iterator[str]:
    yield f"ssl_jax {found['ssl_jax']}, Python {found['python']}, {found['platform']}"
    yield (
        f"{found['cpu_cores']} CPU cores, {found['memory'] / _GIB:.1f} GiB of memory, "
        f"{found['disk_free'] / _GIB:.1f} GiB free on the disk of {found['folder']}"
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
        does = f"computes ({device['seconds']:.2f} s)" if device["computes"] else device["error"]
        yield f"  {jax['backend']} {number}: {device['kind']}{memory}, {does}"


def _table(found: dict[str, Any]) -> Iterator[str]:
    yield f"XLA_FLAGS              {found['xla_flags'] or '-'}"
    yield f"convolutions on a CPU  {found['cpu_convolutions']}"
    yield ""
    yield "features"
    for feature in found["features"]:
        there = "yes" if feature["there"] else "no"
        told = feature["told"] or feature["use"]
        yield f"  {there:<5}{feature['name']}: {told}"
        if feature["install"]:
            yield f"         {feature['install']}"


def _verdict(found: dict[str, Any]) -> Iterator[str]:
    broken = found["jax"]["broken"]
    for module, reason in broken.items():
        yield f"broken: {module} can't be imported ({reason})"
    for name in _CORE:
        if found["versions"][name] is None and _CORE[name] not in broken:
            yield f"broken: {name} is not installed as a package"
    if "error" in found["jax"]:
        yield f"broken: {found['jax']['error']}"
    for number, device in enumerate(found["jax"].get("devices", ())):
        if not device["computes"]:
            yield f"broken: device {number} does not compute ({device['error']})"
    if found["healthy"]:
        yield "What every run needs is there and works."
    else:
        yield "Not everything works that every run needs: see what is broken above."


if __name__ == "__main__":
    sys.stdout.write(json.dumps(probe()) + "\n")
