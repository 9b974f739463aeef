"""Lists the image files and classes of a folder."""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from ssl_jax.config import close_path
from ssl_jax.errors import UserError
from ssl_jax.files import local_path, open_regular, reading, reason

_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif")
_SUFFIXES_IN_WORDS = ", ".join(_SUFFIXES[:-1]) + f" or {_SUFFIXES[-1]}"
IMAGES_IN_WORDS = "JPEG, PNG, TIFF, WebP, BMP or GIF, of at most 16 bits"
_SHOWN = 5  # suffixes of skipped files
_log = logging.getLogger("ssl_jax.data")


def list_images(folder: str, key: str) -> tuple[list[str], list[int] | None, tuple[str, ...]]:
    """Lists the images of a folder: one subfolder per class, or flat without labels.

    Args:
      folder: the folder to search; hidden entries are skipped.
      key: name of the setting that gave the folder, for messages.

    Returns:
      File paths, sorted by class and path; their labels, None for a flat folder; class names.

    Raises:
      UserError: the folder is missing, it or a subfolder has no images or can't be read, it has
        both images and class folders, or a symbolic link has no target or leads in a circle.
    """
    root = _require_folder(folder, key)
    with reading(root, f"Make it readable, or set {key} to a folder that has only images in it"):
        flat, folders = _scan(root)
        above = {_identity(root): root}
        by_class = {name: _walk(root / name, above) for name in folders}
    if not flat and not any(by_class.values()):
        raise UserError(
            f"{key} is {folder}, which contains no images. Add {_SUFFIXES_IN_WORDS} files."
        )
    if flat and not any(by_class.values()):
        return [str(root / name) for name in flat], None, ()
    if flat:
        raise UserError(
            f"{key} is {folder}, which contains both images ({some(flat)}) and folders of images "
            f"({some(folders)}). Move the images into class folders."
        )
    empty = [name for name, files in by_class.items() if not files]
    if empty:
        raise UserError(
            f"{key} is {folder}, where {some(empty)} contains no images ({_SUFFIXES_IN_WORDS}). "
            "Remove folders that are not classes."
        )
    files = [file for name in folders for file in by_class[name]]
    labels = [label for label, name in enumerate(folders) for _ in by_class[name]]
    return files, labels, tuple(folders)


def read_image(file: str | Path) -> bytes:
    """Reads an image file; a pipe or a device, which may never end, is refused.

    Raises:
      OSError: it is no regular file, or can't be read.
    """
    with open_regular(file, sys.maxsize) as opened:
        return opened.read()


def utf8(name: str) -> str:
    """Escapes the bytes of a name that are not UTF-8, so that it can be written and printed."""
    return name.encode("utf-8", "backslashreplace").decode()


def require_data(config: ConfigDict) -> None:
    """Checks the paths of a config's data, without the imports that reading the data takes.

    Raises:
      UserError: a path is missing, of the wrong kind, or empty where it is needed.
    """
    for key in ("dir", "test_dir"):
        path, name = config.data[key], f"config.data.{key}"
        if key == "dir" or path:
            if config.data.name == "folder":
                _require_folder(path, name)
            elif config.data.name == "packed":
                require_packed(path, name)
            elif config.data.name == "paths":
                require_list(path, name)


def _require_folder(folder: str, key: str) -> Path:
    root = named_path(folder, key, f"Set it to a folder of images with --{key}=FOLDER.")
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "doesn't exist"
        raise UserError(
            f"{key} is {folder}, which {problem}. Set it to a folder of images.{close_path(root)}"
        )
    return root


def named_path(path: str, key: str, fix: str) -> Path:
    """The local path that a setting names; `fix` is the advice if it names none."""
    if not path:
        raise UserError(f"{key} is empty. {fix}")
    return local_path(path, key)


def require_packed(path: str, key: str) -> Path:
    """The path of a packed file.

    Args:
      path: of the file.
      key: name of the setting that gave the path, for messages.

    Raises:
      UserError: there is no such file.
    """
    file = named_path(path, key, "Set it to a file written by `ssl-jax data pack FOLDER FILE.npz`.")
    if not file.exists():
        raise UserError(
            f"{key} is {path}, which doesn't exist. "
            f"Write it with `ssl-jax data pack FOLDER {path}`.{close_path(file)}"
        )
    return file


def require_list(path: str, key: str) -> Path:
    """The path of a list of images.

    Args:
      path: of the list.
      key: name of the setting that gave the path, for messages.

    Raises:
      UserError: there is no such file.
    """
    fix = "Set it to a list of images, a path per line."
    file = named_path(path, key, fix)
    if not file.is_file():
        raise UserError(f"{key} is {path}, which is not a file. {fix}{close_path(file)}")
    return file


def _scan(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the images and folders directly in a folder, without hidden ones."""
    with os.scandir(folder) as entries:
        seen = [(entry.name, _is_folder(entry)) for entry in entries if entry.name[0] != "."]
    files = sorted(name for name, is_dir in seen if not is_dir)
    images = [name for name in files if name.lower().endswith(_SUFFIXES)]
    if len(images) < len(files):
        others = [name for name in files if not name.lower().endswith(_SUFFIXES)]
        suffixes = sorted({Path(name).suffix.lower() or "no suffix" for name in others})
        found = ", ".join(suffixes[:_SHOWN] + ["…"] * (len(suffixes) > _SHOWN))
        message = "%s: skipped %s (%s), not %s."
        _log.warning(message, folder, some(others), found, _SUFFIXES_IN_WORDS)
    return images, sorted(name for name, is_dir in seen if is_dir)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a symbolic link to one."""
    if entry.is_symlink():
        try:
            entry.stat()  # the entry keeps the result
        except OSError as error:
            raise UserError(
                f"{entry.path} is a symbolic link to {os.readlink(entry.path)}, which can't be "
                f"reached ({reason(error)}). Restore the target, or remove the link."
            ) from error
    return entry.is_dir()


def _walk(folder: Path, above: Mapping[tuple[int, int], Path]) -> list[str]:
    """Sorted paths of the images in a folder and its subfolders.

    Args:
      folder: to search.
      above: the folders that lead to it, by `_identity`.
    """
    identity = _identity(folder)
    if identity in above:
        raise UserError(
            f"{folder} is a symbolic link back to {above[identity]}, which contains it. "
            "Remove the link."
        )
    images, folders = _scan(folder)
    above = {**above, identity: folder}
    below = [file for name in folders for file in _walk(folder / name, above)]
    return sorted([str(folder / name) for name in images] + below)


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def some(names: Sequence[str]) -> str:
    """The first name, and the number of further ones."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
