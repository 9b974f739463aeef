"""Runs every command in README and docs, with small networks and few steps.

Commands that don't run here are listed in `ELSEWHERE`, with the reason. All commands share one
folder and one small run of `make quickstart`. A page's commands run in order, and none runs twice.
"""

import argparse
import ast
import contextlib
import importlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import images
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from PIL import Image

import ssl_jax
from ssl_jax.cli import main as cli
from ssl_jax.cli.grid import make_settings
from ssl_jax.config import default_config, flatten, load_config
from ssl_jax.downstream.transfer_learning import read_sets
from ssl_jax.plan.chips import parse_topology
from ssl_jax.run import processes

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in DOCS.glob("*.md"))]
SMALL = ("model.depth=4", "model.width=0.0625", "eval.trials=2")
BRIEF = ("steps=2", "log_every=100", "eval.knn_every_epochs=0", "checkpoint.every_epochs=0")
# Augmentation and bfloat16 take most of a step's compile time. Only `UNCHANGED` and the quickstart
# keep their configs' settings; the other commands train on whole images in float32.
UNCHANGED = "configs/moco_cifar10.py:solo"
QUICKSTARTS = {"--workdir=runs/quickstart", "--workdir=runs/stopped"}

# Prefixes of lines and blocks that this file doesn't run, and why.
ELSEWHERE = {
    "make ": "CI runs these targets: test_make_targets_exist",
    "git clone REPOSITORY": "needs the repository's address",
    "python3 -m venv ": "CI creates the environment by make",
    "ssl-jax sweep ": "starts processes: tests/cli/test_sweep.py; test_sweep_commands_are_valid",
    "python run_pretrain.py --config=configs/simclr_digits.py --workdir=runs/a --extend": (
        "commands here train two steps; tests/train/test_extension.py"
    ),
    "[###  ": "the output of a run",
    "pip install ": "installs from an index; CI does so by make",
    "python3.11 -m venv peers": "installs another library for comparison",
    "peers/bin/pip install ": "the same",
    "topology   ": "the output of the command above it",
    "gcloud ": "needs a TPU pod; test_configs_in_commands_load_with_their_overrides",
    "#!/bin/bash": "needs Slurm; the same",
    "apiVersion: ": "needs Kubernetes; the same",
    "JAX_COORDINATOR_ADDRESS=": "several hosts; tests/run/test_processes.py runs several processes",
    "export JAX_PLATFORMS=cpu JAX_COORDINATOR": "two processes; tests/run/test_processes.py",
    "XLA_FLAGS=": "the tests themselves see eight simulated devices, tests/conftest.py",
    "ssl-jax plan ": "needs libtpu, minutes: tests/tpu; test_plan_commands_are_valid",
    "python benchmarks/": "minutes to hours; test_benchmarks_accept_their_arguments",
    "python -X importtime ": "prints hundreds of lines; tests/test_init.py",
    "ssl-jax views --config=configs/simclr_digits.py --out=posterized.png": (
        "needs the page's diffs: test_diffs_of_new_augmentation_page_add_a_working_augmentation"
    ),
    "python run_pretrain.py --config=configs/simclr_imagenet.py": (
        "needs ImageNet; test_configs_in_commands_load_with_their_overrides"
    ),
    "python run_pretrain.py --config=my_method.py": "tests/test_new_method.py",
    "ssl-jax knn --from=runs/mine --import=": "the same",
    "python -m pytest tests/test_my_method.py": "the same",
    "python run_pretrain.py --config=configs/simclr_digits.py --workdir=runs/convnet": (
        "tests/models/test_registry.py"
    ),
    "ssl-jax knn --from=runs/convnet --import=": "the same",
    "ssl-jax export --from=runs/moco --format=": (
        "needs a ResNet-50: tests/interop/test_detectron2.py, tests/peers/test_export_to_torch.py"
    ),
}
# Scripts and outputs that are kept whole.
WHOLE = ("topology   ", "gcloud ", "#!/bin/bash", "apiVersion", "export JAX")
PYTHON_ELSEWHERE = {
    '"""Barlow Twins': "tests/test_new_method.py",
    "import jax\nfrom test_step import ONE": "the same",
    '"""A convolutional network without shortcuts': "tests/models/test_registry.py",
    "import safetensors.torch, timm": "needs timm: tests/peers/test_vit_weights.py",
    "import safetensors.torch, torch": "needs torch: tests/peers/test_export_to_torch.py",
    "from torch_encoder import": "the same",
    "import safetensors.torch, torchvision": "the same",
    "model = dict(": "a config of MMDetection; the same",
}


