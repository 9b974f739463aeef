"""The only writer of files: atomic, durable, never through a link; and the messages of I/O errors.

A workdir may come from someone else and hold links in place of files. None is followed: files are
replaced under an unpredictable temporary name, and appended to only if they are regular files. Only
regular files up to a limit are read: a device has no end, and a pipe may never have a beginning.
"""

import contextlib
import errno
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ssl_jax.errors import UserError, first_line

# The file may be intact, but the file system doesn't give it.
_UNREACHABLE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.ENOTCONN)
_KNOWN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, *_UNREACHABLE)
# Ends of the message.
RESUME = "then rerun the same command to resume"
RERUN = "then rerun the same command"
ANOTHER = "or choose another path"
CHECK_PATH = "Check the path and its permissions"
MAX_JSON = 2**26  # bytes of a JSON file that this library has written
# `Path` makes one slash of two. A folder such as run1:/x is none.
_URL = re.compile(r"[a-zA-Z][\w+.-]*://|(gs|s3|hdfs|https?|file):/")


class InTheWayError(OSError):
    """A link, a folder or another kind of file is where the library writes a file or folder."""


def local_path(path: str | Path, key: str = "") -> Path:
    """Expands `~` in a path where it enters, and checks that `exists` and the like won't raise.

    Args:
      path: to expand.
      key: name of the setting that gave the path, for messages.

    Raises:
      UserError: a URL, which Python would take for a folder of that name; or a path that the system
        refuses, even for a new file: too long, a link to itself, in a locked folder.
    """
    if _URL.match(str(path)):
        subject = f"{key} is {path}," if key else f"{path} is"
        raise UserError(
            f"{subject} a URL, not a path. Mount the bucket as a folder (gcsfuse, mountpoint-s3), "
            "and pass that."
        )
    try:
        path = Path(path).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    # RuntimeError: no such user, as in ~nobody/x; ValueError: a null byte
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"Cannot use the path {path} ({reason(error)}). {CHECK_PATH}.") from error
    return path


@contextlib.contextmanager
def reading(path: str | Path, fix: str = CHECK_PATH, *more: type[Exception]) -> Iterator[None]:
    """Turns an `OSError`, or one of `more`, in the block into `cannot_read`'s `UserError`."""
    errors: tuple[type[Exception], ...] = (OSError, *more)
    try:
        yield
    except errors as error:
        raise cannot_read(path, error, fix) from error


def cannot_read(path: str | Path, error: Exception, fix: str = CHECK_PATH) -> UserError:
    """The error of a file or folder that can't be read, or of one in it; `fix` ends its message."""
    inside = error.filename if isinstance(error, OSError) else None
    shown = inside if isinstance(inside, str) else path
    shown = "''" if str(shown) == "" else shown
    return UserError(f"Cannot read {shown} ({reason(error)}). {fix}.")


