import http.server
import os
import re
import resource
import shutil
import threading
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from images import by_id, config_of, fill, picture, read

from ssl_jax.cli.main import main
from ssl_jax.data import records
from ssl_jax.data.fingerprint import same_images
from ssl_jax.data.index import Index
from ssl_jax.data.sources import make_sources
from ssl_jax.data.tensorflow import array_record_module
from ssl_jax.errors import UserError

tf = pytest.importorskip("tensorflow")


def converted(tmp_path, shards=3):
    """A folder of images, and records of it."""
    images = fill(tmp_path / "images")
    assert records.convert(str(images), str(tmp_path / "records"), shards) == 12
    return images, tmp_path / "records"


def source_of(folder, name="records", **data):
    return make_sources(config_of(folder, **data, name=name))[0]


def test_records_equal_the_converted_folder(tmp_path):
    images, folder = converted(tmp_path)
    expected, source = source_of(images, "folder"), source_of(folder)
    assert source.num_examples == 12 and source.num_classes == 3
    assert source.class_names == expected.class_names and source.device_data() == {}
    np.testing.assert_array_equal(source.labels, expected.labels)
    assert source.names(range(12)) == expected.names(range(12))
    index = dict(np.load(folder / "index.npz"))
    shutil.copytree(folder, tmp_path / "changed")
    assert source_of(tmp_path / "changed").fingerprint == source.fingerprint
    np.savez(tmp_path / "changed" / "index.npz", **index | {"label": index["label"][::-1]})
    assert source_of(tmp_path / "changed").fingerprint != source.fingerprint
    index = Index(12, 4, seed=0)
    steps = [(step, index.ids(step)) for step in range(7)]
    batches, from_files = read(source, steps), read(expected, steps)
    assert by_id(batches, steps) == by_id(from_files, steps)
    for a, b in zip(batches, from_files, strict=True):
        np.testing.assert_array_equal(a["label"], b["label"])
    np.testing.assert_array_equal(source.eval_transform([3, 11]), expected.eval_transform([3, 11]))


def test_records_are_recognized_by_their_contents_in_any_number_of_shards(tmp_path):
    """ArrayRecord pads files, so that those of other images may have the same size."""
    images, folder = converted(tmp_path)
    old = source_of(folder).fingerprint

    def converted_again(shards):
        shutil.rmtree(folder)
        records.convert(str(images), str(folder), shards)
        return source_of(folder).fingerprint

    assert converted_again(2) == old
    picture(7, (1, 2, 3)).save(images / "dog" / "1.png")  # repaired
    assert converted_again(2) != old and same_images(converted_again(2), old)
    for number, file in enumerate(sorted(images.glob("*/*.png"))[:4]):
        picture(number, (3, 2, 1)).save(file)
    assert not same_images(converted_again(2), old)


def test_shards_are_array_records_of_the_unchanged_files(tmp_path):
    images, folder = converted(tmp_path)
    shards = sorted(path.name for path in folder.iterdir())
    assert shards == [f"{i:05d}-of-00003.array_record" for i in range(3)] + ["index.npz"]
    seen = []
    for name in shards[:3]:
        reader = array_record_module.ArrayRecordReader(str(folder / name))
        seen += reader.read_all()
    names = [f"{c}/{i}.png" for c in ("cat", "dog", "emu") for i in range(4)]
    assert seen == [(images / name).read_bytes() for name in names]
    with np.load(folder / "index.npz") as index:
        assert index["names"].tobytes().decode().split("\0") == names
        np.testing.assert_array_equal(index["label"], np.repeat([0, 1, 2], 4))
        assert index["class_names"].tolist() == ["cat", "dog", "emu"]