def blocks(page, language=""):
    """Returns a page's code blocks in a language; "" for commands and output."""
    text = (ROOT / page).read_text()
    return [
        body
        for kind, body in re.findall(r"^```(\S*)\n(.*?)^```", text, re.M | re.S)
        if kind == language
    ]


def starts_with_one_of(text, table):
    return [begins for begins in table if text.startswith(begins)]


def commands(page):
    """Returns a page's commands, one per line; scripts and outputs are kept whole."""
    lines = []
    for block in blocks(page):
        if block.startswith(WHOLE):
            lines.append(block)
        else:
            lines += block.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip()]


def runnable(page):
    """Returns the commands of a page that run here."""
    return [line for line in commands(page) if not starts_with_one_of(line, ELSEWHERE)]


QUICKSTART = "python run_pretrain.py --config=configs/simclr_digits.py --workdir=runs/quickstart"
PROGRAM = "ssl-jax export --from=runs/quickstart --format=program --out=encoder.bin"
# Commands of other pages that a page relies on.
BEFORE = {
    "docs/configs.md": (
        "ssl-jax data pack cifar10/train train.npz",
        "ssl-jax data pack cifar10/test test.npz",
    ),
    "docs/quickstart.md": (
        "python run_pretrain.py --config=configs/simclr_digits.py --workdir=runs/a "
        "--config.optim.lr=0.5",
    ),
}


def fill_folder(folder):
    """Creates the files that the commands need in the folder where they run."""
    for name in ("configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("PATH", "cifar10/train", "cifar10/test", "DIR/train", "DIR/test"):
        # Two classes of four fill one batch everywhere, so each program is compiled for one shape.
        images.fill(folder / name, per_class=4, classes=("cat", "dog"))
        for file in (folder / name).rglob("*.png"):
            small = images.Image.open(file).resize((32, 32))
            small.save(file)
    rows = [f"PATH/{kind}/{i}.png,{kind}" for kind in ("cat", "dog") for i in range(4)]
    (folder / "list.csv").write_text("\n".join(["image,label", *rows]))
    with h5py.File(folder / "train.h5", "w") as file:
        file["images"] = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)
        file["labels"] = np.arange(10) % 2
    (sets,) = blocks("docs/evaluate.md", "json")
    first, *_ = json.loads(sets).items()
    (folder / "sets.json").write_text(json.dumps(dict([first])))
    (folder / "my_method.py").write_text(blocks("docs/new_method.md", "python")[0])


class Typed:
    """Runs commands in a folder, each once, and keeps their output."""

    def __init__(self, folder):
        fill_folder(folder)
        self.folder, self.printed = folder, {}

    def type(self, *lines):
        """Runs commands that haven't run yet; returns the output of all."""
        return "".join(map(self._type, lines))

    def _type(self, line):
        words = tuple(shlex.split(line, comments=True))
        if words not in self.printed:
            out, errors = io.StringIO(), io.StringIO()
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
                    run(words)
            except BaseException as error:
                raise AssertionError(f"{line}\n{errors.getvalue()}") from error
            self.printed[words] = out.getvalue()
        return self.printed[words]

    def page(self, page):
        """Runs the commands that a page relies on and its own; returns their output."""
        return self.type(*BEFORE.get(page, ()), *runnable(page))


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """A folder with a small run of `make quickstart`."""
    made = Typed(tmp_path_factory.mktemp("docs"))
    with contextlib.chdir(made.folder):
        made.type(QUICKSTART)
    return made


@pytest.fixture
def here(typed, monkeypatch):
    """The folder of `typed`, as the working directory."""
    monkeypatch.chdir(typed.folder)
    return typed.folder


FEW_IMAGES = ("batch_size=8", "eval.batch_size=8")


def plain(views):
    """Returns overrides without augmentation and bfloat16, so that a step compiles fast."""
    whole = [f"{key}={value}" for key, value in tiny.WHOLE_IMAGE.items()]
    return ["dtype=float32", *(f"views.{name}.{key}" for name in views for key in whole)]


