"""Why did it end? A pure decision from everything that is known about an ended process."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from keisei.events import ExitCause, signal_name
from keisei.ipc import failures
from keisei.protocol.last_words import LastWords

_ENDING_SIGNALS = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a process ended.

    Attributes:
        cause: The kind of end.
        detail: One line with more about it.
        raised: An exception is the cause, which a second try would only repeat.
        blames_weights: The weights that it had, if it had any, may be the cause.
    """

    cause: ExitCause
    detail: str = ""
    raised: bool = False
    blames_weights: bool = False


def classify(
    words: LastWords,
    *,
    exitcode: int | None,
    was_ready: bool,
    ended_for: tuple[ExitCause, str] | None = None,
    launch_error: BaseException | None = None,
) -> Verdict:
    """Decide why a process ended.

    Args:
        words: What it left behind.
        exitcode: Minus the signal's number after a signal; ``None`` if it is unknown.
        was_ready: It had finished its start.
        ended_for: Why the supervisor killed it or asked it to end, if it did.
        launch_error: Why it could not be started at all.
    """
    orderly = (ExitCause.REQUESTED, ExitCause.RECYCLED)
    is_requested = ended_for is not None and ended_for[0] in orderly
    if launch_error is not None and not is_requested:
        hint = failures.remedy(launch_error)
        what = f"{type(launch_error).__name__}: {launch_error}{hint and '; '}{hint}"
        detail = f"the process could not be started ({what})"
        # What the system refuses now it may grant later; any other error only comes again.
        is_final = not isinstance(launch_error, OSError)
        return Verdict(ExitCause.START_FAILED, detail, raised=is_final)
    if words.failure:
        cause = ExitCause.USER_ERROR if was_ready else ExitCause.START_FAILED
        return Verdict(cause, words.failure, raised=True, blames_weights=True)
    if ended_for is not None and not (is_requested and _crashed(exitcode)):
        cause, detail = ended_for
        return Verdict(cause, detail, blames_weights=cause is ExitCause.HANG)
    if words.said_goodbye and exitcode in (0, None):
        if words.recycle:
            return Verdict(ExitCause.RECYCLED, words.recycle)
        return Verdict(ExitCause.GOODBYE)
    if exitcode is None:
        return Verdict(
            ExitCause.LOST,
            "its exit code is unknown: another part of the application has reaped it, or the "
            "fork server that could tell is gone",
        )
    name = signal_name(exitcode)
    if name is not None:
        hint = _possible_oom(words) if exitcode == -signal.SIGKILL else name
        return Verdict(ExitCause.SIGNAL, hint, blames_weights=_crashed(exitcode))
    when = "after" if words.said_goodbye else "without"
    detail = f"it exited with code {exitcode} {when} saying goodbye"
    cause = ExitCause.EXIT if was_ready else ExitCause.START_FAILED
    return Verdict(cause, detail, blames_weights=True)


def _crashed(exitcode: int | None) -> bool:
    """Return whether a signal ended it that tells of a fault, such as SIGSEGV."""
    return exitcode is not None and exitcode < 0 and -exitcode not in _ENDING_SIGNALS


def _possible_oom(words: LastWords) -> str:
    memory = f"; its peak resident memory was {words.rss / 2**20:.0f} MiB" if words.rss else ""
    return f"SIGKILL that the pool did not send, possibly out of memory{memory}"
