"""The one exception whose message is meant for the user at the terminal."""

import contextlib
import difflib
import unicodedata
from collections.abc import Iterable, Iterator

_LONGEST = 1000  # characters of a message; the fix is at its end
_JOINERS = "\u200c\u200d"


class UserError(Exception):
    """Bad input: the message names the key, file or value at fault, then the fix.

    The command line prints the message without a stack trace and exits with code 2.

    Attributes:
      on_all_processes: whether every process of the run raises this error, so that each may exit
        without waiting for the rest.
      printed_here: whether this process prints the message; of an error on all processes only the
        primary prints.
    """

    on_all_processes = False
    printed_here = True

    def __init__(self, message: object = "") -> None:
        """Escapes and shortens: quoted input can't break or flood the line."""
        text = printable(str(message))
        super().__init__(text if len(text) < _LONGEST else f"{text[:600]} … {text[-300:]}")


def printable(text: str) -> str:
    """Escapes line breaks, terminal codes and other characters that can't be printed.

    Spaces of other scripts, and the joiners of Persian, Hindi and emoji, are parts of names.
    """
    return "".join(c if _is_printable(c) else c.encode("unicode_escape").decode() for c in text)


def _is_printable(character: str) -> bool:
    # For Python no space but the ASCII one is printable.
    joins_or_space = character in _JOINERS or unicodedata.category(character) == "Zs"
    return character.isprintable() or joins_or_space


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint " Did you mean 'x'?" for the closest known word, or " Use one of: ..."."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else f" Use one of: {', '.join(known)}."


def install_extra(name: str) -> str:
    """The fix where packages of an optional extra are missing, without a period."""
    return f"Install the extra '{name}': pip install -c constraints.txt -e '.[{name}]' in a clone"


def require_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Refuses a value that is not one of the choices.

    Args:
      name: of the option, for the message, such as "config.optim.name".
      value: to check.
      choices: the allowed values.

    Raises:
      UserError: naming the option, the value, and the closest choice or all of them.
    """
    choices = list(choices)
    if value not in choices:
        # A number close to another as text is no better guess than the rest.
        word = value if isinstance(value, str) else ""
        raise UserError(f"{name} is {value!r}.{did_you_mean(word, map(str, choices))}")


@contextlib.contextmanager
def importing(package: str, extra: str, use: str = "") -> Iterator[None]:
    """Turns a failed import of an optional package into a UserError.

    Args:
      package: its name.
      extra: that installs it.
      use: what it is needed for, after "which"; "" if the reader knows.
    """
    try:
        yield
    except ImportError as error:
        what = f", which {use}" if use else ""
        raise UserError(
            f"Cannot import {package} ({first_line(error)}){what}. {install_extra(extra)}."
        ) from error


def counted(count: int, noun: str) -> str:
    """Formats a count with its noun: 1 label, 5 labels."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
