import gc
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from images import COLORS, by_id, config_of, fill, noise_files, picture, read
from PIL import Image

from ssl_jax import config
from ssl_jax.cli.main import main
from ssl_jax.data.folder import FolderSource
from ssl_jax.data.index import Index
from ssl_jax.data.sources import make_sources
from ssl_jax.data.tensorflow import load_tensorflow, tf
from ssl_jax.errors import UserError

pytest.importorskip("tensorflow")

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT.parent / "shared/data/photos"


def source_of(root, **data):
    return FolderSource(config_of(root, **data))


# What is in a folder


def test_ids_and_labels_follow_sorted_names(tmp_path):
    fill(tmp_path, per_class=2)
    picture(50, COLORS["dog"]).save(tmp_path / "dog" / "Zebra.JPEG")
    picture(51, COLORS["dog"]).save(tmp_path / "dog" / "nested.JPG")
    (tmp_path / "dog" / "more").mkdir()
    picture(52, COLORS["dog"]).save(tmp_path / "dog" / "more" / "é.Png")
    for hidden in (tmp_path / ".cache", tmp_path / "cat" / ".thumbnails"):
        hidden.mkdir()
        picture(53, (0, 0, 0)).save(hidden / "0.png")
    picture(54, (0, 0, 0)).save(tmp_path / "cat" / "._0.png")
    train, test = make_sources(config_of(tmp_path))
    assert test is None and train.device_data() == {} and train.bad == []
    assert train.class_names == ("cat", "dog", "emu") and train.num_examples == 9
    assert train.labels.dtype == np.int32
    np.testing.assert_array_equal(train.labels, [0, 0, 1, 1, 1, 1, 1, 2, 2])
    images = train.eval_transform(np.arange(9)).reshape(9, -1, 3).mean(axis=1)
    expected = np.array(list(COLORS.values()))[train.labels]
    np.testing.assert_allclose(images, expected, atol=25)


def test_fingerprint_depends_on_the_files_and_not_on_the_folders_path(tmp_path, monkeypatch):
    fill(tmp_path / "a", per_class=1)
    shutil.copytree(tmp_path / "a", tmp_path / "scratch" / "b")
    expected = source_of(tmp_path / "a").fingerprint
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "scratch")
    for path in ("~/a", "../a", "b", tmp_path / "scratch" / "b"):
        assert source_of(path).fingerprint == expected, path
    cat = tmp_path / "a" / "cat" / "0.png"
    cat.write_bytes(cat.read_bytes() + bytes(3))
    assert source_of(tmp_path / "a").fingerprint != expected
    copied = tmp_path / "scratch" / "b" / "cat" / "0.png"
    copied.rename(copied.with_name("9.png"))
    assert source_of("b").fingerprint != expected


def test_a_flat_folder_has_no_labels(tmp_path):
    for i in range(3):
        picture(i, COLORS["cat"]).save(tmp_path / f"{i}.png")
    (tmp_path / "notes").mkdir()
    source = source_of(tmp_path)
    assert source.labels is None and source.class_names == () and source.num_examples == 3
    assert "label" not in read(source, [(0, [2, 0])])[0]


def test_files_of_other_types_are_skipped_with_a_warning(tmp_path, caplog):
    fill(tmp_path, per_class=1)
    (tmp_path / "cat" / "a.heic").write_bytes(b"")
    (tmp_path / "cat" / "b.txt").write_text("")
    with caplog.at_level(logging.WARNING, "ssl_jax.data"):
        source_of(tmp_path)
    assert caplog.messages == [
        f"{tmp_path / 'cat'}: skipped a.heic and 1 more (.heic, .txt), not "
        ".jpg, .jpeg, .png, .tif, .tiff, .webp, .bmp or .gif."
    ]


def no_images(root):
    (root / "cat").mkdir()
    (root / "cat" / "notes.txt").write_text("")


def images_and_class_folders(root):
    fill(root)
    picture(0, (0, 0, 0)).save(root / "stray.png")


def empty_class(root):
    fill(root)
    (root / "ant").mkdir()


