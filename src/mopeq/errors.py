"""Errors for the person at the keyboard: one line, one hint, no traceback.

`BadInput` is what the user can mend (exit status 2); `MopeqError` is the rest (exit status 1).
Broken promises of our own stay assertions.
"""

from __future__ import annotations


class MopeqError(Exception):
    """A failure told in one line, with one hint. Exit status 1."""

    exit_code = 1

    def __init__(self, line: str, hint: str = ""):
        super().__init__(line)
        self.line = line
        self.hint = hint


class BadInput(MopeqError):
    """What was asked for cannot be done as asked. Exit status 2."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """The first line that says something of another library's error, with the next where it only announces one, or the
    error's type where none does."""
    first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {more[0]}" if more and first.endswith(":") else first
