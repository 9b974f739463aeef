"""Links planted in place of everything that the package writes: none is followed.

The names are found by tracing what commands open, create and rename, and by listing what they leave
behind, as Orbax and ArrayRecord write outside of Python. Names that differ between two runs can't
be foretold, so nothing can be planted there.
"""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from images import fill
from tiny import share_steps

from ssl_jax.cli import main as cli
from ssl_jax.cli.failures import _unexpected
from ssl_jax.run.nonfinite import NonfiniteGuard

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[1]
CONFIG = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from tiny import tiny_config, with_whole_images

def get_config():
    config = with_whole_images(tiny_config(steps=2, batch_size=64))
    config.eval.update(at_end=True, labels_per_class=(1,))
    return config
"""
BRIEF = ("steps=1", "batch_size=16", "views.view.crop.sampler=none")
GRID = ("--rates=0.1", "--decays=0")
# The command that trains in each default folder.
TRAINED = {
    "run/linear_simclr": "linear recipe",
    "run/finetune_1": "finetune",
    "run/finetune_1/distill": "distill",
    "run/transfer": "transfer",
    "run/transfer/digits": "transfer",
    "run/transfer/digits/chosen_rate_0.1_decay_0": "transfer",
}
_traced: list[str] | None = None


def _trace(event, arguments):
    if _traced is None:
        return
    if event == "open" and isinstance(arguments[0], str):
        if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            _traced.append(arguments[0])
    elif event in ("os.mkdir", "os.rename"):
        _traced.append(str(arguments[event == "os.rename"]))


sys.addaudithook(_trace)  # for the rest of the process


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A config file and a folder of images of one size."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "config.py").write_text(CONFIG)
    (root / "sets.json").write_text('{"digits": {"data": {}}}')
    fill(root / "images", per_class=1)
    for file in (root / "images").rglob("*.png"):
        file.write_bytes((root / "images" / "cat" / "0.png").read_bytes())
    return root


def run_commands(inputs, root, only=()):
    """Runs the commands that write files, or only some; returns their exit codes by name."""
    run, config = root / "run", f"--config={inputs / 'config.py'}"
    source = f"--from={run}"
    brief = [f"--config.{each}" for each in BRIEF]
    lines = {
        "pretrain": [config, f"--workdir={run}"],
        "report": [run],
        "knn": [source],
        "linear": [source],
        "features": [source, f"--out={root / 'features.npz'}"],
        "linear recipe": [source, "--recipe=simclr", *brief],
        "finetune": [source, *brief],
        "distill": [f"--from={run / 'finetune_1'}", *brief],
        "transfer": [source, f"--sets={inputs / 'sets.json'}", *GRID, *brief],
        "views": [config, f"--out={root / 'views.png'}"],
        "export torch": [source, "--format=torch", f"--out={root / 'encoder.safetensors'}"],
        "export jax": [source, "--format=jax", f"--out={root / 'run.safetensors'}"],
        "export program": [source, "--format=program", f"--out={root / 'encoder.bin'}"],
        "export folder": [source, "--format=folder", f"--out={root / 'hub'}"],
        "data pack": [inputs / "images", root / "packed.npz"],
        "data convert": [inputs / "images", root / "records"],
    }
    codes = {}
    for name in only or lines:
        line = lines[name]
        words = name.split() if name.startswith("data") else name.split()[:1]
        codes[name] = cli.main([*words, *map(str, line)])
    _unexpected(ValueError("x"), run)
    NonfiniteGuard(0, run, lambda step: np.zeros(1))._write(1, 1, {})
    return codes


@pytest.fixture(scope="module")
def written(inputs, tmp_path_factory):
    """Names of what two runs both write, relative to their folder."""
    global _traced
    found = []
    with pytest.MonkeyPatch.context() as patch:
        share_steps(patch)
        for number in range(2):
            root, _traced = tmp_path_factory.mktemp(f"traced{number}"), []
            codes = run_commands(inputs, root)
            names, _traced = _traced, None
            assert set(codes.values()) == {0}, codes
            names += map(str, root.rglob("*"))
            inside = {Path(os.path.abspath(name)) for name in names}
            found.append({p.relative_to(root) for p in inside if p.is_relative_to(root)})
    names = found[0] & found[1] - {Path(), Path("run")}
    folders = {name for name in names if (root / name).is_dir() or "orbax" in name.name}
    return names - folders, folders, root / "run"


def test_traced_names_include_files_of_all_kinds(written):
    files, folders = ({str(name) for name in names} for names in written[:2])
    run = {"config.json", ".lock", "metrics.jsonl", "report.html", "error.txt", "nonfinite.json"}
    assert {f"run/{name}" for name in run} | {"hub/README.md", "records/index.npz"} <= files
    assert {"run/checkpoints", "run/evals", "run/checkpoints/2", *TRAINED} <= folders
    assert any("orbax-checkpoint-tmp" in name for name in folders | files)
    # Temporary files and TensorBoard's events have names that can't be foretold.
    assert not [name for name in files if "/events." in name or "/." in name.replace("/.lock", "")]


def test_no_file_is_written_through_a_link(inputs, written, tmp_path, monkeypatch):
    """A dangling link: whoever opens it to write creates its target."""
    share_steps(monkeypatch)
    root, victims = tmp_path / "root", tmp_path / "victims"
    victims.mkdir()
    planted = [name for name in written[0] if "checkpoints" not in name.parts]
    planted = [name for name in planted if name.name != ".lock"]
    for number, name in enumerate(planted):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(victims / str(number))
    assert run_commands(inputs, root)["pretrain"] == 0
    assert not list(victims.iterdir())


def test_no_folder_and_no_lock_is_used_through_a_link(inputs, written, tmp_path, monkeypatch):
    share_steps(monkeypatch)
    nested = [Path(name) for name in TRAINED]
    names = sorted(name for name in written[1] if name.parts[0] == "run")
    # Runs inside the run are tested below. Folders inside a checkpoint are in a new folder.
    names = [name for name in names if len(name.parts) <= 3 or "checkpoints" not in name.parts]
    names = [name for name in names if not any(name.is_relative_to(each) for each in nested)]
    for number, name in enumerate([*names, Path("run/.lock")]):
        root, victim = tmp_path / str(number), tmp_path / f"victim{number}"
        (root / name).parent.mkdir(parents=True)
        victim.mkdir()
        target = victim / "file" if name.name == ".lock" else victim
        (root / name).symlink_to(target)
        config = f"--config={inputs / 'config.py'}"
        codes = [cli.main(["pretrain", config, f"--workdir={root / 'run'}"])]
        codes.append(cli.main(["report", str(root / "run")]))
        codes.append(cli.main(["knn", f"--from={root / 'run'}"]))
        assert any(codes), name
        assert not list(victim.iterdir()), name


@pytest.mark.parametrize("name", TRAINED)
def test_no_run_is_trained_through_a_link(inputs, written, tmp_path, monkeypatch, name):
    share_steps(monkeypatch)
    root, victim = tmp_path / "root", tmp_path / "victim"
    inside = shutil.ignore_patterns("linear_simclr", "transfer", "distill")
    shutil.copytree(written[2], root / "run", ignore=inside)
    shutil.rmtree(root / name, ignore_errors=True)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    victim.mkdir()
    (root / name).symlink_to(victim)
    assert run_commands(inputs, root, [TRAINED[name]]) == {TRAINED[name]: 2}
    assert not list(victim.iterdir())