def changes(name, arguments):
    """Returns the overrides that make a command small."""
    config = next((a.split("=")[1] for a in arguments if a.startswith("--config=")), "")
    if name == "pretrain":
        small = [*SMALL, *BRIEF]
        loaded = load_config(config)
        digits = loaded.data.name == "digits"
        sizes = [f"views.{k}.size=8" for k, v in loaded.views.items() if v.size > 32]
        small += ["batch_size=64"] if digits else FEW_IMAGES
        if "--workdir=runs/quickstart" not in arguments:
            small.append("eval.at_end=False")
        if config != UNCHANGED and not {*arguments} & QUICKSTARTS:
            small += plain(loaded.views)
        small += ["simclr.memory_bank=0"] if "simclrv2" in config else []
        small += (
            ["moco.queue=64", "model.bn_group_size=0", "model.bn_splits=1"]
            if "moco" in config
            else []
        )
        return small + sizes
    if name in ("finetune", "distill", "transfer") or any("--recipe" in a for a in arguments):
        return ["steps=2", "eval.trials=2", "batch_size=32", "eval.at_end=False"]
    return []


def run(words):
    """Runs a command with small settings; fails if it does."""
    program, *arguments = words
    if program == "ssl-jax":
        name, *arguments = arguments
        added = [f"--config.{change}" for change in changes(name, arguments)]
        assert cli.main([name, *arguments, *added]) == 0
    elif arguments[0] == "run_pretrain.py":
        added = [f"--config.{change}" for change in changes("pretrain", arguments[1:])]
        assert cli.pretrain_main([*arguments[1:], *added]) == 0
    else:
        assert program == "python" and arguments[0].startswith("examples/"), words
        if "pretrain_folder" in arguments[0]:
            arguments += [*SMALL, *BRIEF, "eval.at_end=False"]
            arguments += [*FEW_IMAGES, *plain(("view1", "view2"))]
            arguments += ["views.view1.size=8", "views.view2.size=8"]
        run_program(*arguments)


def run_program(*arguments):
    before = sys.argv
    sys.argv = list(arguments)
    try:
        runpy.run_path(str(ROOT / arguments[0]))
    finally:
        sys.argv = before


# `make long` runs the commands; `make test` checks that all are run or listed, and load.
LONG = pytest.mark.long


@LONG
@pytest.mark.parametrize("page", [*filter(runnable, PAGES)])
def test_every_command_of_the_page_runs(page, typed, here):
    typed.page(page)


def test_commands_that_pages_rely_on_are_in_the_docs():
    every = {line for page in PAGES for line in runnable(page)}
    assert len(every) > 30
    for lines in ((QUICKSTART, PROGRAM), *BEFORE.values()):
        assert set(lines) <= every


@LONG
def test_commands_write_the_files_that_pages_describe(typed, here):
    typed.page("README.md")
    typed.page("docs/evaluate.md")
    page = (here / "runs" / "quickstart" / "report.html").read_text()
    for what in (
        "20 nearest neighbors",
        "linear classifier on features",
        "recipe simclr_cifar",
        "10 %",
    ):
        assert what in page
    assert "student" in (here / "runs" / "teacher" / "report.html").read_text()
    assert (here / "features.npz").exists() and (here / "views.png").exists()
    typed.page("docs/interop.md")
    assert "raw pixels" in (here / "hub" / "README.md").read_text()


@LONG
def test_examples_print_their_results(typed, here):
    printed = typed.page("docs/data.md") + typed.page("docs/quickstart.md")
    assert "optim.lr" in (here / "runs" / "quickstart" / "comparison.html").read_text()
    for line in (
        r"top-1 \d+\.\d\d %",
        r"accuracy \d+\.\d\d % .*folds",
        r"runs/example: encoder of step 2; ",
        r"runs/quickstart: step 2",
        r"kNN +top-1 \d+\.\d\d \[.*\] % of 450 images",
        r"5 labels per class: \d+\.\d % ± \d+\.\d",
    ):
        assert re.search(line, printed), line
    for name in ("encoder.safetensors", "encoder.bin"):
        (difference,) = re.findall(rf"exported/{name}: features differ by (\S+) at most", printed)
        assert float(difference) < 1e-3


def python_blocks():
    for page in PAGES:
        for block in blocks(page, "python"):
            if not starts_with_one_of(block, PYTHON_ELSEWHERE):
                yield pytest.param(page, block, id=f"{page}:{block.split()[1]}")


