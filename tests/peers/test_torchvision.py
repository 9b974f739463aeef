"""Color augmentations and crops equal torchvision's, per pixel and in distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ssl_jax.config import view
from ssl_jax.data import augment, device_crop

torch = pytest.importorskip("torch", reason="torch is not installed here: make peers")
transforms = pytest.importorskip("torchvision.transforms")
functional = transforms.functional

N, SIZE = 6, 32


@pytest.fixture(scope="module")
def images():
    """Random colors, some gray or at the limits."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (N, SIZE, SIZE, 3)).astype(np.float32)
    x[1] = x[1, ..., :1]
    x[2] = (x[2] > 0.5).astype(np.float32)
    return x


def by_torchvision(function, x, *args):
    planes = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    return function(planes, *args).numpy().transpose(0, 2, 3, 1)


def clipped(function):
    """torchvision clips after each adjustment, ssl_jax after the last one."""
    return lambda *args: jnp.clip(function(*args), 0.0, 1.0)


@pytest.mark.parametrize(
    ("ours", "theirs", "values"),
    [
        (
            lambda x, f: augment.adjust_brightness(x, f, "multiply"),
            functional.adjust_brightness,
            (0.0, 0.4, 1.0, 1.7),
        ),
        (
            lambda x, f: augment.adjust_contrast(x, f, "torchvision"),
            functional.adjust_contrast,
            (0.0, 0.4, 1.0, 1.7),
        ),
        (
            lambda x, f: augment.adjust_saturation(x, f, "torchvision"),
            functional.adjust_saturation,
            (0.0, 0.4, 1.0, 1.7),
        ),
        (augment.adjust_hue, functional.adjust_hue, (-0.5, -0.1, 0.0, 0.1, 0.4)),
        (augment.solarize, functional.solarize, (0.0, 0.5, 0.9)),
    ],
    ids=["brightness", "contrast", "saturation", "hue", "solarize"],
)
def test_color_adjustments_equal_torchvision(images, ours, theirs, values):
    for value in values:
        expected = by_torchvision(theirs, images, value)
        np.testing.assert_allclose(clipped(ours)(images, value), expected, atol=2e-4)


def test_grayscale_equals_torchvision(images):
    expected = by_torchvision(lambda x: functional.rgb_to_grayscale(x, 3), images)
    np.testing.assert_allclose(augment.to_grayscale(images), expected, atol=1e-6)


@pytest.mark.parametrize(("taps", "sigma"), [(3, 0.3), (9, 1.0), (23, 2.0)])
def test_blur_equals_torchvision(images, taps, sigma):
    expected = by_torchvision(functional.gaussian_blur, images, [taps, taps], [sigma, sigma])
    ours = augment.gaussian_blur(images, sigma, taps, "torchvision")
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(100, 100), (60, 200)])
@pytest.mark.parametrize("area", [(0.08, 1.0), (0.2, 0.5)])
def test_crop_boxes_have_the_distribution_of_random_resized_crop(size, area):
    """Compares height, width and position by Kolmogorov-Smirnov tests."""
    draws = 4000
    config = view(size=32, crop={"sampler": "torchvision", "area": area})
    drawn = jax.vmap(lambda key: device_crop.sample_geometry(key, *size, config))(
        jax.random.split(jax.random.key(0), draws)
    )
    torch.manual_seed(0)
    image, aspect = torch.empty(3, *size), list(config.crop.aspect)
    get = transforms.RandomResizedCrop.get_params
    theirs = np.array([get(image, list(area), aspect) for _ in range(draws)])
    for i, name in enumerate(("top", "left", "height", "width")):
        p = scipy.stats.ks_2samp(np.asarray(drawn[name]), theirs[:, i]).pvalue
        assert p > 1e-3, name


def test_crop_pixels_equal_torchvision(images):
    """Compares bilinear resizing with antialiasing of tensors."""
    config = view(size=12, crop={"sampler": "torchvision", "interpolation": "bilinear"})
    boxes = {"top": 3, "left": 5, "height": 20, "width": 25}
    geometry = {name: jnp.full((N,), value) for name, value in boxes.items()}
    ours = device_crop.apply_geometry(images, geometry, config)
    expected = by_torchvision(
        lambda x: functional.resized_crop(x, *boxes.values(), [12, 12], antialias=True), images
    )
    np.testing.assert_allclose(ours, expected, atol=1e-5)
