"""A folder of small images as one file of pixels: held on the devices whole, without TensorFlow."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from ssl_jax.data.arrays import ArraySource
from ssl_jax.data.listing import list_images
from ssl_jax.errors import UserError
from ssl_jax.files import asked_for

_KEYS = {"images", "labels", "class_names"}


def pack(folder: str | Path, out: str | Path) -> int:
    """Writes the images of a folder into one file for `config.data.name = "packed"`.

    Args:
      folder: with one sub-folder per class, or flat; all images of one size, such as CIFAR's.
      out: the file to write, an uncompressed `.npz` with "images" uint8 [N, H, W, 3], "labels"
        int32 [N] (empty where there are no classes) and "class_names".

    Returns:
      N.

    Raises:
      UserError: what `list_images` refuses, an image that can't be decoded or is of another size,
        or a file that can't be written; no file is left then.
    """
    out = Path(out)
    if out.suffix != ".npz":
        raise UserError(f"The packed file is to be {out}: give it a name that ends in .npz.")
    files, labels, class_names = list_images(str(folder), "the folder to pack")
    first = _decode(files[0])
    images = np.empty((len(files), *first.shape), np.uint8)
    for row, file in zip(images, files, strict=True):
        image = _decode(file)
        if image.shape != first.shape:
            raise UserError(
                f"{file} has {image.shape[1]}×{image.shape[0]} pixels and {files[0]} has "
                f"{first.shape[1]}×{first.shape[0]}: only images of one size can be packed; use "
                "config.data.name 'folder' for others."
            )
        row[...] = image
    with asked_for(out) as temporary, temporary.open("wb") as handle:
        np.savez(
            handle,
            images=images,
            labels=np.array(labels or [], np.int32),
            class_names=np.array(class_names, str),
        )
    return len(files)


def packed_sources(config: ConfigDict) -> tuple[ArraySource, ArraySource | None]:
    """The packed files `config.data.dir` and `config.data.test_dir`.

    Args:
      config: of the run.

    Returns:
      The training source and the held-out one, None where `config.data.test_dir` is empty.

    Raises:
      UserError: a file that is missing or not one of `pack`, or classes that differ.
    """
    train = _load(config.data.dir, "config.data.dir")
    if not config.data.test_dir:
        return train, None
    test = _load(config.data.test_dir, "config.data.test_dir")
    # Images without labels may be measured on others that have them.
    if train.num_classes and train.class_names != test.class_names:
        raise UserError(
            f"config.data.dir ({config.data.dir}) and config.data.test_dir "
            f"({config.data.test_dir}) have other classes: pack two splits of one data set."
        )
    return train, test


def _load(path: str, key: str) -> ArraySource:
    if not path:
        raise UserError(
            f"{key} is empty: give the file that `ssl-jax data pack FOLDER FILE.npz` has made."
        )
    try:
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as arrays:
            if set(arrays.files) != _KEYS:
                raise ValueError("other arrays")
            images, labels, names = (arrays[k] for k in ("images", "labels", "class_names"))
    except FileNotFoundError as error:
        raise UserError(
            f"{key} is {path}, where there is no file: `ssl-jax data pack FOLDER {path}` makes it."
        ) from error
    except Exception as error:  # a corrupt file fails in many ways
        raise UserError(
            f"{key} is {path}, which is no packed file, or a corrupt one: "
            "`ssl-jax data pack FOLDER FILE.npz` makes one of a folder of images."
        ) from error
    return ArraySource(images, labels if len(labels) else None, [str(name) for name in names])


def _decode(file: str) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise what they like
        raise UserError(f"{file} can't be decoded: remove or replace it.") from error
