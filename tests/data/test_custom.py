"""Users' own sources: an object with a length and `read(ids)`."""

import io
import runpy
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
from images import COLORS, by_id, config_of, picture, read
from PIL import Image
from tiny import random_source, tiny_config

from ssl_jax import config as configs
from ssl_jax import data
from ssl_jax.config import apply_overrides, default_config, from_json, schema_keys, to_json
from ssl_jax.data import registry
from ssl_jax.data.custom import CustomSource
from ssl_jax.data.folder import FolderSource
from ssl_jax.data.sources import make_sources
from ssl_jax.errors import UserError

pytest.importorskip("tensorflow")

ROOT = Path(__file__).parents[2]


class Listed:
    """Images of a list, which notes the ids that it was asked for."""

    def __init__(self, images, labels=None, class_names=()):
        self.images, self.labels, self.class_names = images, labels, class_names
        self.asked = []

    def __len__(self):
        return len(self.images)

    def read(self, ids):
        self.asked.append(ids)
        return [self.images[i] for i in ids]


def noise(n=5, size=8):
    return list(np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8))


def source_of(images, **options):
    return CustomSource(config_of(""), Listed(images, **options), "train")


@pytest.fixture
def register(monkeypatch):
    """Registers sources until the end of the test."""
    monkeypatch.setattr(registry, "_OPENERS", {})
    monkeypatch.setattr(configs, "_SOURCES", set())
    return data.register


AS_READ = {
    "arrays": lambda file: np.asarray(Image.open(file)),
    "pillow": Image.open,
    "files": Path.read_bytes,
    "uint8 files": lambda file: np.frombuffer(file.read_bytes(), np.uint8),
    "views of files": lambda file: memoryview(file.read_bytes()),
}


@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_images_are_bit_equal_to_those_of_a_folder(kind, tmp_path):
    for i in range(6):
        image = picture(i, COLORS["cat"], (30 + 5 * i, 36))
        if i == 3:  # bytes that end in zeros
            image = Image.new("RGB", (41, 36))
        image.save(tmp_path / f"{i}.png")
    expected = FolderSource(config_of(tmp_path, "tf"))
    images = [AS_READ[kind](file) for file in sorted(tmp_path.glob("*.png"))]
    found = CustomSource(config_of(tmp_path, "tf"), Listed(images), "train")
    steps = [(0, [5, 0, 3]), (7, [2, 2, 4]), (8, [1])]
    assert by_id(read(found, steps), steps) == by_id(read(expected, steps), steps)
    ids = [4, 3, 3, 0]
    assert (found.eval_transform(ids) == expected.eval_transform(ids)).all()
    assert (found.image_sizes(ids) == expected.image_sizes(ids)).all()
    for mine, theirs in zip(found.boxes(3, ids), expected.boxes(3, ids), strict=True):
        assert (mine == theirs).all()
    assert found.names([2]) == ["2"]


@pytest.mark.parametrize(
    ("kind", "same"), [("pillow", "arrays"), ("uint8 files", "files"), ("views of files", "files")]
)
def test_other_types_of_images_are_the_same(kind, same, tmp_path):
    picture(0, COLORS["cat"]).save(tmp_path / "0.png")
    found, expected = (source_of([AS_READ[k](tmp_path / "0.png")]) for k in (kind, same))
    assert found.handles(np.array([0]))[0] == expected.handles(np.array([0]))[0]
    assert found.fingerprint == expected.fingerprint


def test_ids_are_read_in_ascending_order_once_each_and_in_one_thread_at_a_time():
    images, running, most = Listed(noise(40)), [], []
    plain = images.read

    def one(ids):
        running.append(ids)
        most.append(len(running))
        try:
            return plain(ids)
        finally:
            running.remove(ids)

    images.read = one
    source = CustomSource(config_of(""), images, "train")
    assert len(images.asked[0]) == 16  # checked at the start
    steps = [(step, np.random.default_rng(step).integers(0, 40, 8)) for step in range(4)]
    readers = [threading.Thread(target=read, args=(source, steps)) for _ in range(2)]
    [reader.start() for reader in readers]
    [reader.join() for reader in readers]
    assert len(images.asked) == 9 and set(most) == {1}
    assert all((np.diff(ids) > 0).all() and ids.dtype == np.int64 for ids in images.asked)


