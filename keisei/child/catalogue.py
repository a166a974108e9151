"""Catalogue: which weights there are, and where, as one worker knows it."""

from __future__ import annotations

import select
from collections.abc import Mapping
from typing import Any

from keisei.child.frames import arrived
from keisei.child.in_place import InPlace
from keisei.exceptions import WeightsError
from keisei.ipc import board
from keisei.ipc.frame_reader import FrameReader
from keisei.ipc.status import StatusLine
from keisei.ipc.weights import WeightsReader
from keisei.protocol import messages

_PATIENCE = 10_000
"""Milliseconds that code of the worker waits for a name that the application is about to tell."""


class Entry:
    """The weights of one name.

    Attributes:
        number: Stands for the name in frames; 0 is "main".
        name: The name.
        reader: Their shared memory.
        loaded: The version that was loaded into the worker; 0 is none.
        taken: The newest version that the worker was given in any way; 0 is none.
        owed: The version that the application waits for; 0 is none.
        in_place: Finds the tensors of the model that they are loaded into.
    """

    def __init__(self, number: int, name: str, reader: WeightsReader) -> None:
        self.number = number
        self.name = name
        self.reader = reader
        self.loaded = 0
        self.taken = 0
        self.owed = 0
        self.in_place = InPlace()


class Catalogue:
    """The names of weights, as the application tells of them.

    Attributes:
        entries: What there is, by name.
        versions: Numbers and versions of what the worker has taken, but for "main"; made anew
            whenever it changes.
        is_asked: The application waits for a version.
    """

    def __init__(self, announcements: FrameReader, status: StatusLine) -> None:
        self.entries: dict[str, Entry] = {}
        self.versions: tuple[tuple[int, int], ...] = ()
        self.is_asked = False
        self._skipped: list[tuple[int, int]] = []
        self._announcements = announcements
        self._status = status
        self._by_number: dict[int, Entry] = {}
        self._words: Any = [0, 0]
        self._edition = 0
        self._is_introduced = False
        self._suspected = -1

    @property
    def generation(self) -> int:
        """A count that moves when anything is published or changed: one read of shared memory."""
        count: int = self._words[board.GENERATION]
        return count

    # what the application tells

    async def introduce(self) -> None:
        """Take in every name that there is when the worker begins.

        Raises:
            QueueEnded: The application has gone.
        """
        while not self._is_introduced:
            self._hear(*await self._announcements.get())

    def take(self) -> None:
        """Take in what was told up to now."""
        for frame in arrived(self._announcements):
            self._hear(*frame)

    async def complete(self) -> None:
        """Take in everything that the application told before this moment, also what is on its way.

        Raises:
            QueueEnded: The application has gone.
        """
        self.take()
        while self._edition < self._words[board.EDITION]:
            self._hear(*await self._announcements.get())

    def complete_now(self, *, may_wait: bool) -> None:
        """Do as ``complete`` outside the event loop.

        Args:
            may_wait: Whether the application goes on while this thread waits.
        """
        self.take()
        if self._edition >= self._words[board.EDITION]:
            return
        poll = select.poll()
        poll.register(self._announcements.fileno(), select.POLLIN)
        while may_wait and self._edition < self._words[board.EDITION] and poll.poll(_PATIENCE):
            self.take()
            if self._announcements.ended is not None:
                return

    def _hear(self, payload: memoryview, fds: Any) -> None:
        message = messages.unpack(payload, messages.MODEL, fds)
        if isinstance(message, messages.Announcement):
            if message.acknowledge:
                self._owe(message.number, message.version)
            return
        if isinstance(message, messages.Arena):
            reader = WeightsReader(fds.claim(), message.layout, is_final=message.is_final)
            self._enter(message, reader)
        elif isinstance(message, messages.Dropped):
            self._forget(message.number)
        else:
            self._words = board.look_at(fds.claim())
            self._is_introduced = True
        self._edition = max(self._edition, message.edition)

    def _owe(self, number: int, version: int) -> None:
        self.is_asked = True
        entry = self._by_number.get(number)
        if entry is None:  # it was dropped meanwhile
            self._skipped.append((number, version))
        else:
            entry.owed = max(entry.owed, version)

    def answers(self, models: Mapping[str, object]) -> list[tuple[int, int]]:
        """Return the numbers and versions to acknowledge: loaded, at hand, or not there any more.

        Args:
            models: The worker's. What has no model there is not loaded, but can be asked for.
        """
        answers, self._skipped = self._skipped, []
        for entry in self.entries.values():
            is_loaded = entry.name in models or entry.number == 0
            version = entry.loaded if is_loaded else entry.reader.latest
            if 0 < entry.owed <= version:
                answers.append((entry.number, version))
                entry.owed = 0
        self.is_asked = False
        return answers

    def _enter(self, message: messages.Arena, reader: WeightsReader) -> None:
        entry = self._by_number.get(message.number)
        if entry is None:
            entry = Entry(message.number, message.name, reader)
            self.entries[entry.name] = self._by_number[entry.number] = entry
        entry.reader = reader

    def _forget(self, number: int) -> None:
        entry = self._by_number.pop(number, None)
        if entry is None:
            return
        del self.entries[entry.name]
        if entry.owed:
            self._skipped.append((number, entry.owed))
        if not entry.loaded:
            self.versions = tuple(pair for pair in self.versions if pair[0] != number)

    # what the worker takes

    def find(self, name: str) -> Entry:
        """Return the weights of a name.

        Raises:
            WeightsError: There are none; the message lists the names.
        """
        entry = self.entries.get(name)
        if entry is None:
            known = ", ".join(map(repr, sorted(self.entries))) or "none at all"
            raise WeightsError(
                f"there are no weights {name!r}; there are {known}. Push them first: await "
                f"manager.push_weights(weights, {name!r})"
            )
        return entry

    def suspect(self, entry: Entry, version: int) -> None:
        """Say in the status page that the worker takes these weights now.

        A failure is blamed on the weights that were published last among those that it took.
        """
        if entry.reader.published >= self._suspected:
            self._suspected = entry.reader.published
            self._status.suspect(entry.number, version)

    def took(self, entry: Entry, version: int) -> None:
        """Note that the worker has this version."""
        if version == entry.taken:
            return
        entry.taken = version
        if entry.number:
            others = (pair for pair in self.versions if pair[0] != entry.number)
            self.versions = (*others, (entry.number, version))
