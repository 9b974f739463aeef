"""Which image files a folder holds, and of which classes."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from ssl_jax.errors import UserError

_SUFFIXES = (".jpg", ".jpeg", ".png")
_log = logging.getLogger("ssl_jax.data")


def list_images(folder: str, key: str) -> tuple[list[str], list[int] | None, tuple[str, ...]]:
    """The images of a folder, by class in its sub-folders or without labels in itself.

    Args:
      folder: to look in; hidden entries are passed over.
      key: of the config or the command line, for messages.

    Returns:
      Paths of the files, sorted by class and path, their labels (None where there are no classes)
      and the names of the classes.

    Raises:
      UserError: no such folder, no images in it or in one of its sub-folders, or images beside
        class folders.
    """
    if not folder:
        raise UserError(f"{key} is empty: give the folder of the images by --{key}=FOLDER.")
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"{key} is {folder}, which is not a folder: give one with images in it.")
    flat, folders = _scan(root)
    by_class = {name: _walk(root / name) for name in folders}
    if not flat and not any(by_class.values()):
        raise UserError(f"{key} is {folder}, which has no images: put .jpg, .jpeg or .png there.")
    if flat and not any(by_class.values()):
        return [str(root / name) for name in flat], None, ()
    if flat:
        raise UserError(
            f"{key} is {folder}, which has both images ({some(flat)}) and folders of images "
            f"({some(folders)}): move the images into class folders."
        )
    empty = [name for name, files in by_class.items() if not files]
    if empty:
        raise UserError(
            f"{key} is {folder}, where {some(empty)} has no .jpg, .jpeg or .png images: "
            "remove what is not a class folder."
        )
    files = [file for name in folders for file in by_class[name]]
    labels = [label for label, name in enumerate(folders) for _ in by_class[name]]
    return files, labels, tuple(folders)


def _scan(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the images and of the folders right in a folder, sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        seen = [(entry.name, entry.is_dir()) for entry in entries if entry.name[0] != "."]
    files = sorted(name for name, is_dir in seen if not is_dir)
    images = [name for name in files if name.lower().endswith(_SUFFIXES)]
    if len(images) < len(files):
        others = [name for name in files if not name.lower().endswith(_SUFFIXES)]
        _log.warning("%s: left out %s, not .jpg, .jpeg or .png.", folder, some(others))
    return images, sorted(name for name, is_dir in seen if is_dir)


def _walk(folder: Path) -> list[str]:
    """Paths of the images in a folder and below, sorted."""
    images, folders = _scan(folder)
    below = [file for name in folders for file in _walk(folder / name)]
    return sorted([str(folder / name) for name in images] + below)


def some(names: Sequence[str]) -> str:
    """The first of some names and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