def a_file(root):
    root.rmdir()
    root.write_text("")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda root: root.rmdir(), "config.data.dir is {}, which doesn't exist"),
        (a_file, "config.data.dir is {}, which is not a folder"),
        (lambda root: None, "config.data.dir is {}, which contains no images"),
        (no_images, "config.data.dir is {}, which contains no images"),
        (
            images_and_class_folders,
            "config.data.dir is {}, which contains both images (stray.png) and",
        ),
        (empty_class, "config.data.dir is {}, where ant contains no images (.jpg, .jpeg, "),
    ],
)
def test_bad_folders_raise_single_line_user_errors(tmp_path, make, message):
    root = tmp_path / "images"
    root.mkdir()
    make(root)
    with pytest.raises(UserError) as caught:
        make_sources(config_of(root))
    assert message.format(root) in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_empty_data_dir_raises_user_error():
    with pytest.raises(UserError, match="config.data.dir is empty"):
        make_sources(config_of(""))


def test_test_dir_is_the_held_out_source(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test", per_class=1)
    c = config_of(tmp_path / "train", test_dir=str(tmp_path / "test"))
    train, test = make_sources(c)
    assert (train.num_examples, test.num_examples) == (12, 3)
    assert train.class_names == test.class_names
    np.testing.assert_array_equal(test.labels, [0, 1, 2])
    c.data.test_dir = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="config.data.test_dir is .*nowhere, which doesn't exist"):
        make_sources(c)


