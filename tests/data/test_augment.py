import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from ssl_jax import config
from ssl_jax.data import augment
from ssl_jax.errors import UserError

N = 7
STYLES = ("tf", "torchvision")
LUMA = np.array([0.2989, 0.587, 0.114])
OFF = dict(flip=0.0, jitter=dict(prob=0.0), gray=0.0, blur=dict(prob=0.0))


def random_images(n=N, size=12, seed=0):
    """Returns random pixels, including HSV's special cases: gray, black, white, pure colors."""
    rng = np.random.default_rng(seed)
    x = rng.random((n, size, size, 3))
    x[:, 0, :8] = [
        [0] * 3,
        [1] * 3,
        [0.4] * 3,
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
        [1, 1, 0],
        [0, 1, 1],
    ]
    x[:, 1, 0] = [1, 0, 1]
    return x.astype(np.float32)


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def color(images, keys, view):
    return jax.jit(lambda x, k: augment.color(x, k, view))(images, keys)


# The definitions, image by image, in float64


def by_pixel(function, image):
    return np.array([[function(*pixel) for pixel in row] for row in image.astype(np.float64)])


def oracle_brightness(image, factor, mode="multiply"):
    return image * factor if mode == "multiply" else image + factor


def oracle_contrast(image, factor, style):
    mean = image.mean((0, 1)) if style == "tf" else (image @ LUMA).mean()
    return factor * image + (1 - factor) * mean


def oracle_saturation(image, factor, style):
    if style == "torchvision":
        return factor * image + (1 - factor) * (image @ LUMA)[..., None]

    def scale(r, g, b):
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        return colorsys.hsv_to_rgb(h, min(max(s * factor, 0), 1), v)

    return by_pixel(scale, image)


def oracle_hue(image, delta):
    def turn(r, g, b):
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        return colorsys.hsv_to_rgb((h + delta) % 1.0, s, v)

    return by_pixel(turn, image)


def oracle_gray(image):
    return np.repeat((image @ LUMA)[..., None], 3, axis=-1)


def oracle_blur(image, sigma, taps, style):
    mode = "constant" if style == "tf" else "mirror"
    for axis in (0, 1):
        image = scipy.ndimage.gaussian_filter1d(
            image.astype(np.float64), sigma, axis=axis, mode=mode, radius=taps // 2
        )
    return image


