"""What `ssl-jax doctor` finds, on this machine and on others that are made up."""

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
    """A process that finds what it is told; its imports take seconds."""

    def make(found):
        monkeypatch.setattr(doctor, "_probed", lambda timeout: found)

    make(WORKS)
    return make


def told(capsys, *arguments):
    code = cli.main(["doctor", *arguments])
    return code, capsys.readouterr().out


def feature(out, name):
    (line,) = re.findall(rf"^  (?:yes|no) +{re.escape(name)}: .*(?:\n {{9}}.*)?", out, re.M)
    return line


def test_this_machine_works_and_is_told_in_a_process_of_its_own():
    """As it is typed: JAX computes on all the simulated devices."""
    line = [sys.executable, "-m", "ssl_jax.cli", "doctor", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ssl_jax"] == __version__ and found["jax"]["backend"] == "cpu"
    assert [device["computes"] for device in found["jax"]["devices"]] == [True] * 8
    assert found["versions"]["jax"] == metadata.version("jax") and found["jax"]["broken"] == {}


def test_nothing_big_is_imported(machine):
    script = (
        "import sys\nfrom ssl_jax.cli import doctor\n"
        "doctor._probed = lambda timeout: {'broken': {}}\n"
        "doctor.text(doctor.examine())\n"
        "sys.exit(bool({'jax', 'numpy', 'tensorflow', 'wandb'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_all_is_told(machine, capsys):
    code, out = told(capsys)
    assert code == 0
    for part in (f"ssl_jax {__version__}", "GiB free on the disk", "cpu 0: cpu, computes (0.10 s)"):
        assert part in out
    assert re.search(rf"^  jax +{re.escape(metadata.version('jax'))}$", out, re.M)
    assert "What every run needs is there and works." in out
    for name in ("images on disk", "TensorFlow Datasets", "plans for TPUs", "Weights & Biases"):
        assert feature(out, name)
    assert told(capsys, "--quiet") == (0, "What every run needs is there and works.\n")
    assert json.loads(told(capsys, "--json")[1])["healthy"] is True


def test_what_every_run_needs_is_what_the_package_requires():
    """By setup.py, for an editable installation may be older than it."""
    tree = ast.parse((Path(doctor.__file__).parents[2] / "setup.py").read_text())
    (call,) = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and n.keywords[4:])
    given = {k.arg: k.value for k in call.keywords}
    names = {re.match(r"[\w-]+", n.value)[0] for n in given["install_requires"].elts}
    assert set(doctor._CORE) == names | {"jaxlib"}  # which JAX brings
    extras = {key.value for key in given["extras_require"].keys}
    assert {f.extra for f in doctor._FEATURES if f.extra} | {"cuda", "tpu"} <= extras


def test_what_is_missing_is_told_with_the_command_that_brings_it(machine, capsys, monkeypatch):
    find = doctor.importlib.util.find_spec
    absent = ("tensorflow", "tensorflow_datasets", "libtpu", "wandb", "torch")
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    code, out = told(capsys)
    assert code == 0
    root = doctor.Path(doctor.__file__).parents[2]
    for name, without, extra in (
        ("images on disk", "without tensorflow\n", "data"),
        ("TensorFlow Datasets", "without tensorflow, tensorflow-datasets", "data"),
        ("plans for TPUs", "without libtpu", "plan"),
        ("Weights & Biases", "without wandb", "wandb"),
    ):
        line = feature(out, name)
        assert line.startswith("  no ") and without in line
        assert (
            f"{sys.executable} -m pip install -c {root}/constraints.txt -e '{root}[{extra}]'"
            in line
        )
    assert feature(out, "PyTorch, to use what is exported").endswith("-m pip install torch")
    assert feature(out, "export for PyTorch").startswith("  yes ")
    # Away from a clone there is nothing to pin.
    monkeypatch.setattr(doctor, "__file__", "/nowhere/ssl_jax/cli/doctor.py")
    assert told(capsys)[1].count("pip install 'ssl_jax[data]'") == 2


def test_a_corrupt_installation_does_not_end_it(machine, capsys, monkeypatch):
    def broken(name):
        raise {"jax": OSError}.get(name, metadata.PackageNotFoundError)(name)

    def lost(name):
        raise ValueError(f"{name}.__spec__ is None")

    monkeypatch.setattr(doctor.backend, "tune_cpu", lambda: None)
    monkeypatch.setattr(doctor.metadata, "version", broken)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lost)
    code, out = told(capsys)
    assert code == 1 and "broken: jax is not installed as a package" in out


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({"broken": {"optax": "ImportError: no x"}} | {"devices": WORKS["devices"]}
         | {"backend": "cpu"}, "broken: optax can't be imported (ImportError: no x)"),
        ({"broken": {}, "error": "JAX ended with code -6, saying: F"}, "code -6, saying: F"),
        ({"broken": {}, "backend": "gpu", "devices": [
            {"kind": "H100", "memory": 80 * 2**30, "computes": False, "seconds": 1, "error": "E"}
        ]}, "gpu 0: H100, 80.0 GiB, E"),
    ],
)  # fmt: skip
def test_what_is_broken_is_told_and_is_the_code(machine, capsys, found, sentence):
    machine(found)
    code, out = told(capsys)
    assert code == 1 and sentence in out and "Not everything works" in out
    brief = told(capsys, "--quiet")[1]
    assert brief.startswith("broken: ") and "versions" not in brief


def test_a_process_that_ends_or_stays_away_is_told(monkeypatch):
    def run(result):
        def instead(command, **options):
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(doctor.subprocess, "run", instead)
        return doctor._probed(5.0)["error"]

    assert "said nothing for 5 s" in run(subprocess.TimeoutExpired("x", 5))
    aborted = SimpleNamespace(stdout="", stderr="F0 Unknown flag in XLA_FLAGS\n\n", returncode=-6)
    assert run(aborted) == "JAX ended with code -6, saying: F0 Unknown flag in XLA_FLAGS"


def test_an_import_that_raises_is_a_line(monkeypatch, capsys):
    """By injection, in this process: SystemExit too, which some packages raise."""
    import jax  # noqa: F401 - while it is first imported it calls what is replaced

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
    ("given", "there", "sentence"),
    [
        ({}, True, "no cluster found"),
        ({"SLURM_JOB_ID": "1"}, True, "found: Slurm (SLURM_JOB_ID)"),
        ({"JAX_NUM_PROCESSES": "1", "SLURM_JOB_ID": "1"}, True, "a run is one process"),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "a:1"},
            False,
            "JAX_NUM_PROCESSES is set without JAX_PROCESS_ID",
        ),
    ],
)
def test_what_a_cluster_has_set_is_told(monkeypatch, given, there, sentence):
    for name in (*doctor._CLUSTERS, "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = doctor._processes()
    assert found["there"] == there and sentence in found["told"]


def test_an_accelerator_that_is_not_used_is_told(monkeypatch):
    monkeypatch.setattr(doctor.os.path, "exists", lambda path: path == "/dev/nvidia0")
    gpu, tpu = doctor._hardware({"jax-cuda-plugin": None, "libtpu": None}, {"backend": "cpu"})
    assert gpu["told"] == "there is one, without jax-cuda-plugin" and "[cuda]'" in gpu["install"]
    assert tpu["told"] == "none seen on this machine" and tpu["install"] == ""
    gpu, _ = doctor._hardware({"jax-cuda-plugin": "0.10", "libtpu": None}, {"backend": "gpu"})
    assert gpu["there"] and gpu["install"] == ""
