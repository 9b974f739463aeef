"""Atomic file writing, and one error message for all files that cannot be written."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from ssl_jax.errors import UserError, first_line

_KNOWN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
# Ends of the message.
RESUME = "then rerun the same command to resume"
RERUN = "then rerun the same command"
ANOTHER = "or choose another path"


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Writes a file atomically: a reader, or a kill, finds the old file or the new one.

    Args:
      file: to replace or create.

    Yields:
      A temporary path in the same folder with the same suffix, hidden by a leading dot. It is
      renamed to `file` when the block ends, and removed if the block raises.
    """
    # The process id keeps two processes that write the same file apart.
    temporary = file.with_name(f".{file.stem}.{os.getpid()}{file.suffix}")
    try:
        yield temporary
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


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
    return UserError(
        f"Cannot write {path} ({reason(error)}). Check free disk space and permissions, {fix}."
    )


@contextlib.contextmanager
def asked_for(file: Path) -> Iterator[Path]:
    """`replacing` for a file that the user has named.

    Raises:
      UserError: the file cannot be written.
    """
    with writing(file, ANOTHER), replacing(file) as temporary:
        yield temporary


def reason(error: Exception) -> str:
    """The cause of an I/O error, short: libraries put long paths in front of it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    known = (os.strerror(code) for code in _KNOWN)
    return next((text for text in known if text in str(error)), first_line(error)[:300])
