"""Real TFDS builds, made by the tests, as users prepare them."""

import shutil

import numpy as np
import pytest
from bucket import Bucket
from images import COLORS, by_id, config_of, fill, picture, read
from PIL import Image

from ssl_jax.data.fingerprint import sampled_ids
from ssl_jax.data.index import Index
from ssl_jax.data.sources import labeled, make_sources
from ssl_jax.errors import UserError

pytest.importorskip("tensorflow_datasets")
from tfds_builds import build  # noqa: E402

FORMATS = ["array_record", "tfrecord"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of images, and of one TFDS build of them per file format."""
    root = tmp_path_factory.mktemp("tfds")
    images = fill(root / "images")
    for file_format in FORMATS:
        build(root / file_format, images, file_format)
    return root


def config_for(folder, **data):
    return config_of(folder, **{"name": "tfds", "dataset": "pictures", **data})


def matched(source, images):
    """Maps each id to the folder's id of the same file; TFDS shuffles the examples."""
    files = sorted(images.glob("*/*.png"))
    contents = {file.read_bytes(): i for i, file in enumerate(files)}
    return np.array([contents[source.read(i)] for i in range(source.num_examples)])


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_example_is_read_once_with_its_label(prepared, file_format):
    config = config_for(prepared / file_format, test_split="test[:5]")
    train, test = make_sources(config)
    assert train.num_examples == 12 and test.num_examples == 5
    assert train.class_names == ("cat", "dog", "emu") and train.num_classes == 3
    ids = matched(train, prepared / "images")
    assert sorted(ids) == list(range(12)) and ids.tolist() != list(range(12))
    np.testing.assert_array_equal(train.labels, ids // 4)
    assert len(set(matched(test, prepared / "images"))) == 5
    folder = make_sources(config_of(prepared / "images"))[0]
    np.testing.assert_array_equal(train.eval_transform(range(12)), folder.eval_transform(ids))


@pytest.mark.parametrize("file_format", FORMATS)
def test_resume_at_any_step_gives_the_same_pixels(prepared, file_format):
    index = Index(12, 4, seed=3)
    steps = [(step, index.ids(step)) for step in range(7)]
    source = make_sources(config_for(prepared / file_format))[0]
    batches = read(source, steps)
    for batch in batches:
        np.testing.assert_array_equal(batch["label"], source.labels[batch["id"]])
    resumed = make_sources(config_for(prepared / file_format, threads=3))[0]
    assert by_id(read(resumed, steps[4:]), steps[4:]).items() <= by_id(batches, steps).items()


@pytest.mark.parametrize("file_format", FORMATS)
def test_split_slices_hold_the_same_examples(prepared, file_format):
    whole = make_sources(config_for(prepared / file_format))[0]
    part = make_sources(config_for(prepared / file_format, split="train[3:10]"))[0]
    assert [part.read(i) for i in range(7)] == [whole.read(i) for i in range(3, 10)]


def test_resuming_reads_no_consumed_examples(prepared, monkeypatch):
    """TFRecord: besides the walk, the images of the fingerprint and of the step."""
    from ssl_jax.data import tfrecords as module

    seen = []

    def counted(path, offset, length):
        seen.append(length)
        return plain(path, offset, length)

    plain = module._read_range
    monkeypatch.setattr(module, "_read_range", counted)
    source = make_sources(config_for(prepared / "tfrecord", bits=8))[0]
    opened = len(sampled_ids(12))
    assert len(seen) == opened
    read(source, [(2, Index(12, 4, 0).ids(2))])
    assert len(seen) == opened + 4
    assert source.labels.tolist() and len(seen) == opened + 4


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make a certificate")
def test_bucket_is_read_once_for_index_and_labels(prepared, tmp_path, monkeypatch):
    """TensorFlow's own client of Google Cloud Storage, against a server on this machine."""
    with Bucket(prepared, tmp_path).serving() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        source = make_sources(config_for("gs://bucket/tfrecord"))[0]
        local = make_sources(config_for(prepared / "tfrecord"))[0]
        walks, sampled = 3, len(sampled_ids(12))  # of three files, each of which fits into a read
        files = [name for name, _ in bucket.reads if ".tfrecord" in name]
        assert len(set(files)) == 3 and len(files) == walks + sampled
        opening = len(bucket.reads)
        np.testing.assert_array_equal(source.labels, local.labels)
        assert len(bucket.reads) == opening
        assert source.read(5) == local.read(5) and len(bucket.reads) == opening + 1


def test_labels_in_array_records_are_remembered_when_images_are_read(prepared, monkeypatch):
    source = make_sources(config_for(prepared / "array_record"))[0]
    read(source, [(0, [7, 2, 3, 11]), (1, [0, 1, 4, 5])])
    asked, plain = [], source.handles
    monkeypatch.setattr(source, "handles", lambda ids: asked.extend(ids) or plain(ids))
    labels = source.labels
    assert sorted(asked) == [6, 8, 9, 10]
    np.testing.assert_array_equal(labels, matched(source, prepared / "images") // 4)


@pytest.mark.parametrize("file_format", FORMATS)
def test_lists_of_classes_are_targets(prepared, file_format):
    config = config_for(prepared / file_format, label_key="labels", test_split="test[:5]")
    train, test = make_sources(config)
    assert train.labels is None and train.num_classes == 0
    own = np.eye(3, dtype=np.int8)[matched(train, prepared / "images") // 4]
    own[:, 0], own[:, 1] = 1 - own[:, 1], 0
    np.testing.assert_array_equal(train.targets.values, own)
    assert train.targets.names == test.targets.names == ("cat", "dog", "emu")
    assert test.targets.values.shape == (5, 3) and train.labels_from == "feature 'labels'"


def test_empty_label_key_gives_no_labels(prepared):
    source = make_sources(config_for(prepared / "array_record", label_key=""))[0]
    assert source.labels is None and "label" not in read(source, [(0, [1, 2])])[0]


def test_split_whose_labels_are_all_minus_one_has_no_labels(tmp_path):
    build(tmp_path, fill(tmp_path / "images"), "array_record", splits=("unlabeled", "test"))
    config = config_for(tmp_path, split="unlabeled", test_split="test")
    train, test = make_sources(config)
    assert train.labels is None and (train.num_classes, train.class_names) == (0, ())
    assert "label" not in read(train, [(0, [1, 2])])[0]
    assert test.num_classes == 3 and sorted(test.labels) == sorted(np.arange(12) // 4)
    mixed, _ = make_sources(config_for(tmp_path, split="unlabeled+test"))
    assert mixed.num_classes == 3 and (mixed.labels == -1).sum() == 12
    assert (labeled(mixed).labels >= 0).all() and labeled(mixed).num_examples == 12


def test_label_beyond_the_class_names_is_refused_wherever_labels_are_read(tmp_path):
    build(tmp_path, fill(tmp_path / "images"), "array_record")
    (features,) = tmp_path.rglob("features.json")
    features.write_text(features.read_text().replace('"3"', '"2"'))
    features.with_name("label.labels.txt").write_text("cat\nd\x1bog\n")
    source = make_sources(config_for(tmp_path))[0]
    assert source.class_names == ("cat", "d\\x1bog")
    for use in (lambda: source.labels, lambda: read(source, [(0, range(12))])):
        with pytest.raises(
            UserError, match=r"split train. has the label 2 .image \d+. but 2 class"
        ):
            use()


def test_undecodable_example_is_named_or_replaced(tmp_path):
    images = fill(tmp_path / "images")
    file = images / "dog" / "2.png"
    picture(7, COLORS["dog"]).save(file)
    file.write_bytes(file.read_bytes()[:-30])
    build(tmp_path / "set", images, "array_record", splits=("train",))
    config = config_for(tmp_path / "set")
    ids = matched(make_sources(config)[0], images)
    (bad,) = np.flatnonzero(ids == 6)
    with pytest.raises(UserError, match=f"Cannot decode Example {bad} of .*pictures, split train"):
        make_sources(config)[0].eval_transform([bad])
    config.data.on_bad_image = "skip"
    source = make_sources(config)[0]
    (batch,) = read(source, [(0, [bad, (bad + 1) % 12])])
    assert batch["label"].tolist() == [ids[(bad + 1) % 12] // 4] * 2


def test_grayscale_images_become_rgb(tmp_path):
    images = fill(tmp_path / "images", per_class=1)
    for file in images.glob("*/*.png"):
        Image.open(file).convert("L").save(file)
    build(tmp_path / "set", images, "tfrecord", splits=("train",))
    clean = make_sources(config_for(tmp_path / "set"))[0].eval_transform([0, 1, 2])
    np.testing.assert_array_equal(clean, np.repeat(clean[..., :1], 3, axis=-1))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"dataset": ""}, "config.data.dataset is empty. Set it to a TFDS"),
        ({"dataset": "imagenet2021"}, "which is not in TFDS .* Did you mean 'imagenet2012'"),
        ({"dataset": "my set"}, "'my set', which is not in TFDS or "),
        ({"dataset": "kubric:movi_a"}, "'kubric:movi_a', a community dataset, .* Set it to"),
        ({"dataset": "cifar10:3.0.2"}, "cifar10/3.0.2 is not prepared in"),
        ({"dataset": "cifar10"}, "cifar10/3.0.2 is not prepared in .* Run `tfds build cifar10`"),
        (
            {"split": "trian"},
            "data.split is 'trian', which is not a split .* Did you mean 'train'",
        ),
        ({"test_split": "train[:x]"}, "config.data.test_split is 'train"),
        ({"image_key": "img"}, "image_key is 'img', which is not an image .* Did you mean 'image'"),
        ({"label_key": "file"}, "label_key is 'file', which is not a class label .*: label"),
    ],
)
def test_unknown_names_raise_user_errors_with_the_fix(prepared, data, words):
    with pytest.raises(UserError, match=words):
        make_sources(config_for(prepared / "array_record", **data))


def test_suggestions_for_unknown_names_are_looked_up_offline(prepared, monkeypatch):
    from ssl_jax.data import tfds as module

    plain, asked = module.tfds.list_builders, []
    monkeypatch.setattr(
        module.tfds, "list_builders", lambda **options: asked.append(options) or plain(**options)
    )
    with pytest.raises(UserError, match="Did you mean 'imagenet2012'"):
        make_sources(config_for(prepared / "array_record", dataset="imagenet2021"))
    assert asked == [{"with_community_datasets": False}]