def open_regular(path: str | Path, limit: int) -> IO[bytes]:
    """Opens a regular file, or a link to one, for reading.

    Raises:
      OSError: it is something else, such as a pipe or a device, or larger than `limit` bytes.
    """
    # Without O_NONBLOCK, opening a pipe would wait for its other end.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    found = os.fstat(descriptor)
    code, why = 0, ""
    if stat.S_ISDIR(found.st_mode):
        code, why = errno.EISDIR, os.strerror(errno.EISDIR)
    elif not stat.S_ISREG(found.st_mode):
        code, why = errno.EINVAL, "not a regular file"
    elif found.st_size > limit:
        code, why = errno.EFBIG, f"larger than {limit:,} bytes"
    if code:
        os.close(descriptor)
        raise OSError(code, why, str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: str | Path, limit: int = MAX_JSON) -> bytes:
    """Reads what `open_regular` opens."""
    with open_regular(path, limit) as file:
        return file.read(limit)


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Writes a file atomically: a reader, a kill or a power cut leaves the old file or the new one.

    Args:
      file: to replace or create; a link is replaced, not followed.

    Yields:
      A new temporary file in the same folder with the same suffix, hidden by a leading dot. It is
      renamed to `file` when the block ends, and removed if the block raises.
    """
    descriptor, name = tempfile.mkstemp(file.suffix, f".{file.stem}.", file.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        os.replace(temporary, file)
        _sync(file.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def appending(file: Path) -> IO[str]:
    """Opens a text file for reading and appending, creating it if necessary.

    Raises:
      InTheWayError: the file is a link, has other names (hard links), or is not a regular file.
      OSError: it can't be written.
    """
    # Without O_NONBLOCK, opening a pipe would wait for its other end.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(file, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            why = "it is a link" if error.errno == errno.ELOOP else "it is a folder"
            raise InTheWayError(error.errno, why, str(file)) from error
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        why = "it has other names, hard links" if found.st_nlink > 1 else "not a regular file"
        raise InTheWayError(errno.EINVAL, why, str(file))
    return os.fdopen(descriptor, "a+")


def subfolder(workdir: Path, name: str) -> Path:
    """Creates a folder in a workdir, if necessary, and returns its path.

    Raises:
      InTheWayError: it is a link, or not a folder.
      OSError: it can't be created.
    """
    folder = workdir / name
    with contextlib.suppress(FileExistsError):
        folder.mkdir(parents=True)
    _require_folder(folder)
    return folder


def own_folder(root: Path, *names: str) -> Path:
    """The path `root/name/…`, checked where it exists; nothing is created.

    Args:
      root: named by the user, so it may be a link.
      *names: of the folders below, which a library writes and which the sender of `root` may have
        replaced.

    Raises:
      UserError: one of them is a link or a file.
    """
    folder = root
    for name in names:
        folder = folder / name
        if folder.is_symlink():
            raise UserError(
                f"{folder} is a link, through which a run doesn't write. If the folder that it "
                "points to is this run's, move that folder here; otherwise remove the link."
            )
        if folder.exists() and not folder.is_dir():
            raise UserError(
                f"{folder} is a file, where a run writes a folder. Move it away, {RERUN}."
            )
    return folder


def private_folder(folder: Path) -> Path:
    """Creates a folder that only this user may enter, if necessary, and returns its path.

    Raises:
      OSError: it is a link or not a folder, or others own it or may write to it.
    """
    with contextlib.suppress(FileExistsError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(0o700)
    found = _require_folder(folder)
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OSError(errno.EPERM, "others own it or can write to it", str(folder))
    folder.chmod(0o700)
    return folder


def _require_folder(folder: Path) -> os.stat_result:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise InTheWayError(errno.ENOTDIR, "a link or a file in place of a folder", str(folder))
    return found


@contextlib.contextmanager
def writing(path: str | Path, fix: str = RESUME, *more: type[Exception]) -> Iterator[None]:
    """Turns an `OSError`, or one of `more`, in the block into `cannot_write`'s `UserError`."""
    errors: tuple[type[Exception], ...] = (OSError, *more)
    try:
        yield
    except errors as error:
        raise cannot_write(path, error, fix) from error


def cannot_write(path: str | Path, error: Exception, fix: str = RESUME) -> UserError:
    """The error of a file or folder that cannot be written; `fix` ends its message."""
    if isinstance(error, InTheWayError):
        return UserError(f"Cannot write {error.filename} ({reason(error)}). Move it away, {fix}.")
    return UserError(
        f"Cannot write {path} ({reason(error)}). Check free disk space and permissions, {fix}."
    )


@contextlib.contextmanager
def writing_output(file: Path) -> Iterator[Path]:
    """`replacing` for a file that the user has named.

    Raises:
      UserError: the file cannot be written.
    """
    with writing(file, ANOTHER), replacing(file) as temporary:
        yield temporary


def require_writable(folder: Path) -> None:
    """Checks that files can be created in a folder, before their content is computed.

    Raises:
      OSError: they cannot.
    """
    descriptor, name = tempfile.mkstemp(prefix=".", dir=folder)
    os.close(descriptor)
    os.unlink(name)


def reason(error: Exception) -> str:
    """The cause of an I/O error, short: libraries put long paths in front of it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    known = (os.strerror(code) for code in _KNOWN)
    return next((t for t in known if t in str(error)), first_line(error)[:300].rstrip("."))


def unreachable(error: Exception) -> bool:
    """Whether an error, of Python or of a library, is of reaching a file, not of its content."""
    return any(
        getattr(error, "errno", None) == code or os.strerror(code) in str(error)
        for code in _UNREACHABLE
    )


def _sync(path: Path) -> None:
    """Flushes a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems can't
            raise
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
