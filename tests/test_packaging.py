"""The package as users install it: from a wheel, outside this checkout."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

import pytest

import ssl_jax

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ssl_jax"


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the wheel from a copy, because setuptools writes next to its sources."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / "ssl_jax", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    run(*install, "--target", target, wheel, cwd=target)
    return target


@pytest.fixture(scope="module")
def wheel_metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_wheel_contains_the_whole_package_and_its_license(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("/LICENSE") for name in names)


def test_wheel_has_the_packages_version(wheel_metadata) -> None:
    assert wheel_metadata["Version"] == ssl_jax.__version__
    assert wheel_metadata["Requires-Python"] == ">=3.11"


def test_installed_package_imports_without_tensorflow(installed: Path, tmp_path: Path) -> None:
    # Modules that read files with TensorFlow report what to install; no other module needs it.
    program = """
import importlib, pkgutil, sys
sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = None
import ssl_jax
from ssl_jax.errors import UserError
for module in pkgutil.walk_packages(ssl_jax.__path__, "ssl_jax."):
    try:
        importlib.import_module(module.name)
    except UserError as error:
        assert module.name.startswith(("ssl_jax.data.", "ssl_jax.cli.convert")), module.name
        assert "'.[data]'" in str(error), error
print(ssl_jax.__file__)
"""
    out = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(out.strip()) == installed / "ssl_jax" / "__init__.py"


def test_installed_commands_show_their_help(installed: Path, tmp_path: Path) -> None:
    module = (sys.executable, "-m", "ssl_jax.cli")
    script = (sys.executable, installed / "bin" / "ssl-jax")
    for command in (module, script):
        out = run(*command, "--help", cwd=tmp_path, PYTHONPATH=str(installed))
        assert "pretrain" in out
        out = run(*command, "--version", cwd=tmp_path, PYTHONPATH=str(installed))
        assert out.strip() == ssl_jax.__version__


def imported_by(source: str) -> set[str]:
    """Returns the packages that a file imports, without the standard library and ssl_jax."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module)
    return {name.split(".")[0] for name in modules} - {*sys.stdlib_module_names, "ssl_jax"}


def requirements(wheel_metadata, *extras: str) -> set[str]:
    """Returns the requirements of the wheel with the given extras, on all platforms."""
    names = set()
    for line in wheel_metadata.get_all("Requires-Dist"):
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        if extra is None or extra[1] in extras:
            names.add(canonical(re.match(r"[\w.-]+", line)[0]))
    return names


def test_every_import_is_declared(wheel_metadata) -> None:
    declared = requirements(
        wheel_metadata, "data", "hf", "parquet", "pictures", "tiff", "wandb", "peers"
    )
    distributions = metadata.packages_distributions()
    imported = set().union(*(imported_by(path.read_text()) for path in PACKAGE.rglob("*.py")))
    assert {"jax", "flax"} <= imported
    undeclared = {
        name
        for name in imported
        if not declared & {canonical(each) for each in distributions.get(name, [name])}
    }
    assert not undeclared


def test_every_requirement_is_pinned(wheel_metadata) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    pinned = {canonical(pin.partition("==")[0]) for pin in pins}
    assert len(pinned) == len(pins)
    required = requirements(wheel_metadata, "data", "dev", "pictures", "plan")
    assert required - pinned <= {"tensorflow"}  # replaces tensorflow-cpu on other platforms