def oracle_color(image, p, view):
    """Applies the whole chain to one image with the parameters p sampled for it."""
    image = image.astype(np.float64)
    jitter = view.jitter
    steps = (
        lambda x: oracle_brightness(x, p["brightness"], jitter.brightness_mode),
        lambda x: oracle_contrast(x, p["contrast"], jitter.style),
        lambda x: oracle_saturation(x, p["saturation"], jitter.style),
        lambda x: oracle_hue(x, p["hue"]),
    )
    if p.get("flip"):
        image = image[:, ::-1]
    if p.get("gray") and view.gray_first:
        image = oracle_gray(image)
    if p.get("jitter"):
        for which in p["order"]:
            image = np.clip(steps[which](image), 0, 1)
    if p.get("gray") and not view.gray_first:
        image = oracle_gray(image)
    if p.get("blur"):
        taps = view.blur.kernel_size or 2 * (image.shape[0] // 20) + 1
        image = oracle_blur(image, p["sigma"], taps, jitter.style)
    if p.get("solarize"):
        image = np.where(image >= view.solarize.threshold, 1 - image, image)
    image = np.clip(image, 0, 1)
    return (image - view.mean) / view.std if view.mean else image


FACTORS = np.array([0.0, 0.3, 0.9, 1.0, 1.2, 1.8, 2.5])
ROTATIONS = np.array([-1.0, -0.5, -0.2, 0.0, 0.1, 0.37, 1.0])
SIGMAS = np.array([0.1, 0.5, 0.8, 1.0, 1.5, 2.0, 5.0])


def by_option(name, function, oracle, values, *options):
    """Returns entries of `ADJUSTMENTS`, one per tuple of further arguments."""

    def adjustment(option):
        return (lambda x, v: function(x, v, *option)), (lambda x, v: oracle(x, v, *option))

    return {f"{name} {option}": (*adjustment(option), values, 2e-6) for option in options}


# By name: the function, its definition, a value per image, and the tolerance.
ADJUSTMENTS = {
    **by_option(
        "brightness", augment.adjust_brightness, oracle_brightness, FACTORS, ("multiply",), ("add",)
    ),
    **by_option(
        "contrast", augment.adjust_contrast, oracle_contrast, FACTORS, *((s,) for s in STYLES)
    ),
    **by_option(
        "saturation", augment.adjust_saturation, oracle_saturation, FACTORS, *((s,) for s in STYLES)
    ),
    "hue": (augment.adjust_hue, oracle_hue, ROTATIONS, 4e-6),
    **by_option(
        "blur",
        augment.gaussian_blur,
        oracle_blur,
        SIGMAS,
        *[(1, "tf"), (3, "torchvision"), (9, "torchvision"), (12, "tf")],
    ),
}


@pytest.fixture(scope="module")
def adjusted():
    """Runs each adjustment with a value per image and with one for all, in one compiled program."""

    @jax.jit
    def adjust_all(x, values):
        return {
            name: (function(x, values[name]), function(x, values[name][1]))
            for name, (function, *_) in ADJUSTMENTS.items()
        }

    values = {name: np.float32(values) for name, (*_, values, _) in ADJUSTMENTS.items()}
    return adjust_all(random_images(), values)


@pytest.mark.parametrize("name", ADJUSTMENTS)
def test_adjustments_match_their_definitions(name, adjusted):
    _, oracle, values, atol = ADJUSTMENTS[name]
    each, same = adjusted[name]
    x = random_images()
    expected = np.stack([oracle(image, value) for image, value in zip(x, values, strict=True)])
    np.testing.assert_allclose(each, expected, atol=atol)
    assert each.dtype == jnp.float32
    expected = np.stack([oracle(image, values[1]) for image in x])
    np.testing.assert_allclose(same, expected, atol=atol)


def test_grayscale_matches_its_definition():
    x = random_images()
    got = augment.to_grayscale(x)
    np.testing.assert_allclose(got, [oracle_gray(image) for image in x], atol=1e-6)
    assert got.shape == x.shape


def test_solarize_inverts_at_and_above_the_threshold():
    x = jnp.array([0.0, 0.25, 0.49, 0.5, 0.75, 1.0]).reshape(1, 1, 2, 3)
    expected = np.array([0.0, 0.25, 0.49, 0.5, 0.25, 0.0]).reshape(1, 1, 2, 3)
    np.testing.assert_allclose(augment.solarize(x, 0.5), expected, atol=1e-7)
    two = augment.solarize(jnp.full((2, 1, 1, 3), 0.4), jnp.array([0.4, 0.6]))
    np.testing.assert_allclose(two[:, 0, 0, 0], [0.6, 0.4], atol=1e-7)


def test_adjustments_match_tensorflow():
    tf = pytest.importorskip("tensorflow")
    x = random_images(seed=1)
    for factor in (0.0, 0.4, 1.7):
        for function, tf_function in (
            (augment.adjust_contrast, tf.image.adjust_contrast),
            (augment.adjust_saturation, tf.image.adjust_saturation),
            (lambda x, f: augment.adjust_brightness(x, f, "add"), tf.image.adjust_brightness),
        ):
            np.testing.assert_allclose(function(x, factor), tf_function(x, factor), atol=3e-6)
    for delta in (-0.2, 0.07, 0.5):
        np.testing.assert_allclose(
            augment.adjust_hue(x, delta), tf.image.adjust_hue(x, delta), atol=4e-6
        )
    gray = tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(x))
    np.testing.assert_allclose(augment.to_grayscale(x), gray, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1 / 255, 0.5, 1.0])
def test_gray_pixels_have_no_hue_or_saturation(value):
    x = jnp.full((1, 2, 2, 3), value)
    np.testing.assert_array_equal(augment.adjust_hue(x, 0.3), x)
    np.testing.assert_array_equal(augment.adjust_saturation(x, 3.0), x)


def test_adjustments_do_not_clip():
    x = random_images()
    assert augment.adjust_brightness(x, 1.5).max() > 1.2
    assert augment.adjust_contrast(x, 2.5).min() < -0.2


