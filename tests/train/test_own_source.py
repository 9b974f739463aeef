"""Whole runs on a user's own source of images, by name and given in Python."""

import runpy
import shutil

import jax
import numpy as np
import pytest
from encoders import same
from tiny import assert_trees_close, make_step, share_steps, tiny_config, with_whole_images

import ssl_jax
from ssl_jax.cli import main as cli
from ssl_jax.data.custom import CustomSource
from ssl_jax.data.index import Index
from ssl_jax.downstream.features import run_features
from ssl_jax.errors import UserError
from ssl_jax.interop.load import restore_state
from ssl_jax.spmd import make_spmd
from ssl_jax.train import pretrain

pytest.importorskip("tensorflow")
pytestmark = pytest.mark.long

SOURCE = """
import numpy as np
from ssl_jax import data

@data.register("noise")
class Noise:
    class_names = ("dark", "light")

    def __init__(self, path):
        rng = np.random.default_rng(len(path))
        self.labels = rng.integers(0, 2, int(path))
        self.images = rng.integers(0, 150, (int(path), 9, 8, 3), np.uint8)
        self.images += 100 * self.labels[:, None, None, None].astype(np.uint8)

    def __len__(self):
        return len(self.images)

    def read(self, ids):
        return self.images[ids]
"""
CONFIG = """
from tiny import tiny_config, with_whole_images

def get_config():
    config = with_whole_images(tiny_config(steps=4, batch_size=32))
    config.optim.warmup_epochs = 0.0
    config.checkpoint.update(every_epochs=0.5, keep=4)
    config.eval.update(at_end=True, knn_k=5)
    return config
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.py").write_text(SOURCE)
    (folder / "config.py").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def noise(here):
    """The class that the file registers."""
    return runpy.run_path(str(here / "own.py"))["Noise"]


@pytest.fixture(scope="module")
def finished(here):
    """A run by name: 128 images to train on, 16 held out."""
    with pytest.MonkeyPatch.context() as patch:
        share_steps(patch)
        files = {"config": "config.py", "workdir": "run", "import": "own.py"}
        command = [f"--{option}={here / file}" for option, file in files.items()]
        data = {"name": "noise", "dir": "128", "test_dir": "16"}
        command += [f"--config.data.{key}={value}" for key, value in data.items()]
        assert cli.main(["pretrain", *command]) == 0
    return here / "run"


def test_run_by_name_is_evaluated_and_reported(finished, here, capsys):
    pictures = np.load(finished / "report_images.npz")
    assert len(pictures["neighbors"]) == len(pictures["neighbors_query"]) > 0
    capsys.readouterr()
    imported = f"--import={here / 'own.py'}"
    for command in (["knn"], ["linear"], ["features", f"--out={here / 'features.npz'}"]):
        assert cli.main([*command, f"--from={finished}", imported]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.count("top-1") == 2
    features = np.load(here / "features.npz")
    assert len(features["train"]) == 128
    assert features["class_names"].tolist() == ["dark", "light"]
    assert features["test_names"].tolist() == [str(i) for i in range(16)]
    assert ssl_jax.load(finished).apply(np.zeros((2, 8, 8, 3), np.uint8)).shape[0] == 2


def test_given_in_python_it_trains_the_same_and_resumes_bit_exact(
    finished, noise, tmp_path, monkeypatch, capsys
):
    share_steps(monkeypatch)
    config = ssl_jax.config.load_config(str(finished.parent / "config.py"))
    config.eval.at_end = False
    splits = {"train": noise("128"), "test": noise("16")}
    state = pretrain(config, tmp_path / "run", **splits).state
    expected = restore_state(finished)
    assert same(state.params, expected.params)
    assert same(state.method_state["batch_stats"], expected.method_state["batch_stats"])
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    capsys.readouterr()
    again = pretrain(config, tmp_path / "run", **splits).state
    assert "Resuming from step 2 of 4." in capsys.readouterr().out
    assert same(again.params, state.params)
    features = run_features(tmp_path / "run", **splits)
    assert features.train.shape[0] == 128 and features.test_labels.tolist() == [*noise("16").labels]
    with pytest.raises(UserError, match="were given in Python"):
        run_features(tmp_path / "run")
    splits["train"].labels = 1 - splits["train"].labels
    with pytest.raises(UserError, match="other training images"):
        pretrain(config, tmp_path / "run", **splits)
    with pytest.raises(UserError, match="test is given without train"):
        pretrain(config, tmp_path / "other", test=splits["test"])
    assert not (tmp_path / "other").exists()


def test_step_agrees_between_1_and_8_devices(noise):
    config = with_whole_images(tiny_config(batch_size=32))
    config.optim.warmup_epochs = 0.0
    source = CustomSource(config, noise("128"), "train")
    results = []
    for devices in (jax.devices()[:1], jax.devices()):
        spmd = make_spmd("shard_map", devices, 32)
        _, step, state, device_data = make_step(config, spmd, source)
        rows = Index(128, 32, config.seed).ids(3)
        (batch,) = source.batches(iter([(3, rows)]))
        results.append(jax.device_get(step(state, spmd.place_batch(batch), device_data)))
    (one, metrics), (eight, others) = results
    np.testing.assert_allclose(others["loss"], metrics["loss"], rtol=1e-5)
    assert_trees_close(eight.params, one.params, rtol=1e-5, atol=1e-5)