def test_different_class_folders_in_dir_and_test_dir_raise_user_error(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test", classes=("cat", "dog"))
    with pytest.raises(UserError, match="Only one of .* has the class emu. Use two splits of one"):
        make_sources(config_of(tmp_path / "train", test_dir=str(tmp_path / "test")))
    flat = tmp_path / "flat"
    flat.mkdir()
    picture(0, (0, 0, 0)).save(flat / "0.png")
    _, test = make_sources(config_of(tmp_path / "train", test_dir=str(flat)))
    assert test.num_classes == 0  # as the run's first lines say


def test_affine_views_raise_user_error(tmp_path):
    c = config_of(fill(tmp_path))
    c.views.a.affine.update(shear=5.0, degrees=2.0)
    flags = "--config.views.a.affine.degrees=0 --config.views.a.affine.shear=0."
    with pytest.raises(UserError, match=f"Use packed images, or add {flags}"):
        make_sources(c)


# Batches


def test_batches_hold_ids_labels_and_views_in_order(tmp_path):
    source = source_of(fill(tmp_path))
    steps = [(4, [11, 0, 5]), (5, [3, 4, 0]), (6, [8, 8, 1])]
    batches = read(source, steps)
    assert len(batches) == 3
    for (_, ids), batch in zip(steps, batches, strict=True):
        assert batch["id"].dtype == batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["id"], ids)
        np.testing.assert_array_equal(batch["label"], np.array(ids) // 4)
        assert isinstance(batch["views"], tuple)
        assert [v.shape for v in batch["views"]] == [(3, 16, 16, 3), (3, 8, 8, 3), (3, 8, 8, 3)]
        for view in batch["views"]:
            assert view.dtype == np.uint8
            expected = np.array(list(COLORS.values()))[batch["label"]]
            np.testing.assert_allclose(view.mean(axis=(1, 2)), expected, atol=30)


def test_pixels_are_independent_of_threads_splits_order_and_resume(tmp_path):
    fill(tmp_path)
    index = Index(num_examples=12, batch_size=6, seed=1)
    steps = [(step, index.ids(step)) for step in range(5)]
    whole = by_id(read(source_of(tmp_path), steps), steps)
    assert len(whole) == 5 * 6 * 3
    assert len(set(whole.values())) == len(whole)  # every crop is another
    for threads in (1, 3):
        assert by_id(read(source_of(tmp_path, threads=threads), steps), steps) == whole
    halves = {}
    for process in (0, 1):
        rows = 3 * process + np.arange(3)
        local = [(step, index.local_ids(step, rows)) for step in range(5)]
        halves |= by_id(read(source_of(tmp_path), local), local)
    assert halves == whole
    resumed = [(step, ids[::-1]) for step, ids in steps[3:]]
    again = by_id(read(source_of(tmp_path), resumed), resumed)
    assert again.items() <= whole.items() and len(again) == 2 * 6 * 3


def test_views_equal_make_views_of_the_files_pixels(tmp_path):
    from ssl_jax.data import views

    fill(tmp_path)
    c = config_of(tmp_path, sampler="tf")
    c.seed = 5
    (batch,) = read(FolderSource(c), [(9, [6, 1])])
    image = np.asarray(Image.open(tmp_path / "dog" / "2.png"))
    expected = views.make_views(image, views.image_seed(5, 9, 6), config.flat_views(c))
    for got, one in zip(batch["views"], expected, strict=True):
        np.testing.assert_array_equal(got[0], one)


def test_steps_of_different_sizes_are_read(tmp_path):
    source = source_of(fill(tmp_path))
    steps = [(0, [1, 2]), (1, [3, 4]), (2, [5]), (3, [6, 7, 8]), (4, [9, 10, 11])]
    batches = read(source, steps)
    assert [batch["id"].tolist() for batch in batches] == [ids for _, ids in steps]
    assert read(source, []) == []


def test_error_in_the_steps_iterator_is_raised_after_the_earlier_batches(tmp_path):
    def steps():
        yield 0, np.array([0, 1])
        yield 1, np.array([2, 3])
        raise KeyError("lost")

    batches = source_of(fill(tmp_path)).batches(steps())
    assert next(batches)["id"].tolist() == [0, 1]
    assert next(batches)["id"].tolist() == [2, 3]
    with pytest.raises(KeyError, match="lost"):
        next(batches)


def test_few_steps_are_read_ahead_and_closing_stops_reading(tmp_path):
    drawn = []

    def steps():
        while True:
            drawn.append(len(drawn))
            yield drawn[-1], np.array([0, 1, 2])

    batches = source_of(fill(tmp_path), threads=2).batches(steps())
    for _ in range(3):
        next(batches)
    time.sleep(0.5)
    assert len(drawn) <= 8
    started = time.perf_counter()
    batches.close()
    assert time.perf_counter() - started < 5
    left_at = len(drawn)
    time.sleep(0.2)
    assert len(drawn) == left_at


@pytest.mark.long
def test_four_processes_read_disjoint_shares_with_the_pixels_of_one(tmp_path):
    """Each process reads its share of the steps."""
    images = fill(tmp_path / "images")
    code = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
from images import config_of
from ssl_jax.data.folder import FolderSource
from ssl_jax.data.index import Index
process, index = int(sys.argv[4]), Index(12, 8, seed=1)
source = FolderSource(config_of(sys.argv[2]))
rows = 2 * process + np.arange(2)
steps = ((step, index.local_ids(step, rows)) for step in range(3))
read = list(source.batches(steps))
np.savez(f"{sys.argv[3]}/{process}.npz", id=[batch["id"] for batch in read],
         **{f"view{v}": [batch["views"][v] for batch in read] for v in range(3)})
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code, ROOT / "tests", images, tmp_path, str(i)])
        for i in range(4)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0] * 4
    shares = [np.load(tmp_path / f"{i}.npz") for i in range(4)]
    index = Index(12, 8, seed=1)
    whole = read(source_of(images), [(step, index.ids(step)) for step in range(3)])
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([s["id"][step] for s in shares]), batch["id"])
        for number, view in enumerate(batch["views"]):
            together = np.concatenate([s[f"view{number}"][step] for s in shares])
            np.testing.assert_array_equal(together, view)


# Evaluation


