"""Paths that the system refuses are one sentence in every command, before anything is computed."""

import importlib
import os
import tempfile
from pathlib import Path

import pytest

from ssl_jax.cli import main as cli
from ssl_jax.config import default_config
from ssl_jax.run.folder import write_config

ROOT = Path(__file__).parents[2]
DIGITS = f"--config={ROOT / 'configs' / 'simclr_digits.py'}"
PRETRAIN = ("pretrain", DIGITS, "--workdir=new")
# {} stands for the path. Of an output only the folder is opened.
INPUTS = {
    "--config": ("config", "--config={}"),
    "--import": ("knn", "--from=run", "--import={}"),
    "folder": (*PRETRAIN, "--config.data.name=folder", "--config.data.dir={}"),
    "packed": (*PRETRAIN, "--config.data.name=packed", "--config.data.dir={}"),
    "records": (*PRETRAIN, "--config.data.name=records", "--config.data.dir={}"),
    "init_from": (*PRETRAIN, "--config.init_from.path={}"),
    "report": ("report", "{}"),
    "compare": ("plan", DIGITS, "--topology=h100:1", "--compare={}"),
    "--from": ("knn", "--from={}"),
    "safetensors": ("export", "--from={}.safetensors", "--format=jax", "--out=o.safetensors"),
    "--sets": ("transfer", "--from=run", "--sets={}"),
    "import": ("import", "{}", "--out=o.safetensors"),
    "pack": ("data", "pack", "{}", "o.npz"),
    "convert": ("data", "convert", "{}", "o"),
}
OUTPUTS = {
    "--workdir": ("pretrain", DIGITS, "--workdir={}"),
    "views": ("views", DIGITS, "--out={}"),
    "features": ("features", "--from=run", "--out={}"),
    "exported": ("export", "--from=run", "--format=jax", "--out={}"),
    "packed file": ("data", "pack", "images", "{}.npz"),
    "converted folder": ("data", "convert", "images", "{}"),
}


@pytest.fixture(scope="module")
def places():
    """Paths by the reason why they can't be opened, in the folder of a run and of images.

    Permissions don't hold for root, who becomes nobody for these tests, and might not read Python's
    own files then.
    """
    for module in sorted((ROOT / "ssl_jax" / "cli").glob("[a-z]*.py")):
        importlib.import_module(f"ssl_jax.cli.{module.stem}")
    tensorflow = pytest.importorskip("tensorflow", reason="reads records")
    tensorflow.io.gfile.exists("run")
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        here = Path(name)
        here.chmod(0o777)
        patch.chdir(here)
        (here / "run").mkdir()
        write_config(here / "run", default_config(), "")
        (here / "run").chmod(0o777)
        (here / "images" / "a").mkdir(parents=True)
        (here / "images" / "a" / "0.png").write_bytes(b"")
        for suffix in ("", ".safetensors", ".npz"):
            (here / f"loop{suffix}").symlink_to(f"loop{suffix}")
        (here / "locked").mkdir()
        (here / "locked").chmod(0)
        for folder in ("folder", "images/lost+found"):
            (here / folder).mkdir()
            (here / folder).chmod(0)
        for name in ("file", "file.safetensors"):
            (here / name).write_text("{}")
            (here / name).chmod(0)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield {
                "Too many levels of symbolic links": "loop",
                "File name too long": "x" * 300,
                "Permission denied": "locked/x",
                "a folder": "folder",
                "a file": "file",
            }
        finally:
            if root:
                os.seteuid(0)
            for name in ("locked", "folder", "images/lost+found"):
                (here / name).chmod(0o755)


def assert_one_sentence(capsys, arguments, path, reason):
    code = cli.main([argument.format(path) for argument in arguments])
    error = capsys.readouterr().err
    assert code == 2, error
    (line,) = [line for line in error.splitlines() if "oneDNN" not in line and "absl" not in line]
    assert line.startswith("error: ") and path in line and reason in line


@pytest.mark.parametrize(
    "reason", ["Too many levels of symbolic links", "File name too long", "Permission denied"]
)
@pytest.mark.parametrize("what", INPUTS | OUTPUTS)
def test_refused_path_is_one_sentence(places, capsys, what, reason):
    assert_one_sentence(capsys, (INPUTS | OUTPUTS)[what], places[reason], reason)


@pytest.mark.parametrize("what", INPUTS)
def test_unreadable_file_or_folder_is_one_sentence(places, capsys, what):
    folder = what in ("folder", "records", "report", "pack", "convert")
    path = places["a folder" if folder else "a file"]
    assert_one_sentence(capsys, INPUTS[what], path, "Permission denied")


def test_unreadable_class_folder_is_one_sentence(places, capsys):
    fix = "Make it readable, or set config.data.dir to a folder that has only images in it."
    assert_one_sentence(capsys, INPUTS["folder"], "images", "images/lost+found (Permission denied)")
    cli.main([argument.format("images") for argument in INPUTS["folder"]])
    assert fix in capsys.readouterr().err
