import dataclasses
import sys
import zlib

import jax
import numpy as np
import pytest
from images import COLORS, config_of, fill, picture
from ml_collections import ConfigDict
from PIL import Image
from tiny import method_config, random_source, tiny_config

from ssl_jax.cli import main as cli
from ssl_jax.config import view
from ssl_jax.data.index import Index
from ssl_jax.data.pipeline import make_augment_fn
from ssl_jax.data.sources import make_sources
from ssl_jax.errors import UserError
from ssl_jax.report import picture as views_picture

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.2, 0.3)


def plain_view(**changes):
    """A view that changes nothing apart from the given keys."""
    nothing = {
        **{"size": 8, "flip": 0.0, "gray": 0.0},
        "crop": {"sampler": "none", "interpolation": "bilinear"},
        "jitter": {"prob": 0.0},
        "blur": {"prob": 0.0},
    }
    return view(**{**nothing, **changes})


def expected_views(config, images, step):
    """The views that the train step's own functions make of its batch's first images."""
    source, _ = make_sources(config)
    ids = Index(source.num_examples, config.batch_size, config.seed).ids(step)[:images]
    key = jax.random.key(config.seed)
    for data in (zlib.crc32(b"views"), step):
        key = jax.random.fold_in(key, data)
    raw = next(source.batches(iter([(step, ids)])))
    return ids, jax.jit(make_augment_fn(config))(raw, source.device_data(), key)["views"]


def normalized(config):
    config = ConfigDict(config.to_dict())
    for name in config.views:
        config.views[name].update(mean=MEAN, std=STD)
    return config


def folder_config(root):
    pytest.importorskip("tensorflow")
    config = config_of(fill(root))
    config.batch_size = 8
    return config


def collect_from(source, monkeypatch, one_view, **changes):
    """Collects 16 images of a source with one view."""
    monkeypatch.setattr(views_picture, "make_sources", lambda config: (source, None))
    config = tiny_config(**changes)
    config.views = {"only": one_view}
    samples = views_picture.collect(config, 16, 0)
    return samples, samples.views[0]


def assert_views_are_the_steps(config, step):
    """Compares collected views with those that training sees; returns the former."""
    samples = views_picture.collect(normalized(config), 5, step)
    ids, views = expected_views(config, 5, step)
    np.testing.assert_array_equal(samples.ids, ids)
    assert len(samples.views) == len(views)
    for shown, seen in zip(samples.views, views, strict=True):
        np.testing.assert_array_equal(shown.pixels, seen)
    return samples


def test_views_of_a_folder_equal_the_train_steps(tmp_path):
    assert_views_are_the_steps(folder_config(tmp_path), 2)


def test_multi_crop_views_of_arrays_equal_the_train_steps():
    config = method_config("swav", seed=3)
    config.views.a_large.noise = 0.1
    samples = assert_views_are_the_steps(config, 7)
    titles = ["a_large", "b_large", "c_small 1", "c_small 2"]
    assert [view.title for view in samples.views] == titles
    drawn = views_picture.draw(samples, "title")
    # Originals and large views of 8 pixels are enlarged 20 times, small ones of 6 pixels 27 times.
    shown = [image for image in framed_images(drawn) if image.shape[0] > 100]
    assert sorted({image.shape[:2] for image in shown}) == [(160, 160), (162, 162)]
    assert drawn.width == 2 * 36 + 5 * 176 + 4 * 24


def test_batch_larger_than_the_data_set_shows_every_image_once(monkeypatch):
    one = plain_view(flip=0.5)
    samples, _ = collect_from(random_source(16), monkeypatch, one, batch_size=64)
    assert sorted(samples.ids) == list(range(16))


# Notes below a view


def test_flip_is_noted_exactly_on_flipped_views(monkeypatch):
    source = random_source()
    samples, only = collect_from(source, monkeypatch, plain_view(flip=0.5))
    assert set(only.notes) == {("flip",), ()}
    for id, label, pixels, notes in zip(
        samples.ids, samples.labels, only.pixels, only.notes, strict=True
    ):
        image = source.images[id] / 255
        np.testing.assert_allclose(pixels, image[:, ::-1] if notes else image, atol=1e-6)
        assert label == str(source.labels[id])


