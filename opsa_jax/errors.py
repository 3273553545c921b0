"""The one error type for anything a user can mend, and the did-you-mean that goes with it."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, what is allowed, what to do. Entry points print it and exit with 2."""

    exit_code = 2


class PeerError(UserError):
    """Another process of the run did not join, ended, or cannot be reached. Entry points print the line and exit with 69."""

    exit_code = 69  # EX_UNAVAILABLE of sysexits.h


class Preempted(Exception):
    """The machine is about to be taken away, and everything needed to go on is saved. Entry points print the line and exit with 75."""

    exit_code = 75  # EX_TEMPFAIL: the same command may succeed later


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the option nearest to `name`, or the list of options when none is near.

    >>> did_you_mean("revers", ["forward", "reverse"])
    "; did you mean 'reverse'?"
    """
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed: {', '.join(options)}"
