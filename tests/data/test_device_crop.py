import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from PIL import Image

from ssl_jax import config
from ssl_jax.data import augment, device_crop
from ssl_jax.errors import UserError

SAMPLERS = ("torchvision", "tf", "byol", "none")
WHOLE = dict(sampler="none", interpolation="bilinear")


def random_images(n=6, height=32, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def crop_views(images, keys, view):
    return jax.jit(lambda x, k: device_crop.crop_views(x, k, view))(images, keys)


def apply_boxes(images, boxes, view):
    """Crops by boxes given as rows of top, left, height, width."""
    names = ("top", "left", "height", "width")
    geometry = dict(zip(names, jnp.asarray(boxes, jnp.int32).T, strict=True))
    return jax.jit(lambda x, g: device_crop.apply_geometry(x, g, view))(images, geometry)


def sample_boxes(view, height, width, n=4_000, seed=0):
    sample = jax.vmap(lambda key: device_crop.sample_geometry(key, height, width, view))
    g = jax.jit(sample)(keys(n, seed))
    return np.stack([g[name] for name in ("top", "left", "height", "width")], axis=1)


# Resampling

BOXES = [
    [0, 0, 40, 48],
    [3, 5, 30, 25],
    [10, 1, 7, 40],
    [39, 47, 1, 1],
    [0, 46, 40, 2],
    [5, 5, 16, 16],
]


def cut(image, box):
    top, left, height, width = box
    return image[top : top + height, left : left + width]


def pil_resize(image, size, method):
    """Resizes by PIL in 32-bit floats, which it neither rounds nor clips."""
    planes = [
        np.asarray(Image.fromarray(np.float32(plane)).resize((size, size), method))
        for plane in np.moveaxis(image, -1, 0)
    ]
    return np.clip(np.stack(planes, axis=-1) / 255, 0, 1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_torchvision_resampling_matches_pil(interpolation):
    view = config.view(size=16, crop=dict(sampler="torchvision", interpolation=interpolation))
    images = random_images(len(BOXES), 40, 48)
    method = getattr(Image.Resampling, interpolation.upper())
    expected = [pil_resize(cut(x, box), 16, method) for x, box in zip(images, BOXES, strict=True)]
    np.testing.assert_allclose(apply_boxes(images, BOXES, view), expected, atol=2e-6)
    resized = device_crop.resize_images(images, (16, 16), interpolation)
    np.testing.assert_allclose(resized, [pil_resize(x, 16, method) for x in images], atol=2e-6)


@pytest.mark.parametrize("sampler, interpolation", [("tf", "bicubic"), ("byol", "bilinear")])
def test_tf_resampling_matches_tensorflow(sampler, interpolation):
    tf = pytest.importorskip("tensorflow")
    view = config.view(size=16, crop=dict(sampler=sampler, interpolation=interpolation))
    images = random_images(len(BOXES), 40, 48)

    def resized(image):
        return np.clip(tf.image.resize(image, (16, 16), interpolation) / 255, 0, 1)

    # TensorFlow reads the cubic kernel from a table of 1024 steps per pixel.
    atol = 2e-3 if interpolation == "bicubic" else 2e-6
    expected = [resized(cut(x, box)) for x, box in zip(images, BOXES, strict=True)]
    np.testing.assert_allclose(apply_boxes(images, BOXES, view), expected, atol=atol)
    whole = device_crop.resize_images(images, (16, 16), interpolation, antialias=False)
    np.testing.assert_allclose(whole, [resized(x) for x in images], atol=atol)


@pytest.mark.parametrize(
    "sampler, interpolation",
    [("tf", "bicubic"), ("byol", "bilinear"), ("torchvision", "bilinear"), ("none", "bicubic")],
)
def test_whole_image_at_its_size_is_unchanged(sampler, interpolation):
    view = config.view(
        size=32, crop=dict(sampler=sampler, interpolation=interpolation, area=(1.0, 1.0))
    )
    images = random_images()
    box = np.tile([0, 0, 32, 32], (6, 1))
    np.testing.assert_allclose(apply_boxes(images, box, view), images / 255, atol=1e-7)


def test_view_without_crop_is_the_resized_image():
    images = random_images(height=20, width=30)
    view = config.view(size=12, crop=dict(sampler="none"))
    got = crop_views(images, keys(6), view)
    np.testing.assert_array_equal(
        got, jax.jit(lambda x: device_crop.resize_images(x, (12, 12)))(images)
    )


def test_bicubic_overshoot_is_clipped():
    images = np.zeros((1, 8, 8, 3), np.uint8)
    images[:, :, 4:] = 255
    got = np.asarray(device_crop.resize_images(images, (32, 32)))
    assert got.min() == 0.0 and got.max() == 1.0


# Boxes


def torchvision_box(rng, height, width, area, aspect):
    for _ in range(10):
        target = height * width * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
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
    target = height * width * rng.uniform(*area)
    ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
    w = min(round(math.sqrt(target * ratio)), width)
    h = min(round(math.sqrt(target / ratio)), height)
    return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w


def tf_boxes(height, width, area, aspect, n):
    tf = pytest.importorskip("tensorflow")

    def box(seed):
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            (height, width, 3),
            bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            seed=tf.stack([seed, 7]),
            min_object_covered=0.1,
            aspect_ratio_range=aspect,
            area_range=area,
            max_attempts=100,
        )
        return tf.concat([begin[:2], size[:2]], axis=0)

    return tf.function(lambda: tf.map_fn(box, tf.range(n)))().numpy()


SETTINGS = [
    (32, 32, (0.08, 1.0), (3 / 4, 4 / 3)),
    (60, 97, (0.2, 1.0), (3 / 4, 4 / 3)),
    (40, 30, (0.05, 0.14), (1 / 2, 2.0)),
    (20, 64, (0.2, 1.0), (3 / 4, 4 / 3)),
]


@pytest.mark.parametrize("height, width, area, aspect", SETTINGS)
@pytest.mark.parametrize("sampler", ["torchvision", "byol", "tf"])
def test_boxes_have_the_official_codes_distribution(sampler, height, width, area, aspect):
    view = config.view(crop=dict(sampler=sampler, area=area, aspect=aspect))
    actual = sample_boxes(view, height, width)
    n = len(actual)
    if sampler == "tf":
        expected = tf_boxes(height, width, area, aspect, n)
    else:
        rng = np.random.default_rng(0)
        box = torchvision_box if sampler == "torchvision" else byol_box
        expected = np.array([box(rng, height, width, area, aspect) for _ in range(n)])
    for boxes in (actual, expected):
        assert np.all(boxes[:, 0] + boxes[:, 2] <= height) and np.all(boxes >= 0)
        assert np.all(boxes[:, 1] + boxes[:, 3] <= width) and np.all(boxes[:, 2:] >= 1)
    of = {
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: b[:, 3] / b[:, 2],
        "bottom": lambda b: height - b[:, 0] - b[:, 2],
        "right": lambda b: width - b[:, 1] - b[:, 3],
    }
    for name, value in of.items():
        assert scipy.stats.ks_2samp(value(actual), value(expected)).pvalue > 1e-3, name
        assert value(actual).min() == pytest.approx(value(expected).min(), abs=0.05, rel=0.05), name
    top_left = [np.corrcoef(b[:, 0], b[:, 1])[0, 1] for b in (actual, expected)]
    assert top_left[0] == pytest.approx(top_left[1], abs=0.1)


def test_torchvision_falls_back_to_the_center():
    # Nearly the whole of a long image cannot be nearly square: every attempt fails.
    for height, width, box in ((20, 64, [0, 18, 20, 27]), (64, 20, [18, 0, 27, 20])):
        view = config.view(crop=dict(sampler="torchvision", area=(0.9, 1.0)))
        np.testing.assert_array_equal(sample_boxes(view, height, width, n=20), [box] * 20)


def test_tf_falls_back_to_the_whole_image():
    view = config.view(crop=dict(sampler="tf", area=(0.9, 1.0)))
    np.testing.assert_array_equal(sample_boxes(view, 20, 64, n=20), [[0, 0, 20, 64]] * 20)


def test_tf_boxes_cover_a_tenth_and_never_reach_the_far_border():
    boxes = sample_boxes(config.view(crop=dict(sampler="tf")), 50, 50)
    top, left, height, width = boxes.T
    assert (height * width).min() >= 0.1 * 50 * 50
    assert np.all((top + height < 50) | (height == 50))
    assert np.all((left + width < 50) | (width == 50))


def test_byol_sides_are_clipped_to_the_image():
    boxes = sample_boxes(config.view(crop=dict(sampler="byol", area=(0.9, 1.0))), 20, 64, n=100)
    assert np.all(boxes[:, 2] == 20) and np.all(boxes[:, 3] < 64)


# Keys


@pytest.mark.parametrize("affine", [{}, dict(degrees=20.0, translate=0.1)])
def test_crops_depend_only_on_the_image_and_its_key(affine):
    view = config.view(size=16, crop=dict(interpolation="bilinear"), affine=affine)
    images = random_images(12)
    run = jax.jit(lambda x, k: device_crop.crop_views(x, k, view))
    whole = np.asarray(run(images, keys(12)))
    assert whole.shape == (12, 16, 16, 3) and whole.dtype == np.float32
    order = np.random.default_rng(0).permutation(12)
    np.testing.assert_array_equal(run(images[order], keys(12)[order]), whole[order])
    np.testing.assert_allclose(run(images[4:5], keys(12)[4:5]), whole[4:5], atol=5e-6)
    same = run(np.repeat(images[:1], 12, axis=0), keys(12))
    assert np.abs(same - same[:1])[1:].mean(axis=(1, 2, 3)).min() > 0.01


def test_crop_and_colors_of_one_key_are_independent():
    view = config.view(crop=WHOLE, affine=dict(degrees=1.0, shear=1.0, translate=1.0))

    def sample(key):
        geometry = device_crop.sample_geometry(key, 32, 32, view)
        sampled = geometry | augment.sample_parameters(key, view)
        return [
            sampled[name] for name in ("degrees", "shift_x", "flip", "hue", "sigma", "contrast")
        ]

    sampled = np.stack(jax.jit(jax.vmap(sample))(keys(4000))).astype(float)
    assert np.abs(np.corrcoef(sampled) - np.eye(len(sampled))).max() < 5 / math.sqrt(4000)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_crops_compile_without_gathers(sampler):
    for affine in (dict(degrees=0.0), dict(degrees=10.0)):
        view = config.view(
            size=8, crop=dict(sampler=sampler, interpolation="bilinear"), affine=affine
        )
        crop = jax.jit(lambda x, k, view=view: device_crop.crop_views(x, k, view))
        text = crop.lower(random_images(2), keys(2)).as_text()
        assert "dot_general" in text and "gather" not in text


# Affine views


def affine_oracle(image, size, box, degrees, shear, shift_y, shift_x):
    """Samples by matrices: image -> centered -> sheared -> rotated -> shifted -> crop -> view."""

    def shifted(x, y):
        return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])

    height, width = image.shape[:2]
    center = shifted(width / 2, height / 2)
    angle = math.radians(degrees)
    turn = np.array(
        [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]]
    )
    slant = np.array([[1, math.tan(math.radians(shear)), 0], [0, 1, 0], [0, 0, 1]])
    moved = center @ shifted(shift_x, shift_y) @ turn @ slant @ np.linalg.inv(center)
    top, left, tall, wide = box
    to_view = np.diag([size / wide, size / tall, 1.0]) @ shifted(-left, -top)
    column, row = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
    points = np.stack([column.ravel(), row.ravel(), np.ones(size * size)])
    x, y, _ = np.linalg.inv(to_view @ moved) @ points - 0.5
    planes = [
        scipy.ndimage.map_coordinates(plane / 255, [y, x], order=1, mode="grid-constant")
        for plane in np.moveaxis(image.astype(np.float64), -1, 0)
    ]
    return np.stack(planes, axis=-1).reshape(size, size, 3)


