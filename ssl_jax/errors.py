"""The one exception whose message is meant for the person at the terminal."""


class UserError(Exception):
    """Bad input, told in one sentence that names the key, file or value and what to do.

    The command line prints the sentence without a stack trace and exits with code 2.

    Attributes:
      told_here: whether this process prints it; of several that share the error, one does.
    """

    told_here = True
