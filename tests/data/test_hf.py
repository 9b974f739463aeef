"""Datasets in the formats of Hugging Face's package, none of which needs a network."""

import builtins
import io
import shutil
import tarfile

import numpy as np
import pytest
from images import by_id, config_of, fill, read

from ssl_jax.data.folder import FolderSource
from ssl_jax.data.sources import make_sources
from ssl_jax.errors import UserError

pytest.importorskip("tensorflow")
datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Prepared datasets are kept out of the home folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("images"), per_class=2)


@pytest.fixture(scope="module")
def rows(images):
    """The folder's images, as a dataset."""
    files = sorted(images.rglob("*.png"))
    kinds = datasets.ClassLabel(names=["cat", "dog", "emu"])
    features = datasets.Features({"image": datasets.Image(), "label": kinds})
    stored = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    labels = [file.parent.name for file in files]
    return datasets.Dataset.from_dict({"image": stored, "label": labels}, features)


def hf(path, **changes):
    return config_of(path, name="hf", **changes)


def saved(rows, folder):
    rows.save_to_disk(str(folder))


def parquet(rows, folder):
    folder.mkdir()
    rows.to_parquet(str(folder / "data.parquet"))


def image_folder(rows, folder):
    fill(folder, per_class=2)


def tar(rows, folder):
    folder.mkdir()
    with tarfile.open(folder / "data.tar", "w") as archive:
        for i, row in enumerate(rows.cast_column("image", datasets.Image(decode=False))):
            files = {"png": row["image"]["bytes"], "cls": str(row["label"]).encode()}
            for kind, contents in files.items():
                about = tarfile.TarInfo(f"{i:04d}.{kind}")
                about.size = len(contents)
                archive.addfile(about, io.BytesIO(contents))


def table(rows, folder):
    fill(folder / "files", per_class=2)
    files = sorted((folder / "files").rglob("*.png"))
    lines = [f"{file.relative_to(folder)},{file.parent.name}" for file in files]
    # Next to the images, the package would take the folder for one of images.
    shutil.move(folder / "files", folder / ".files")
    lines = [f".{line}" for line in lines]
    (folder / "data.csv").write_text("\n".join(["image,label", *lines]))


@pytest.mark.parametrize("write", [saved, parquet, image_folder, tar, table])
def test_every_format_reads_the_folders_files(write, rows, images, tmp_path):
    write(rows, tmp_path / "data")
    keys = {"image_key": "png", "label_key": "cls"} if write is tar else {}
    train, test = make_sources(hf(tmp_path / "data", **keys))
    assert test is None and train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert train.class_names == (("0", "1", "2") if write is tar else ("cat", "dog", "emu"))
    contents = [file.read_bytes() for file in sorted(images.rglob("*.png"))]
    assert train.handles(np.arange(6))[0] == contents


def test_views_are_bit_equal_to_those_of_the_folder(rows, images, tmp_path):
    saved(rows, tmp_path / "data")
    train, _ = make_sources(hf(tmp_path / "data"))
    folder, steps = FolderSource(config_of(images)), [(0, [5, 0]), (3, [2, 2])]
    assert by_id(read(train, steps), steps) == by_id(read(folder, steps), steps)


def test_splits_are_of_one_folder_or_of_two(rows, tmp_path):
    half = {"train": rows.select([4, 1, 0, 3]), "validation": rows.select([2, 5])}
    datasets.DatasetDict(half).save_to_disk(str(tmp_path / "both"))
    train, test = make_sources(hf(tmp_path / "both", test_split="validation"))
    assert train.labels.tolist() == [2, 0, 0, 1] and test.labels.tolist() == [1, 2]
    assert train.labels_from == "column 'label'"
    saved(rows, tmp_path / "one")
    _, test = make_sources(hf(tmp_path / "both", test_dir=str(tmp_path / "one")))
    assert test.num_examples == 6
    with pytest.raises(UserError, match="test_split is 'test', which is not a split .*validation"):
        make_sources(hf(tmp_path / "both", test_split="test"))
    with pytest.raises(UserError, match="test_split is '', which is not a split of .*both"):
        make_sources(hf(tmp_path / "one", test_dir=str(tmp_path / "both")))


def test_columns_of_bytes_and_of_strings_are_read(rows, images, tmp_path):
    plain = rows.cast_column("image", datasets.Image(decode=False))
    names = rows.features["label"].names
    columns = {
        "raw": [image["bytes"] for image in plain["image"]],
        "kind": [None, *(names[label] for label in rows["label"][1:])],
        "label": [None, *rows["label"][1:]],
    }
    saved(datasets.Dataset.from_dict(columns), tmp_path / "data")
    expected = make_sources(config_of(images))[0].eval_transform([0, 5])
    for key in ("kind", "label"):
        train, _ = make_sources(hf(tmp_path / "data", image_key="raw", label_key=key))
        assert train.labels.tolist() == [-1, 0, 1, 1, 2, 2]
        assert (train.eval_transform([0, 5]) == expected).all()
    train, _ = make_sources(hf(tmp_path / "data", image_key="raw", label_key=""))
    assert train.labels is None


def test_what_cannot_be_read_is_refused_in_a_sentence(rows, tmp_path):
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    columns = {"pixels": list(pixels), "score": [0.5, 1.0], "link": ["https://a/b.png"] * 2}
    columns["device"] = ["/dev/zero"] * 2
    saved(datasets.Dataset.from_dict(columns), tmp_path / "odd")
    saved(datasets.Dataset.from_dict({"pixels": list(pixels)}), tmp_path / "none")
    saved(rows, tmp_path / "good")
    (tmp_path / "empty").mkdir()
    for name, changes, words in (
        ("", {}, "config.data.dir is empty. Set it to the folder of a dataset"),
        ("user/cifar", {}, "not a folder here, and nothing is downloaded.* with `hf download"),
        ("empty", {}, "which the package datasets can't read"),
        ("good", {"image_key": "img"}, "image_key is 'img', .* Did you mean 'image'"),
        ("none", {}, "image_key is 'image', .* It has no column of images"),
        ("good", {"label_key": "fine"}, "label_key is 'fine', which is not .* set it to ''"),
        ("odd", {"image_key": "link", "label_key": "score"}, "label_key is 'score', which holds"),
        ("odd", {"image_key": "link", "label_key": ""}, "is at https://a/b.png, which needs a net"),
        ("odd", {"image_key": "device", "label_key": ""}, "/dev/zero"),
        ("good", {"split": "test"}, "config.data.split is 'test', which is not a split of"),
    ):
        with pytest.raises(UserError, match=words):
            make_sources(hf(tmp_path / name if name else "", **changes))


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    plain = builtins.__import__

    def missing(name, *rest, **named):
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return plain(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"Cannot import datasets .*'.\[hf\]'"):
        make_sources(hf(tmp_path))


def test_column_of_lists_of_classes_is_several_labels_per_image(images, tmp_path):
    files = sorted(images.rglob("*.png"))
    kinds = datasets.Sequence(datasets.ClassLabel(names=["cat", "dog"]))
    features = datasets.Features({"image": datasets.Image(), "label": kinds})
    stored = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    labels = [[0, 1], [], None, [1], [0], [1]]
    rows = datasets.Dataset.from_dict({"image": stored, "label": labels}, features)
    saved(rows, tmp_path / "several")
    source = make_sources(hf(tmp_path / "several"))[0]
    assert source.labels is None and source.targets.names == ("cat", "dog")
    assert source.targets.values[:4].tolist() == [[1, 1], [0, 0], [-1, -1], [0, 1]]