def test_labels_are_optional_and_may_be_partly_unknown():
    source = source_of(noise())
    assert source.labels is None and source.num_classes == 0
    assert "label" not in read(source, [(0, [1])])[0]
    source = source_of(noise(), labels=[1, -1, 0, 1, 1], class_names=["x", "y"])
    assert source.labels.tolist() == [1, -1, 0, 1, 1] and source.class_names == ("x", "y")
    assert source.labels_from == "Listed.labels"
    assert read(source, [(0, [3, 2])])[0]["label"].tolist() == [1, 0]
    with pytest.raises(UserError, match=r"train has the label 2 \(image 1\) but 2 class names"):
        source_of(noise(2), labels=[0, 2], class_names=["x", "y"])
    with pytest.raises(UserError, match=r"train has 5 images but labels of shape \[4\]"):
        source_of(noise(), labels=[0, 1, 0, 1])


def test_fingerprint_depends_on_order_labels_number_and_pixels():
    images, labels = noise(), [0, 1, 0, 1, 0]
    other = [image.copy() for image in images]
    other[2][0, 0, 0] ^= 1
    sources = [source_of(each) for each in (images, images[::-1], images[:4], other)]
    sources += [source_of(images, labels=each) for each in (labels, [1, *labels[1:]])]
    found = [source.fingerprint for source in sources]
    assert len(set(found)) == len(found)
    assert found[0] == source_of(images).fingerprint and found[0].startswith("5 images, checksum ")


WRONG = {
    "read(ids) returned 4 images for 5 ids": lambda images: images[1:],
    "read(ids) returned a NoneType. Return a list": lambda images: None,
    "read(ids) returned a generator. Return a list": lambda images: (x for x in images),
    "dtype float32 and shape [8, 8, 3] for image 0": lambda x: np.array(x, np.float32),
    "dtype uint8 and shape [8, 8] for image 0": lambda x: np.array(x)[..., 0],
    "dtype uint8 and shape [3, 8, 8] for image 0": lambda x: np.array(x).transpose(0, 3, 1, 2),
    "dtype uint8 and shape [0, 8, 3] for image 0": lambda x: np.array(x)[:, :0],
    "returned both arrays and files; image 1 is a file": lambda x: [x[0], b"GIF", *x[2:]],
}


@pytest.mark.parametrize("words", WRONG)
def test_what_read_must_not_return_is_refused_in_a_sentence(words):
    images = Listed(noise())
    images.read = lambda ids: WRONG[words](noise())
    with pytest.raises(UserError) as caught:
        CustomSource(config_of(""), images, "train")
    assert words in str(caught.value) and str(caught.value).startswith("train: read(ids)")


def test_errors_of_read_reach_the_caller_unchanged():
    images = Listed(noise(32))
    source = CustomSource(config_of(""), images, "train")
    plain, wrong = images.read, KeyError("mine")

    def failing(ids):
        if 7 in ids:
            raise wrong
        return plain(ids)

    images.read = failing
    steps = ((i, np.array([i])) for i in range(32))
    with pytest.raises(KeyError) as caught:
        list(source.batches(steps))
    assert caught.value is wrong
    images.read = lambda ids: [x[:, :4] for x in plain(ids)][:-1]
    with pytest.raises(UserError, match="train: read.ids. returned 0 images for 1 ids"):
        source.eval_transform([3])
    images.read = lambda ids: open("/nowhere/images")
    with pytest.raises(UserError, match="Cannot read /nowhere/images .*Restore the data, then rer"):
        source.eval_transform([3])