@LONG
@pytest.mark.parametrize(("page", "block"), [*python_blocks()])
def test_every_python_block_runs(page, block, typed, here):
    if page == "docs/interop.md":
        typed.type(PROGRAM)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    names = {"images": pictures}
    exec(block, names)
    if "features" in names:
        expected = ssl_jax.load("runs/quickstart").apply(pictures)
        np.testing.assert_allclose(names["features"], expected, rtol=1e-4, atol=1e-5)
    if isinstance(names.get("config"), ConfigDict):
        load_config("configs/simclr_digits.py")
        ssl_jax.config.validate(names["config"])


def test_data_sets_file_of_evaluate_page_is_read(tmp_path):
    file = tmp_path / "sets.json"
    file.write_text(blocks("docs/evaluate.md", "json")[0])
    assert [found.metric for found in read_sets(file)] == ["top1", "mean_per_class"]


def test_skipped_commands_are_still_in_the_docs():
    lines = [line for page in PAGES for line in commands(page)]
    for begins in ELSEWHERE:
        assert any(line.startswith(begins) for line in lines), begins
    programs = [block for page in PAGES for block in blocks(page, "python")]
    for begins in PYTHON_ELSEWHERE:
        assert any(block.startswith(begins) for block in programs), begins
    known = {"", "python", "json", "diff", "yaml"}
    for page in PAGES:
        found = set(re.findall(r"^```(\S+)\n", (ROOT / page).read_text(), re.M))
        assert {kind for kind in found if not kind.startswith("{")} <= known, page


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        text = (ROOT / page).read_text()
        named = re.findall(r"(?:^|`)make (\w+)[ \n`]", text, re.M)
        assert set(named) <= targets, page


def test_configs_in_commands_load_with_their_overrides():
    """Includes commands that can't run here."""
    tried = 0
    for page in PAGES:
        for block in blocks(page):
            text = re.sub(r"\\\n|\n +--", " --", block).replace("-- ", "")
            for line in text.splitlines():
                found = re.search(r"--config=(configs/\S+)", line)
                if not found or "posterize" in line or "convnet" in line:
                    continue
                overrides = re.findall(r"--config\.([\w.]+=[^\s\"$]+)", line)
                for file in re.findall(r"--import=(examples/\S+)", line):
                    runpy.run_path(str(ROOT / file))
                load_config(str(ROOT / found[1]), overrides)
                tried += 1
    assert tried > 15


def test_plan_commands_are_valid():
    for page in PAGES:
        for line in commands(page):
            if line.startswith("ssl-jax plan"):
                arguments = dict(word.split("=", 1) for word in shlex.split(line)[2:])
                assert arguments.keys() == {"--config", "--topology"}
                assert parse_topology(arguments["--topology"]).chips > 1


def test_sweep_commands_are_valid():
    for line in (line for page in PAGES for line in commands(page) if line.startswith("ssl-jax s")):
        overrides, rest = cli._split_overrides(shlex.split(line.partition(" > ")[0])[1:])
        args = cli._parser().parse_args(rest)
        assert len(make_settings(str(ROOT / args.config), overrides, args.grid)) == 6


class ParsedError(Exception):
    """The arguments were accepted."""


def stop_when_parsed(monkeypatch):
    """Makes programs raise `ParsedError` once they have parsed their arguments."""
    parser, inside = argparse.ArgumentParser, []

    def stopping(parse):
        def stop(self, *args, **kwargs):
            outermost = not inside
            inside.append(parse)
            try:
                found = parse(self, *args, **kwargs)
            finally:
                inside.pop()
            if outermost:
                raise ParsedError
            return found

        return stop

    for name in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(parser, name, stopping(getattr(parser, name)))


def test_benchmarks_accept_their_arguments(monkeypatch, tmp_path):
    stop_when_parsed(monkeypatch)
    monkeypatch.chdir(tmp_path)
    lines = {line for page in PAGES for line in commands(page)}
    lines = {line for line in lines if line.startswith("python benchmarks/")}
    assert len(lines) > 15
    for line in sorted(lines):
        _, file, *arguments = shlex.split(line)
        monkeypatch.setattr(sys, "argv", [file, *arguments])
        # Benchmarks import files next to them by name.
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        with pytest.raises(ParsedError):
            runpy.run_path(str(ROOT / file), run_name="__main__")


# Names in the text.


def schema():
    """Returns all keys and groups of the schema."""
    plain = default_config().to_dict()
    keys = flatten(plain) | {"views": {}}
    groups = {key.rpartition(".")[0] for key in keys}
    return set(keys) | groups | {group.split(".")[0] for group in groups}


