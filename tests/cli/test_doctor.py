"""`ssl-jax doctor` on this machine and on simulated ones."""

import ast
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from ssl_jax import __version__
from ssl_jax.cli import doctor
from ssl_jax.cli import main as cli

WORKS = {
    "broken": {},
    "backend": "cpu",
    "devices": [{"kind": "cpu", "memory": None, "computes": True, "seconds": 0.1, "error": ""}],
}


@pytest.fixture
def machine(monkeypatch):
    """Replaces the subprocess, whose imports take seconds, by one with the given result."""

    def make(found):
        monkeypatch.setattr(doctor, "_probed", lambda timeout: found)

    make(WORKS)
    return make


def doctor_output(capsys, *arguments):
    code = cli.main(["doctor", *arguments])
    return code, capsys.readouterr().out


def feature(out, name):
    (line,) = re.findall(rf"^  (?:yes|no) +{re.escape(name)}: .*(?:\n {{9}}.*)?", out, re.M)
    return line


def test_all_devices_work_on_this_machine():
    """In subprocesses as for a user; JAX computes on all simulated devices."""
    line = [sys.executable, "-m", "ssl_jax.cli", "doctor", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ssl_jax"] == __version__ and found["jax"]["backend"] == "cpu"
    assert [device["computes"] for device in found["jax"]["devices"]] == [True] * 8
    assert found["versions"]["jax"] == metadata.version("jax") and found["jax"]["broken"] == {}


@pytest.mark.parametrize("seconds", ["0", "1e9", "inf", "nan"])
def test_timeout_is_positive_and_at_most_a_day(seconds, machine, capsys):
    assert cli.main(["doctor", f"--timeout={seconds}"]) == 2
    assert "set it above 0, and to at most 86400 seconds" in capsys.readouterr().err


def test_doctor_imports_no_large_package(machine):
    script = (
        "import sys\nfrom ssl_jax.cli import doctor\n"
        "doctor._probed = lambda timeout: {'broken': {}}\n"
        "doctor.text(doctor.examine())\n"
        "sys.exit(bool({'jax', 'numpy', 'tensorflow', 'wandb'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_report_lists_machine_devices_versions_and_features(machine, capsys):
    code, out = doctor_output(capsys)
    assert code == 0
    for part in (f"ssl_jax {__version__}", "GiB of free disk space", "cpu 0: cpu, works (0.10 s)"):
        assert part in out
    assert re.search(rf"^  jax +{re.escape(metadata.version('jax'))}$", out, re.M)
    assert "All required packages are installed and all devices work." in out
    for name in ("images on disk", "TensorFlow Datasets", "plans for TPUs", "Weights & Biases"):
        assert feature(out, name)
    assert doctor_output(capsys, "--quiet") == (
        0,
        "All required packages are installed and all devices work.\n",
    )
    assert json.loads(doctor_output(capsys, "--json")[1])["healthy"] is True


def test_required_packages_match_the_install_requirements():
    """Reads setup.py, as the metadata of an editable installation may be older."""
    tree = ast.parse((Path(doctor.__file__).parents[2] / "setup.py").read_text())
    (call,) = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and n.keywords[4:])
    given = {k.arg: k.value for k in call.keywords}
    names = {re.match(r"[\w-]+", n.value)[0] for n in given["install_requires"].elts}
    assert set(doctor._CORE) == names | {"jaxlib"}  # which JAX brings
    extras = {key.value for key in given["extras_require"].keys}
    assert {f.extra for f in doctor._FEATURES if f.extra} | {"cuda", "tpu"} <= extras


def test_missing_package_is_reported_with_its_install_command(machine, capsys, monkeypatch):
    find = doctor.importlib.util.find_spec
    absent = ("tensorflow", "tensorflow_datasets", "libtpu", "wandb", "torch")
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    code, out = doctor_output(capsys)
    assert code == 0
    root = doctor.Path(doctor.__file__).parents[2]
    for name, missing, extra in (
        ("images on disk", "missing tensorflow\n", "data"),
        ("TensorFlow Datasets", "missing tensorflow, tensorflow-datasets", "data"),
        ("plans for TPUs", "missing libtpu", "plan"),
        ("Weights & Biases", "missing wandb", "wandb"),
    ):
        line = feature(out, name)
        assert line.startswith("  no ") and missing in line
        assert (
            f"{sys.executable} -m pip install -c {root}/constraints.txt -e '{root}[{extra}]'"
            in line
        )
    assert feature(out, "PyTorch, to load exports").endswith("-m pip install torch")
    assert feature(out, "export to PyTorch").startswith("  yes ")
    # Outside a clone, no versions are pinned.
    monkeypatch.setattr(doctor, "__file__", "/nowhere/ssl_jax/cli/doctor.py")
    assert doctor_output(capsys)[1].count("pip install 'ssl_jax[data]'") == 3


def test_folders_need_no_array_record_but_records_do(machine, capsys, monkeypatch):
    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util,
        "find_spec",
        lambda name: None if name == "array_record" else find("json"),
    )
    out = doctor_output(capsys)[1]
    assert feature(out, "images on disk").startswith("  yes ")
    for name in ("records", "TensorFlow Datasets"):
        line = feature(out, name)
        assert line.startswith("  no ") and "missing array_record\n" in line


