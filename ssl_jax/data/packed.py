"""Small images packed into one file of pixels, held on the devices; needs no TensorFlow."""

import sys
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from ssl_jax.data.arrays import ArraySource
from ssl_jax.data.decode import ChannelsError, decode
from ssl_jax.data.image_list import FLAGS, Columns, list_or_folder
from ssl_jax.data.listing import IMAGES_IN_WORDS, read_image, require_packed
from ssl_jax.data.values import MAX_CHANNELS
from ssl_jax.errors import UserError, counted
from ssl_jax.files import local_path, open_regular, reading, writing_output
from ssl_jax.memory import require_host_memory

_KEYS = {"images", "labels", "class_names"}
_RECORDS = "Convert the images with `ssl-jax data convert`, or set config.data.name to 'folder'."


def pack(images: str | Path, out: str | Path, channels: int = 3, columns: Columns = FLAGS) -> int:
    """Packs images into one file for `config.data.name = "packed"`.

    Args:
      images: a folder, one subfolder per class or flat, or a list, see `read_list`; all images have
        the same size, such as CIFAR's.
      out: the file to write, an uncompressed `.npz` with "images" uint8 [N, H, W, C], or uint16 if
        the first image has more than 8 bits, "labels" int32 [N] (-1 for an image without a label;
        empty without classes) or `Targets.values`, int8 [N, classes], and "class_names".
      channels: C, `config.data.channels` of the runs.
      columns: how a list is read.

    Returns:
      The number of images, N.

    Raises:
      UserError: as `list_or_folder`, an image can't be decoded or differs in size, channels or
        bits, the images can't fit in memory, or the file can't be written. No file is left behind.
    """
    out = local_path(out)
    if out.suffix != ".npz":
        raise UserError(f"The output file is {out}. Give it a name that ends in .npz.")
    found = list_or_folder(str(images), "the folder or list to pack", columns)
    files = found.files
    if not 1 <= channels <= MAX_CHANNELS:
        raise UserError(f"--channels is {channels}. Set it to 1 to {MAX_CHANNELS}.")
    first = _decode(files[0], channels)
    what = f"{counted(len(files), 'image')} like {files[0]}"
    require_host_memory(len(files) * first.nbytes, what, _RECORDS)
    pixels = np.empty((len(files), *first.shape), first.dtype)
    for row, file in zip(pixels, files, strict=True):
        image = _decode(file, channels)
        if image.dtype != first.dtype:
            raise UserError(
                f"{file} has values of {image.dtype} and {files[0]} of {first.dtype}, but packed "
                "images must have the same depth. Convert them, or set config.data.name to "
                "'folder'."
            )
        if image.shape != first.shape:
            raise UserError(
                f"{file} has {image.shape[0]}×{image.shape[1]} pixels and {files[0]} has "
                f"{first.shape[0]}×{first.shape[1]}, but packed images must have the same size. "
                "Resize them, or set config.data.name to 'folder'."
            )
        row[...] = image
    labels = found.label_array if found.label_names else np.zeros(0, np.int32)
    names = np.array(found.label_names, str)
    with writing_output(out) as temporary, temporary.open("wb") as handle:
        np.savez(handle, images=pixels, labels=labels, class_names=names)
    return len(files)


def packed_source(config: ConfigDict, key: str) -> ArraySource:
    """Loads a packed file.

    Args:
      config: the run's config.
      key: the key of `config.data` that names the file, "dir" or "test_dir".

    Raises:
      UserError: the file is missing or corrupt, its arrays aren't those that `pack` writes, or they
        can't fit in memory.
    """
    path, key = config.data[key], f"config.data.{key}"
    file = require_packed(path, key)
    with reading(file):
        opened = open_regular(file, sys.maxsize)
    try:
        with opened as handle, np.load(handle, allow_pickle=False) as arrays:
            if set(arrays.files) != _KEYS:
                raise ValueError("unexpected arrays")
            size = sum(part.file_size for part in arrays.zip.infolist())
            require_host_memory(size, f"The arrays of {path}", _RECORDS)
            images, labels, names = (arrays[k] for k in ("images", "labels", "class_names"))
    except UserError:
        raise
    except Exception as error:  # a corrupt file fails in many ways
        raise UserError(
            f"{key} is {path}, which is corrupt or not a packed file. Write it with `ssl-jax data "
            f"pack FOLDER {path}`."
        ) from error
    where = f"{key} ({path})"
    # [0] means no labels; [n, 0] is refused as labels of no class.
    given = labels if labels.size or labels.ndim != 1 else None
    return ArraySource(images, given, names, where=where, labels_from=Path(path).name)


def _decode(file: str, channels: int) -> np.ndarray:
    with reading(file):
        contents = read_image(file)
    try:
        return decode(contents, channels, bits=16)
    except ChannelsError as error:
        raise UserError(
            f"{file} has {counted(error.found, 'channel')}, not the {channels} of "
            "--channels. Set it to that of your images, or convert this one."
        ) from error
    except ValueError as error:
        raise UserError(
            f"Cannot decode {file} as an image ({IMAGES_IN_WORDS}). Remove or replace it."
        ) from error
