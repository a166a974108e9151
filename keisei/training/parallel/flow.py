"""How far workers run ahead: credits, and the inbox of what they have delivered.

A worker without a credit waits. Back-pressure, rounds and staleness pacing are all decided here,
by granting credits or not.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Mapping

from keisei.config import ParallelConfig
from keisei.protocol.batches import PendingBatch
from keisei.protocol.line import Line
from keisei.training.parallel.batch import ExperienceBatch
from keisei.training.parallel.rounds import Round


class Flow:
    """Grants credits and keeps experiences that have arrived until they are taken.

    Attributes:
        num_dropped: Experiences discarded by ``overflow`` or ``staleness_policy``.
        num_batches: Experiences delivered.
        num_steps: Environment steps delivered.
    """

    def __init__(
        self,
        config: ParallelConfig,
        ready: Mapping[int, Line],
        newest_version: Callable[[], int],
    ) -> None:
        """Start empty.

        Args:
            config: ``mode``, ``max_queue_size``, ``overflow`` and the staleness settings.
            ready: The workers that may be given credits, as they come and go.
            newest_version: Tells the weights version that staleness counts from.
        """
        self._config = config
        self._ready = ready
        self._newest_version = newest_version
        is_limited = config.max_staleness is not None
        self._is_pacing = is_limited and config.staleness_policy == "pace"
        self._is_dropping = is_limited and config.staleness_policy == "drop"
        self._arrivals: deque[PendingBatch] = deque()
        self._queued: Counter[int] = Counter()
        self._steps_queued = 0
        self._demand = 0
        self._changed = asyncio.Event()
        self._round: Round | None = None
        self._rounds_held = 0
        self._wanted: list[int | None] = []
        self._newest = 0
        self._per_version = config.num_workers
        self._delivered_since_push = 0
        self.num_dropped = 0
        self.num_batches = 0
        self.num_steps = 0

    # events

    def arrived(self, arrival: PendingBatch) -> None:
        """Take in an experience that a worker has committed."""
        worker_id = arrival.worker_id
        if self._round is not None and self._round.has(worker_id):
            self._round.put(arrival)
            self._end_round_if_complete()
            self._changed.set()
            return
        self._append(arrival)
        if (
            self._config.overflow == "drop_oldest"
            and self._queued[worker_id] > self._config.max_queue_size
            and not self._demand  # a caller that waits is about to take them, the oldest first
        ):
            self._drop_oldest_of(worker_id)
        self._top_up_one(worker_id)
        # A caller that waits for many steps is not woken up for each few of them.
        if any(self._has(num_steps) for num_steps in self._wanted):
            self._changed.set()

    def became_ready(self, line: Line) -> None:
        """Give a new process its credits."""
        if self._round is not None:
            if self._round.awaits(line.worker_id):
                line.grant(1)
        else:
            self.top_up()
        self._changed.set()

    def closed(self, worker_id: int) -> None:
        """Expect nothing more of a slot."""
        if self._round is not None and self._round.awaits(worker_id):
            self._round.leave_out(worker_id)
            self._end_round_if_complete()
        self._changed.set()

    def pushed(self) -> None:
        """Called after a weights version was published."""
        self._per_version = max(1, self._delivered_since_push)
        self._delivered_since_push = 0
        if self._is_pacing:
            self.top_up()

    def wake(self) -> None:
        """Have every waiter look again."""
        self._changed.set()

    # credits

    def top_up(self) -> None:
        """Grant the credits that the async mode allows now."""
        if self._config.mode != "async":
            return
        for line in self._ready.values():
            line.grant(self._room_of(line, line.outstanding))

    def _top_up_one(self, worker_id: int) -> None:
        """Grant what a worker's arrival or delivery allows.

        When pacing, that concerns every worker's credits.
        """
        if self._is_pacing:
            self.top_up()
        elif self._config.mode == "async" and (line := self._ready.get(worker_id)) is not None:
            outstanding = line.outstanding
            room = self._room_of(line, outstanding)
            # While a worker has work for a while, room is told in twos and more: each telling
            # costs a system call and may wake the worker up.
            if outstanding == 0 or 2 * room >= self._config.max_queue_size:
                line.grant(room)

    def _room_of(self, line: Line, outstanding: int) -> int:
        """Return how many more experiences a worker may collect."""
        held = outstanding
        if self._config.overflow == "block":
            held += self._queued[line.worker_id]
        room = self._config.max_queue_size - held
        if room > 0 and self._is_pacing:
            room = min(room, self._room_within_pace())
        if self._steps_queued < self._demand and outstanding == 0:
            room = max(room, 1)  # somebody waits for more than the queues can hold
        return room

    def _room_within_pace(self) -> int:
        """Return how many experiences may be begun and still be fresh enough when delivered.

        As many are expected to be delivered under each version as under the one before; so a
        limit of S versions leaves room for S + 1 times as many, counted from the last push
        (the rule of W. Fu et al., "AReaL", 2025, section 4, with the batch size measured).
        """
        limit = (self._config.max_staleness or 0) + 1
        begun = sum(line.outstanding for line in self._ready.values())
        begun += len(self._arrivals) + self._delivered_since_push
        return max(0, self._per_version * limit - begun)

    # taking

    async def wait_for(self, num_steps: int | None, is_over: Callable[[], bool]) -> None:
        """Wait until ``num_steps`` are here, or ``is_over``; takes nothing. Safe to cancel.

        A round of the sync mode that has begun goes on by itself.

        Args:
            num_steps: Environment steps; ``None`` is one experience, which may have no steps.
            is_over: Whether waiting has become pointless.
        """
        demand = 1 if num_steps is None else num_steps
        self._demand += demand
        try:
            if num_steps is not None or self._is_pacing:  # one experience was granted already
                self.top_up()
            while not self._has(num_steps) and not is_over():
                self._begin_round()
                self._changed.clear()
                self._wanted.append(num_steps)
                try:
                    await self._changed.wait()
                finally:
                    self._wanted.remove(num_steps)
        finally:
            self._demand -= demand

    def _has(self, num_steps: int | None) -> bool:
        if self._is_dropping:
            self._drop_too_old()
        return bool(self._arrivals) if num_steps is None else self._steps_queued >= num_steps

    def _begin_round(self) -> None:
        """In sync mode, have every live worker collect one experience, unless they are at it."""
        if self._config.mode != "sync" or self._rounds_held:
            return
        if self._round is None and self._ready:
            self._round = Round(self._ready)
            for line in self._ready.values():
                line.grant(1)

    def _end_round_if_complete(self) -> None:
        """Put a complete round into the inbox, ordered by worker."""
        if self._round is not None and self._round.is_complete:
            complete, self._round = self._round, None
            for arrival in complete.batches():
                self._append(arrival)

    async def hold_rounds(self, is_over: Callable[[], bool]) -> None:
        """Let no round of the sync mode begin until ``release_rounds``; wait for the running one.

        When cancelled, rounds are not held.
        """
        self._rounds_held += 1
        try:
            while self._round is not None and not is_over():
                self._changed.clear()
                await self._changed.wait()
        except BaseException:
            self.release_rounds()
            raise

    def release_rounds(self) -> None:
        """Let rounds begin again; begin one at once if a caller waits for it."""
        self._rounds_held -= 1
        if self._wanted:
            self._begin_round()  # now: a caller that holds rounds in a loop leaves no other moment

    def take(self, num_steps: int | None = None) -> list[ExperienceBatch]:
        """Take what ``wait_for`` has found, oldest first, up to about ``num_steps``.

        Call it before the loop turns again. ``None`` takes all.
        """
        batches: list[ExperienceBatch] = []
        steps = 0
        while self._arrivals and (num_steps is None or steps < num_steps):
            batches.append(self._take_oldest())
            steps += batches[-1].num_steps
        return batches

    def take_one(self) -> ExperienceBatch | None:
        """Take the oldest one; ``None`` if nothing (fresh enough) is here."""
        return self._take_oldest() if self._has(None) else None

    def _take_oldest(self) -> ExperienceBatch:
        newest = self._newest if self._is_dropping else self._newest_version()
        batch = ExperienceBatch.of(self._pop(), newest)
        self.num_batches += 1
        self.num_steps += batch.num_steps
        self._delivered_since_push += 1
        self._top_up_one(batch.worker_id)
        return batch

    def _drop_too_old(self) -> None:
        """Discard experiences that are too stale, before any are counted or taken.

        A version may be published from a thread at any time; the experiences that are taken now
        are measured by the version that is read here.
        """
        self._newest = self._newest_version()
        oldest = self._newest - (self._config.max_staleness or 0)
        too_old = [one for one in self._arrivals if one.version < oldest]
        if too_old:
            self._arrivals = deque(one for one in self._arrivals if one.version >= oldest)
        for arrival in too_old:
            self._uncount(arrival)
            self.num_dropped += 1
            self._top_up_one(arrival.worker_id)

    def discard_all(self) -> None:
        """Give the memory of all experiences that have arrived back, unread."""
        while self._arrivals:
            self._pop()
        self._round = None

    # the inbox

    @property
    def num_steps_queued(self) -> int:
        """Environment steps that have arrived and were not taken."""
        return self._steps_queued

    @property
    def num_queued(self) -> int:
        """Experiences that have arrived and were not taken."""
        return len(self._arrivals)

    def num_queued_of(self, worker_id: int) -> int:
        """Experiences of one worker that have arrived and were not taken."""
        return self._queued[worker_id]

    def _append(self, arrival: PendingBatch) -> None:
        self._arrivals.append(arrival)
        self._queued[arrival.worker_id] += 1
        self._steps_queued += arrival.num_steps

    def _pop(self) -> PendingBatch:
        arrival = self._arrivals.popleft()
        self._uncount(arrival)
        return arrival

    def _uncount(self, arrival: PendingBatch) -> None:
        self._queued[arrival.worker_id] -= 1
        self._steps_queued -= arrival.num_steps

    def _drop_oldest_of(self, worker_id: int) -> None:
        for index, arrival in enumerate(self._arrivals):
            if arrival.worker_id == worker_id:
                del self._arrivals[index]
                self._uncount(arrival)
                self.num_dropped += 1
                return
