import io
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from ssl_jax import config
from ssl_jax.data import views
from ssl_jax.data.device_crop import antialiased
from ssl_jax.data.pipeline import prepare_eval
from ssl_jax.errors import UserError

tf = pytest.importorskip("tensorflow")

SAMPLERS = ("torchvision", "tf", "byol", "none")


def random_image(height, width, seed=0):
    """Soft blobs, sharp edges and noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-height // 7), -(-width // 7), 3))
    image = np.kron(coarse, np.ones((7, 7, 1), int))[:height, :width]
    image[:, width // 2 :] += rng.integers(-40, 40, (height, width - width // 2, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def view_of(sampler, interpolation="bilinear", size=32, **crop):
    return config.view(size=size, crop=dict(sampler=sampler, interpolation=interpolation, **crop))


def seed_of(number):
    return views.image_seed(17, 0, number)


def crop(image, seed, view):
    return views.make_views(image, seed, (view,))[0]


def box_of(seed, height, width, view):
    return views.draw_boxes(tf.constant([height, width]), seed, (view,))[0]


# Decoding

RGB = Image.fromarray(random_image(45, 61))
GRAY = RGB.convert("L")
TURNED = Image.Exif()
TURNED[274] = 6  # a quarter to the right
FILES = {
    "rgb.jpg": (encoded(RGB), None),
    "rgb_4:4:4.jpg": (encoded(RGB, quality=98, subsampling=0), None),
    "progressive.jpg": (encoded(RGB, progressive=True), None),
    "gray.jpg": (encoded(GRAY), None),
    "cmyk.jpg": (encoded(RGB.convert("CMYK")), None),
    "turned_by_exif.jpg": (encoded(RGB, exif=TURNED), None),  # left as it is
    "rgb.png": (encoded(RGB, "PNG"), np.asarray(RGB)),
    "gray.png": (encoded(GRAY, "PNG"), np.repeat(np.asarray(GRAY)[..., None], 3, axis=-1)),
    "rgba.png": (
        encoded(Image.merge("RGBA", [*RGB.split(), GRAY]), "PNG"),
        np.asarray(RGB),
    ),
    "gray_alpha.png": (encoded(Image.merge("LA", [GRAY, GRAY]), "PNG"), None),
    "palette.png": (encoded(RGB.quantize(16), "PNG"), None),
    "palette_transparent.png": (encoded(RGB.quantize(16), "PNG", transparency=3), None),
    "one_bit.png": (encoded(RGB.convert("1"), "PNG"), None),
    "16_bit.png": (
        encoded(Image.fromarray(np.asarray(GRAY).astype(np.uint16) * 256 + 200), "PNG"),
        np.repeat(np.asarray(GRAY)[..., None], 3, axis=-1),
    ),
    "rgb.webp": (encoded(RGB, "WEBP"), None),
    "rgb.bmp": (encoded(RGB, "BMP"), np.asarray(RGB)),
    "rgb.tif": (encoded(RGB, "TIFF"), np.asarray(RGB)),
    "animation.gif": (
        encoded(RGB, "GIF", save_all=True, append_images=[Image.new("RGB", (61, 45))]),
        None,
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_decodes_to_rgb(name):
    contents, expected = FILES[name]
    if expected is None:
        expected = np.asarray(Image.open(io.BytesIO(contents)).convert("RGB"))
    got = views.decode(contents).numpy()
    assert got.dtype == np.uint8 and got.shape == (45, 61, 3)
    np.testing.assert_allclose(got.astype(int), expected, atol=1)


def huge_jpeg():
    """A JPEG whose header claims 60,000 × 60,000 pixels, 10 GiB."""
    contents = bytearray(encoded(RGB))
    frame = contents.index(b"\xff\xc0")
    contents[frame + 5 : frame + 9] = (60_000).to_bytes(2) * 2
    return bytes(contents)


UNDECODABLE = {
    "huge": huge_jpeg(),
    "empty": b"",
    "text": b"not an image\n" * 100,
    "half a JPEG": encoded(RGB)[:1000],
    "JPEG without its last byte": encoded(RGB)[:-1],
    "half a progressive JPEG": encoded(RGB, progressive=True)[:1000],
    "PNG without its last chunk": encoded(RGB, "PNG")[:-12],
    "half a WebP": encoded(RGB, "WEBP")[:1000],
    "half a BMP": encoded(RGB, "BMP")[:1000],
}


@pytest.mark.parametrize("what", UNDECODABLE)
def test_incomplete_files_raise_the_errors_of_undecodable_images(what):
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
        views.decode(UNDECODABLE[what])


# Resampling


def kernel(x, interpolation):
    x = np.abs(x)
    if interpolation == "bilinear":
        return np.maximum(1 - x, 0)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def resized(image, size, interpolation, antialias):
    """The definition in float64: PIL's with antialias, TensorFlow's without."""
    for axis in (0, 1):
        source = image.shape[axis]
        scale = source / size
        center = (np.arange(size)[:, None] + 0.5) * scale - 0.5
        wide = max(scale, 1) if antialias else 1
        weights = kernel((np.arange(source) - center) / wide, interpolation)
        weights /= weights.sum(axis=1, keepdims=True)
        image = np.moveaxis(np.tensordot(weights, image.astype(float), (1, axis)), 0, axis)
    return np.clip(image, 0, 255)


SHAPES = [(150, 200), (64, 33), (20, 25), (300, 40)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_crop_equals_its_definition(sampler, interpolation):
    view = view_of(sampler, interpolation)
    for number, (height, width) in enumerate(SHAPES):
        image = random_image(height, width, number)
        box = box_of(seed_of(number), height, width, view).numpy()
        top, left, tall, wide = box
        cut = image[top : top + tall, left : left + wide]
        expected = resized(cut, 32, interpolation, antialias=sampler in ("torchvision", "none"))
        got = crop(image, seed_of(number), view).numpy()
        assert got.dtype == np.uint8 and got.shape == (32, 32, 3)
        if sampler in ("torchvision", "none"):
            # Pillow rounds to integers and clips overshoot after the first axis.
            assert np.quantile(np.abs(got - expected), 0.95) <= 1.01
            method = getattr(Image.Resampling, interpolation.upper())
            pil = Image.fromarray(image).crop((left, top, left + wide, top + tall))
            np.testing.assert_array_equal(got, pil.resize((32, 32), method))
        else:
            # Half a level for rounding, and TensorFlow's tabulated cubic.
            np.testing.assert_allclose(got, expected, atol=1.01)


def test_whole_image_at_its_own_size_is_unchanged():
    image = random_image(32, 32)
    for interpolation in ("bilinear", "bicubic"):
        got = crop(image, seed_of(0), view_of("none", interpolation))
        np.testing.assert_array_equal(got, image)


def test_bicubic_overshoot_is_clipped():
    image = np.full((8, 8, 3), 5, np.uint8)
    image[:, 4:] = 250
    for sampler in ("none", "tf"):
        view = view_of(sampler, "bicubic", area=(0.95, 1.0), aspect=(0.9, 1.1))
        got = crop(image, seed_of(0), view).numpy()
        assert got.min() == 0 and got.max() == 255


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 400), (400, 1), (2, 3)])
def test_tiny_and_thin_images_are_resized(sampler, shape):
    image = np.full((*shape, 3), 77, np.uint8)
    for number in range(3):
        got = crop(image, seed_of(number), view_of(sampler, "bicubic"))
        np.testing.assert_array_equal(got, np.full((32, 32, 3), 77))


# Evaluation


@pytest.mark.parametrize("sampler, interpolation", [("tf", "bicubic"), ("torchvision", "bilinear")])
@pytest.mark.parametrize(
    "height, width, fraction, box",
    [
        (100, 160, 0.875, (6, 36, 88, 88)),  # 87.5 to even
        (160, 100, 0.875, (36, 6, 88, 88)),
        (64, 64, 1.0, (0, 0, 64, 64)),
        (30, 51, 1.0, (0, 11, 30, 30)),
        (1, 5, 0.2, (0, 2, 1, 1)),
        (32, 32, 0.875, (0, 0, 32, 32)),  # the view's size
        (32, 33, 0.875, (2, 3, 28, 28)),
    ],
)
def test_center_crop_is_the_central_square(sampler, interpolation, height, width, fraction, box):
    image = random_image(height, width)
    top, left, side, _ = box
    cut = image[top : top + side, left : left + side]
    expected = resized(cut, 32, interpolation, antialias=sampler == "torchvision")
    got = views.center_crop(image, view_of(sampler), fraction, interpolation)
    np.testing.assert_allclose(got, expected, atol=1.01)


def evaluated_as(c):
    """How a config prepares images for evaluation, at 32 pixels or less."""
    one = config.flat_views(c)[0]
    sampler = "torchvision" if antialiased(one) else "tf"
    settings = (sampler, c.eval.interpolation, c.eval.crop_fraction)
    return min(one.size, 32), *settings, one.mean, one.std


RECIPES = {
    evaluated_as(config.load_config(str(file))): file.stem
    for file in sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
    if file.stem != "ablations"  # a function of a run's config
}
OTHERS = {
    (32, sampler, interpolation, 0.8, (), ()): f"{sampler}_{interpolation}"
    for sampler in SAMPLERS
    for interpolation in ("bilinear", "bicubic")
}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=[pytest.mark.long] * (settings in RECIPES))
        for settings, name in (OTHERS | RECIPES).items()
    ],
)
def test_image_files_and_arrays_are_prepared_alike(settings):
    """Commands prepare image files on the host; `ssl_jax.load(...).apply` and arrays don't."""
    size, sampler, interpolation, fraction, mean, std = settings
    c = config.default_config()
    c.views = {"view1": config.view(size=size, crop=dict(sampler=sampler), mean=mean, std=std)}
    c.eval.update(interpolation=interpolation, crop_fraction=fraction)
    small, large = max(1, size // 2), size + size // 2
    for height, width in ((small, small + 3), (size, size), (size, size + 9), (large, large - 9)):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        cropped = views.center_crop(image, c.views.view1, fraction, interpolation).numpy()
        got, expected = (np.asarray(prepare_eval(x[None], c))[0] for x in (image, cropped))
        if (height, width) == (size, size):
            np.testing.assert_array_equal(cropped, image)
            np.testing.assert_array_equal(got, expected)
        # Pillow rounds to integers and clips overshoot after the first axis.
        off = 255 * np.abs(got - expected) * np.array(std or (1, 1, 1))
        assert np.quantile(off, 0.95) <= 1.01


# Boxes


def sample_boxes(view, height, width, n=3000):
    def box(number):
        return box_of(views.image_seed(3, 0, number), height, width, view)

    numbers = tf.range(n, dtype=tf.int64)
    run = tf.function(
        lambda: tf.map_fn(box, numbers, fn_output_signature=tf.TensorSpec([4], tf.int32))
    )
    return run().numpy()


def sides(rng, height, width, area, aspect):
    target = height * width * rng.uniform(*area)
    ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
    return round(math.sqrt(target / ratio)), round(math.sqrt(target * ratio))


def torchvision_box(rng, height, width, area, aspect):
    for _ in range(10):
        h, w = sides(rng, height, width, area, aspect)
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
    ratio = width / height
    if ratio < aspect[0]:
        w, h = width, round(width / aspect[0])
    elif ratio > aspect[1]:
        w, h = round(height * aspect[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def byol_box(rng, height, width, area, aspect):
    h, w = sides(rng, height, width, area, aspect)
    h, w = min(h, height), min(w, width)
    return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w


@pytest.mark.parametrize(
    "height, width, area, aspect",
    [
        (375, 500, (0.08, 1.0), (3 / 4, 4 / 3)),
        (40, 30, (0.05, 0.14), (1 / 2, 2.0)),
        (20, 64, (0.2, 1.0), (3 / 4, 4 / 3)),
    ],
)
@pytest.mark.parametrize("sampler, box", [("torchvision", torchvision_box), ("byol", byol_box)])
def test_boxes_are_distributed_as_defined(sampler, box, height, width, area, aspect):
    actual = sample_boxes(view_of(sampler, area=area, aspect=aspect), height, width)
    rng = np.random.default_rng(0)
    expected = np.array([box(rng, height, width, area, aspect) for _ in range(len(actual))])
    of = {
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: b[:, 3] / b[:, 2],
        "bottom": lambda b: height - b[:, 0] - b[:, 2],
        "right": lambda b: width - b[:, 1] - b[:, 3],
    }
    for name, value in of.items():
        compared = scipy.stats.ks_2samp(value(actual), value(expected), method="asymp")
        assert compared.pvalue > 1e-3, name
        assert value(actual).min() >= 0
    top_left = [np.corrcoef(b[:, 0], b[:, 1])[0, 1] for b in (actual, expected)]
    assert top_left[0] == pytest.approx(top_left[1], abs=0.1)


def test_tf_sampler_has_simclrs_arguments():
    top, left, tall, wide = sample_boxes(view_of("tf"), 50, 60).T
    assert np.all(top + tall <= 50) and np.all(left + wide <= 60)
    covered = tall * wide / (50 * 60)
    assert 0.1 <= covered.min() < 0.12 and covered.max() > 0.9  # not .08: at least .1 is covered
    assert 0.7 < (wide / tall).min() < 0.8 and 1.25 < (wide / tall).max() < 1.4
    # No nearly square box can cover nearly all of a long image.
    whole = sample_boxes(view_of("tf", area=(0.9, 1.0)), 20, 64, n=20)
    np.testing.assert_array_equal(whole, [[0, 0, 20, 64]] * 20)


def test_torchvision_sampler_falls_back_to_a_center_crop():
    view = view_of("torchvision", area=(0.9, 1.0))
    for height, width, box in ((20, 64, [0, 18, 20, 27]), (64, 20, [18, 0, 27, 20])):
        np.testing.assert_array_equal(sample_boxes(view, height, width, n=20), [box] * 20)


def test_boxes_depend_on_seed_step_id_and_view():
    image = random_image(300, 300)
    view = view_of("torchvision", size=8)

    def pixels(seed, step, id):
        made = views.make_views(image, views.image_seed(seed, step, id), (view, view))
        return [v.numpy().tobytes() for v in made]

    sampled = [pixels(*where) for where in itertools.product((0, 1), (0, 1), (0, 1))]
    assert len(set(itertools.chain(*sampled))) == 16
    assert pixels(1, 0, 1) == sampled[5]
    # Permuted numbers, and numbers above 32 bits.
    apart = [pixels(2, 3, 4), pixels(2, 4, 3), pixels(3, 2, 4), pixels(2**32 + 2, 3, 4)]
    assert len(set(itertools.chain(*apart))) == 8


def test_boxes_of_a_seed_equal_recorded_ones():
    # A run resumed with a later version of ssl_jax or TensorFlow must see the same crops.
    seed = views.image_seed(7, 1000, 123456)
    boxes = {s: box_of(seed, 375, 500, view_of(s)).numpy().tolist() for s in SAMPLERS}
    assert boxes == {
        "torchvision": [0, 43, 353, 417],
        "tf": [20, 121, 320, 378],
        "byol": [0, 43, 353, 417],
        "none": [0, 0, 375, 500],
    }


def test_unknown_sampler_raises_user_error():
    with pytest.raises(UserError, match="crop.sampler is 'random'"):
        crop(random_image(8, 8), seed_of(0), view_of("random"))
