import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config

import ssl_jax.memory
from ssl_jax.cli.main import main
from ssl_jax.data import image_list
from ssl_jax.data.decode import decode
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
    with pytest.raises(UserError, match="dog/2.png has 8×9 pixels .* must have the same size"):
        pack(folder, tmp_path / "out.npz")
    assert not list(tmp_path.glob("out*"))


def test_undecodable_image_is_named(folder, tmp_path):
    (folder / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="Cannot decode .*cat/1.png"):
        pack(folder, tmp_path / "out.npz")


def test_images_that_cannot_fit_in_memory_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ssl_jax.memory, "host_memory", lambda: 2**20)
    pack(folder, tmp_path / "a.npz")
    monkeypatch.setattr(ssl_jax.memory, "host_memory", lambda: 6 * 8 * 8 * 3 - 1)
    with pytest.raises(UserError, match=r"6 images like .* take 1.1 KiB, but .* data convert"):
        pack(folder, tmp_path / "b.npz")
    assert not (tmp_path / "b.npz").exists()
    with pytest.raises(UserError, match=r"The arrays of .*a.npz take 1.5 KiB, but"):
        make_sources(packed_config(dir=str(tmp_path / "a.npz")))


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


def test_tilde_in_the_path_is_expanded(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pack(folder, tmp_path / "a.npz")
    assert make_sources(packed_config(dir="~/a.npz"))[0].num_examples == 6


def test_splits_with_different_classes_raise_user_error(folder, tmp_path):
    pack(folder, tmp_path / "a.npz")
    (folder / "dog").rename(folder / "fox")
    pack(folder, tmp_path / "b.npz")
    with pytest.raises(UserError, match="Only one of .* has the class dog and 1 more. Use two"):
        make_sources(packed_config(dir=str(tmp_path / "a.npz"), test_dir=str(tmp_path / "b.npz")))


def test_held_out_split_may_lack_the_last_of_unnamed_classes(tmp_path):
    images = np.zeros((4, 8, 8, 3), np.uint8)
    for name, labels in (("a", [0, 1, 2, 3]), ("b", [0, 1, 2, 2])):
        np.savez(tmp_path / f"{name}.npz", images=images, labels=labels, class_names=[])
    a, b = str(tmp_path / "a.npz"), str(tmp_path / "b.npz")
    train, test = make_sources(packed_config(dir=a, test_dir=b))
    assert (train.num_classes, test.num_classes) == (4, 3)
    with pytest.raises(UserError, match="Only one of .* has the class 3"):
        make_sources(packed_config(dir=b, test_dir=a))


ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
ADAM7 = (*ADAM7, (1, 0, 2, 1))  # first row, first column, and steps of both


def png(values, depth, color, *chunks, interlaced=False):
    """A PNG file of values [h, w, channels], of any bit depth and color type of the standard."""

    def chunk(kind, data):
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    def scanlines(part):
        high_first = part.reshape(len(part), -1)[..., None] >> np.arange(depth)[::-1] & 1
        bits = high_first.reshape(len(part), -1).astype(np.uint8)
        return b"".join(b"\0" + row.tobytes() for row in np.packbits(bits, axis=1))

    height, width = values.shape[:2]
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    data = b"".join(scanlines(values[r::rs, c::cs]) for r, c, rs, cs in passes)
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def png_files():
    """One file per bit depth and color type of PNG, with transparency and interlaced too."""
    rng = np.random.default_rng(0)
    depths = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
    for color, depth in ((c, d) for c, many in depths.items() for d in many):
        values = rng.integers(0, 2**depth, (9, 13, channels[color]))
        palette = [(b"PLTE", rng.integers(0, 256, 3 * 2**depth, np.uint8).tobytes())]
        palette = palette if color == 3 else []
        name = f"color_{color}_depth_{depth}"
        yield f"{name}.png", png(values, depth, color, *palette)
        yield f"{name}_interlaced.png", png(values, depth, color, *palette, interlaced=True)
        if color in (0, 2, 3):
            shown = values[0, 0].astype(">u2").tobytes() if color != 3 else bytes([0, 128])
            yield f"{name}_trns.png", png(values, depth, color, *palette, (b"tRNS", shown))


def jpeg_files():
    """JPEG files of all color spaces, with and without Adobe's marker, subsampled, progressive."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (21, 19, 4)).astype(np.uint8)
    for mode, progressive in itertools.product(("L", "RGB", "CMYK"), (False, True)):
        image = Image.fromarray(pixels[..., 0] if mode == "L" else pixels[..., : len(mode)], mode)
        for subsampling in (0, 1, 2) if mode == "RGB" else (0,):
            file = io.BytesIO()
            options = {"quality": 90, "progressive": progressive, "subsampling": subsampling}
            image.save(file, "JPEG", **options)
            content = file.getvalue()
            yield f"{mode}_{subsampling}_{progressive}.jpg", content
        if mode == "CMYK":
            marker = content.index(b"Adobe")
            yield f"CMYK_plain_{progressive}.jpg", content.replace(b"Adobe", b"other")
            ycck = content[: marker + 11] + b"\2" + content[marker + 12 :]
            yield f"YCCK_{progressive}.jpg", ycck
    file = io.BytesIO()
    Image.fromarray(pixels[..., :3]).save(file, "JPEG", keep_rgb=True)
    yield "RGB_kept.jpg", file.getvalue()


def test_pack_and_folder_decode_all_modes_of_png_and_jpeg_to_the_same_pixels():
    views = pytest.importorskip("ssl_jax.data.views")
    differing = {}
    for name, content in (*png_files(), *jpeg_files()):
        expected, found = views.decode(content).numpy(), decode(content)
        if not np.array_equal(found, expected):
            differing[name] = np.abs(found.astype(int) - expected).max()
    assert not differing


def test_16_bit_grayscale_keeps_its_bits(tmp_path):
    (tmp_path / "in").mkdir()
    ramp = (np.mgrid[:32, :32][1] * 2000).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "in" / "a.png")
    pack(tmp_path / "in", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["images"].dtype == np.uint16 and arrays["images"].shape == (1, 32, 32, 3)
        np.testing.assert_array_equal(arrays["images"][0, ..., 1], ramp)


def test_other_formats_are_packed_as_pillow_reads_them(tmp_path):
    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3), np.uint8)
    for image, suffix in zip(pixels, ("bmp", "gif", "png", "TIFF", "webp"), strict=True):
        Image.fromarray(image).save(tmp_path / "in" / f"a.{suffix}")
    assert pack(tmp_path / "in", tmp_path / "out.npz") == 5
    expected = []
    for file in sorted((tmp_path / "in").iterdir()):
        with Image.open(file) as image:  # animated formats leave the file open
            expected.append(np.asarray(image.convert("RGB")))
    with np.load(tmp_path / "out.npz") as arrays:
        np.testing.assert_array_equal(arrays["images"], expected)
    (tmp_path / "in" / "a.gif").write_bytes((tmp_path / "in" / "a.gif").read_bytes()[:60])
    with pytest.raises(UserError, match="Cannot decode .*a.gif as an image .JPEG, PNG, TIFF, WebP"):
        pack(tmp_path / "in", tmp_path / "out.npz")


def test_labels_with_a_column_per_class_are_read_from_a_packed_file(tmp_path):
    images = np.zeros((3, 8, 8, 3), np.uint8)
    for classes in (2, 0):
        labels = np.ones((3, classes), np.uint8)
        names = np.array(["cat", "dog"][:classes], str)
        np.savez(tmp_path / f"{classes}.npz", images=images, labels=labels, class_names=names)
    source = make_sources(packed_config(dir=str(tmp_path / "2.npz")))[0]
    assert source.targets.names == ("cat", "dog") and source.targets.values.all()
    with pytest.raises(UserError, match=r"labels of shape \[3, 0\]"):
        make_sources(packed_config(dir=str(tmp_path / "0.npz")))


def listed_folder(folder):
    """A list of the images with up to two classes each, and its targets."""
    cells = ["cat;dog", "?dog", "", "dog", "cat", "dog;?cat"]
    files = sorted(folder.rglob("*.png"))
    rows = [f"{file.relative_to(folder)},{cell}" for file, cell in zip(files, cells, strict=True)]
    (folder / "list.csv").write_text("\n".join(["path,kinds", *rows]))
    return folder / "list.csv", [[1, 1], [0, -1], [0, 0], [0, 1], [1, 0], [-1, 1]]


FLAGS = ("--image-key=path", "--label-key=kinds", "--label-separator=;")


def test_list_with_several_labels_per_image_is_packed(folder, tmp_path, capsys):
    file, targets = listed_folder(folder)
    out = tmp_path / "several.npz"
    assert main(["data", "pack", str(file), str(out), *FLAGS]) == 0
    packed = "several.npz: 6 images, 2 classes (cat, dog), several per image"
    assert packed in capsys.readouterr().out
    source = make_sources(packed_config(dir=str(out)))[0]
    assert source.targets.names == ("cat", "dog") and source.labels is None
    assert source.targets.values.tolist() == targets
    pack(folder, tmp_path / "one.npz")
    single = make_sources(packed_config(dir=str(tmp_path / "one.npz")))[0]
    np.testing.assert_array_equal(source.images, single.images)
    # A damaged label is named when the file is read.
    with np.load(out) as arrays:
        wrong = {**arrays, "labels": np.where(np.arange(2) == 1, 7, arrays["labels"])}
    np.savez(out, **wrong)
    with pytest.raises(UserError, match=r"several.npz\) has the label 7 \(image 0, class 1\)"):
        make_sources(packed_config(dir=str(out)))


def test_list_with_one_label_per_image_is_packed(folder, tmp_path):
    file, _ = listed_folder(folder)
    columns = image_list.Columns("path", "kinds", flags=True)
    pack(file, tmp_path / "one.npz", columns=columns)
    source = make_sources(packed_config(dir=str(tmp_path / "one.npz")))[0]
    assert source.targets is None and source.labels.tolist() == [2, 0, -1, 3, 1, 4]
    assert source.class_names == ("?dog", "cat", "cat;dog", "dog", "dog;?cat")
    plain = folder / "list.txt"
    plain.write_text("dog/1.png\ncat/0.png\n")
    assert pack(plain, tmp_path / "plain.npz") == 2
    assert make_sources(packed_config(dir=str(tmp_path / "plain.npz")))[0].labels is None


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_of_lists_are_refused_with_a_folder(folder, tmp_path, capsys, flag):
    assert main(["data", "pack", str(folder), str(tmp_path / "out.npz"), flag]) == 2
    name, value = flag.split("=")
    assert f"{name} is '{value}', but {folder} is not a list of images" in capsys.readouterr().err


def test_column_that_a_list_lacks_is_named_by_its_flag(folder, tmp_path, capsys):
    file, _ = listed_folder(folder)
    assert main(["data", "pack", str(file), str(tmp_path / "out.npz")]) == 2
    assert "--image-key is 'image', which is not a column of" in capsys.readouterr().err
