"""The one exception whose message is meant for the person at the terminal."""

import difflib
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


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint " Did you mean 'x'?" for the closest known word, or " Use one of: ..."."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else f" Use one of: {', '.join(known)}."


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
        hint = did_you_mean(str(value), map(str, choices))
        raise UserError(f"{name} is {value!r}.{hint}")
