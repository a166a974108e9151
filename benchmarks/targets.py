"""Targets as data, and the figures that they are compared with: ratios, bounds and growth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

OURS = "keisei"


class Measured(Protocol):
    """What a target asks of the results of a measurement; ``benchmarks.results`` has them."""

    def series(self, system: str, case: str, metric: str) -> list[float | None]:
        """Return a figure by repetition; ``None`` where it was not measured."""
        ...

    def median(self, system: str, case: str, metric: str) -> float | None:
        """Return the median over the repetitions, or ``None`` if it was never measured."""
        ...

    def higher_is_better(self, metric: str) -> bool:
        """Return whether a higher figure is the better one."""
        ...

    def best(self, systems: Sequence[str], metric: str, case: str) -> str | None:
        """Return the system with the best median, or ``None`` if none was measured."""
        ...

    def times_better(
        self, system: str, others: Sequence[str], metric: str, case: str
    ) -> float | None:
        """Return how many times better ``system`` is than the best of ``others``."""
        ...


Figure = Callable[[Measured], float | None]


@dataclass(frozen=True)
class Target:
    """A bound that keisei's figure must keep.

    Attributes:
        text: The figure, in words.
        figure: Computes it from the results; returns ``None`` if a measurement is missing.
    """

    text: str
    figure: Figure
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None

    @property
    def required(self) -> str:
        """The bound as text."""
        signs = (("≥", self.at_least), ("≤", self.at_most), ("<", self.below))
        return ", ".join(f"{sign} {bound:,.6g}" for sign, bound in signs if bound is not None)

    def reached(self, value: float) -> bool:
        """Whether ``value`` satisfies every bound."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def paired_ratio(ours: Sequence[float | None], other: Sequence[float | None]) -> float | None:
    """Return the median over the repetitions of ours / other.

    Each repetition is divided by its neighbour in time, so that the machine's slow drift, which
    hits both, cancels out. Without a common repetition it is the ratio of the medians.
    """
    pairs = [a / b for a, b in zip(ours, other, strict=False) if a is not None and b]
    if pairs:
        return median(pairs)
    mine = [a for a in ours if a is not None]
    theirs = [b for b in other if b is not None]
    if not mine or not theirs or not median(theirs):
        return None
    return median(mine) / median(theirs)


def ahead_of(peers: Sequence[str], metric: str, cases: Sequence[str]) -> Figure:
    """How many times better keisei is than the best of ``peers``, in its weakest case."""

    def figure(results: Measured) -> float | None:
        ratios = [results.times_better(OURS, peers, metric, case) for case in cases]
        return _worst(ratios, min)

    return figure


def faster_across(peers: Sequence[str], metric: str, ours_case: str, peers_case: str) -> Figure:
    """How many times less time keisei takes in one case than the best of ``peers`` in another."""

    def figure(results: Measured) -> float | None:
        best = results.best(peers, metric, peers_case)
        if best is None:
            return None
        theirs = results.series(best, peers_case, metric)
        return paired_ratio(theirs, results.series(OURS, ours_case, metric))

    return figure


def of_limit(limit: str, metric: str, cases: Sequence[str]) -> Figure:
    """Keisei / limit in its weakest case: below 1 for a rate, above 1 for a time."""

    def figure(results: Measured) -> float | None:
        pick = min if results.higher_is_better(metric) else max
        ratios = [
            paired_ratio(results.series(OURS, case, metric), results.series(limit, case, metric))
            for case in cases
        ]
        return _worst(ratios, pick)

    return figure


def value(metric: str, cases: Sequence[str]) -> Figure:
    """Keisei's own figure in its weakest case."""

    def figure(results: Measured) -> float | None:
        pick = min if results.higher_is_better(metric) else max
        return _worst([results.median(OURS, case, metric) for case in cases], pick)

    return figure


def growth(metric: str, first: str, last: str) -> Figure:
    """Keisei's figure in case ``last`` divided by that in case ``first``; 1 is flat."""

    def figure(results: Measured) -> float | None:
        return paired_ratio(results.series(OURS, last, metric), results.series(OURS, first, metric))

    return figure


def _worst(figures: Sequence[float | None], pick: Callable[[list[float]], float]) -> float | None:
    """Return the weakest figure, or ``None`` if any figure is missing."""
    known = [figure for figure in figures if figure is not None]
    return pick(known) if known and len(known) == len(figures) else None