def test_affine_view_is_bilinear_sampling_with_black_outside():
    view = config.view(
        size=14,
        crop=dict(sampler="torchvision", area=(0.5, 1.0), interpolation="bilinear"),
        affine=dict(degrees=30.0, shear=20.0, translate=0.2),
    )
    images = random_images(8, 20, 24)
    sample = jax.jit(jax.vmap(lambda key: device_crop.sample_geometry(key, 20, 24, view)))
    g = {name: np.asarray(value) for name, value in sample(keys(8)).items()}
    expected = [
        affine_oracle(
            image,
            14,
            [g[name][i] for name in ("top", "left", "height", "width")],
            *(float(g[name][i]) for name in ("degrees", "shear", "shift_y", "shift_x")),
        )
        for i, image in enumerate(images)
    ]
    np.testing.assert_allclose(crop_views(images, keys(8), view), expected, atol=1e-5)


@pytest.mark.parametrize("affine", [{}, dict(degrees=30.0, shear=20.0, translate=0.2)])
def test_view_corners_match_the_pixels_of_the_view(affine):
    view = config.view(size=14, crop=dict(area=(0.3, 0.6), interpolation="bilinear"), affine=affine)
    # Pixels encode their own position: red from the left, green from the top.
    column, row = np.meshgrid(np.arange(24) + 0.5, np.arange(20) + 0.5)
    image = np.stack([column / 24, row / 20, 0 * row], axis=-1).astype(np.float32)
    shown = crop_views(np.repeat(image[None], 8, axis=0), keys(8), view)
    shown_x, shown_y = shown[..., 0] * 24, shown[..., 1] * 20
    sample = jax.jit(jax.vmap(lambda key: device_crop.sample_geometry(key, 20, 24, view)))
    corners = np.asarray(device_crop.view_corners(sample(keys(8)), 20, 24))
    first, right, _, down = (corners[:, i, None, None] for i in range(4))
    steps = (np.arange(14) + 0.5) / 14
    across, below = np.meshgrid(steps, steps)
    place = first + across[..., None] * (right - first) + below[..., None] * (down - first)
    y, x = place[..., 0], place[..., 1]
    # Outside the image is black, and at a crop's border its last pixel is repeated.
    seen = (y > 0.5) & (y < 19.5) & (x > 0.5) & (x < 23.5)
    if not affine:
        seen[:, [0, 1, -2, -1]] = seen[:, :, [0, 1, -2, -1]] = False
    assert seen.mean() > 0.5
    np.testing.assert_allclose(shown_y[seen], y[seen], atol=1e-3)
    np.testing.assert_allclose(shown_x[seen], x[seen], atol=1e-3)
    np.testing.assert_allclose(
        corners[:, 2], corners[:, 1] + corners[:, 3] - corners[:, 0], atol=1e-4
    )