VIEWS = {
    "simclr": config.view(size=20),
    "moco v1": config.view(
        jitter=dict(
            prob=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, style="torchvision"
        ),
        gray=0.5,
        gray_first=True,
        blur=dict(prob=0.0),
    ),
    "byol": config.view(
        jitter=dict(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, brightness_mode="add"),
        blur=dict(prob=1.0, kernel_size=5),
        solarize=dict(prob=0.5),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
    "fixed order, torchvision": config.view(
        jitter=dict(style="torchvision", random_order=False), blur=dict(prob=1.0, kernel_size=9)
    ),
    "some strengths zero": config.view(jitter=dict(prob=1.0, brightness=0.0, hue=0.0)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_color_matches_the_chain_of_definitions(name):
    view = VIEWS[name]
    n = 40
    images = random_images(n, size=20, seed=2)

    @jax.jit
    def sample_and_color(images, keys):
        sampled = jax.vmap(lambda key: augment.sample_parameters(key, view))(keys)
        return sampled, augment.color(images, keys, view)

    sampled, got = jax.device_get(sample_and_color(images, keys(n, 5)))
    expected = np.stack(
        [
            oracle_color(image, {name: v[i] for name, v in sampled.items()}, view)
            for i, image in enumerate(images)
        ]
    )
    difference = np.abs(got - expected)
    # A pixel within rounding of the threshold may be solarized by one and not by the other.
    assert np.mean(difference > 3e-5) <= (1e-4 if view.solarize.prob else 0.0)
    assert np.abs(expected - images).mean() > 0.01


def test_jitter_is_applied_in_the_sampled_order():
    view = config.view(**{**OFF, "jitter": dict(prob=1.0)})
    image = random_images(1, seed=3)
    orders = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
    p = dict(brightness=1.5, contrast=0.4, saturation=1.6, hue=0.15, jitter=True)
    n = len(orders)
    batched = {name: jnp.full(n, value) for name, value in p.items()} | {"order": orders}
    apply = jax.jit(lambda x, p: augment.apply_parameters(x, p, view))
    got = apply(np.repeat(image, n, axis=0), batched)
    expected = [oracle_color(image[0], {**p, "order": order}, view) for order in orders]
    np.testing.assert_allclose(got, expected, atol=5e-6)
    assert np.abs(expected[0] - expected[1]).mean() > 0.02


def sample_many(view, n=20_000, seed=1):
    sample = jax.jit(jax.vmap(lambda key: augment.sample_parameters(key, view)))
    return {name: np.asarray(value) for name, value in sample(keys(n, seed)).items()}


def test_sampled_numbers_are_uniform_in_their_ranges_and_independent():
    sampled = sample_many(config.view(jitter=dict(brightness=0.8, contrast=1.5, saturation=0.3)))
    ranges = dict(
        brightness=(0.2, 1.8),
        contrast=(0.0, 2.5),
        saturation=(0.7, 1.3),
        hue=(-0.2, 0.2),
        sigma=(0.1, 2.0),
    )
    for name, (low, high) in ranges.items():
        assert scipy.stats.kstest(sampled[name], "uniform", (low, high - low)).pvalue > 1e-3, name
    del sampled["order"]
    correlations = np.corrcoef(np.stack(list(sampled.values())).astype(float))
    off_diagonal = correlations[~np.eye(len(correlations), dtype=bool)]
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(20_000)
    added = sample_many(config.view(jitter=dict(brightness_mode="add", brightness=0.4)))
    assert scipy.stats.kstest(added["brightness"], "uniform", (-0.4, 0.8)).pvalue > 1e-3


def test_augmentations_are_sampled_with_their_probabilities():
    probabilities = dict(flip=0.5, jitter=0.8, gray=0.2, blur=0.1, solarize=0.3)
    view = config.view(
        flip=0.5, jitter=dict(prob=0.8), gray=0.2, blur=dict(prob=0.1), solarize=dict(prob=0.3)
    )
    sampled = sample_many(view)
    for name, p in probabilities.items():
        tail = scipy.stats.binomtest(int(sampled[name].sum()), len(sampled[name]), p).pvalue
        assert tail > 1e-3, name
    always = sample_many(config.view(flip=1.0, jitter=dict(prob=1.0), gray=0.0))
    assert always["flip"].all() and always["jitter"].all() and "gray" not in always


def test_all_24_orders_are_equally_likely():
    orders = sample_many(config.view(), n=24_000)["order"]
    codes, counts = np.unique(orders @ [64, 16, 4, 1], return_counts=True)
    assert len(codes) == 24
    assert np.all(np.sort(orders, axis=1) == np.arange(4))
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    fixed = sample_many(config.view(jitter=dict(random_order=False)), n=10)["order"]
    assert np.all(fixed == np.arange(4))


def test_pixels_depend_only_on_the_image_and_its_key():
    view = config.view(noise=0.05, solarize=dict(prob=0.3))
    images, k = random_images(16, size=32), keys(16)
    run = jax.jit(lambda x, k: augment.color(x, k, view))
    whole = np.asarray(run(images, k))
    shuffled = np.random.default_rng(0).permutation(16)
    np.testing.assert_array_equal(run(images[shuffled], k[shuffled]), whole[shuffled])
    np.testing.assert_allclose(run(images[3:4], k[3:4]), whole[3:4], atol=1e-6)
    assert np.abs(run(images, keys(16, seed=9)) - whole).mean() > 0.01


def test_uint8_and_float_images_give_the_same_pixels():
    x = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    view = config.view()
    got = color(jnp.asarray(x), keys(4), view)
    same = color(jnp.asarray(x / 255.0, jnp.float32), keys(4), view)
    np.testing.assert_allclose(got, same, atol=1e-6)
    untouched = color(jnp.asarray(x), keys(4), config.view(**OFF))
    np.testing.assert_allclose(untouched, x / 255.0, atol=1e-7)


def test_flip_mirrors_the_columns():
    x = random_images(3)
    got = color(x, keys(3), config.view(**{**OFF, "flip": 1.0}))
    np.testing.assert_array_equal(got, x[:, :, ::-1])


def test_noise_has_its_standard_deviation_and_is_clipped():
    view = config.view(**OFF, noise=0.1)
    got = np.asarray(color(jnp.full((8, 32, 32, 3), 0.5), keys(8), view))
    noise = (got - 0.5).reshape(8, -1)
    assert scipy.stats.kstest(noise.ravel() / 0.1, "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(noise) - np.eye(8)).max() < 0.1
    white = np.asarray(color(jnp.ones((2, 8, 8, 3)), keys(2), view))
    assert white.max() == 1.0 and white.min() > 0.3


def program(view):
    return str(jax.make_jaxpr(lambda x, k: augment.color(x, k, view))(random_images(), keys(N)))


def test_augmentations_of_probability_zero_are_not_compiled():
    assert " exp " in program(config.view()) and " floor " in program(config.view())
    off = program(config.view(**OFF))
    assert " exp " not in off and " floor " not in off and " rev" not in off
    assert " floor " not in program(config.view(jitter=dict(hue=0.0)))


@pytest.mark.parametrize("style", STYLES)
def test_colors_compile_without_gathers(style):
    view = config.view(jitter=dict(style=style))
    lowered = jax.jit(lambda x, k: augment.color(x, k, view)).lower(random_images(), keys(N))
    assert "stablehlo.select" in lowered.as_text()
    assert "gather" not in lowered.as_text()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: augment.adjust_contrast(x, 1.0, "pil"),
        lambda x: augment.adjust_saturation(x, 1.0, "pil"),
        lambda x: augment.gaussian_blur(x, 1.0, 3, "pil"),
        lambda x: augment.adjust_brightness(x, 1.0, "pil"),
    ],
)
def test_unknown_styles_are_errors(call):
    with pytest.raises(UserError, match="'pil'"):
        call(random_images())


def test_blur_without_taps_is_an_error():
    with pytest.raises(UserError, match="kernel_size is 0"):
        augment.gaussian_blur(random_images(), 1.0, 0)


@pytest.mark.parametrize("border", ["constant", "reflect"])
@pytest.mark.parametrize("axis", [1, 2])
def test_blur_by_matrices_matches_blur_by_shifts(border, axis):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.random((3, 12, 9, 3)), jnp.float32)
    taps = jnp.asarray(rng.random((3, 4)), jnp.float32)
    by_shifts = augment._by_shifts(x, taps, axis, border)
    np.testing.assert_allclose(augment._by_matrices(x, taps, axis, border), by_shifts, rtol=1e-5)
