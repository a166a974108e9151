"""What a learner returns as metrics, made into plain numbers for events and observers."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch

logger = logging.getLogger("keisei.learner")

_PLAIN = (float, int, bool)
_MOST_TOLD = 100
"""Names that are warned of; a learner that makes up new names all the time is not followed."""


class MetricNumbers:
    """Makes metrics into floats, leaves out what is no number, and warns once of each such name.

    Numbers are those of Python and NumPy, and tensors and arrays with one real element on any
    device, whether or not they require a gradient. NaN and infinity are numbers. A string is
    none, even if it could be read as one.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()

    @staticmethod
    def are_plain(metrics: Mapping[Any, Any]) -> bool:
        """Return whether ``of`` is immediate, because there are strings and Python's numbers only.

        Otherwise it may have to wait for a device, or run code of the values' own classes.
        """
        return type(metrics) is dict and all(
            type(name) is str and type(value) in _PLAIN for name, value in metrics.items()
        )

    def of(self, metrics: Mapping[Any, Any]) -> dict[str, float]:
        """Return the metrics that are numbers, by name; a name that is no string becomes one.

        Raises nothing, whatever the mapping, its names and its values do.
        """
        numbers: dict[str, float] = {}
        if self.are_plain(metrics):  # a Ctrl-C here is the application's: it passes through
            self._add_all(numbers, metrics)
            return numbers
        try:
            self._add_all(numbers, metrics)
        except BaseException as error:  # noqa: BLE001 - told; metrics must not end the training
            self._warn("", f"the learner's metrics cannot be read: {_text(error)}")
        return numbers

    def copy_and_numbers_of(
        self, metrics: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], dict[str, float]]:
        """Return a copy of the mapping, or itself if it cannot be copied, and its numbers."""
        copy = metrics
        with contextlib.suppress(BaseException):  # what is wrong with it, ``of`` tells
            copy = dict(metrics)
        return copy, self.of(metrics)

    def episodes_of(
        self, infos: Iterable[Mapping[str, Any]]
    ) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Return the returns and lengths of the episodes that ended in an update's batches.

        They are what workers put under "episode_returns" and "episode_lengths" in their ``info``:
        sequences of numbers. Anything else there is left out, and told once. Raises nothing.
        """
        returns: list[float] = []
        lengths: list[int] = []
        for info in infos:
            returns += self._series(info, "episode_returns")
            lengths += map(int, filter(math.isfinite, self._series(info, "episode_lengths")))
        return tuple(returns), tuple(lengths)

    def _series(self, info: Mapping[str, Any], name: str) -> list[float]:
        try:
            values = info.get(name, ())
            if not isinstance(values, list | tuple):
                values = values.tolist()  # of an array or a tensor
            numbers = [_number(value) for value in values]
        except Exception as error:  # noqa: BLE001 - told; an info must not end the training
            self._warn(name, f"a batch's info[{name!r}] is no sequence of numbers: {_text(error)}")
            return []
        if None in numbers:
            self._warn(name, f"a batch's info[{name!r}] holds what is no number; it is left out")
        return [number for number in numbers if number is not None]

    def _add_all(self, numbers: dict[str, float], metrics: Mapping[Any, Any]) -> None:
        for name, value in metrics.items():
            self._add(numbers, name, value)

    def _add(self, numbers: dict[str, float], name: Any, value: Any) -> None:
        key = name if type(name) is str else _text(name)
        number = _number(value)
        if number is None:
            kind = type(value).__qualname__
            text = f"the metric {key!r} is no number but a {kind}; it is left out of events"
            self._warn(key, text)
        else:
            numbers[key] = number

    def _warn(self, key: str, text: str) -> None:
        if key not in self._told and len(self._told) < _MOST_TOLD:
            self._told.add(key)
            logger.warning("%s; told once", text)


def _number(value: Any) -> float | None:
    """Return ``value`` as a float, or ``None`` if it is no number."""
    if type(value) in _PLAIN:
        return _float(value)
    if isinstance(value, str | bytes | bytearray):
        return None
    try:
        shape = getattr(value, "shape", None)  # of a tensor, an array or a scalar of NumPy
        if isinstance(value, torch.Tensor) or isinstance(shape, tuple):
            value = value.item()  # raises unless there is exactly one element
            return _float(value) if isinstance(value, Real) else None
        return _float(value)
    except BaseException:  # noqa: BLE001 - code of the value's class has failed: it is no number
        return None


def _float(value: Any) -> float | None:
    if not hasattr(type(value), "__float__") and not hasattr(type(value), "__index__"):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer beyond any float
        return None
    return number if type(number) is float else None


def _text(value: object) -> str:
    """Return ``value`` as text, whatever its class does."""
    try:
        return str.__str__(str(value))
    except BaseException:  # noqa: BLE001 - its class has failed; its name is all that is left
        return f"<{type(value).__qualname__}>"
