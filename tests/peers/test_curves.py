"""lightly's side of the comparison of learning curves, at toy size."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from images import packed_colors

from ssl_jax.config import flat_views, load_config

torch = pytest.importorskip("torch", reason="torch is not installed here: make peers")
pytest.importorskip("lightly", reason="lightly is not installed here: make peers")
torchvision = pytest.importorskip("torchvision")

# The interval of losses of an untrained network.
LOSSES = {
    "simclr": (np.log(31) - 1, np.log(31) + 1),
    "moco": (0, np.log(65) + 1),
    "byol": (-1, 1),
    "simsiam": (-1, 1),
    "barlow": (0, 1e5),
    "swav": (np.log(512) - 1, np.log(512) + 1),
}


@pytest.fixture(scope="module")
def peer():
    return importlib.import_module("curves_peer")


@pytest.fixture
def train(peer, tmp_path, monkeypatch):
    monkeypatch.setattr(peer, "QUEUE", 64)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (32, 32, 32, 3)).astype(np.uint8)
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=images)

    def train(method, name="run", epochs=1, stop_in=0):
        """Trains; stops within an epoch, before its state is saved, if one is given."""
        out = tmp_path / name
        words = [f"--method={method}", f"--out={out}", f"--epochs={epochs}", "--every=1"]
        words += [f"--{split}={tmp_path / split}.npz" for split in ("train", "test")]
        words += ["--batch=16", "--width=0.0625", "--workers=0", "--seed=1"]
        if stop_in:
            out.mkdir()
            steps = peer.Run(peer.parse_arguments(words), images).train(epochs)
            for _ in range(stop_in):
                next(steps)
        else:
            peer.main(words)
        return out

    return train


@pytest.mark.parametrize("method", LOSSES)
def test_every_method_trains_and_leaves_features(train, method):
    out = train(method)
    (line,) = [json.loads(line) for line in (out / "epochs.jsonl").read_text().splitlines()]
    assert line["epoch"] == 1 and line["images"] == 32 and line["seconds"] > 0
    low, high = LOSSES[method]
    assert low < line["loss"] < high
    with np.load(out / "features_1.npz") as features:
        assert features["train"].shape == features["test"].shape == (32, 32)
        np.testing.assert_allclose(features["train"], features["test"], rtol=1e-3, atol=1e-3)
        assert features["train"].std(axis=0).max() > 0


@pytest.mark.parametrize("method", ["moco", "byol"])
def test_killed_run_resumes_with_the_same_steps(train, method):
    """MoCo has a memory bank, which lightly doesn't save; BYOL's views draw from NumPy, too."""
    whole = train(method, "whole", epochs=3)
    np.random.seed(99)  # noqa: NPY002 -- as another process has another state
    train(method, "killed", epochs=3, stop_in=2)
    np.random.seed(100)  # noqa: NPY002
    resumed = train(method, "killed", epochs=3)
    expected, found = (
        [json.loads(line)["loss"] for line in (out / "epochs.jsonl").read_text().splitlines()]
        for out in (whole, resumed)
    )
    assert len(found) == 3
    np.testing.assert_allclose(found, expected, rtol=1e-4)  # torch's sums vary with alignment


def parts(transform):
    """The single transforms of one of lightly's views, by class name; no-ops are left out."""
    found, waiting = {}, [transform]
    while waiting:
        one = waiting.pop()
        inner = [getattr(one, "transforms", None), getattr(one, "transform", None)]
        waiting += next((list(x) for x in inner if isinstance(x, list | torch.nn.ModuleList)), [])
        if isinstance(inner[1], torchvision.transforms.v2.Compose):
            waiting.append(inner[1])
        if not isinstance(one, torchvision.transforms.v2.ColorJitter) or one.hue:
            found[type(one).__name__] = one
    return found


@pytest.mark.parametrize("method", LOSSES)
def test_views_are_those_of_the_config(peer, method):
    file = Path(__file__).parents[2] / "configs" / f"{method}_cifar10.py"
    views = flat_views(load_config(f"{file}:lightly"))
    transforms = peer.TRANSFORMS[method]().transforms
    assert len(views) == len(transforms) == 2
    for view, found in zip(views, map(parts, transforms), strict=True):
        crop, jitter = found["RandomResizedCrop"], found["ColorJitter"]
        assert (crop.size, crop.scale) == ((view.size, view.size), tuple(view.crop.area))
        assert tuple(crop.ratio) == pytest.approx(tuple(view.crop.aspect))
        assert crop.interpolation == view.crop.interpolation
        for name in ("brightness", "contrast", "saturation"):
            strength = view.jitter[name]
            assert getattr(jitter, name) == pytest.approx((1 - strength, 1 + strength)), name
        assert jitter.hue == pytest.approx((-view.jitter.hue, view.jitter.hue))
        assert found["RandomApply"].p == view.jitter.prob
        assert found["RandomGrayscale"].p == view.gray
        assert found["RandomHorizontalFlip"].p == view.flip
        assert found["GaussianBlur"].prob == view.blur.prob
        solarized = found["RandomSolarization"].prob if "RandomSolarization" in found else 0
        assert solarized == view.solarize.prob
        assert list(found["Normalize"].mean) == pytest.approx(list(view.mean))
        assert list(found["Normalize"].std) == pytest.approx(list(view.std))


def test_both_libraries_train_in_alternation(tmp_path):
    """The comparison itself, of real runs; the two classes differ in color."""
    curves = importlib.import_module("curves")
    words = [
        *packed_colors(tmp_path),
        f"--workdir={tmp_path}/curves",
        f"--peer-python={sys.executable}",
    ]
    words += ["--methods=simclr", "--seeds=1", "--epochs=5", "--images=40", "--batch=16"]
    words += ["--peer-workers=0", "--config.model.width=0.0625", "--config.eval.knn_k=5"]
    curves.main(words)
    header, _, *rows = (tmp_path / "curves" / "curves.md").read_text().splitlines()
    assert [row.split(" | ")[1] for row in rows] == ["ssl_jax", "lightly"]
    for row in rows:
        cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
        assert float(cells["kNN, epoch 5"]) > 90 and float(cells["images/s |"].strip(" |")) > 0


def test_network_is_torchvisions(peer):
    theirs, own = torchvision.models.resnet18(), peer.ResNet18(1.0)
    theirs.fc = torch.nn.Identity()
    own.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(own(images), theirs(images))


def test_two_processes_dont_train_in_one_folder(train, peer, tmp_path, monkeypatch):
    def taken(*_):
        raise BlockingIOError

    monkeypatch.setattr(peer.fcntl, "flock", taken)
    with pytest.raises(SystemExit, match="Another process"):
        train("simclr")
