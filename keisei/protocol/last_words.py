"""LastWords: what an ended worker left behind."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LastWords:
    """What an ended incarnation left behind, after its queues were read to their end.

    Attributes:
        said_goodbye: It announced an orderly end.
        recycle: Why it wants a successor, from its goodbye; "" if it does not.
        failure: The hook's error in one line, if it reported one.
        traceback: The remote traceback, if it reported one.
        phase: What it was doing, in lower case.
        delivered: Experiences of it that have arrived.
        version: The weights version that it had applied or was applying.
        experiences_lost: Experiences that it had begun and not finished.
        commands_lost: Commands that were sent and never answered.
        last_command: The name of the last command that it took up.
        suspected: The number and version of the weights that a failure is to be blamed on: those
            that were published last among those that it took. ``None`` is version of "main".
        rss: Its peak resident memory in bytes, as of its last experience; 0 is unknown.
    """

    said_goodbye: bool = False
    recycle: str = ""
    failure: str = ""
    traceback: str | None = None
    phase: str = ""
    delivered: int = 0
    version: int = 0
    experiences_lost: int = 0
    commands_lost: int = 0
    last_command: str | None = None
    rss: int = 0
    suspected: tuple[int, int] | None = None
