import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config

from ssl_jax.cli.main import main
from ssl_jax.data.packed import pack
from ssl_jax.data.sources import make_sources
from ssl_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def packed_config(**data):
    config = tiny_config()
    config.data.update(name="packed", **data)
    return config


def test_packed_file_equals_the_folder(folder, tmp_path, capsys):
    out = tmp_path / "train.npz"
    assert main(["data", "pack", str(folder), str(out)]) == 0
    assert "6 images" in capsys.readouterr().out
    train, test = make_sources(packed_config(dir=str(out)))
    assert test is None
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and train.class_names == ("cat", "dog")
    expected = np.asarray(Image.open(folder / "dog" / "1.png"))
    np.testing.assert_array_equal(train.device_data()["image"][4], expected)


def test_flat_folder_packs_without_labels(folder, tmp_path):
    pack(folder / "cat", tmp_path / "flat.npz")
    train, test = make_sources(packed_config(dir=str(tmp_path / "flat.npz")))
    assert train.labels is None and train.num_examples == 3


def test_images_of_two_sizes_raise_user_error_and_leave_no_file(folder, tmp_path):
    Image.new("RGB", (9, 8)).save(folder / "dog" / "2.png")
    with pytest.raises(UserError, match="dog/2.png has 9×8 pixels .* must have the same size"):
        pack(folder, tmp_path / "out.npz")
    assert not list(tmp_path.glob("out*"))


def test_undecodable_image_is_named(folder, tmp_path):
    (folder / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="Cannot decode .*cat/1.png"):
        pack(folder, tmp_path / "out.npz")


def test_bad_packed_files_raise_user_errors_with_the_fix(folder, tmp_path):
    with pytest.raises(UserError, match="ends in .npz"):
        pack(folder, tmp_path / "out.bin")
    with pytest.raises(UserError, match="Cannot write"):
        pack(folder, tmp_path / "missing" / "out.npz")
    with pytest.raises(UserError, match="config.data.dir is empty. .*ssl-jax data pack"):
        make_sources(packed_config())
    with pytest.raises(UserError, match="absent.npz, which doesn't exist"):
        make_sources(packed_config(dir=str(tmp_path / "absent.npz")))
    pack(folder, tmp_path / "whole.npz")
    whole = (tmp_path / "whole.npz").read_bytes()
    for name, content in [("cut", whole[: len(whole) // 2]), ("other", b"123")]:
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(UserError, match="not a packed file"):
            make_sources(packed_config(dir=str(tmp_path / f"{name}.npz")))
    np.savez(tmp_path / "else.npz", x=np.ones(3))
    with pytest.raises(UserError, match="not a packed file"):
        make_sources(packed_config(dir=str(tmp_path / "else.npz")))


def test_splits_with_different_classes_raise_user_error(folder, tmp_path):
    pack(folder, tmp_path / "a.npz")
    (folder / "dog").rename(folder / "fox")
    pack(folder, tmp_path / "b.npz")
    with pytest.raises(UserError, match="Only one of .* has the class dog and 1 more. Use two"):
        make_sources(packed_config(dir=str(tmp_path / "a.npz"), test_dir=str(tmp_path / "b.npz")))