NOT_KEYS = {"json", "py", "KEY", "update", "view", "x"}
OF_A_PAGE = {
    "docs/new_augmentation.md": "posterize",
    "docs/new_encoder.md": "convnet",
    "docs/new_method.md": "barlow_twins",
}


@pytest.mark.parametrize("page", PAGES)
def test_config_keys_on_the_page_exist(page):
    known = schema()
    for key in re.findall(r"config\.([A-Za-z_][\w.]*\w)", (ROOT / page).read_text()):
        if key.split(".")[0] in NOT_KEYS or OF_A_PAGE.get(page, "-") in key:
            continue
        key = re.sub(r"^views\.\w+", "views.view1", key)
        key = re.sub(r"\.update$", "", key)
        assert key in known, f"{page}: config.{key}"


def test_defaults_in_coming_from_match_the_schema():
    plain = flatten(default_config().to_dict())
    rows = [line.split(" | ") for line in text_of("docs/coming_from.md").splitlines()]
    ours = [row[1] for row in rows if len(row) == 3]
    found = [pair for cell in ours for pair in re.findall(r"`config\.([\w.]+)`, ([^;`]+)", cell)]
    checked = 0
    for key, documented in found:
        documented = documented.split(", and")[0].strip()
        value = plain[key]
        if re.fullmatch(r"\d{1,3}(,\d{3})+", documented):
            documented = documented.replace(",", "")
        if documented:  # not another key
            expected = () if documented == "empty" else literal(documented)
            assert value == expected, f"config.{key} is {value}, not {documented}"
            checked += 1
    assert checked > 30


