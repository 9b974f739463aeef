import zlib

import jax
import numpy as np
import pytest
from images import COLOURS, config_of, fill, picture
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
    """A view that changes nothing, but for the changes."""
    nothing = {
        **{"size": 8, "flip": 0.0, "gray": 0.0},
        "crop": {"sampler": "none", "interpolation": "bilinear"},
        "jitter": {"prob": 0.0},
        "blur": {"prob": 0.0},
    }
    return view(**{**nothing, **changes})


def expected_views(config, images, step):
    """What a train step's own functions make of the first images of its batch."""
    source, _ = make_sources(config)
    ids = Index(source.num_examples, config.batch_size, config.seed).ids(step)[:images]
    key = jax.random.key(config.seed)
    for data in (zlib.crc32(b"views"), step):
        key = jax.random.fold_in(key, data)
    raw = next(source.batches(iter([(step, ids)])))
    return ids, jax.jit(make_augment_fn(config))(raw, source.device_data(), key)["views"]


def normalised(config):
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
    """16 images of a source with one view."""
    monkeypatch.setattr(views_picture, "make_sources", lambda config: (source, None))
    config = tiny_config(**changes)
    config.views = {"only": one_view}
    samples = views_picture.collect(config, 16, 0)
    return samples, samples.views[0]


def assert_of_the_step(config, step):
    """Holds what is collected to what training sees; returns the former."""
    samples = views_picture.collect(normalised(config), 5, step)
    ids, views = expected_views(config, 5, step)
    np.testing.assert_array_equal(samples.ids, ids)
    assert len(samples.views) == len(views)
    for shown, seen in zip(samples.views, views, strict=True):
        np.testing.assert_array_equal(shown.pixels, seen)
    return samples


def test_views_of_a_folder_are_those_of_the_step(tmp_path):
    assert_of_the_step(folder_config(tmp_path), 2)


def test_views_of_arrays_are_those_of_the_step_and_so_is_multi_crop():
    config = method_config("swav", seed=3)
    config.views.a_large.noise = 0.1
    samples = assert_of_the_step(config, 7)
    titles = ["a_large", "b_large", "c_small 1", "c_small 2"]
    assert [view.title for view in samples.views] == titles
    drawn = views_picture.draw(samples, "title")
    # Originals and large views of 8 pixels are shown 20, small ones of 6 pixels 27 times as large.
    assert drawn.width == 2 * 36 + 3 * 162 + 2 * 164 + 4 * 20


def test_a_batch_larger_than_the_data_is_drawn_all_the_same(monkeypatch):
    one = plain_view(flip=0.5)
    samples, _ = collect_from(random_source(16), monkeypatch, one, batch_size=64)
    assert sorted(samples.ids) == list(range(16))


# What is written below a view


def test_flip_is_noted_where_the_view_is_flipped(monkeypatch):
    source = random_source()
    samples, only = collect_from(source, monkeypatch, plain_view(flip=0.5))
    assert set(only.notes) == {("flip",), ()}
    for id, label, pixels, notes in zip(
        samples.ids, samples.labels, only.pixels, only.notes, strict=True
    ):
        image = source.images[id] / 255
        np.testing.assert_allclose(pixels, image[:, ::-1] if notes else image, atol=1e-6)
        assert label == str(source.labels[id])


def test_factors_are_those_that_were_applied(monkeypatch):
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


def test_gray_and_solarize_are_noted_where_they_are_seen(monkeypatch):
    source = random_source()
    source.images[..., 0] = 255
    one = plain_view(gray=0.5, solarize={"prob": 0.5, "threshold": 0.9})
    _, only = collect_from(source, monkeypatch, one)
    for pixels, notes in zip(only.pixels, only.notes, strict=True):
        assert ("gray" in notes) == np.allclose(pixels[..., 0], pixels[..., 1])
        if "gray" not in notes:
            assert ("solarize 0.9" in notes) == (pixels[..., 0] == 0).all()
    assert len(set(only.notes)) == 4


