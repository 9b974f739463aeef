"""TFRecord files that TensorFlow writes."""

import builtins
from types import SimpleNamespace

import numpy as np
import pytest

from ssl_jax.data import tfrecords
from ssl_jax.data.tfrecords import TFRecords
from ssl_jax.errors import UserError

tf = pytest.importorskip("tensorflow")


def example(label, image=b"", before="a", after="z"):
    """An example like TFDS's: an image, a label, and text features around both by name."""
    features = {
        before: tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"n" * 200])),
        "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
        "label": tf.train.Feature(int64_list=tf.train.Int64List(value=label)),
        after: tf.train.Feature(float_list=tf.train.FloatList(value=[1.0])),
    }
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString(
        deterministic=True
    )


def written(path, payloads):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for payload in payloads:
            writer.write(payload)
    return path


def part(path, take, skip=0):
    return SimpleNamespace(filename=path, skip=skip, take=take)


def test_labels_and_payloads_are_those_written(tmp_path):
    """A label's place among the features, and its number of bytes, vary."""
    labels = [0, 1, 127, 128, 99_999, -1]
    payloads = [example([i], b"x" * (5000 * n), "m" * (n + 1)) for n, i in enumerate(labels)]
    file = written(tmp_path / "a", payloads)
    records = TFRecords([part(file, 6), part(file, 2, skip=3)], "label")
    assert records.labels.tolist() == [*labels, 128, 99_999]
    assert records[np.arange(8)] == [*payloads, *payloads[3:5]]
    assert TFRecords([part(file, 6)]).labels is None


def test_file_is_opened_once_and_images_are_skipped(tmp_path, monkeypatch):
    files = [
        written(tmp_path / name, [example([i], b"x" * 500_000) for i in range(4)]) for name in "ab"
    ]
    opened, sizes = [], []

    def counted(path, *args, **kwargs):
        opened.append(path)
        file = builtins.open(path, *args, **kwargs)

        def read(size):
            sizes.append(size)
            return file.read(size)

        return SimpleNamespace(read=read, seek=file.seek, close=file.close, fileno=file.fileno)

    monkeypatch.setattr(tfrecords, "open", counted, raising=False)
    assert TFRecords([part(file, 4) for file in files], "label").labels.tolist() == [0, 1, 2, 3] * 2
    assert sorted(opened) == sorted(map(str, files))
    assert len(sizes) <= 2 * 8 + 2 and max(sizes) == 4096  # of 4,000,000 bytes


@pytest.mark.parametrize("length", [2**64 - 1, 2**40, 101])
def test_record_longer_than_its_file_is_refused(tmp_path, length):
    file = tmp_path / "a.tfrecord"
    file.write_bytes(length.to_bytes(8, "little") + bytes(108))
    with pytest.raises(UserError, match=f"a.tfrecord has a record of {length:,} bytes at 0, beyo"):
        TFRecords([part(file, 1)])


@pytest.mark.parametrize("label", [[], [1, 2]])
def test_record_without_one_label_is_refused(tmp_path, label):
    file = written(tmp_path / "a", [example([3]), example(label)])
    with pytest.raises(UserError, match="a has no label 'label' in the record at 2"):
        TFRecords([part(file, 2)], "label")


def test_missing_or_short_files_raise_user_errors(tmp_path):
    with pytest.raises(UserError, match="Cannot read .*a .No such file.* complete"):
        TFRecords([part(tmp_path / "a", 1)])
    (tmp_path / "a").write_bytes(b"123")
    with pytest.raises(UserError, match="Cannot read .*a .it is too short.* complete"):
        TFRecords([part(tmp_path / "a", 1)])


def test_corrupt_payload_gives_a_label_or_a_user_error(tmp_path):
    rng, file = np.random.default_rng(0), tmp_path / "a"
    plain, refused = written(file, [example([3], b"x" * 300)]).read_bytes(), 0
    negative = written(tmp_path / "b", [example([-1], b"x" * 300)]).read_bytes()
    for number in range(300):
        data = bytearray(negative if number % 2 else plain)
        for place in rng.integers(12, len(data) - 4, 3):
            data[place] = rng.integers(256)
        file.write_bytes(data)
        try:
            TFRecords([part(file, 1)], "label")
        except UserError:
            refused += 1
    assert 0 < refused < 300
