"""NamedWeights: all weights of a pool by name, and what every worker is told of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from keisei.exceptions import WeightsError
from keisei.ipc.board import Board
from keisei.protocol import messages
from keisei.protocol.line import Line
from keisei.training.parallel.published import PublishedWeights, Pushed
from keisei.training.parallel.weights_source import WeightsSource
from keisei.worker import MAIN

_LONGEST = 200
_NO_LINES: Mapping[int, Line] = MappingProxyType({})


class NamedWeights:
    """The weights of every name.

    A name keeps its number and its count of versions for the life of the pool, also while it has
    no weights: what is pushed under it again is newer than all before.

    Attributes:
        main: Those of "main", which may have been pushed or not.
    """

    def __init__(
        self,
        lines: Mapping[int, Line] = _NO_LINES,
        *,
        check_finite: bool = False,
        on_pushed: Callable[[PublishedWeights, Pushed], None],
    ) -> None:
        """Start without weights.

        Args:
            lines: The workers' lines, by worker id; always as they are now.
            check_finite: Look whether weights hold NaN or infinity.
            on_pushed: Called in the event loop with each version.
        """
        self._lines = lines
        self._check_finite = check_finite
        self._on_pushed = on_pushed
        self._board: Board | None = None
        self._known: dict[str, PublishedWeights] = {}
        self._by_number: list[PublishedWeights] = []
        self.main = self._add(MAIN)

    def _add(self, name: str) -> PublishedWeights:
        added = PublishedWeights(
            name,
            len(self._by_number),
            self._the_board,
            check_finite=self._check_finite,
            on_memory=self._tell_all,
            on_pushed=self._on_pushed,
        )
        self._known[name] = added
        self._by_number.append(added)
        return added

    def _the_board(self) -> Board:
        """Return the board, which is made for the first weights and told to all workers."""
        if self._board is None:
            self._board = Board()
            for line in list(self._lines.values()):
                self._show_board(line, self._board)
        return self._board

    @staticmethod
    def _show_board(line: Line, board: Board) -> None:
        line.announce("board", messages.pack(messages.Introduced(board.edition)), board)

    # which

    @property
    def names(self) -> list[str]:
        """The names that have weights, "main" first, then in the order of their first push."""
        return [name for name, weights in self._known.items() if weights.has_memory]

    def version_of(self, name: str) -> int:
        """Return the newest version of a name, also after it was dropped; 0 is none."""
        weights = self._known.get(name)
        return weights.newest_version() if weights is not None else 0

    def find(self, name: str) -> PublishedWeights:
        """Return the weights of a name.

        Raises:
            WeightsError: There are none; the message lists the names.
        """
        weights = self._known.get(name)
        if weights is None or not weights.has_memory:
            known = ", ".join(map(repr, self.names)) or "none at all: push weights first"
            raise WeightsError(f"there are no weights {name!r}; there are {known}")
        return weights

    def find_or_add(self, name: object) -> PublishedWeights:
        """Return the weights of a name, which may have none yet.

        Raises:
            WeightsError: It is no name.
        """
        self._the_board()  # here: a thread that publishes must not make one
        checked = check_name(name)
        return self._known.get(checked) or self._add(checked)

    def numbered(self, number: int) -> PublishedWeights:
        """Return the weights that a number stands for, which may have been dropped.

        Raises:
            LookupError: There never were any.
        """
        return self._by_number[number]

    def newest_of(self, number: int) -> tuple[str, int]:
        """Return the name and the newest version of weights; raises as ``numbered``."""
        weights = self._by_number[number]
        return weights.name, weights.newest_version()

    # what workers are told

    def introduce(self, line: Line) -> None:
        """Tell a new worker of all weights that there are; it takes them in before its start."""
        if self._board is None:
            return  # it is told when there are some
        board = self._board
        for weights in self._by_number:
            if weights.has_memory:
                line.announce(weights.number, weights.frame(board.edition), weights.memory)
        self._show_board(line, board)

    @property
    def is_introducing(self) -> bool:
        """Whether ``introduce`` tells a worker anything."""
        return self._board is not None

    def _tell_all(self, weights: PublishedWeights) -> None:
        """Tell every worker of new memory, then show that there is something to read."""
        board = self._the_board()
        self._announce(weights.number, weights.frame(board.edition + 1), weights.memory)
        board.change_names()

    def drop(self, name: str) -> None:
        """Give the memory of a name back, and have every worker forget it.

        Raises:
            WeightsError: There are none of that name; the message lists the names.
        """
        weights = self.find(name)
        weights.drop()
        board = self._the_board()
        frame = messages.pack(messages.Dropped(weights.number, board.edition + 1))
        self._announce(weights.number, frame, None)
        board.change_names()

    def _announce(self, number: int, frame: Any, memory: Any) -> None:
        for line in list(self._lines.values()):
            line.announce(number, frame, memory)

    def close(self) -> None:
        """Give all shared memory back."""
        for weights in self._by_number:
            weights.close()
        if self._board is not None:
            self._board.close()


def named_models(
    model: WeightsSource | None, models: Mapping[str, WeightsSource] | None
) -> dict[str, WeightsSource]:
    """Return what a manager is given as first weights, by name.

    Raises:
        WeightsError: A key is no name, or there are two of "main".
    """
    named = dict(models or {})
    for name in named:
        check_name(name)
    if model is None:
        return named
    if MAIN in named:
        raise WeightsError(f"model=... is models[{MAIN!r}]: give one of them")
    return {MAIN: model, **named}


def check_name(name: object) -> str:
    """Return a name of weights, as what it is.

    Raises:
        WeightsError: It is no text, or empty, or longer than 200 characters.
    """
    if not isinstance(name, str):
        raise WeightsError(f"the name of weights is text, not a {type(name).__qualname__}")
    if not 0 < len(name) <= _LONGEST:
        raise WeightsError(f"the name of weights has 1 to {_LONGEST} characters, not {len(name)}")
    return name
