"""Views that are not square, images of other channels than three, and images of 16 bits."""

import io

import jax
import numpy as np
import pytest
import tifffile
from images import config_of, read
from PIL import Image
from tiny import tiny_config

from ssl_jax import config as configs
from ssl_jax.data import device_crop
from ssl_jax.data.arrays import ArraySource
from ssl_jax.data.decode import ChannelsError, decode, image_bits, image_size
from ssl_jax.data.packed import pack, packed_source
from ssl_jax.data.pipeline import make_augment_fn, prepare_eval
from ssl_jax.data.sources import make_sources
from ssl_jax.data.tensorflow import tf
from ssl_jax.data.values import rgb, to_unit
from ssl_jax.errors import UserError
from ssl_jax.models import make_encoder
from ssl_jax.plan.flops import traced_flops
from ssl_jax.recipes import set_channels
from ssl_jax.train.setup import resolve

# Neighbors differ in their lower 8 bits only.
RAMP = (np.arange(20 * 24).reshape(20, 24) * 3 + 40_000).astype(np.uint16)


def png(values):
    if values.ndim == 3:
        return tf.io.encode_png(values).numpy()
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def tiff(values, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="minisblack", **options)
    return file.getvalue()


def whole_views(channels, size=(12, 8), sampler="none", **data):
    """A config whose views are whole images, without any augmentation."""
    config = tiny_config()
    config.data.update(channels=channels, **data)
    plain = dict(flip=0.0, jitter=dict(prob=0.0), gray=0.0, blur=dict(prob=0.0))
    one = configs.view(size=size, crop=dict(sampler=sampler, interpolation="bilinear"), **plain)
    config.views = {"view": one}
    configs.validate(config)
    return config


def resized(image, size):
    """Resizes floats in [0, 1] bilinearly with antialiasing, in float64, from the definition."""

    def weights(old, new):
        scale = old / new
        centers = (np.arange(new)[:, None] + 0.5) * scale - 0.5
        taps = np.maximum(0, 1 - np.abs(np.arange(old)[None] - centers) / max(scale, 1))
        return taps / taps.sum(axis=1, keepdims=True)

    rows, columns = (weights(o, n) for o, n in zip(image.shape[:2], size, strict=True))
    return np.einsum("ih,hwc,jw->ijc", rows, image.astype(np.float64), columns)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_files_of_16_bits_keep_all_of_them(order):
    color = np.stack([RAMP, RAMP + 1, 65_535 - RAMP], axis=-1)
    files = {
        "gray png": (png(RAMP), RAMP[..., None]),
        "gray tiff": (tiff(RAMP.astype(order), byteorder=order[0]), RAMP[..., None]),
        "rgb png": (png(color), color),
        "rgb tiff": (tiff(color.astype(order), byteorder=order[0], planarconfig="contig"), color),
    }
    for name, (file, expected) in files.items():
        found = decode(file, expected.shape[-1], bits=16)
        assert found.dtype == np.uint16 and image_bits(file) == 16, name
        np.testing.assert_array_equal(found, expected, name)
        np.testing.assert_array_equal(decode(file), np.broadcast_to(expected >> 8, color.shape))
        assert image_size(file) == RAMP.shape
    gray_as_3 = decode(files["gray png"][0], 3, bits=16)
    np.testing.assert_array_equal(gray_as_3, np.repeat(RAMP[..., None], 3, axis=-1))


@pytest.mark.parametrize("channels", [2, 4, 5, 16])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiffs_of_any_number_of_channels_keep_their_values(channels, dtype):
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (6, 8, channels), dtype)
    compressed = {"contig": "zlib", "separate": "lzw"}
    for planes, compression in compressed.items():
        stored = values if planes == "contig" else np.moveaxis(values, -1, 0)
        file = tiff(stored, planarconfig=planes, compression=compression)
        np.testing.assert_array_equal(decode(file, channels, 16), values)
        assert image_size(file) == (6, 8)
    pages = tiff(np.moveaxis(values, -1, 0))  # a page per channel
    np.testing.assert_array_equal(decode(pages, channels, 16), values)
    np.testing.assert_array_equal(decode(file, channels, 8), values >> 8 * (dtype == np.uint16))
    with pytest.raises(ChannelsError, match=f"{channels} channels"):
        decode(file, 1)