def literal(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def text_of(page):
    return (ROOT / page).read_text()


def test_files_and_names_in_where_things_are_exist():
    text = text_of("docs/where_things_are.md")
    for name in re.findall(r"`([\w/]+\.(?:py|toml))`", text):
        assert (ROOT / "ssl_jax" / name).exists() or (ROOT / name).exists(), name
    places = re.findall(r"`([\w/]+)\.py`, `(\w+(?:\.(?!py`)\w+)?)`", text)
    assert ("losses", "nt_xent") in places and ("ema", "update") in places
    for file, name in places:
        found = importlib.import_module("ssl_jax." + file.replace("/", "."))
        for part in name.split("."):
            found = getattr(found, part)


def slug(heading):
    """Returns the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_exist(page):
    for target in re.findall(r"\]\(([^)#\s]*(?:#[^)\s]*)?)\)", text_of(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            assert anchor in map(slug, headings), f"{page}: {target}"


def test_every_page_is_in_the_table_of_contents():
    listed = set(re.findall(r"^(\w+)$", text_of("docs/index.md"), re.M))
    pages = {page.stem for page in (*DOCS.glob("*.md"), *DOCS.glob("*.rst"))} - {"index"}
    assert pages == listed


# Generated files.


def test_every_config_key_has_a_meaning(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    table = importlib.import_module("config_keys")
    missing = [key for key, _, meaning in table.rows() if not meaning]
    assert not missing, f"document them in ssl_jax/schema.py: {missing}"
    rows = {key: (default, meaning) for key, default, meaning in table.rows()}
    assert rows["moco.temperature"] == ("0.2", "Temperature of InfoNCE; v1: 0.07; positive")
    assert rows["views.*.flip"] == ("0.5", "Probability of a horizontal flip; from 0 to 1")
    assert rows["views.*.gray_first"] == ("False", "Apply grayscale before jitter (MoCo v1)")


def test_config_file_shown_in_docs_equals_the_file():
    shown = blocks("docs/configs.md", "python")[0]
    assert text_of("configs/simclr_folder.py").endswith('"""\n\n' + shown)


def test_diagrams_are_up_to_date():
    drawn = runpy.run_path(str(DOCS / "diagrams.py"))
    assert len(drawn["DIAGRAMS"]) == len(list((DOCS / "images").glob("*.svg")))
    for draw in drawn["DIAGRAMS"]:
        file = DOCS / "images" / f"{draw.__name__}.svg"
        assert file.read_text() == draw().svg(), "run python docs/diagrams.py"
        assert f"images/{file.name}" in text_of("docs/concepts.md") + text_of(
            "docs/where_things_are.md"
        )
    with pytest.raises(ValueError, match="doesn't fit"):
        drawn["Drawing"]("", "", 100).box(0, 0, "far too many words for one box", "net")


@LONG
def test_result_of_a_run_can_be_drawn(here, tmp_path):
    out = tmp_path / "result.png"
    runpy.run_path(str(DOCS / "result.py"))["main"](here / "runs" / "quickstart", out)
    with Image.open(out) as image:
        assert len(image.getcolors()) > 10
    assert out.stat().st_size < 150_000
    # A run that evaluates its target has a row of the online network, too.
    run = tmp_path / "run"
    shutil.copytree(here / "runs" / "quickstart", run)
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["rows"].insert(2, evaluation["rows"][0])
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    runpy.run_path(str(DOCS / "result.py"))["main"](run, tmp_path / "same.png")
    assert (tmp_path / "same.png").read_bytes() == out.read_bytes()


@LONG
def test_stopped_run_is_resumed_by_the_example(here, monkeypatch, capsys):
    monkeypatch.setattr(processes.Stop, "asked", lambda self, step: step == 1)
    run(QUICKSTART.replace("quickstart", "stopped").split())
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert ssl_jax.load("runs/stopped").step == 1
    run_program("examples/resume.py", "runs/stopped")
    assert "Resuming from step 1 of 2" in capsys.readouterr().out
    assert ssl_jax.load("runs/stopped").step == 2


POSTERIZED = """
import sys
import jax, numpy as np
from ssl_jax.cli import main as cli
from ssl_jax.config import default_config, from_json, to_json, view
from ssl_jax.data.augment import color, posterize
from ssl_jax.interop.card import _view

images = np.random.default_rng(0).random((64, 6, 6, 3), np.float32)
keys = jax.random.split(jax.random.key(0), 64)
off = dict(flip=0.0, gray=0.0, jitter=dict(prob=0.0), blur=dict(prob=0.0))
always = color(images, keys, view(**off, posterize=dict(prob=1.0, levels=4)))
thirds = np.array([0, 1, 2, 3]) / 3
expected = thirds[np.abs(images[..., None] - thirds).argmin(-1)]
np.testing.assert_allclose(always, expected, atol=1e-6)
half = np.asarray(color(images, keys, view(**off, posterize=dict(prob=0.5, levels=4))))
changed = np.array([np.allclose(a, b, atol=1e-6) for a, b in zip(half, expected)])
assert 16 < changed.sum() < 48
np.testing.assert_array_equal(half[~changed], images[~changed])
assert "posterize 0.5 (4 levels)" in _view(view(posterize=dict(prob=0.5)))
command = ["--config=configs/simclr_digits.py", "--out=posterized.png"]
assert cli.main(["views", *command, "--config.views.view1.posterize.prob=1.0"]) == 0
assert cli.main(["views", *command, "--config.views.view1.posterize.prob=2.0"]) == 2
sys.path.append("docs")
from config_keys import rows
assert not [key for key, _, meaning in rows() if not meaning]
import pytest
tests = ["tests/data/test_augment.py", "-k", "test_color_matches and posterize"]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *tests]))
"""
STALE = (
    "The diffs in docs/new_augmentation.md no longer apply. Make their changes by hand in a copy "
    "of the package and paste the hunks of its `git diff` into the page."
)


def apply_patch(patch, folder):
    """Runs `git apply`; if that fails, tries again with only the context above each change."""
    # Keeps git from applying the patch relative to a repository above the folder.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    above = re.sub(r"^(\+.*\n)(?: .*\n|\n)+(?=@@|\Z)", r"\1", patch, flags=re.M)
    for text, options in ((patch, []), (above, ["--recount", "--unidiff-zero"])):
        done = subprocess.run(
            ["git", "apply", *options, "-"],
            input=text,
            cwd=folder,
            env=environment,
            text=True,
            capture_output=True,
        )
        if done.returncode == 0:
            return
        assert "corrupt" not in done.stderr, f"{done.stderr}A hunk's counts are wrong."
    raise AssertionError(f"{done.stderr}{STALE}")


@LONG
@pytest.mark.parametrize("other", ["", "bands"])
def test_diffs_of_new_augmentation_page_add_a_working_augmentation(other, tmp_path):
    """Applies the diffs to the package, and to a copy with another augmentation added before."""
    for name in ("ssl_jax", "tests/data"):
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=unwanted)
    for name in ("configs", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    patches = blocks("docs/new_augmentation.md", "diff")
    for patch in patches if other else []:
        apply_patch(patch.replace("posterize", other), tmp_path)
    for patch in patches:
        apply_patch(patch, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", POSTERIZED],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "posterize.prob is 2.0" in done.stderr
    assert "1 passed" in done.stdout and (tmp_path / "posterized.png").exists()
