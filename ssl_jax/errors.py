"""The one exception whose message is meant for the person at the terminal."""

from collections.abc import Iterable


class UserError(Exception):
    """Bad input, told in one sentence that names the key, file or value and what to do.

    The command line prints the sentence without a stack trace and exits with code 2.

    Attributes:
      on_all_processes: whether all processes of the run have raised it.
      printed_here: whether this process prints it; of several that have agreed on it, one does.
    """

    on_all_processes = False
    printed_here = True

    def __init__(self, sentence: object = "") -> None:
        """Keeps it on one line, whatever the input holds that is quoted in it."""
        told = str(sentence)
        super().__init__(
            "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in told)
        )


def check_choice(key: str, value: object, choices: Iterable[object]) -> None:
    """Raises a `UserError` that lists the choices if a key's value is not one of them."""
    choices = tuple(choices)
    if value not in choices:
        raise UserError(f"{key} is {value!r}: use one of {', '.join(map(str, choices))}.")


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
