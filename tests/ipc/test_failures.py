"""Text about exceptions: what is in it, and how long it may become."""

from __future__ import annotations

import errno
import os
import resource

import pytest

from keisei.ipc import failures
from keisei.protocol import messages


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


def test_a_summary_is_the_class_and_the_message() -> None:
    """What a log line needs is one line of the exception's own words."""
    assert failures.summary(ValueError("wrong")) == "ValueError: wrong"
    assert "Unprintable" in failures.summary(Unprintable())


def test_a_trace_has_the_causes() -> None:
    """The traceback names what the exception came from."""
    error = KeyError("second")
    error.__cause__ = ValueError("first")
    trace = failures.trace(error)
    assert trace.index("ValueError: first") < trace.index("KeyError: 'second'")


@pytest.mark.parametrize("surplus", [-1, 0, 1, 1 << 20])
def test_the_middle_of_a_long_text_is_left_out(surplus: int) -> None:
    """Both ends stay whole, what is between is counted, and what fits is not touched."""
    text = "a" * (failures.LONGEST + surplus - 1) + "z"
    short = failures.shortened(text)
    if surplus <= 0:
        assert short == text
        return
    assert short.startswith("a" * (failures.LONGEST // 2))
    assert short.endswith("az")
    assert f"({surplus:,} characters left out)" in short


def test_last_words_are_heard_at_once() -> None:
    """The longest failure of the widest characters is a small frame, unpacked where it arrives."""
    error = ValueError("\N{MUSICAL SYMBOL G CLEF}" * (1 << 20))
    failed = messages.Failed(
        "collect", failures.summary(error), failures.trace(error), during_start=True
    )
    frame = messages.pack(failed)
    assert len(frame) < 1 << 19
    assert not messages.is_heavy(messages.unpack(frame, messages.REPLY))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EMFILE, ["each worker takes about 12 file descriptors", "ulimit -n 65536", "1,234"]),
        (errno.ENFILE, ["fs.file-max", "about 12"]),
        (errno.EAGAIN, ["ulimit -u", "pids.max"]),
        (errno.ENOMEM, ["memory limit"]),
        (errno.ENOSPC, ["no memory left, or no room for temporary files"]),
    ],
)
def test_what_ran_out_is_told_with_what_helps(monkeypatch, number, words):
    """The limit that was met is named, with its value and the command that raises it."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1234, 1234))
    told = failures.remedy(OSError(number, os.strerror(number)))
    assert [word for word in words if word not in told] == []


def test_other_errors_have_no_remedy():
    """Only what a limit explains is explained."""
    assert failures.remedy(OSError(errno.EPERM, "x")) == failures.remedy(ValueError("x")) == ""