def affine_of_whole(images, **changes):
    view = config.view(size=images.shape[1], crop=WHOLE, affine=dict(degrees=1.0))
    names = ("top", "left", "degrees", "shear", "shift_y", "shift_x")
    geometry = {**dict.fromkeys(names, 0.0), "height": images.shape[1], "width": images.shape[2]}
    geometry = {n: jnp.full(len(images), float(v)) for n, v in (geometry | changes).items()}
    return np.asarray(device_crop.apply_geometry(images, geometry, view))


def test_affine_identity_rotation_and_shifts_are_exact():
    images = random_images(2, 16, 16)
    x = np.float32(images) / 255
    np.testing.assert_allclose(affine_of_whole(images), x, atol=1e-6)
    clockwise = np.rot90(x, -1, axes=(1, 2))
    np.testing.assert_allclose(affine_of_whole(images, degrees=90.0), clockwise, atol=1e-5)
    down = affine_of_whole(images, shift_y=3.0)
    np.testing.assert_allclose(down[:, 3:], x[:, :-3], atol=1e-6)
    np.testing.assert_array_equal(down[:, :3], 0.0)
    right = affine_of_whole(images, shift_x=2.0)
    np.testing.assert_allclose(right[:, :, 2:], x[:, :, :-2], atol=1e-6)


