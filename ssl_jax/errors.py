"""The one exception whose message is meant for the person at the terminal."""


class UserError(Exception):
    """Bad input, told in one sentence that names the key, file or value and what to do.

    The command line prints the sentence without a stack trace and exits with code 2.

    Attributes:
      agreed: whether all processes of the run have raised it.
      told_here: whether this process prints it; of several that have agreed on it, one does.
    """

    agreed = False
    told_here = True