def test_notes_follow_the_order_of_what_was_done():
    one = view(
        affine={"degrees": 9.0, "shear": 9.0, "translate": 0.1},
        jitter={"brightness_mode": "add", "saturation": 0.0},
        solarize={"prob": 0.5},
        noise=0.05,
    )
    crop = {"top": 30, "left": 12, "height": 140, "width": 180}
    turn = {"degrees": -0.2, "shear": 4.4, "shift_y": -0.01, "shift_x": 1.26}
    colours = {"brightness": 0.123, "contrast": 1.5, "saturation": 0.7, "hue": -0.05, "sigma": 1.3}
    done = dict.fromkeys(("flip", "jitter", "gray", "blur", "solarize"), True)
    drawn = {**crop, **turn, **colours, **done, "order": np.array([3, 2, 0, 1])}
    geometry = ["crop 12,30 180x140", "turn 0°", "shear 4°", "shift 1.3,0.0", "flip"]
    jitter, blur = "jitter h-0.05 b+0.12 c1.50", ["blur 1.30", "solarize 0.5", "noise 0.05"]
    assert list(views_picture.describe(drawn, one)) == [*geometry, jitter, "gray", *blur]
    one.gray_first = True
    assert list(views_picture.describe(drawn, one)) == [*geometry, "gray", jitter, *blur]


def test_boxes_of_a_host_are_where_its_views_come_from(tmp_path):
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


def test_small_originals_on_disk_are_shown_as_they_are(tmp_path):
    pytest.importorskip("tensorflow")
    made = [picture(number, COLOURS["cat"], (12, 12)) for number in range(4)]
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


def test_pixels_are_drawn_enlarged_and_nothing_else(monkeypatch):
    samples, only = collect_from(random_source(), monkeypatch, plain_view(flip=0.5))
    drawn = np.asarray(views_picture.draw(samples, "title", "command"))
    left = 36 + 162 + 20 + 1  # margin, original, gap, frame
    for pixels in only.pixels[:3]:
        large = np.round(255 * pixels).astype(np.uint8).repeat(20, axis=0).repeat(20, axis=1)
        places = range(len(drawn) - 160)
        column = drawn[:, left : left + 160]
        assert sum(np.array_equal(column[top : top + 160], large) for top in places) == 1
    assert (drawn[:36] == 255).all() and (drawn[:, -36:] == 255).all()


def test_text_is_broken_between_items_if_it_can_be():
    font = views_picture.ImageFont.load_default(12)
    wrapped = views_picture._wrapped(["one two", "three", "four five six"], font, 60, " · ")
    assert wrapped == ["one two", "three", "four five", "six"]
    long = views_picture._wrapped(["one", "n02085782_Japanese_spaniel aaaaaaaa"], font, 60, " · ")
    assert long[0] == "one" and "".join(long[1:]) == "n02085782_Japanese_spanielaaaaaaaa"
    assert all(font.getlength(line) <= 60 for line in long)
    assert views_picture._wrapped([], font, 60, " · ") == []
    assert views_picture._printable("Émeu 鳥") == "Emeu ?"


@pytest.mark.parametrize("data", ["digits", "folder"])
def test_the_command_writes_a_picture(tmp_path, capsys, data):
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
            assert image.width == 2 * 36 + 2 * 162 + 20
        assert image.width > 2 * 162 and image.height > 2 * 162


def test_what_cannot_be_drawn_is_told_in_a_sentence(tmp_path, capsys, monkeypatch):
    def told(*arguments):
        config = "--config=configs/simclr_digits.py"
        assert cli.main(["views", config, *(str(argument) for argument in arguments)]) == 2
        out, error = capsys.readouterr()
        assert out == "" and error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "ends in .png" in told(f"--out={tmp_path / 'views.jpg'}")
    assert "no folder" in told(f"--out={tmp_path / 'nowhere' / 'views.png'}")
    out = f"--out={tmp_path / 'views.png'}"
    assert "--images is 0" in told(out, "--images=0")
    assert "--step is -1" in told(out, "--step=-1")
    assert "flop" in told(out, "--config.views.view1.flop=0.0")
    assert "no config file" in told(out, "--config=nowhere.py")
    monkeypatch.setattr(views_picture, "make_sources", lambda config: (random_source(), None))
    (tmp_path / "views.png").mkdir()
    config = tiny_config()
    config.views = {"only": plain_view(flip=0.5)}
    with pytest.raises(UserError, match="Cannot write .* or choose another path"):
        views_picture.write_views(config, tmp_path / "views.png", images=16)
    assert [path.name for path in tmp_path.iterdir()] == ["views.png"]
