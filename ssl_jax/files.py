"""Writing a file so that a reader, or a kill, finds the old one or the new one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ssl_jax.errors import UserError


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name to write to; what is written takes the place of a file when the block has ended.

    Args:
      file: to be replaced as a whole, or made.

    Yields:
      A path beside it, of the same suffix, hidden by a leading dot; after an error inside there is
      nothing at it.
    """
    # Two processes may write the same file, each its own first.
    temporary = file.with_name(f".{file.stem}.{os.getpid()}{file.suffix}")
    try:
        yield temporary
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def asked_for(file: Path) -> Iterator[Path]:
    """`replacing` a file that the user has named.

    Raises:
      UserError: it can't be written.
    """
    try:
        with replacing(file) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"{file} can't be written ({error.strerror}): choose another.") from error