def test_eval_transform_is_independent_of_the_other_ids(tmp_path):
    from ssl_jax.data import views

    fill(tmp_path)
    c = config_of(tmp_path)
    c.eval.update(crop_fraction=0.5, interpolation="bilinear")
    source = FolderSource(c)
    images = source.eval_transform(np.arange(12))
    assert images.shape == (12, 16, 16, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(source.eval_transform([7, 7, 2]), images[[7, 7, 2]])
    pixels = np.asarray(Image.open(tmp_path / "emu" / "1.png"))
    assert pixels.shape == (36, 35, 3)
    expected = views.center_crop(pixels, c.views.a, 0.5, "bilinear")
    np.testing.assert_array_equal(images[9], expected)


def test_passes_over_a_source_leave_nothing_behind(tmp_path):
    """TensorFlow never frees the Python functions of a pipeline."""
    from tensorflow.python.eager import context
    from tensorflow.python.ops import script_ops

    source = source_of(noise_files(tmp_path), threads=2)

    def held():
        gc.collect()
        functions = script_ops._py_funcs.size(), len(context.context().list_function_names())
        return *functions, *(len(os.listdir(f"/proc/self/{each}")) for each in ("task", "fd"))

    def passes(source):
        read(source, [(step, range(8 * step, 8 * step + 8)) for step in range(4)])
        list(source.eval_batches(np.split(np.arange(64), 8)))
        for count in (1, 2, 17):
            source.eval_transform(np.arange(count))
        next(source.batches(iter([(0, np.arange(8)), (1, np.arange(8))])))  # and no more

    passes(source)
    before = held()
    passes(source)
    assert all(now <= then for now, then in zip(held(), before, strict=True))
    gone = weakref.ref(source)
    del source
    gc.collect()
    assert gone() is None


# Files that can't be decoded


def spoil(file, how):
    if how == "text":
        file.write_text("not an image\n" * 50)
    elif how == "empty":
        file.write_bytes(b"")
    else:
        picture(1, COLORS["cat"], (200, 150)).save(file, "JPEG")
        os.truncate(file, file.stat().st_size * 3 // 4)


@pytest.mark.parametrize("how", ["text", "empty", "truncated"])
def test_undecodable_image_is_fatal_and_named(tmp_path, how):
    fill(tmp_path)
    spoil(tmp_path / "dog" / "1.png", how)
    source = source_of(tmp_path)
    batches = source.batches(iter([(0, np.array([0, 4])), (1, np.array([6, 5]))]))
    assert next(batches)["id"].tolist() == [0, 4]
    with pytest.raises(UserError, match="Cannot decode .*dog/1.png .* --config.data.on_bad_image="):
        next(batches)
    with pytest.raises(UserError, match="Cannot decode .*dog/1.png as an image .JPEG, PNG"):
        source.eval_transform([4, 5])
    assert source.bad == []


def test_fatal_error_counts_other_bad_images_of_the_step(tmp_path):
    fill(tmp_path)
    for name in ("dog/3.png", "dog/1.png", "emu/0.png"):
        spoil(tmp_path / name, "text")
    with pytest.raises(UserError, match=r"decode .*dog/1.png \(and 2 more in the same step\) as"):
        read(source_of(tmp_path), [(0, range(12))])


def test_skip_replaces_a_bad_image_by_the_next_good_one(tmp_path, caplog):
    fill(tmp_path)
    spoil(tmp_path / "cat" / "3.png", "truncated")  # the next one has a different label
    spoil(tmp_path / "emu" / "2.png", "empty")
    spoil(tmp_path / "emu" / "3.png", "text")  # the first id follows the last
    source = source_of(tmp_path, on_bad_image="skip")
    steps = [(0, [0, 1]), (1, [2, 3]), (2, [10, 4]), (3, [11, 3]), (4, [10, 11])]
    with caplog.at_level(logging.WARNING, "ssl_jax.data"):
        batches = read(source, steps)
    assert [batch["id"].tolist() for batch in batches] == [ids for _, ids in steps]
    labels = [batch["label"].tolist() for batch in batches]
    assert labels == [[0, 0], [0, 1], [0, 1], [0, 1], [0, 0]]
    bad = [str(tmp_path / name) for name in ("cat/3.png", "emu/2.png", "emu/3.png")]
    assert source.bad == bad
    good = [str(tmp_path / name) for name in ("dog/0.png", "cat/0.png", "cat/0.png")]
    assert caplog.messages == [
        f"Cannot decode {a}; using {b} instead." for a, b in zip(bad, good, strict=True)
    ]
    clean = source.eval_transform(np.arange(12))
    np.testing.assert_array_equal(clean[[3, 10, 11]], clean[[4, 0, 0]])
    np.testing.assert_array_equal(source.labels, [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 0, 0])
    names = source.names(np.arange(12))
    assert names[2:5] == ["cat/2.png", "dog/0.png", "dog/0.png"] and names[11] == "cat/0.png"
    # The id stays, and with it the crop.
    assert batches[4]["views"][0][0].tobytes() != batches[4]["views"][0][1].tobytes()


def test_class_and_file_names_that_are_not_utf_8_are_escaped(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    for name in (b"0.png", b"\xff.png"):
        picture(0, COLORS["cat"]).save(tmp_path / "image.png")
        os.replace(tmp_path / "image.png", folder + b"/" + name)
    source = source_of(tmp_path)
    assert source.class_names == ("caf\\udce9",)
    assert source.names([0, 1]) == ["caf\\udce9/0.png", "caf\\udce9/\\udcff.png"]
    assert source.eval_transform([0, 1]).shape[0] == 2


def test_other_formats_are_read_and_replaced_as_jpeg_and_png(tmp_path):
    from ssl_jax.data import views

    for i, name in enumerate(("a.tif", "b.webp", "c.BMP", "d.gif", "e.png", "f.tiff")):
        picture(i, COLORS["cat"], (33, 30 + i)).save(tmp_path / name)
    os.truncate(tmp_path / "a.tif", 1500)
    (tmp_path / "f.tiff").write_text("not an image\n")
    source = source_of(tmp_path, on_bad_image="skip")
    batches = read(source, [(4, [1, 2, 3]), (5, [0, 4, 5])])
    assert source.bad == [str(tmp_path / name) for name in ("a.tif", "f.tiff")]
    assert source.image_sizes([1, 2, 5]).tolist() == [[31, 33], [32, 33]]
    c, used = config_of(tmp_path), ("b.webp", "c.BMP", "d.gif", "b.webp", "e.png", "b.webp")
    for number, (id, name) in enumerate(zip((1, 2, 3, 0, 4, 5), used, strict=True)):
        with Image.open(tmp_path / name) as image:
            pixels = np.asarray(image.convert("RGB"))
        seed = views.image_seed(c.seed, 4 + number // 3, id)
        made = views.make_views(pixels, seed, config.flat_views(c))
        for got, expected in zip(batches[number // 3]["views"], made, strict=True):
            np.testing.assert_array_equal(got[number % 3], expected)
    (again,) = read(source_of(tmp_path, on_bad_image="skip"), [(5, [0, 4, 5])])
    np.testing.assert_array_equal(again["views"][0], batches[1]["views"][0])
    with pytest.raises(UserError, match="Cannot decode .*f.tiff as an image .JPEG, PNG, TIFF"):
        source_of(tmp_path).eval_transform([5])


def test_replacements_are_independent_of_earlier_reads(tmp_path):
    fill(tmp_path)
    for name in ("cat/3.png", "dog/0.png", "emu/3.png"):
        spoil(tmp_path / name, "text")
    index = Index(num_examples=12, batch_size=4, seed=0)
    steps = [(step, index.ids(step)) for step in range(6)]
    whole = by_id(read(source_of(tmp_path, on_bad_image="skip"), steps), steps)
    assert len(whole) == 6 * 4 * 3
    evaluated_first = source_of(tmp_path, on_bad_image="skip", threads=2)
    evaluated_first.eval_transform(np.arange(12)[::-1])
    assert by_id(read(evaluated_first, steps), steps) == whole
    resumed = by_id(read(source_of(tmp_path, on_bad_image="skip"), steps[4:]), steps[4:])
    assert resumed.items() <= whole.items()


def test_bad_image_found_by_a_concurrent_reader_is_listed_once(tmp_path):
    fill(tmp_path)
    spoil(tmp_path / "cat" / "2.png", "text")
    source = source_of(tmp_path, on_bad_image="skip")
    batches = source.batches(iter([(0, np.array([0, 1])), (1, np.array([2, 3]))]))
    next(batches)
    time.sleep(0.3)  # the second step is being read
    source.eval_transform([2])
    assert next(batches)["id"].tolist() == [2, 3]
    assert source.bad == [str(tmp_path / "cat" / "2.png")]


def test_only_undecodable_images_raise_user_error(tmp_path):
    fill(tmp_path, per_class=1)
    for file in tmp_path.glob("*/*.png"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="Cannot decode any image of config.data.dir"):
        source_of(tmp_path, on_bad_image="skip").eval_transform([1])


def test_sizes_are_read_with_the_time_limit_of_images(tmp_path, monkeypatch):
    fill(tmp_path, per_class=1)
    source, threads = source_of(tmp_path), []
    read_image = FolderSource.read

    def noted(self, id):
        threads.append(threading.current_thread())
        return read_image(self, id)

    monkeypatch.setattr(FolderSource, "read", noted)
    assert source.image_sizes([0, 2]).shape == (2, 2)
    assert len(threads) == 2 and threading.main_thread() not in threads


def test_pipe_in_place_of_an_image_is_refused(tmp_path, capsys):
    fill(tmp_path / "a", per_class=1)
    pipe = tmp_path / "a" / "cat" / "0.png"
    pipe.unlink()
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=r"cat/0.png \(not a regular file\)"):
        source_of(tmp_path / "a").image_sizes([0])
    for command, out in (("pack", tmp_path / "a.npz"), ("convert", tmp_path / "records")):
        assert main(["data", command, str(tmp_path / "a"), str(out)]) == 2
        assert "0.png (not a regular file)" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("on_bad_image", ["fatal", "skip"])
def test_missing_file_raises_user_error_and_is_never_skipped(tmp_path, on_bad_image):
    fill(tmp_path)
    source = source_of(tmp_path, on_bad_image=on_bad_image)
    (tmp_path / "dog" / "2.png").unlink()
    with pytest.raises(UserError, match="Cannot read .*dog/2.png .*No such file"):
        read(source, [(0, [5, 6])])


def test_other_tensorflow_errors_are_not_taken_for_bad_images(tmp_path, monkeypatch):
    def broken(image, seed, views):
        return (tf.reshape(image, [7]),)

    monkeypatch.setattr("ssl_jax.data.views.make_views", broken)
    with pytest.raises(tf.errors.InvalidArgumentError, match="reshape"):
        read(source_of(fill(tmp_path), on_bad_image="skip"), [(0, [1, 2])])


# Photographs


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"there are no photographs in {PHOTOS}")
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_of_photographs_equal_pils(interpolation):
    c = config_of(PHOTOS)
    crop = dict(sampler="torchvision", interpolation=interpolation)
    c.views = {"a": config.view(count=2, crop=crop)}
    source = FolderSource(c)
    assert source.num_examples == 100 and source.labels is None
    ids = np.arange(3, 100, 12)
    (batch,) = read(source, [(2, ids)])
    boxes, sizes = source.boxes(2, ids)
    files = sorted(PHOTOS.glob("*.JPEG"))
    method = getattr(Image.Resampling, interpolation.upper())
    for i, id in enumerate(ids):
        photo = Image.open(files[id]).convert("RGB")
        assert photo.size == tuple(sizes[i, ::-1])
        for number, view in enumerate(batch["views"]):
            top, left, tall, wide = boxes[i, number]
            cropped = photo.crop((left, top, left + wide, top + tall))
            np.testing.assert_array_equal(view[i], cropped.resize((224, 224), method))


# TensorFlow is loaded only where it is needed


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("TF_")} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_imports_and_array_sources_load_no_tensorflow_and_set_no_variables():
    code = (
        "import os, sys, jax; before = dict(os.environ); import ssl_jax.data.pipeline; "
        "from ssl_jax.data import folder, records, sources, tfds; import ssl_jax.interop.simclr; "
        "from ssl_jax.config import default_config; sources.make_sources(default_config()); "
        "assert not {'tensorflow', 'tensorflow_datasets', 'array_record'} & set(sys.modules); "
        "assert os.environ == before"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_tensorflow_logs_nothing_and_uses_no_gpu(tmp_path):
    fill(tmp_path)
    spoil(tmp_path / "cat" / "0.png", "truncated")
    spoil(tmp_path / "cat" / "2.png", "text")
    code = (
        "import jax\n"  # imported first in a run; sets TensorFlow's log level
        "from ssl_jax.config import default_config\n"
        "from ssl_jax.data.sources import make_sources\n"
        "c = default_config()\n"
        f"c.data.update(name='folder', dir={str(tmp_path)!r}, on_bad_image='skip')\n"
        "make_sources(c)[0].eval_transform([0, 1, 2])\n"
        "import tensorflow as tf\n"
        "assert tf.config.get_visible_devices('GPU') == []\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"Cannot decode {tmp_path}/cat/0.png; using {tmp_path}/cat/1.png instead.",
        f"Cannot decode {tmp_path}/cat/2.png; using {tmp_path}/cat/3.png instead.",
    ]


def test_missing_tensorflow_error_names_the_extra_to_install(tmp_path, monkeypatch):
    load_tensorflow.cache_clear()
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match=r"pip install .* '\.\[data\]'"):
        make_sources(config_of(fill(tmp_path)))
