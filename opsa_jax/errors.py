"""The one error type for anything a user can mend, and the did-you-mean that goes with it."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, what is allowed, what to do. Entry points print it and exit with 2."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the option nearest to `name`, or the list of options when none is near.

    >>> did_you_mean("revers", ["forward", "reverse"])
    "; did you mean 'reverse'?"
    """
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed: {', '.join(options)}"