def test_alpha_is_dropped_with_one_and_three_channels_and_kept_with_others():
    values = np.random.default_rng(0).integers(0, 256, (5, 4, 4), np.uint8)
    for count, rest in ((2, 1), (4, 3)):
        file = png(values[..., :count])
        np.testing.assert_array_equal(decode(file, count), values[..., :count])
        np.testing.assert_array_equal(decode(file, rest), values[..., :rest])
    for found, file in ((3, png(values[..., :3])), (1, png(values[..., 0]))):
        with pytest.raises(ChannelsError, match=f"{found} channels"):
            decode(file, 2)


@pytest.mark.parametrize("sampler", ["none", "byol"])
def test_host_views_of_16_bits_are_resized_in_floats(tmp_path, sampler):
    (tmp_path / "0.png").write_bytes(png(RAMP))
    config = whole_views(1, sampler=sampler, name="folder", dir=str(tmp_path))
    if sampler == "byol":  # crops the whole image, too, and resizes by TensorFlow
        config.views.view.crop.update(area=(1.0, 1.0), aspect=(24 / 20, 24 / 20))
        config.views.view.size = (20, 24)
    size = config.views.view.size
    source, _ = make_sources(config)
    (batch,) = read(source, [(0, [0])])
    (view,) = batch["views"]
    assert source.bits == 16 and view.shape == (1, *size, 1) and view.dtype == np.float32
    expected = resized(RAMP[..., None] / 65_535, size)
    np.testing.assert_allclose(view[0], expected, atol=2e-7)
    assert len(np.unique(view)) > 0.9 * view.size  # 8 bits would leave six values
    (on_device,) = make_augment_fn(config)(batch, {}, jax.random.key(0))["views"]
    np.testing.assert_array_equal(on_device, view)


def test_range_scales_and_clips_values_on_host_and_device(tmp_path):
    twelve = (RAMP - 40_000) * 3  # 0 to 4,311
    (tmp_path / "0.png").write_bytes(png(twelve))
    config = whole_views(1, size=(20, 24), name="folder", dir=str(tmp_path), range=(100, 4095))
    expected = np.clip((twelve - 100.0) / 3995, 0, 1)[None, ..., None]
    source, _ = make_sources(config)
    (batch,) = read(source, [(0, [0])])
    np.testing.assert_allclose(batch["views"][0], expected, atol=1e-6)
    arrays = ArraySource(twelve[None, ..., None].astype(">u2"))
    raw = {"id": np.array([0])}
    made = make_augment_fn(config)(raw, arrays.device_data(), jax.random.key(0))
    np.testing.assert_allclose(made["views"][0], expected, atol=1e-6)
    for images in (source.eval_transform([0]), arrays.eval_transform([0])):
        np.testing.assert_allclose(prepare_eval(images, config), expected, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 4, 16])
def test_host_and_device_make_the_same_views_of_any_channels(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 24, channels), np.uint8)
    for number, image in enumerate(images):
        several = {"planarconfig": "contig"} if channels > 1 else {}
        (tmp_path / f"{number}.tif").write_bytes(tiff(image, **several))
    config = whole_views(channels, name="folder", dir=str(tmp_path))
    source, _ = make_sources(config)
    (batch,) = read(source, [(0, [0, 1])])
    (view,) = batch["views"]
    assert view.dtype == np.uint8 and view.shape == (2, 12, 8, channels)
    raw = {"id": np.array([0, 1])}
    (on_device,) = make_augment_fn(config)(raw, {"image": images}, jax.random.key(0))["views"]
    np.testing.assert_allclose(view / 255, on_device, atol=1.01 / 255)  # Pillow rounds twice
    expected = [resized(image / 255, (12, 8)) for image in images]
    np.testing.assert_allclose(on_device, expected, atol=2e-6)
    np.testing.assert_array_equal(rgb(images)[..., 0], images[..., 0])
    assert rgb(images).shape == (2, 20, 24, 3)


