"""Settings that outlive processes: what each slot is set to, whatever process fills it.

``SettingsBook`` is pure: it decides what each slot, and each slot to come, is set to. A slot keeps
what its processes have confirmed, and in order what was told to the present one and not answered
yet. A new process is given all of it. ``SettingsTeller`` is the part that talks to workers.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from keisei.events import Event, SettingsChanged, SettingsRefused
from keisei.exceptions import CommandError, WorkerLost
from keisei.ipc import serialize
from keisei.ipc.threads import to_the_end
from keisei.ipc.wire import Payload
from keisei.protocol import messages
from keisei.protocol.line import Line
from keisei.protocol.settings import configure

SettingsSource = Mapping[str, Any] | Callable[[int], Mapping[str, Any]]
"""What workers begin with: the same for all, or what a function returns for a worker id."""
Packed = dict[str, Payload]
"""Settings by name, each value pickled by itself."""


@dataclass(slots=True)
class _Slot:
    """What one slot is set to.

    Attributes:
        values: What its process has confirmed, or was begun with.
        version: The version of ``values``.
        pending: Changes that were told to its process and not answered yet, by version.
    """

    values: Packed
    version: int
    pending: dict[int, Packed] = field(default_factory=dict)

    def settle(self, up_to: int | None = None) -> None:
        """Take pending changes over, all of them or those up to a version."""
        for version in [one for one in self.pending if up_to is None or one <= up_to]:
            self.values = {**self.values, **self.pending.pop(version)}
            self.version = version

    def now(self) -> tuple[int, Packed]:
        """Return the version and the settings, pending changes included."""
        version, values = self.version, self.values
        for version, change in self.pending.items():  # noqa: B007 - the last one is returned
            values = {**values, **change}
        return version, values


class SettingsBook:
    """What every slot is set to, and every slot to come.

    Attributes:
        version: The newest version; each change has one, counted over all slots. 0 is the
            beginning.
    """

    def __init__(self, initial: SettingsSource | None = None, num_workers: int = 0) -> None:
        """Begin with ``initial``, for which a function is called with each worker id.

        Raises:
            TypeError: It is no mapping with names that are text, or the function returns none.
            SerializationError: A value cannot be pickled; the error names it.
        """
        self.version = 0
        self._initial: Callable[[int], Mapping[str, Any]] | None = None
        self._same: Packed = {}
        if callable(initial) and not isinstance(initial, Mapping):
            self._initial = initial
        elif initial is not None:
            self._same = packed(initial)
        self._slots: dict[int, _Slot] = {}
        self._for_all: dict[int, Packed] = {}
        self._unanswered: dict[int, set[int]] = {}
        self.add(range(num_workers))

    def add(self, worker_ids: Iterable[int]) -> None:
        """Give slots that are new what they begin with, and every change that was for all.

        Raises:
            TypeError: As at the beginning; no slot was added.
            SerializationError: The same.
        """
        added: dict[int, _Slot] = {}
        for worker_id in worker_ids:
            if worker_id not in self._slots:
                values = self._same if self._initial is None else packed(self._initial(worker_id))
                slot = added[worker_id] = _Slot(values, 0, dict(self._for_all))
                slot.settle()
        self._slots |= added

    def change(
        self, change: Packed, worker_ids: Collection[int] | None, told: Collection[int]
    ) -> int:
        """Change slots and return the new version.

        Args:
            change: What is new or different.
            worker_ids: The slots; ``None`` is all, those to come included.
            told: Those among them whose process is told of it, and will answer.
        """
        self.version += 1
        if worker_ids is None:
            self._for_all[self.version] = change
        for worker_id in self._slots if worker_ids is None else worker_ids:
            slot = self._slots[worker_id]
            slot.pending[self.version] = change
            if worker_id not in told:
                slot.settle()
        self._unanswered[self.version] = set(told)
        self._tidy()
        return self.version

    def greet(self, worker_id: int) -> tuple[int, Packed]:
        """Return the version and the settings that a new process of a slot begins with."""
        slot = self._slots[worker_id]
        slot.settle()
        return slot.now()

    def confirmed(self, worker_id: int, version: int) -> None:
        """Take in that a slot's process has the settings of a version."""
        slot = self._slots[worker_id]
        if version in slot.pending:
            slot.settle(version)
        self._answered(worker_id, version)

    def refused(self, worker_id: int, version: int) -> None:
        """Take in that a slot's process refuses a change: the slot, and those to come, forget it.

        Changes that came after it stand.
        """
        self._slots[worker_id].pending.pop(version, None)
        self._for_all.pop(version, None)
        self._answered(worker_id, version)

    def lost(self, worker_id: int, version: int) -> None:
        """Take in that a slot's process will not answer any more: its successor begins with it."""
        self._slots[worker_id].settle(version)
        self._answered(worker_id, version)

    def _answered(self, worker_id: int, version: int) -> None:
        self._unanswered.get(version, set()).discard(worker_id)
        self._tidy()

    def _tidy(self) -> None:
        """Join the oldest changes for all slots that no process can refuse any more."""
        for version in [one for one, slots in self._unanswered.items() if not slots]:
            del self._unanswered[version]
        oldest = min(self._unanswered, default=self.version + 1)
        final = [version for version in self._for_all if version < oldest]
        if len(final) > 1:
            joined: Packed = {}
            for version in final:
                joined |= self._for_all.pop(version)
            self._for_all = {final[-1]: joined, **self._for_all}

    def packed_of(self, worker_id: int) -> Packed:
        """Return what a slot is set to."""
        return self._slots[worker_id].now()[1]