def encoded(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def test_files_that_cannot_be_decoded_are_skipped_or_named():
    files = [encoded(image) for image in noise()]
    files[1] = files[1][:40]
    with pytest.raises(UserError, match="Cannot decode image 1 of train as an image .JPEG, PNG"):
        source_of(files).eval_transform([1])
    c = config_of("", on_bad_image="skip")
    source = CustomSource(c, Listed(files, labels=range(5)), "train")
    assert (source.eval_transform([1]) == source.eval_transform([2])).all()
    assert source.labels.tolist() == [0, 2, 2, 3, 4] and source.bad == ["image 1 of train"]


# In a config, and given in Python


def test_registered_source_is_opened_with_the_paths_of_the_config(register):
    @register("mine")
    def opener(path):
        return Listed(noise(int(path)), labels=np.arange(int(path)) % 2)

    config = apply_overrides(config_of("12"), ["data.name=mine", "data.test_dir=6"])
    train, test = make_sources(config)
    assert (train.num_examples, test.num_examples, test.num_classes) == (12, 6, 2)
    config.data.update(test_dir="", validation=0.5)
    assert [split.num_examples for split in make_sources(config)] == [6, 6]
    config.data.update(test_dir="6", validation=0.0)
    register("mine")(lambda path: Listed(noise(), [0] * 5, [path]))
    with pytest.raises(UserError, match=r"Only one of config.data.dir \(12\) and .* class 12"):
        make_sources(config)
    register("mine")(lambda path: random_source(int(path)))  # any Source
    config.data.update(test_dir="")
    assert make_sources(config)[0].device_data()["image"].shape == (12, 8, 8, 3)
    register("mine")(lambda path: open("/nowhere"))
    with pytest.raises(UserError, match=r"Cannot read /nowhere .No such file"):
        make_sources(config)
    register("mine")(lambda path: path)
    with pytest.raises(UserError, match=r"config.data.dir \(mine: 12\) is of type str, which has"):
        make_sources(config)


def test_names_of_sources_are_checked_where_images_are_needed(register):
    for name in schema_keys()["data.name"].choices:
        with pytest.raises(UserError, match=f"'{name}' is a source of ssl_jax"):
            register(name)
    register("mine")(Listed)
    config = apply_overrides(default_config(), ["data.name=mine"])
    configs._SOURCES.clear()
    assert from_json(to_json(config)).data.name == "mine"  # an encoder is loaded without images
    for refused in (lambda: apply_overrides(config, []), lambda: make_sources(config)):
        with pytest.raises(UserError, match="config.data.name is 'mine', .*--import=FILE.py"):
            refused()


def test_images_given_in_python_replace_those_of_the_config():
    config = tiny_config()
    train, test = Listed(noise(8), labels=[0, 1] * 4), Listed(noise(4), labels=[1, 0] * 2)
    sources = make_sources(config, train, test)
    assert [source.num_examples for source in sources] == [8, 4]
    config.data.subset = 0.5
    assert make_sources(config, train)[0].num_examples == 4
    assert make_sources(config, random_source())[0].num_examples == 32
    named = Listed(noise(4), labels=[2, 1, 0, 0], class_names=["0", "1", "x"])
    with pytest.raises(UserError, match="Only one of train and test has the class x"):
        make_sources(config, train, named)
    with pytest.raises(UserError, match="train is of type list, which has no length or no read"):
        make_sources(config, [])
    with pytest.raises(UserError, match="train has no images: its length is 0"):
        make_sources(config, Listed([]))
    config.data.name = "python"
    with pytest.raises(UserError, match="were given in Python. Give them again, as train=…"):
        make_sources(config)


def test_example_reads_an_hdf5_file(register, tmp_path):
    text = (ROOT / "examples/hdf5_source.py").read_text()
    _, _, code = text.split('"""', 2)
    assert len(text.splitlines()) < 35 and code.strip() in (ROOT / "docs/data.md").read_text()
    images = np.stack(noise(6))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"], file["labels"] = images, np.arange(6) % 2
        file["class_names"] = ["cat", "dog"]
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["images"] = images
    runpy.run_path(str(ROOT / "examples/hdf5_source.py"))
    config = tiny_config()
    config.data.update(name="hdf5", dir=str(tmp_path / "a.h5"), test_dir=str(tmp_path / "b.h5"))
    train, test = make_sources(config)
    assert train.class_names == ("cat", "dog") and test.labels is None
    assert (train.eval_transform([4, 1, 1]) == images[[4, 1, 1]]).all()
    config.data.dir = str(tmp_path / "absent.h5")
    with pytest.raises(UserError, match=r"Cannot read config.data.dir \(hdf5: .*absent.h5\)"):
        make_sources(config)


def test_labels_with_a_column_per_class_are_targets(tmp_path):
    class Several:
        labels = np.array([[0, 1], [1, -1], [0, 0]])
        class_names = ("cat", "dog")

        def __len__(self):
            return 3

        def read(self, ids):
            return np.zeros((len(ids), 40, 40, 3), np.uint8)

    source = CustomSource(config_of(tmp_path), Several(), "train")
    assert source.labels is None and source.num_classes == 0
    assert source.targets.values.tolist() == [[0, 1], [1, -1], [0, 0]]
    assert source.targets.names == ("cat", "dog")