def test_mismatch_names_file_and_both_counts(tmp_path):
    (tmp_path / "0.png").write_bytes(png(RAMP))
    config = whole_views(4, name="folder", dir=str(tmp_path), on_bad_image="skip")
    source, _ = make_sources(config)
    with pytest.raises(UserError, match="0.png has 1 channel, but config.data.channels is 4"):
        read(source, [(0, [0])])  # no image has four
    (tmp_path / "1.png").write_bytes(png(np.repeat(RAMP[..., None], 4, axis=-1)))
    source, _ = make_sources(config)
    (batch,) = read(source, [(0, [0, 1])])
    np.testing.assert_array_equal(*batch["views"][0])
    assert len(source.bad) == 1 and source.bad[0].endswith("0.png")
    with pytest.raises(UserError, match="0.png has 1 channel, not the 2 of --channels"):
        pack(tmp_path, tmp_path / "out.npz", channels=2)
    given = ArraySource(np.zeros((2, 4, 4, 5), np.uint8))
    with pytest.raises(UserError, match="ArraySource has images of 5 channels, but .* is 4"):
        make_sources(config, given)


class Arrays:
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def read(self, ids):
        return [self.images[id] for id in ids]


def test_objects_of_uint16_arrays_keep_their_bits():
    images = np.stack([RAMP, RAMP + 1])[..., None].astype(">u2")
    config = whole_views(1, size=(20, 24))
    source, _ = make_sources(config, Arrays(images))
    (batch,) = read(source, [(0, [1, 0])])
    assert source.bits == 16
    np.testing.assert_allclose(batch["views"][0], to_unit(images[::-1].astype(np.uint16)))
    with pytest.raises(UserError, match=r"\[20, 24, 1\] for image 0, of 1 channels, but .* is 2"):
        make_sources(whole_views(2), Arrays(images))