def test_affine_parameters_are_uniform_in_their_ranges():
    view = config.view(crop=WHOLE, affine=dict(degrees=15.0, shear=5.0, translate=0.1))
    g = jax.jit(jax.vmap(lambda key: device_crop.sample_geometry(key, 20, 30, view)))(keys(4000))
    for name, bound in dict(degrees=15.0, shear=5.0, shift_y=2.0, shift_x=3.0).items():
        assert scipy.stats.kstest(g[name], "uniform", (-bound, 2 * bound)).pvalue > 1e-3, name
    correlations = np.corrcoef([g[name] for name in ("degrees", "shear", "shift_y", "shift_x")])
    assert np.abs(correlations - np.eye(4)).max() < 5 / math.sqrt(4000)


# Bad input


def test_bad_crops_are_errors():
    images, k = random_images(2), keys(2)
    for changes, message in (
        (dict(crop=dict(sampler="random")), "crop.sampler is 'random'"),
        (dict(crop=dict(interpolation="nearest")), "crop.interpolation is 'nearest'"),
        (dict(affine=dict(degrees=5.0)), "set crop.interpolation to 'bilinear'"),
    ):
        with pytest.raises(UserError, match=message):
            view = config.view(**changes)
            jax.eval_shape(lambda x, view=view: device_crop.crop_views(x, k, view), images)
