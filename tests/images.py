"""Small image files and helpers shared by the tests of host sources."""

import numpy as np
from PIL import Image

from ssl_jax import config

COLORS = {"cat": (200, 30, 30), "dog": (30, 200, 30), "emu": (30, 30, 200)}


def picture(number, color, size=(40, 30)):
    """Returns an image of noise around a color, different for each number."""
    rng = np.random.default_rng(number)
    pixels = np.array(color) + rng.integers(-30, 30, (size[1], size[0], 1))
    pixels[: size[1] // 2] += rng.integers(-25, 25, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def packed_colors(folder):
    """Packs 40 training and 20 test images in two classes of different colors.

    Returns:
      The arguments --train and --test of a benchmark.
    """
    for name, count in (("train", 40), ("test", 20)):
        labels = np.arange(count, dtype=np.int32) % 2
        images = np.broadcast_to(labels[:, None, None, None] * 200, (count, 32, 32, 3))
        arrays = {"images": images.astype(np.uint8), "labels": labels, "class_names": ["a", "b"]}
        np.savez(folder / f"{name}.npz", **arrays)
    return [f"--train={folder}/train.npz", f"--test={folder}/test.npz"]


def fill(root, per_class=4, classes=COLORS):
    """Writes class folders of PNG files of several sizes."""
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            image = picture(100 * number + i, COLORS[name], (30 + 5 * i, 36))
            image.save(root / name / f"{i}.png")
    return root


def noise_files(root):
    """Writes 64 JPEG files of noise, of five sizes and two classes."""
    rng = np.random.default_rng(0)
    for i in range(64):
        (root / f"{i % 2}").mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (20 + i % 5, 24, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{i % 2}" / f"{i}.jpg")
    return root


def config_of(root, sampler="torchvision", **data):
    c = config.default_config()
    c.data.update(**{"name": "folder", "dir": str(root), **data})
    small = config.view(size=16, crop=dict(sampler=sampler, interpolation="bilinear"))
    c.views = {"b": config.view(size=8, count=2, crop=dict(sampler=sampler)), "a": small}
    return c


def read(source, steps):
    """Reads the batches of (step, ids) pairs into a list."""
    pairs = ((step, np.array(ids, np.int32)) for step, ids in steps)
    return list(source.batches(pairs))


def by_id(batches, steps):
    """Maps (step, id, view) to pixels."""
    return {
        (step, int(id), number): view[i].tobytes()
        for (step, _), batch in zip(steps, batches, strict=True)
        for number, view in enumerate(batch["views"])
        for i, id in enumerate(batch["id"])
    }
