"""Why a process ended, from everything that is known about it."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from keisei.events import ExitCause
from keisei.protocol.last_words import LastWords
from keisei.supervision.exits import Verdict, classify

GOODBYE = LastWords(said_goodbye=True)
FAILED = LastWords(failure="ValueError: no", traceback="Traceback …", phase="collect")
HUNG = (ExitCause.HANG, "no progress in collect for 10.0 s")
REQUESTED = (ExitCause.REQUESTED, "")
REPLACED = (ExitCause.RECYCLED, "a restart was requested")
PROTOCOL = (ExitCause.PROTOCOL, "a frame makes no sense")
ABANDONED = (ExitCause.ABANDONED, "process 5 is in state 'D'")
LOST = (
    "its exit code is unknown: another part of the application has reaped it, or the fork server "
    "that could tell is gone"
)


def verdict(cause: ExitCause, detail: str = "", *flags: str) -> Verdict:
    return Verdict(cause, detail, raised="raised" in flags, blames_weights="blames" in flags)


@pytest.mark.parametrize(
    ("words", "facts", "expected"),
    [
        # orderly
        (GOODBYE, {"exitcode": 0}, verdict(ExitCause.GOODBYE)),
        (GOODBYE, {"exitcode": None}, verdict(ExitCause.GOODBYE)),
        (GOODBYE, {"exitcode": 0, "ended_for": REQUESTED}, verdict(ExitCause.REQUESTED)),
        (
            LastWords(said_goodbye=True, recycle="it collected 5 experiences"),
            {"exitcode": 0},
            verdict(ExitCause.RECYCLED, "it collected 5 experiences"),
        ),
        # of its own, in Python
        (
            FAILED,
            {"exitcode": 1},
            verdict(ExitCause.USER_ERROR, "ValueError: no", "raised", "blames"),
        ),
        (
            FAILED,
            {"exitcode": 1, "was_ready": False},
            verdict(ExitCause.START_FAILED, "ValueError: no", "raised", "blames"),
        ),
        (
            FAILED,
            {"exitcode": None},
            verdict(ExitCause.USER_ERROR, "ValueError: no", "raised", "blames"),
        ),
        (
            FAILED,
            {"exitcode": -9, "ended_for": REQUESTED},
            verdict(ExitCause.USER_ERROR, "ValueError: no", "raised", "blames"),
        ),
        (
            LastWords(),
            {"exitcode": 0},
            verdict(ExitCause.EXIT, "it exited with code 0 without saying goodbye", "blames"),
        ),
        (
            LastWords(),
            {"exitcode": 3},
            verdict(ExitCause.EXIT, "it exited with code 3 without saying goodbye", "blames"),
        ),
        (
            LastWords(),
            {"exitcode": 0, "was_ready": False},
            verdict(
                ExitCause.START_FAILED, "it exited with code 0 without saying goodbye", "blames"
            ),
        ),
        (
            GOODBYE,
            {"exitcode": 1},
            verdict(ExitCause.EXIT, "it exited with code 1 after saying goodbye", "blames"),
        ),
        # by a signal
        (LastWords(), {"exitcode": -11}, verdict(ExitCause.SIGNAL, "SIGSEGV", "blames")),
        (LastWords(), {"exitcode": -6}, verdict(ExitCause.SIGNAL, "SIGABRT", "blames")),
        (LastWords(), {"exitcode": -15}, verdict(ExitCause.SIGNAL, "SIGTERM")),
        (
            LastWords(),
            {"exitcode": -11, "was_ready": False},
            verdict(ExitCause.SIGNAL, "SIGSEGV", "blames"),
        ),
        (
            LastWords(),
            {"exitcode": -9},
            verdict(ExitCause.SIGNAL, "SIGKILL that the pool did not send, possibly out of memory"),
        ),
        (
            LastWords(rss=300 * 2**20),
            {"exitcode": -9},
            verdict(
                ExitCause.SIGNAL,
                "SIGKILL that the pool did not send, possibly out of memory; its peak resident "
                "memory was 300 MiB",
            ),
        ),
        (GOODBYE, {"exitcode": -11}, verdict(ExitCause.SIGNAL, "SIGSEGV", "blames")),
        # by the pool
        (LastWords(), {"exitcode": -9, "ended_for": HUNG}, verdict(*HUNG, "blames")),
        (LastWords(), {"exitcode": -9, "ended_for": PROTOCOL}, verdict(*PROTOCOL)),
        (LastWords(), {"exitcode": None, "ended_for": ABANDONED}, verdict(*ABANDONED)),
        (LastWords(), {"exitcode": -15, "ended_for": REQUESTED}, verdict(*REQUESTED)),
        (LastWords(), {"exitcode": -9, "ended_for": REQUESTED}, verdict(*REQUESTED)),
        (LastWords(), {"exitcode": 143, "ended_for": REQUESTED}, verdict(*REQUESTED)),
        (LastWords(), {"exitcode": None, "ended_for": REQUESTED}, verdict(*REQUESTED)),
        (
            LastWords(),
            {"exitcode": -11, "ended_for": REQUESTED},
            verdict(ExitCause.SIGNAL, "SIGSEGV", "blames"),
        ),
        (LastWords(), {"exitcode": -9, "ended_for": REPLACED}, verdict(*REPLACED)),
        (GOODBYE, {"exitcode": 0, "ended_for": REPLACED}, verdict(*REPLACED)),
        (
            LastWords(),
            {"exitcode": -11, "ended_for": REPLACED},
            verdict(ExitCause.SIGNAL, "SIGSEGV", "blames"),
        ),
        (LastWords(), {"exitcode": -11, "ended_for": HUNG}, verdict(*HUNG, "blames")),
        # unknown
        (LastWords(), {"exitcode": None}, verdict(ExitCause.LOST, LOST)),
        # not started at all
        (
            LastWords(),
            {"exitcode": None, "launch_error": OSError(errno.EIO, os.strerror(errno.EIO))},
            verdict(
                ExitCause.START_FAILED,
                "the process could not be started (OSError: [Errno 5] Input/output error)",
            ),
        ),
        (
            LastWords(),
            {"exitcode": None, "launch_error": AssertionError("daemons have no children")},
            verdict(
                ExitCause.START_FAILED,
                "the process could not be started (AssertionError: daemons have no children)",
                "raised",
            ),
        ),
        (
            LastWords(),
            {"exitcode": None, "launch_error": OSError(), "ended_for": REQUESTED},
            verdict(ExitCause.REQUESTED),
        ),
    ],
)
def test_why_it_ended(words, facts, expected):
    """Each combination of what is known has one cause, and a detail for people."""
    assert classify(words, **{"was_ready": True, **facts}) == expected


@pytest.mark.parametrize("number", sorted(signal.valid_signals() - {signal.SIGKILL}))
def test_every_signal_has_a_name(number):
    """The incident of a signal names it, also one that Python has no name for."""
    found = classify(LastWords(), exitcode=-number, was_ready=True)
    assert found.cause is ExitCause.SIGNAL
    names = {int(one): one.name for one in signal.Signals}
    assert found.detail == names.get(number, f"signal {number}")


@pytest.mark.parametrize(
    ("number", "blames"),
    [
        (signal.SIGHUP, False),
        (signal.SIGINT, False),
        (signal.SIGTERM, False),
        (signal.SIGKILL, False),
        (signal.SIGSEGV, True),
        (signal.SIGBUS, True),
        (signal.SIGFPE, True),
        (signal.SIGABRT, True),
    ],
)
def test_signals_that_somebody_sends_are_not_blamed_on_the_weights(number, blames):
    """Only a crash may be the fault of the weights that the worker had."""
    assert classify(LastWords(), exitcode=-number, was_ready=True).blames_weights is blames


def test_a_start_that_found_no_room_is_told_with_what_helps():
    """The limit that was met is named in the incident, and the start is tried again."""
    error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    verdict = classify(LastWords(), exitcode=None, was_ready=False, launch_error=error)
    assert verdict.detail.startswith(
        "the process could not be started (OSError: [Errno 24] Too many open files; "
        "each worker takes about 12 file descriptors of the application"
    )
    assert not verdict.raised
