"""The one exception a user's mistake raises."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: one line that says what was found, where, and what is accepted.

    The command line prints it without a traceback and ends with exit status 2.
    """