def test_packed_files_keep_16_bits_and_channels(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(2):
        (tmp_path / f"images/{number}.png").write_bytes(png(RAMP + np.uint16(number)))
    out = tmp_path / "out.npz"
    assert pack(tmp_path / "images", out, channels=1) == 2
    source = packed_source(whole_views(1, name="packed", dir=str(out)), "dir")
    np.testing.assert_array_equal(source.images[1, ..., 0], RAMP + 1)
    assert source.bits == 16


def test_evaluated_box_of_a_view_that_is_not_square():
    # Height 3: width 2 in an image of 60×90: 60×40, of which 0.5.
    assert device_crop.eval_box(60, 90, (96, 64), 0.5) == (15, 35, 30, 20)
    assert device_crop.eval_box(60, 90, (64, 96), 1.0) == (0, 0, 60, 90)
    assert device_crop.eval_box(96, 64, (96, 64), 0.5) == (0, 0, 96, 64)
    assert device_crop.eval_box(64, 96, (96, 64), 1.0) == (0, 27, 64, 43)


@pytest.mark.parametrize("sampler", ["torchvision", "tf", "byol"])
def test_evaluation_and_crops_of_a_pair_are_height_by_width(tmp_path, sampler):
    rows = np.repeat(np.arange(40, dtype=np.uint8)[:, None] * 6, 40, axis=1)
    for number in range(2):
        Image.fromarray(rows).save(tmp_path / f"{number}.png")
    config = config_of(tmp_path, sampler)
    config.views.a.update(crop=dict(aspect=(1.0, 1.0)))
    config = configs.apply_overrides(config, ["views.a.size=(12, 6)", "views.b.size=5,7"])
    source, _ = make_sources(config)
    (batch,) = read(source, [(0, [0, 1])])
    assert [view.shape[1:] for view in batch["views"]] == [(12, 6, 3), (5, 7, 3), (5, 7, 3)]
    evaluated = source.eval_transform([0, 1])
    assert evaluated.shape == (2, 12, 6, 3)
    raw = np.repeat(np.repeat(rows[None, ..., None], 3, axis=-1), 2, axis=0)
    prepared = np.asarray(prepare_eval(raw, config))
    np.testing.assert_allclose(evaluated / 255, prepared, atol=2.1 / 255)
    keys = jax.random.split(jax.random.key(0), 2)
    crops = device_crop.crop_views(raw, keys, config.views.a)
    for view in (batch["views"][0], np.asarray(crops), prepared):
        assert view.shape == (2, 12, 6, 3)
        assert (np.diff(view.astype(float), axis=1) > 0).all()  # down
        np.testing.assert_allclose(np.diff(view.astype(float), axis=2), 0, atol=1e-5)  # across


def test_operations_on_colors_are_refused_and_dropped_by_the_recipe():
    config = configs.default_config()
    config.data.channels = 4
    with pytest.raises(UserError) as error:
        configs.validate(config)
    for part in (
        "is 4, but grayscale and hue and saturation",
        "view2.jitter.hue=0",
        "view1.gray=0",
    ):
        assert part in str(error.value)
    flags = [word[9:] for word in str(error.value).split() if word.startswith("--config")]
    config = configs.apply_overrides(config, [flag.rstrip(",") for flag in flags])
    config.views.view1.update(mean=(0.5,) * 3, std=(0.2,) * 3)
    with pytest.raises(UserError, match="has 3 values in mean .* Set both to 4 .config.data.chan"):
        configs.validate(config)
    set_channels(config, 5)
    configs.validate(config)
    assert config.views.view1.mean == () and config.views.view1.jitter.brightness > 0
    config.data.range = (5, 5)
    with pytest.raises(UserError, match="config.data.range is .5, 5.: write .low, high. with low"):
        configs.validate(config)


@pytest.mark.parametrize("size", ["(3,)", "(0, 4)", "(4, 2.5)", "(1, 2, 3)"])
def test_sizes_that_are_no_pair_are_refused(size):
    with pytest.raises(UserError, match=r"config.views.view1.size is .*such as \(96, 64\)"):
        configs.apply_overrides(configs.default_config(), [f"views.view1.size={size}"])


def test_pair_survives_json_and_copies():
    config = configs.apply_overrides(configs.default_config(), ["views.view1.size=(96, 64)"])
    again = configs.from_json(configs.to_json(config))
    assert again.views.view1.size == (96, 64) and again.views.view2.size == 224
    back = configs.apply_overrides(again, ["views.view1.size=32"])
    assert back.views.view1.size == 32
    assert configs.size_text(again.views.view1) == "96×64"


def test_rotated_crops_of_a_pair_are_height_by_width():
    rows = np.repeat(np.arange(16, dtype=np.uint8)[:, None] * 15, 16, axis=1)
    view = whole_views(1).views.view
    view.affine.degrees = 1e-3
    keys = jax.random.split(jax.random.key(0), 1)
    (crop,) = np.asarray(device_crop.crop_views(rows[None, ..., None], keys, view))
    assert crop.shape == (12, 8, 1)
    inside = crop[1:-1, 1:-1]  # black enters at the borders
    assert (np.diff(inside, axis=0) > 0).all()
    np.testing.assert_allclose(np.diff(inside, axis=1), 0, atol=1e-4)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Training files of 16 bits, held-out ones of 8."""
    root = tmp_path_factory.mktemp("mixed")
    for split, images in (("train", [RAMP + i for i in range(4)]), ("test", [RAMP >> 8] * 2)):
        (root / split).mkdir()
        for number, image in enumerate(images):
            dtype = np.uint16 if split == "train" else np.uint8
            (root / split / f"{number}.png").write_bytes(png(image.astype(dtype)))
    return root


@pytest.mark.parametrize(("train", "bits"), [("train", 16), ("test", 8)])
def test_held_out_files_keep_the_bits_of_the_training_files(mixed, train, bits):
    other = {"train": "test", "test": "train"}[train]
    data = {"name": "folder", "dir": str(mixed / train), "test_dir": str(mixed / other)}
    config = whole_views(1, **data)
    found = {}
    for recorded in (0, bits):  # as while training, and as of the finished run
        config.data.bits = recorded
        sources = make_sources(config)
        assert [source.bits for source in sources] == [bits, bits]
        found[recorded] = sources[1].eval_transform([0, 1])
    assert found[0].dtype == (np.float32 if bits == 16 else np.uint8)
    np.testing.assert_array_equal(found[0], found[bits])
    assert resolve(whole_views(1, **data), sources[0]).data.bits == bits


def test_shares_of_two_processes_are_the_batch_of_one(mixed):
    config = whole_views(1, sampler="torchvision", name="folder", dir=str(mixed / "train"))
    (whole,) = read(make_sources(config)[0], [(3, [2, 0, 3, 1])])
    shares = [read(make_sources(config)[0], [(3, ids)])[0] for ids in ([2, 0], [3, 1])]
    joined = np.concatenate([share["views"][0] for share in shares])
    assert joined.dtype == np.float32
    np.testing.assert_array_equal(joined, whole["views"][0])


def test_arrays_of_other_bits_than_the_configs_or_the_training_images_are_refused():
    def arrays(dtype):
        return ArraySource(np.zeros((2, 4, 4, 1), dtype))

    words = "ArraySource has arrays of uint16, but config.data.bits is 8. Set config.data.bits=0"
    with pytest.raises(UserError, match=words):
        make_sources(whole_views(1, bits=8), arrays(np.uint16))
    with pytest.raises(UserError, match="arrays of uint16, but config.data.bits is 8"):
        make_sources(whole_views(1, bits=8), Arrays(RAMP[None, ..., None]))
    with pytest.raises(UserError, match="arrays of uint8, but config.data.bits is 16"):
        make_sources(whole_views(1, bits=16), arrays(np.uint8))
    with pytest.raises(UserError, match="arrays of uint8, but the training images of 16. Give bo"):
        make_sources(whole_views(1), arrays(np.uint16), arrays(np.uint8))
    train, _ = make_sources(whole_views(1, bits=16), arrays(np.uint16), arrays(np.uint16))
    assert train.bits == 16


def test_range_beyond_8_bits_is_refused_if_the_images_have_8():
    config = whole_views(1, range=(0, 4095))
    images = ArraySource(np.zeros((2, 4, 4, 1), np.uint8))
    with pytest.raises(UserError, match=r"range is \(0, 4095\), but config.data.bits is 8, with"):
        resolve(config, images)
    config.data.bits = 8
    with pytest.raises(UserError, match="Set config.data.bits=16, or a range within 0 to 255"):
        configs.validate(config)


def test_plain_images_are_not_copied():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    assert ArraySource(images).images is images
    assert ArraySource(images).device_data()["image"] is images
    assert np.shares_memory(rgb(images), images)


def test_config_file_that_assigns_a_pair_is_shown_how(tmp_path):
    file = tmp_path / "c.py"
    file.write_text(
        "from ssl_jax.config import default_config\n\n\ndef get_config():\n"
        "    config = default_config()\n    config.views.view1.size = (96, 64)\n"
        "    return config\n"
    )
    with pytest.raises(UserError, match=r"Give a pair when .* view\(size=\(96, 64\)\)"):
        configs.load_config(str(file), [])


def test_vit_and_flops_of_a_pair():
    config = whole_views(4, size=(8, 12))
    config.model.name = "vit"
    config.model.vit.update(width=8, depth=1, heads=2, patch=4)
    flops = {}
    for size in ((8, 12), (12, 8), (12, 12)):
        config = configs.apply_overrides(config, [f"views.view.size={size}"])
        encoder = make_encoder(config)
        images = jax.ShapeDtypeStruct((2, *size, 4), np.float32)
        shapes = jax.eval_shape(
            lambda x, encoder=encoder: encoder.init_with_output(jax.random.key(0), x, train=False),
            images,
        )
        assert shapes[0].shape == (2, 8)

        def forward(params, x, encoder=encoder):
            return encoder.apply(params, x, train=False)

        flops[size] = traced_flops(forward, shapes[1], images)
    assert flops[8, 12] == flops[12, 8] < flops[12, 12]
    config = configs.apply_overrides(config, ["views.view.size=(8, 10)"])
    with pytest.raises(UserError, match=r"config.views.view.size is \(8, 10\), but .*patch is 4"):
        make_encoder(config)