def packed(settings: Mapping[str, Any]) -> Packed:
    """Return settings with each value pickled by itself.

    Raises:
        TypeError: They are no mapping, or a name is not text.
        SerializationError: A value cannot be pickled; the error names it.
    """
    if not isinstance(settings, Mapping):
        raise TypeError(
            f"settings are a {type(settings).__name__}; give a mapping such as {{'level': 3}}"
        )
    for name in settings:
        if not isinstance(name, str):
            raise TypeError(f"settings have names that are text; {name!r} is none")
    return {name: serialize.dumps(value, f"setting {name!r}") for name, value in settings.items()}


def unpacked(values: Packed) -> dict[str, Any]:
    """Return copies of settings that were packed."""
    return {name: serialize.loads(value, f"setting {name!r}") for name, value in values.items()}


async def packed_aside(settings: Mapping[str, Any]) -> Packed:
    """Do as ``packed``, in a thread where that takes a while."""
    if serialize.is_large(settings):
        return await to_the_end(lambda: packed(settings))
    return packed(settings)


class SettingsTeller:
    """Tells workers what their slots are set to, and takes their answers in.

    Attributes:
        book: What every slot is set to.
    """

    def __init__(
        self,
        book: SettingsBook,
        lines: Mapping[int, Line],
        publish: Callable[[Event], None],
    ) -> None:
        """Keep a pool's book.

        Args:
            book: What every slot is set to.
            lines: The lines of all processes, by worker id; always as they are now.
            publish: Told of changes and of refusals.
        """
        self.book = book
        self._lines = lines
        self._publish = publish

    def greet(self, line: Line, hello: messages.Hello) -> None:
        """Send a new process its first frame, with what its slot is set to."""
        version, values = self.book.greet(line.worker_id)
        if values or version:
            line.greet(hello._replace(has_settings=True), configure(version, values))
        else:
            line.greet(hello)

    def change(
        self, values: Packed, worker_ids: Collection[int] | None
    ) -> tuple[int, dict[int, asyncio.Future[None]]]:
        """Change slots and tell their processes.

        Returns:
            The new version, and the futures of the answers of workers that are ready. They raise
            ``CommandError`` and ``WorkerLost``, which need not be retrieved.
        """
        told = {
            worker_id: line
            for worker_id, line in self._lines.items()
            if line.is_greeted and (worker_ids is None or worker_id in worker_ids)
        }
        version = self.book.change(values, worker_ids, told)
        frame = messages.pack(configure(version, values))
        answers: dict[int, asyncio.Future[None]] = {}
        for worker_id, line in told.items():
            answer = line.configure(version, frame)
            answer.add_done_callback(functools.partial(self._answered, line, version))
            if line.is_ready:
                answers[worker_id] = answer
        chosen = None if worker_ids is None else tuple(sorted(worker_ids))
        self._publish(SettingsChanged(version, tuple(values), chosen))
        return version, answers

    def _answered(self, line: Line, version: int, answer: asyncio.Future[None]) -> None:
        worker_id = line.worker_id
        error = None if answer.cancelled() else answer.exception()
        if isinstance(error, CommandError):
            self.book.refused(worker_id, version)
            self._publish(
                SettingsRefused(
                    worker_id, line.incarnation, version, error.message, error.remote_traceback
                )
            )
        elif isinstance(error, WorkerLost) or answer.cancelled():
            self.book.lost(worker_id, version)
        else:
            self.book.confirmed(worker_id, version)
