"""StructlogObserver: every event as a structlog entry with real fields; needs ``structlog``."""

from __future__ import annotations

import logging
from typing import Any

from keisei.observers.missing import missing

try:
    import structlog
except ImportError as error:
    raise missing("keisei.observers.structlog", "structlog", "structlog") from error

from keisei.events import Event
from keisei.observers.log import describe

__all__ = ["StructlogObserver"]


class StructlogObserver:
    """Writes one entry for each event, with the level of ``LogObserver``.

    The message is the first line of the summary. The fields of ``event.to_dict()`` are those of the
    entry; "type" is "event_type", since the message itself is structlog's "event".

    Args:
        logger: Where to write; ``None`` is ``structlog.get_logger("keisei")``.
    """

    def __init__(self, logger: Any = None) -> None:
        self._logger = structlog.get_logger("keisei") if logger is None else logger

    def on_event(self, event: Event) -> None:
        """Write ``event``."""
        level, text = describe(event)
        fields = event.to_dict()
        fields["event_type"] = fields.pop("type")
        fields.pop("event", None)
        write = getattr(self._logger, logging.getLevelName(level).lower())
        write(text.partition("\n")[0], **fields)
