"""Fixtures of the tests of downstream evaluations."""

import shutil

import pytest
from classifier_runs import BRIEF, WHOLE
from encoders import copy_run
from images import fill


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    """A SimCLR run with a three-layer projector."""
    return copy_run(finished_run, tmp_path_factory.mktemp("runs") / "simclr")


@pytest.fixture
def unlabeled(tmp_path):
    """Overrides that name unlabeled training images and six labeled test images."""
    fill(tmp_path / "sorted", per_class=30)
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, file in enumerate(sorted((tmp_path / "sorted").rglob("*.png"))):
        shutil.copy(file, flat / f"{number}.png")
    fill(tmp_path / "test", per_class=2)
    data = (f"data.dir={flat}", f"data.test_dir={tmp_path / 'test'}", "data.name=folder")
    return (*BRIEF, WHOLE, *data)