def test_corrupt_installation_does_not_crash_doctor(machine, capsys, monkeypatch):
    def broken(name):
        raise {"jax": OSError}.get(name, metadata.PackageNotFoundError)(name)

    def lost(name):
        raise ValueError(f"{name}.__spec__ is None")

    monkeypatch.setattr(doctor.backend, "tune_cpu", lambda: None)
    monkeypatch.setattr(doctor.metadata, "version", broken)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lost)
    code, out = doctor_output(capsys)
    assert code == 1 and "broken: jax is not an installed package" in out


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"broken": {"optax": "ImportError: no x"}} | {"devices": WORKS["devices"]}
         | {"backend": "cpu"}, "broken: optax can't be imported (ImportError: no x)"),
        ({"broken": {}, "error": "JAX exited with code -6: F"}, "code -6: F"),
        ({"broken": {}, "backend": "gpu", "devices": [
            {"kind": "H100", "memory": 80 * 2**30, "computes": False, "seconds": 1, "error": "E"}
        ]}, "gpu 0: H100, 80.0 GiB, E"),
    ],
)  # fmt: skip
def test_broken_machine_is_reported_with_exit_code_1(machine, capsys, found, message):
    machine(found)
    code, out = doctor_output(capsys)
    assert code == 1 and message in out and "packages or devices do not work" in out
    brief = doctor_output(capsys, "--quiet")[1]
    assert brief.startswith("broken: ") and "versions" not in brief


def test_crash_or_hang_of_the_subprocess_is_reported(monkeypatch):
    def run(result):
        def instead(command, **options):
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(doctor.subprocess, "run", instead)
        return doctor._probed(5.0)["error"]

    assert "did not respond within 5 s" in run(subprocess.TimeoutExpired("x", 5))
    aborted = SimpleNamespace(stdout="", stderr="F0 Unknown flag in XLA_FLAGS\n\n", returncode=-6)
    assert run(aborted) == "JAX exited with code -6: F0 Unknown flag in XLA_FLAGS"


def test_import_error_is_reported_on_one_line(monkeypatch, capsys):
    """Includes SystemExit, which some packages raise on import."""
    import jax  # noqa: F401 - its first import calls the function that is replaced

    real = doctor.importlib.import_module

    def importing(name, package=None):
        if name == "optax":
            raise SystemExit("two\nlines")
        if name == "PIL":
            raise OSError("libjpeg is gone")
        return real(name, package)

    monkeypatch.setattr(doctor.importlib, "import_module", importing)
    found = doctor.probe()
    assert found["broken"] == {
        "optax": "SystemExit: two lines",
        "PIL": "OSError: libjpeg is gone",
    }
    assert found["backend"] == "cpu" and all(d["computes"] for d in found["devices"])


@pytest.mark.parametrize(
    ("variables", "available", "message"),
    [
        ({}, True, "no cluster found"),
        ({"SLURM_JOB_ID": "1"}, True, "found: Slurm (SLURM_JOB_ID)"),
        ({"JAX_NUM_PROCESSES": "1", "SLURM_JOB_ID": "1"}, True, "runs use one process"),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "a:1"},
            False,
            "JAX_NUM_PROCESSES is set without JAX_PROCESS_ID",
        ),
    ],
)
def test_cluster_variables_are_reported(monkeypatch, variables, available, message):
    for name in (*doctor._CLUSTERS, "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = doctor._processes()
    assert found["available"] == available and message in found["note"]


def test_unused_accelerator_is_reported_with_the_install_command(monkeypatch):
    monkeypatch.setattr(doctor.os.path, "exists", lambda path: path == "/dev/nvidia0")
    gpu, tpu = doctor._hardware({"jax-cuda-plugin": None, "libtpu": None}, {"backend": "cpu"})
    assert gpu["note"] == "found, but jax-cuda-plugin is missing" and "[cuda]'" in gpu["install"]
    assert tpu["note"] == "none found on this machine" and tpu["install"] == ""
    gpu, _ = doctor._hardware({"jax-cuda-plugin": "0.10", "libtpu": None}, {"backend": "gpu"})
    assert gpu["available"] and gpu["install"] == ""