def test_flat_folder_converts_without_labels(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        picture(i, (9, 9, 9)).save(tmp_path / "images" / f"{i}.png")
    out = tmp_path / "records"
    assert main(["data", "convert", str(tmp_path / "images"), str(out)]) == 0
    source = source_of(out)
    assert len(list(out.glob("*.array_record"))) == 1 and source.labels is None
    assert "label" not in read(source, [(0, [2, 0])])[0]


def test_undecodable_records_are_named_or_replaced(tmp_path):
    images = fill(tmp_path / "images")
    (images / "dog" / "3.png").write_bytes(b"")
    records.convert(str(images), str(tmp_path / "records"), 2)
    with pytest.raises(
        UserError, match="Cannot decode dog/3.png in .*00001-of-00002.array_record as"
    ):
        read(source_of(tmp_path / "records"), [(0, [6, 7])])
    source = source_of(tmp_path / "records", on_bad_image="skip")
    (batch,) = read(source, [(0, [6, 7])])
    assert batch["label"].tolist() == [1, 2] and len(source.bad) == 1
    np.testing.assert_array_equal(source.eval_transform([7]), source.eval_transform([8]))


def test_interrupted_conversion_is_incomplete_until_rerun(tmp_path, monkeypatch, capsys):
    images = fill(tmp_path / "images")
    out = tmp_path / "records"
    write_shard = records._write_shard

    def write_after_a_file_is_gone(shard, files):
        (images / "emu" / "3.png").unlink(missing_ok=True)
        write_shard(shard, files)

    monkeypatch.setattr(records, "_write_shard", write_after_a_file_is_gone)
    arguments = ["data", "convert", str(images), str(out), "--shards=2"]
    assert main(arguments) == 2
    assert re.search("Cannot read .*emu/3.png", capsys.readouterr().err)
    with pytest.raises(UserError, match="no complete records. Write them with `ssl-jax data"):
        source_of(out)
    assert main(arguments) == 0
    assert source_of(out).num_examples == 11
    assert main(arguments) == 2
    assert "already holds records" in capsys.readouterr().err


def test_corrupt_or_missing_files_raise_user_errors(tmp_path):
    images, folder = converted(tmp_path)
    with pytest.raises(UserError, match="config.data.dir is empty. Set it to a folder written by"):
        source_of("")
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "index.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="index.npz is corrupt"):
        source_of(copy)
    source = source_of(folder, on_bad_image="skip")
    last = folder / "00002-of-00003.array_record"
    whole = last.read_bytes()
    last.write_bytes(whole[:-200])
    with pytest.raises(UserError, match="Cannot read .*/00002-of-00003.array_record .Corrupted"):
        read(source, [(0, [1, 10])])
    image = (images / "emu" / "2.png").read_bytes()
    last.write_bytes(whole.replace(image, image[:-1] + b"?"))
    source = source_of(folder, on_bad_image="skip")
    with pytest.raises(UserError, match="Cannot read .*/00002-of-00003.array_record .Corrupted"):
        read(source, [(0, [1, 10])])
    last.unlink()
    source = source_of(folder, on_bad_image="skip")
    assert len(read(source, [(0, [1, 7])])) == 1  # the other shards are whole
    with pytest.raises(UserError, match="array_record .open.* failed: No such file"):
        read(source, [(0, [1, 10])])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("label", np.array(0), r"labels of shape \[\]"),
        ("label", np.zeros(11, int), r"12 images but labels of shape \[11\]"),
        ("shards", np.array("a"), r"shards of dtype <U1 and shape \[\]"),
        ("shards", np.array([1, 2]), "shards of dtype int64"),
        ("shards", np.array([], str), r"shards of dtype <U1 and shape \[0\]"),
        ("shards", np.array(["a", "b", "c"]), "3 shards but 2 counts"),
        ("shards", np.array(["a", "../rec/b"]), "the shard '../rec/b', which is not a plain file"),
        ("shards", np.array(["a", ".."]), "the shard '..', which is not a plain file name"),
        ("counts", np.array([6.0, 6.0]), "counts of dtype float64"),
        ("counts", np.array(["6", "6"]), "counts of dtype <U1"),
        ("counts", np.array([[6, 6]]), r"counts of dtype int64 and shape \[1, 2\]"),
        ("counts", np.array([13, -1]), "a shard of -1 records"),
        ("counts", np.array([6, 7]), "12 names for 13 records"),
        ("names", np.frombuffer(b"a\0b", np.uint8), "2 names for 12 records"),
        ("names", np.frombuffer(b"a" + bytes(11), np.uint8), "names that are empty"),
        ("names", np.zeros(12), "names that are empty or not bytes"),
        ("class_names", np.array("a"), r"class names of shape \[\]"),
    ],
)
def test_index_of_other_shapes_types_or_paths_is_refused(tmp_path, key, value, words):
    index = {
        "shards": np.array(["a", "b"]),
        "counts": np.array([6, 6]),
        "label": np.zeros(12, int),
        "names": np.frombuffer(b"\0".join([b"a"] * 12), np.uint8),
        "class_names": np.array(["cat"]),
    }
    np.savez(tmp_path / "index.npz", **index)
    assert source_of(tmp_path).num_examples == 12
    np.savez(tmp_path / "index.npz", **{**index, key: value})
    with pytest.raises(UserError, match=f"index.npz has .*{words}"):
        source_of(tmp_path)


@pytest.mark.parametrize("on_bad_image", ["fatal", "skip"])
def test_file_cut_at_a_block_boundary_raises_user_error(tmp_path, on_bad_image):
    """ArrayRecord reads all records of such a file as empty, and raises nothing."""
    images = fill(tmp_path / "images")
    for file in images.glob("*/*"):
        file.write_bytes(file.read_bytes().ljust(12_000, b"\0"))
    records.convert(str(images), str(tmp_path / "records"), 1)
    (shard,) = (tmp_path / "records").glob("*.array_record")
    shard.write_bytes(shard.read_bytes()[: 2**16])
    source = source_of(tmp_path / "records", on_bad_image=on_bad_image)
    with pytest.raises(UserError, match="Cannot read .*array_record .its end is missing"):
        read(source, [(0, [1, 7])])


