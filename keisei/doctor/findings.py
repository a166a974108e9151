"""One thing that the doctor found, as a frozen value."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from keisei.jsonable import jsonable


class Verdict(enum.StrEnum):
    """What a finding means for a pool on this machine."""

    FACT = "fact"
    """Nothing to judge."""
    OK = "ok"
    """It is as the library would like it."""
    SUBSTITUTE = "substitute"
    """It is missing, and something else takes its place; the note says what."""
    WARNING = "warning"
    """It works, and there may be trouble; the note says which."""
    PROBLEM = "problem"
    """A pool cannot work like this; the note says what to do."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        section: Its heading.
        name: Which thing.
        value: What was found: a bool, a number or text.
        verdict: What that means.
        note: What is used in its place, or what to do; may be empty.
    """

    section: str
    name: str
    value: Any
    verdict: Verdict = Verdict.FACT
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as what JSON has."""
        return {
            "section": self.section,
            "name": self.name,
            "value": jsonable(self.value),
            "verdict": self.verdict.value,
            "note": self.note,
        }
