import shutil
from pathlib import Path

import numpy as np
import pytest
from images import by_id, config_of, fill, picture, read

from ssl_jax.cli.main import main
from ssl_jax.data.index import Index
from ssl_jax.data.sources import make_sources
from ssl_jax.errors import UserError

tf = pytest.importorskip("tensorflow")
records = pytest.importorskip("ssl_jax.data.records")


def converted(tmp_path, shards=3):
    """A folder of images, and records of it."""
    images = fill(tmp_path / "images")
    assert records.convert(str(images), str(tmp_path / "records"), shards) == 12
    return images, tmp_path / "records"


def source_of(folder, name="records", **data):
    return make_sources(config_of(folder, **data, name=name))[0]


def test_records_are_the_folder(tmp_path):
    images, folder = converted(tmp_path)
    expected, source = source_of(images, "folder"), source_of(folder)
    assert source.num_examples == 12 and source.num_classes == 3
    assert source.class_names == expected.class_names and source.device_data() == {}
    np.testing.assert_array_equal(source.labels, expected.labels)
    index = Index(12, 4, seed=0)
    steps = [(step, index.ids(step)) for step in range(7)]
    ours, theirs = read(source, steps), read(expected, steps)
    assert by_id(ours, steps) == by_id(theirs, steps)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a["label"], b["label"])
    np.testing.assert_array_equal(source.eval_transform([3, 11]), expected.eval_transform([3, 11]))


def test_the_shards_are_tfrecords_of_the_unchanged_files(tmp_path):
    images, folder = converted(tmp_path)
    shards = sorted(path.name for path in folder.iterdir())
    assert shards == [f"{i:05d}-of-00003.tfrecord" for i in range(3)] + ["index.npz"]
    spec = {
        "image": tf.io.FixedLenFeature([], tf.string),
        "label": tf.io.FixedLenFeature([], tf.int64),
        "name": tf.io.FixedLenFeature([], tf.string),
    }
    files = [str(folder / name) for name in shards[:3]]
    seen = []
    for record in tf.data.TFRecordDataset(files).as_numpy_iterator():
        example = tf.io.parse_single_example(record, spec)
        name = example["name"].numpy().decode()
        assert example["image"].numpy() == (images / name).read_bytes()
        seen.append((name, int(example["label"])))
    names = [f"{c}/{i}.png" for c in ("cat", "dog", "emu") for i in range(4)]
    assert seen == list(zip(names, np.repeat([0, 1, 2], 4), strict=True))


def test_a_flat_folder_has_no_labels(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        picture(i, (9, 9, 9)).save(tmp_path / "images" / f"{i}.png")
    out = tmp_path / "records"
    assert main(["data", "convert", str(tmp_path / "images"), str(out)]) == 0
    source = source_of(out)
    assert len(list(out.glob("*.tfrecord"))) == 1 and source.labels is None
    assert "label" not in read(source, [(0, [2, 0])])[0]


def test_bad_images_are_named_and_replaced(tmp_path):
    images = fill(tmp_path / "images")
    (images / "dog" / "3.png").write_bytes(b"")
    records.convert(str(images), str(tmp_path / "records"), 2)
    with pytest.raises(UserError, match="dog/3.png in .*00001-of-00002.tfrecord can't be decoded"):
        read(source_of(tmp_path / "records"), [(0, [6, 7])])
    source = source_of(tmp_path / "records", on_bad_image="skip")
    (batch,) = read(source, [(0, [6, 7])])
    assert batch["label"].tolist() == [1, 2] and len(source.bad) == 1
    np.testing.assert_array_equal(source.eval_transform([7]), source.eval_transform([8]))


def test_an_interrupted_conversion_is_not_taken_for_a_whole_one(tmp_path, monkeypatch, capsys):
    images = fill(tmp_path / "images")
    out = tmp_path / "records"
    (images / "emu" / "3.png").unlink()
    (images / "emu" / "3.png").symlink_to("gone")
    arguments = ["data", "convert", str(images), str(out), "--shards=2"]
    assert main(arguments) == 2
    assert "emu/3.png can't be read" in capsys.readouterr().err
    with pytest.raises(UserError, match="no complete records: `ssl-jax data convert"):
        source_of(out)
    (images / "emu" / "3.png").unlink()
    assert main(arguments) == 0
    assert source_of(out).num_examples == 11
    assert main(arguments) == 2
    assert "holds records already" in capsys.readouterr().err


def test_damage_is_one_sentence(tmp_path):
    _, folder = converted(tmp_path)
    with pytest.raises(UserError, match="config.data.dir is empty: give the folder"):
        source_of("")
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "index.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="index.npz is corrupt"):
        source_of(copy)
    source = source_of(folder, on_bad_image="skip")
    last = folder / "00002-of-00003.tfrecord"
    last.write_bytes(last.read_bytes()[:-200])
    with pytest.raises(UserError, match="00002-of-00003.tfrecord can't be read .it is too short"):
        read(source, [(0, [10, 11])])
    last.unlink()
    with pytest.raises(UserError, match="00002-of-00003.tfrecord can't be read .No such file"):
        read(source, [(0, [10, 11])])


def test_classes_of_both_splits_must_agree(tmp_path):
    _, folder = converted(tmp_path)
    fill(tmp_path / "other", classes=["cat", "dog"])
    records.convert(str(tmp_path / "other"), str(tmp_path / "test"))
    with pytest.raises(UserError, match="have other classes"):
        make_sources(config_of(folder, name="records", test_dir=str(tmp_path / "test")))


def test_a_bucket_is_read_by_tensorflows_file_system(tmp_path):
    """memory:// stands for gs://: neither is a path that Python's own open() knows."""
    images = fill(tmp_path / "images")
    records.convert(str(images), "ram://bucket/records", 2)
    source = source_of("ram://bucket/records")
    expected = source_of(images, "folder")
    np.testing.assert_array_equal(
        source.eval_transform(range(12)), expected.eval_transform(range(12))
    )