def test_empty_file_is_a_bad_image(tmp_path):
    images = fill(tmp_path / "images")
    (images / "dog" / "3.png").write_bytes(b"")
    records.convert(str(images), str(tmp_path / "records"), 2)
    with pytest.raises(UserError, match="Cannot decode dog/3.png in "):
        read(source_of(tmp_path / "records"), [(0, [6, 7])])
    source = source_of(tmp_path / "records", on_bad_image="skip")
    read(source, [(0, [6, 7])])
    assert len(source.bad) == 1


def test_negative_number_of_shards_is_refused(tmp_path, capsys):
    images = fill(tmp_path / "images")
    assert main(["data", "convert", str(images), str(tmp_path / "records"), "--shards=-1"]) == 2
    assert "The number of shards is -1: use 1 or more" in capsys.readouterr().err


def test_failed_write_raises_user_error_and_leaves_records_incomplete(tmp_path):
    images = fill(tmp_path / "images")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00000-of-00001.array_record").mkdir()
    with pytest.raises(UserError, match=r"Cannot write .*/out \(Is a directory\)"):
        records.convert(str(images), str(tmp_path / "out"))
    with pytest.raises(UserError, match="contains no complete records"):
        source_of(tmp_path / "out")


def test_more_shards_than_the_open_file_limit_are_read(tmp_path):
    _, folder = converted(tmp_path, shards=12)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    expected = source_of(folder).eval_transform(range(12))
    opened = set(map(int, os.listdir("/proc/self/fd")))
    free = [number for number in range(soft) if number not in opened]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[6], hard))
    try:
        np.testing.assert_array_equal(source_of(folder).eval_transform(range(12)), expected)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_different_classes_in_dir_and_test_dir_raise_user_error(tmp_path):
    _, folder = converted(tmp_path)
    fill(tmp_path / "other", classes=["cat", "dog"])
    records.convert(str(tmp_path / "other"), str(tmp_path / "test"))
    with pytest.raises(UserError, match="Only one of .* has the class emu. Use two"):
        make_sources(config_of(folder, name="records", test_dir=str(tmp_path / "test")))


def test_conversion_to_a_bucket_writes_the_same_files(tmp_path):
    """TensorFlow's ram:// stands for gs://, which ArrayRecord's writer doesn't know either."""
    images, folder = converted(tmp_path)
    records.convert(str(images), "ram://bucket/records", 3)
    for path in folder.iterdir():
        with tf.io.gfile.GFile(f"ram://bucket/records/{path.name}", "rb") as file:
            assert file.read() == path.read_bytes()
    assert source_of("ram://bucket/records").num_examples == 12


def test_records_in_a_bucket_are_read_one_by_one(tmp_path, monkeypatch):
    """ArrayRecord's own client of Google Cloud Storage, against a server on this machine."""
    images, folder = converted(tmp_path)

    class Bucket(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            file = folder / unquote(self.path).partition("?")[0].rpartition("/")[2]
            if not file.is_file():
                return self.send_error(404)
            whole = file.read_bytes()
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            start = int(first) if first else max(0, len(whole) - int(last))
            stop = int(last) + 1 if first and last else len(whole)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(whole)}")
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            self.wfile.write(whole[start:stop])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", endpoint)
        shards = [f"gs://bucket/records/{i:05d}-of-00003.array_record" for i in range(4)]
        bucket = records.ArrayRecords([(shard, 0, 4) for shard in shards])
        files = sorted(images.glob("*/*.png"))
        assert bucket[np.array([11, 2, 6])] == [files[i].read_bytes() for i in (11, 2, 6)]
        with pytest.raises(UserError, match="Cannot read gs://bucket/records/00003-of-00003"):
            bucket[np.array([3, 13])]
        server.shutdown()


def test_list_with_several_labels_per_image_is_converted(tmp_path):
    images, folder = fill(tmp_path / "images"), tmp_path / "records"
    names = sorted(str(file.relative_to(images)) for file in images.rglob("*.png"))
    cells = ["cat;dog", "", "?cat; emu", *["dog"] * 9]
    rows = ["image,label", *(f"{name},{cell}" for name, cell in zip(names, cells, strict=True))]
    (images / "list.csv").write_text("\n".join(rows))
    line = ["data", "convert", str(images / "list.csv"), str(folder), "--shards=2"]
    assert main([*line, "--label-separator=;"]) == 0
    source = source_of(folder)
    expected = source_of(images / "list.csv", "paths", label_separator=";")
    assert source.targets.names == expected.targets.names == ("cat", "dog", "emu")
    np.testing.assert_array_equal(source.targets.values, expected.targets.values)
    assert source.targets.values[2].tolist() == [-1, 0, 1] and source.labels is None
    assert source.names(range(12)) == names
    np.testing.assert_array_equal(source.eval_transform([7]), expected.eval_transform([7]))
    with np.load(folder / "index.npz") as index:
        wrong = {**index, "label": np.where(np.arange(3) == 1, 7, index["label"])}
    assert source_of(folder).fingerprint == source.fingerprint
    np.savez(folder / "index.npz", **wrong)
    with pytest.raises(UserError, match=r"index.npz has the label 7 \(image 0, class 1\) among"):
        source_of(folder)