def test_noted_jitter_factors_are_the_applied_ones(monkeypatch):
    source = random_source()
    jitter = {"prob": 0.5, "brightness": 0.8, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    for mode in ("multiply", "add"):
        one = plain_view(jitter={**jitter, "brightness_mode": mode})
        samples, only = collect_from(source, monkeypatch, one)
        assert {len(notes) for notes in only.notes} == {0, 1}
        for id, pixels, notes in zip(samples.ids, only.pixels, only.notes, strict=True):
            image = source.images[id] / 255
            if notes:
                word, factor = notes[0].split(" b")
                image = image + float(factor) if mode == "add" else image * float(factor)
                assert word == "jitter" and (factor[0] in "+-") == (mode == "add")
            np.testing.assert_allclose(pixels, np.clip(image, 0, 1), atol=0.006)


def test_gray_and_solarize_are_noted_exactly_where_applied(monkeypatch):
    source = random_source()
    source.images[..., 0] = 255
    one = plain_view(gray=0.5, solarize={"prob": 0.5, "threshold": 0.9})
    _, only = collect_from(source, monkeypatch, one)
    for pixels, notes in zip(only.pixels, only.notes, strict=True):
        assert ("gray" in notes) == np.allclose(pixels[..., 0], pixels[..., 1])
        if "gray" not in notes:
            assert ("solarize 0.9" in notes) == (pixels[..., 0] == 0).all()
    assert len(set(only.notes)) == 4


def test_notes_are_in_the_order_applied():
    one = view(
        affine={"degrees": 9.0, "shear": 9.0, "translate": 0.1},
        jitter={"brightness_mode": "add", "saturation": 0.0},
        solarize={"prob": 0.5},
        noise=0.05,
    )
    crop = {"top": 30, "left": 12, "height": 140, "width": 180}
    turn = {"degrees": -0.2, "shear": 4.4, "shift_y": -0.01, "shift_x": 1.26}
    colors = {"brightness": 0.123, "contrast": 1.5, "saturation": 0.7, "hue": -0.05, "sigma": 1.3}
    applied = dict.fromkeys(("flip", "jitter", "gray", "blur", "solarize"), True)
    sampled = {**crop, **turn, **colors, **applied, "order": np.array([3, 2, 0, 1])}
    geometry = ["crop 12,30 180x140", "rotate 0°", "shear 4°", "shift 1.3,0.0", "flip"]
    jitter, blur = "jitter h-0.05 b+0.12 c1.50", ["blur 1.30", "solarize 0.5", "noise 0.05"]
    assert list(views_picture.describe(sampled, one)) == [*geometry, jitter, "gray", *blur]
    one.gray_first = True
    assert list(views_picture.describe(sampled, one)) == [*geometry, "gray", jitter, *blur]


def test_noted_and_outlined_crops_of_a_folder_are_its_views_sources(tmp_path):
    config = folder_config(tmp_path)
    crop = {"sampler": "torchvision", "area": (0.2, 0.6), "interpolation": "bilinear"}
    config.views = {"only": plain_view(size=16, crop=crop)}
    samples = views_picture.collect(config, 6, 1)
    (only,) = samples.views
    files = sorted(tmp_path.glob("*/*.png"))
    for row, id in enumerate(samples.ids):
        assert samples.labels[row] == files[id].parent.name
        with Image.open(files[id]) as image:
            assert tuple(samples.sizes[row]) == (image.height, image.width)
            assert samples.originals[row].shape[:2] == (image.height, image.width)
            place, sides = only.notes[row][0].removeprefix("crop ").split()
            left, top = (int(number) for number in place.split(","))
            width, height = (int(number) for number in sides.split("x"))
            box = (left, top, left + width, top + height)
            expected = image.resize((16, 16), Image.Resampling.BILINEAR, box)
            corners = np.round(only.corners[row] * (image.height, image.width))
        np.testing.assert_array_equal(corners[0], (top, left))
        np.testing.assert_array_equal(corners[2], (top + height, left + width))
        assert np.abs(only.pixels[row] - np.asarray(expected) / 255).mean() < 0.01


def test_small_originals_on_disk_are_shown_unchanged(tmp_path):
    pytest.importorskip("tensorflow")
    made = [picture(number, COLORS["cat"], (12, 12)) for number in range(4)]
    for number, image in enumerate(made):
        image.save(tmp_path / f"{number}.png")
    config = config_of(tmp_path)
    config.batch_size = 4
    config.views = {"only": plain_view(flip=0.5)}
    samples = views_picture.collect(config, 3, 0)
    assert samples.labels == ("", "", "")
    for id, original in zip(samples.ids, samples.originals, strict=True):
        np.testing.assert_array_equal(original, np.asarray(made[id]))


# The picture


FRAME = (214, 217, 222)


def framed_images(drawn):
    """The pixels within each gray frame of a picture, found by the frames' corners."""
    pixels = np.asarray(drawn)
    frame = (pixels == FRAME).all(axis=-1)
    above, left = np.pad(frame, 1)[:-2, 1:-1], np.pad(frame, 1)[1:-1, :-2]
    for top, start in np.argwhere(frame & ~above & ~left):
        width = np.argmin(np.append(frame[top, start:], False))
        height = np.argmin(np.append(frame[top:, start], False))
        if min(width, height) > 4 and frame[top + height - 1, start : start + width].all():
            yield pixels[top + 2 : top + height - 2, start + 2 : start + width - 2]


def test_views_are_enlarged_by_whole_factors_without_resampling(monkeypatch):
    samples, only = collect_from(random_source(), monkeypatch, plain_view(flip=0.5))
    drawn = views_picture.draw(samples, "title", "command")
    shown = list(framed_images(drawn))
    assert len(shown) == 16  # outlines of whole images cover the originals' frames
    for pixels in only.pixels:
        large = np.round(255 * pixels).astype(np.uint8).repeat(20, axis=0).repeat(20, axis=1)
        assert sum(np.array_equal(image, large) for image in shown) == 1
    drawn = np.asarray(drawn)
    assert (drawn[:36] == 255).all() and (drawn[:, -36:] == 255).all()
    assert (drawn[-36:] == 255).all() and (drawn[:, :36] == 255).all()


def test_captions_have_height_before_width(monkeypatch):
    source, written = random_source(), []
    samples, only = collect_from(source, monkeypatch, plain_view())
    samples.sizes[:] = (30, 40)
    wide = dataclasses.replace(only, pixels=only.pixels[:, :4])
    lines = views_picture._lines
    monkeypatch.setattr(
        views_picture, "_lines", lambda texts, *rest: written.extend(texts) or lines(texts, *rest)
    )
    views_picture.draw(dataclasses.replace(samples, views=(wide,)), "title")
    assert any("30x40" in text for text in written)
    assert any(text.startswith("4x8 px") for text in written)


def test_outlines_enclose_the_views_sources(monkeypatch):
    samples, only = collect_from(random_source(), monkeypatch, plain_view())
    quarter = np.array([[0.25, 0.25], [0.25, 0.75], [0.75, 0.75], [0.75, 0.25]])
    only.corners[:] = quarter
    original, _, *_ = framed_images(views_picture.draw(samples, "title"))
    blue = (original == (0, 114, 178)).all(axis=-1)
    rows, columns = np.nonzero(blue)
    assert {rows.min(), columns.min()} <= {38, 39, 40} and {rows.max(), columns.max()} <= {119, 120}
    assert not blue[45:115, 45:115].any()


def test_pictures_are_deterministic(monkeypatch):
    samples, _ = collect_from(random_source(), monkeypatch, plain_view(flip=0.5))
    first, second = (views_picture.draw(samples, "title").tobytes() for _ in range(2))
    assert first == second


def test_long_text_is_broken_and_missing_letters_are_replaced():
    def lines(*items):
        return [text for text, _ in views_picture._lines(items, views_picture._NOTE, 100)]

    assert lines("one two", "three", "four five six") == ["one two", "three", "four five six"]
    long = lines("one", "n02085782_Japanese_spaniel aaaaaaaa")
    broken = "".join(long[1:]).replace(" ", "")
    assert long[0] == "one" and broken == "n02085782_Japanese_spanielaaaaaaaa"
    assert all(len(line) <= 14 for line in long)
    assert lines() == lines("") == []
    assert lines("Émeu 鳥") == ["Émeu ?"]


def test_text_is_drawn_literally_and_fits_the_picture(monkeypatch):
    source = random_source()
    source.class_names = ("$Japanese_spaniel$" * 3, "鳥") * 5
    samples, _ = collect_from(source, monkeypatch, plain_view(flip=0.5))
    drawn = np.asarray(views_picture.draw(samples, "Views of data " * 20, "--config=W.py " * 40))
    assert (drawn[:, -36:] == 255).all()


def test_missing_matplotlib_is_an_error_that_names_the_extra(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("ssl_jax.report.picture", "ssl_jax.cli.views"):  # the command imports them again
        monkeypatch.delitem(sys.modules, name, raising=False)
    code = cli.main(["views", "--config=configs/simclr_digits.py", f"--out={tmp_path / 'a.png'}"])
    assert code == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1
    assert "matplotlib, which is not installed" in error and "'.[pictures]'" in error


@pytest.mark.parametrize("data", ["digits", "folder"])
def test_views_command_writes_a_png(tmp_path, capsys, data):
    file, out = tmp_path / "experiment.py", tmp_path / "views.png"
    file.write_text(
        "from ssl_jax import config\n"
        "def get_config(variant=''):\n"
        "    c = config.default_config()\n"
        "    c.batch_size = 8\n"
        "    c.views = {'only': config.view(size=8)}\n"
        "    return c\n"
    )
    arguments = ["--config.views.only.flip=1.0", f"--config.data.name={data}", "--images=2"]
    if data == "folder":
        pytest.importorskip("tensorflow")
        arguments.append(f"--config.data.dir={fill(tmp_path / 'images')}")
    code = cli.main(["views", f"--config={file}", f"--out={out}", *arguments])
    assert code == 0
    assert capsys.readouterr().out == f"{out}: 2 images and their views at step 0\n"
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_file()) == [".png", ".py"]
    with Image.open(out) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        if data == "digits":
            assert image.width == 2 * 36 + 2 * 176 + 24
        assert image.width > 2 * 162 and image.height > 2 * 162


def test_bad_arguments_are_one_line_errors(tmp_path, capsys, monkeypatch):
    def error_of(*arguments):
        config = "--config=configs/simclr_digits.py"
        assert cli.main(["views", config, *(str(argument) for argument in arguments)]) == 2
        out, error = capsys.readouterr()
        assert out == "" and error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "ends in .png" in error_of(f"--out={tmp_path / 'views.jpg'}")
    assert "no folder" in error_of(f"--out={tmp_path / 'nowhere' / 'views.png'}")
    out = f"--out={tmp_path / 'views.png'}"
    assert "--images is 0" in error_of(out, "--images=0")
    assert "--step is -1" in error_of(out, "--step=-1")
    assert "below 2147483648" in error_of(out, "--step=2147483648")
    assert "flop" in error_of(out, "--config.views.view1.flop=0.0")
    assert "no config file" in error_of(out, "--config=nowhere.py")
    monkeypatch.setattr(views_picture, "make_sources", lambda config: (random_source(), None))
    (tmp_path / "views.png").mkdir()
    config = tiny_config()
    config.views = {"only": plain_view(flip=0.5)}
    with pytest.raises(UserError, match="Cannot write .* or choose another path"):
        views_picture.write_views(config, tmp_path / "views.png", images=16)
    assert [path.name for path in tmp_path.iterdir()] == ["views.png"]
