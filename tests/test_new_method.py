"""docs/new_method.md: the method it shows is short, right and runs like the package's own."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_step import ONE, gradients_on
from tiny import assert_trees_close, method_config, random_source

import ssl_jax
from ssl_jax.config import Schedule, default_config, from_json, load_config, to_json
from ssl_jax.errors import UserError
from ssl_jax.methods import Method, register
from ssl_jax.train import pretrain

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/new_method.md").read_text()
CODE = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "my_method.py"
    file.write_text(CODE)
    return file


def test_it_is_under_60_lines():
    assert len(CODE.splitlines()) < 60


def test_its_gradients_agree_between_1_and_8_devices(config_file):
    load_config(str(config_file))  # registers it
    config = method_config("barlow_twins")
    config.barlow_twins.update(hidden=16, out=8)
    expected = gradients_on(config, random_source(), "shard_map", ONE)
    actual = gradients_on(config, random_source(), "shard_map", jax.devices())
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    assert_trees_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_it_trains_is_evaluated_and_loaded_by_the_commands_of_the_page(config_file, tmp_path):
    config = load_config(str(config_file), ["barlow_twins.out=32", "steps=2", "batch_size=320"])
    config.model.update(method_config("simclr").model)
    config.eval.update(draws=2, labels_per_class=(1, 5), frozen_at_end=True)
    pretrain(config, tmp_path / "run")
    assert ssl_jax.load(tmp_path / "run").apply(np.zeros((2, 8, 8, 3), np.uint8)).shape[0] == 2
    # A process that has not registered it.
    script = f"import ssl_jax; ssl_jax.load({str(tmp_path / 'run')!r})"
    alone = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "'barlow_twins'" in alone.stderr and "import the file that registers it" in alone.stderr
    knn = [sys.executable, "-m", "ssl_jax.cli", "knn", f"--from={tmp_path / 'run'}"]
    refused = subprocess.run(knn, capture_output=True, text=True)
    assert refused.returncode == 2 and "by --import=FILE.py" in refused.stderr
    small = f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport tiny\n"
    (tmp_path / "mine.py").write_text(small + CODE.partition('"""\n')[2])
    mine = [*knn, f"--import={tmp_path / 'mine.py'}"]
    done = subprocess.run(mine, capture_output=True, text=True)
    assert done.returncode == 0 and "top-1" in done.stdout, done.stderr
    absent = subprocess.run([*knn, "--import=absent.py"], capture_output=True, text=True)
    assert absent.returncode == 2 and "no file absent.py (--import)" in absent.stderr


def test_a_registered_methods_keys_are_no_part_of_other_runs(config_file):
    before = to_json(default_config())
    load_config(str(config_file))
    assert to_json(default_config()) == before
    assert from_json(before).barlow_twins.hidden == 256


@pytest.mark.parametrize("name", ["moco", "optim", "seed"])
def test_names_that_are_taken_are_refused(name):
    with pytest.raises(UserError, match=f"{name}"):
        register(name)(Method)


def test_an_option_of_a_type_that_configs_do_not_have_is_refused():
    with pytest.raises(UserError, match="config.listed.sizes has the default"):
        register("listed", sizes=[1, 2])


def test_a_projector_of_ones_own_needs_no_layers():
    class Own(Method):
        networks = {"projector": object()}

    method = Own(method_config("simclr"), Schedule(1, 1))
    method.check_projector_layer(0)
    with pytest.raises(UserError, match="no hidden layer"):
        method.check_projector_layer(1)
