"""Curves: the history of a pool in bounded memory, for pages that are opened late.

Values are averaged in buckets of one width. When there are too many buckets, neighbours are merged
and the width doubles, so that the curves always reach back to the start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Totals = dict[str, tuple[float, float]]
"""The sum of a curve's values in a bucket, and their weight."""


class Curves:
    """Named values over time.

    Args:
        max_points: Buckets that are kept at most; at least 2.
        width: Seconds of a bucket at first.
        max_names: Curves that are kept at most; later names are left out.

    Attributes:
        generation: How often neighbours were merged: points of one generation have one width.
    """

    def __init__(self, max_points: int = 480, width: float = 1.0, max_names: int = 24) -> None:
        self.generation = 0
        self._max_points = max_points
        self._width = width
        self._max_names = max_names
        self._names: list[str] = []
        self._buckets: list[tuple[float, Totals]] = []
        self._open: Totals = {}
        self._begins = 0.0

    @property
    def num_closed(self) -> int:
        """Buckets that are complete."""
        return len(self._buckets)

    def add(self, at: float, values: Mapping[str, float | None], weight: float = 1.0) -> None:
        """Take values in; those that are ``None``, NaN or infinite are left out.

        Args:
            at: Seconds since the start, never less than before.
            values: By the curve's name.
            weight: How much they count in the average of their bucket.
        """
        if at >= self._begins + self._width:
            self._close(at)
        for name, value in values.items():
            if value is not None and math.isfinite(value) and self._knows(name):
                total, weights = self._open.get(name, (0.0, 0.0))
                self._open[name] = (total + value * weight, weights + weight)

    def _knows(self, name: str) -> bool:
        if name not in self._names:
            if len(self._names) >= self._max_names:
                return False
            self._names.append(name)
        return True

    def _close(self, at: float) -> None:
        """End the open bucket, and begin the one that ``at`` is in."""
        if self._open:
            self._buckets.append((self._begins, self._open))
            self._open = {}
        if len(self._buckets) > self._max_points:
            self._merge()
        self._begins = at - at % self._width
        if self._buckets and self._buckets[-1][0] == self._begins:  # it has become wide enough
            _, self._open = self._buckets.pop()

    def _merge(self) -> None:
        """Make the buckets twice as wide, as often as it takes."""
        while len(self._buckets) > self._max_points:
            self._width *= 2
            self.generation += 1
            merged: dict[float, Totals] = {}
            for begins, totals in self._buckets:
                into = merged.setdefault(begins - begins % self._width, {})
                for name, (total, weight) in totals.items():
                    before, weights = into.get(name, (0.0, 0.0))
                    into[name] = (before + total, weights + weight)
            self._buckets = sorted(merged.items())

    def news(self, count: int = 4) -> dict[str, Any]:
        """Return what a page needs that has all points but the newest ones, as what JSON has.

        "closed" is the number of complete buckets, "last" the newest ``count`` of them.
        """
        return {
            "generation": self.generation,
            "closed": self.num_closed,
            "names": list(self._names),
            "last": [_point(begins, totals) for begins, totals in self._buckets[-count:]],
        }

    def to_dict(self) -> dict[str, Any]:
        """Return all curves as what JSON has.

        "names" are the curves, "points" the complete buckets, oldest first: each the time at which
        it begins, in seconds since the start, and its averages by name.
        """
        return {
            "generation": self.generation,
            "names": list(self._names),
            "points": [_point(begins, totals) for begins, totals in self._buckets],
        }


def _point(begins: float, totals: Totals) -> dict[str, Any]:
    values = {name: _short(total / weight) for name, (total, weight) in totals.items() if weight}
    return {"t": round(begins, 3), "v": values}


def _short(value: float) -> float:
    """Return ``value`` with six digits: more than any screen shows."""
    return float(f"{value:.6g}")
