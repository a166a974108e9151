"""What a process tells of an exception: text of bounded length, whatever the exception says."""

from __future__ import annotations

import traceback

LONGEST = 1 << 15
"""Characters of one text. Everything that is told of a failure is small enough to be heard at once,
so that a worker's last words are known when its end is."""


def summary(error: BaseException) -> str:
    """Return the class and the message of ``error``, also of one whose ``__str__`` raises."""
    return shortened("".join(traceback.format_exception_only(error)).strip())


def trace(error: BaseException) -> str:
    """Return the traceback of ``error`` with those of its causes."""
    return shortened("".join(traceback.format_exception(error)))


def shortened(text: str) -> str:
    """Leave out the middle of a text that is longer than ``LONGEST``; both ends say more."""
    left_out = len(text) - LONGEST
    if left_out <= 0:
        return text
    half = LONGEST // 2
    return f"{text[:half]}\n… ({left_out:,} characters left out) …\n{text[-half:]}"
