"""Keeps every slot filled: carries out what the pure machine decides.

One task per incarnation sees it through: start, wait for the end, read the queues to theirs,
classify, tell the machine. State is changed in ``_advance`` only.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from keisei import events
from keisei.config import ParallelConfig
from keisei.events import ExitCause, Incident, Remedy
from keisei.exceptions import PoolExhausted, WorkerLost, WorkerStartError
from keisei.protocol.last_words import LastWords
from keisei.supervision import machine
from keisei.supervision.exits import Verdict, classify
from keisei.supervision.incarnation import Incarnation, PoolPort
from keisei.supervision.line_view import LineView
from keisei.supervision.process import ProcessHandle
from keisei.supervision.slots import Slot, SlotStatus, SlotTable
from keisei.supervision.stalls import Stall


class Supervisor:
    """Supervises the slots of one pool, in one event loop.

    Attributes:
        incidents: Every failure so far, oldest first.
        num_restarts: Processes started in the place of one that failed or was recycled.
        failure: Why the pool has failed for good, if it has.
        lines: The lines of all processes that are starting, ready or ending, by worker id; a view
            that is always as it is now.
        ready: The lines of workers that are ready; a view too.
    """

    def __init__(
        self,
        port: PoolPort,
        config: ParallelConfig,
        publish: Callable[[events.Event], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._port = port
        self._config = config
        self._publish = publish
        self._clock = clock
        self._random = random.Random()  # noqa: S311 - jitter is no secret
        self._incarnations: dict[int, Incarnation] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._hurry = asyncio.Event()
        self._changed = asyncio.Event()
        self.incidents: list[Incident] = []
        self.num_restarts = 0
        self.failure: Exception | None = None
        self.lines = LineView(self._incarnations, lambda _: True)
        self.ready = LineView(self._incarnations, self.is_ready)
        self._table = SlotTable(
            policy=config.restart,
            min_workers=config.min_workers,
            degrade=config.on_exhausted == "degrade",
            poison_threshold=config.poison_threshold,
        )

    # what the pool asks

    @property
    def slots(self) -> Mapping[int, Slot]:
        """Every slot's state, by worker id."""
        return self._table.slots

    def running(self, worker_id: int) -> Incarnation | None:
        """Return the incarnation that the slot has now, or ``None``."""
        incarnation = self._incarnations.get(worker_id)
        return None if incarnation is None or incarnation.is_gone else incarnation

    def is_closed(self, worker_id: int) -> bool:
        """Return whether the slot will have no process any more."""
        return self._table.slots[worker_id].status.is_terminal

    def is_ready(self, worker_id: int) -> bool:
        """Return whether the slot's process has finished its start and was not asked to end."""
        slot = self._table.slots.get(worker_id)
        return slot is not None and slot.status is SlotStatus.RUNNING

    def add(self, worker_id: int) -> None:
        """Fill a new slot."""
        self._advance(machine.Added(worker_id))

    def remove(self, worker_id: int) -> None:
        """End a slot's process in an orderly way and leave the slot empty."""
        self._advance(machine.Removed(worker_id))

    def restart(self, worker_id: int) -> None:
        """Have a new process take the place of the slot's present one."""
        self._advance(machine.Replaced(worker_id))

    async def wait_settled(self) -> None:
        """Wait until every slot is running, given up or stopped.

        Raises:
            WorkerStartError: A worker's first start failed by an exception of its own.
            PoolExhausted: The restart policy was exceeded.
        """
        await self.wait_until(lambda: all(map(self.is_settled, self._table.slots)))

    async def wait_until(self, is_reached: Callable[[], bool]) -> None:
        """Wait until the slots are as wanted; raises as ``wait_settled``."""
        while True:
            self._changed.clear()
            if self.failure is not None:
                raise self.failure
            if is_reached():
                return
            await self._changed.wait()

    def is_settled(self, worker_id: int) -> bool:
        """Return whether the slot is running, given up or stopped."""
        if self.is_ready(worker_id):
            return self._incarnations[worker_id].handle is not None  # it may be ready before that
        return self.is_closed(worker_id)

    async def stop(self) -> None:
        """End every process and return when all are gone or abandoned.

        ``hurry`` shortens the rest of the grace.
        """
        self._advance(machine.Stopping())
        while self._tasks:
            await asyncio.wait(self._tasks)

    def hurry(self) -> None:
        """Leave processes that are being ended two more seconds at most."""
        self._hurry.set()

    def kill_all(self) -> None:
        """Kill every process at once and give back what they held; works on a closed loop too."""
        self._table = replace(self._table, is_stopping=True)
        for one in self._incarnations.values():
            if one.handle is not None and not one.is_gone:
                one.handle.kill()
            one.conclude(_lost(one, "its pool was dropped"))

    def fail(self, failure: Exception) -> None:
        """Stop the pool for good, because of an error that is no worker's fault."""
        if self.failure is None:
            self.failure = failure
            self._advance(machine.Stopping())
            self._port.on_failed()

    # the machine

    def _advance(self, event: machine.Event) -> list[machine.Action]:
        """Feed the machine and carry out what it decides."""
        self._table, actions = machine.step(self._table, event, self._clock())
        for action in actions:
            match action:
                case machine.Spawn(worker_id, incarnation, is_restart):
                    self.num_restarts += is_restart
                    self._spawn(worker_id, incarnation)
                case machine.Schedule(worker_id, incarnation, delay):
                    due = machine.Due(worker_id, incarnation)
                    self._incarnations[worker_id].later(delay, self._advance, due)
                case machine.End(worker_id, is_replaced):
                    self._incarnations[worker_id].end(is_replaced=is_replaced)
                case machine.Withdraw() | machine.GiveUp() | machine.Escalate():
                    pass  # these need the incident; ``_conclude`` carries them out
        if isinstance(event, machine.Stopping):
            for one in self._incarnations.values():
                if one.is_gone:
                    one.stop_watching()  # the end of a back-off
        self._changed.set()
        return actions

    def _spawn(self, worker_id: int, number: int) -> None:
        one = Incarnation(
            worker_id,
            number,
            self._port,
            self._config,
            self._hurry,
            owner=self,
            clock=self._clock,
        )
        self._incarnations[worker_id] = one
        task = asyncio.get_running_loop().create_task(
            self._see_through(one), name=f"keisei-worker-{worker_id}.{number}"
        )
        self._tasks.add(task)
        task.add_done_callback(self._on_seen_through)

    def _on_seen_through(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() and not self._tasks:
            self._port.on_cancelled()

    # one incarnation, from its start to its end

    async def _see_through(self, one: Incarnation) -> None:
        exitcode: int | None = None
        launch_error: Exception | None = None
        try:
            try:
                handle = await one.start()
            except Exception as error:  # noqa: BLE001 - whatever it is, the policy decides about it
                launch_error, handle = error, None
            if handle is not None:
                self._on_started(one, handle)
                exitcode = await one.wait_gone(handle)
            if not one.is_gone:
                await self._conclude(one, exitcode, launch_error)
        except Exception as error:  # noqa: BLE001 - no error of our own may end supervision silently
            self._on_own_error(one, exitcode, error)
        finally:
            one.conclude(_lost(one, "its supervision was cancelled"))

    def _on_started(self, one: Incarnation, handle: ProcessHandle) -> None:
        worker_id, number = one.worker_id, one.number
        self._changed.set()
        self._publish(events.WorkerStarted(worker_id, number, one.pid))
        if self.is_ready(worker_id):  # its own word came first
            self._publish(events.WorkerReady(worker_id, number, one.pid))

        def on_stall(stall: Stall) -> None:
            self._publish(
                events.WorkerSuspected(
                    worker_id, number, stall.phase, stall.seconds, stall.stacks, stall.state
                )
            )

        one.watch(handle, on_stall)

    def on_ready(self, incarnation: Incarnation) -> None:
        """Called when a worker has finished its start: it may be given work from now on."""
        worker_id, number = incarnation.worker_id, incarnation.number
        self._advance(machine.Readied(worker_id, number))
        if incarnation.line is not None and self.is_ready(worker_id):
            if incarnation.handle is not None:
                self._publish(events.WorkerReady(worker_id, number, incarnation.pid))
            self._port.on_ready(incarnation.line)

    async def _conclude(
        self, one: Incarnation, exitcode: int | None, launch_error: Exception | None
    ) -> None:
        """Drain the line, classify the exit, let the machine decide, and report the incident."""
        words = await one.read_to_the_end()
        verdict = classify(
            words,
            exitcode=exitcode,
            was_ready=one.said_ready,
            ended_for=one.ended_for,
            launch_error=launch_error,
        )
        incident = self._incident(one, verdict, words, exitcode)
        one.stop_watching()  # before a back-off begins to count
        worker_id = one.worker_id
        number, version = words.suspected or (0, words.version)
        actions = self._advance(
            machine.Exited(
                worker_id,
                one.number,
                verdict.cause,
                jitter=self._random.random(),
                version=version if verdict.blames_weights else 0,
                weights=number,
                raised=verdict.raised and verdict.cause is ExitCause.START_FAILED,
                raised_at_first=verdict.raised and _is_at_its_first(words),
            )
        )
        if incident is not None:
            incident = replace(
                incident, remedy=self._remedy(worker_id, actions), delay=_delay(actions)
            )
            self.incidents.append(incident)
        one.give_back(_lost(one, "it has ended", incident))
        if incident is None:
            self._publish(events.WorkerExited(worker_id, one.number, verdict.cause))
        else:
            self._publish(events.WorkerIncident(incident))
            self._carry_out(actions, incident)
        self._close_if_terminal(worker_id)

    def _on_own_error(self, one: Incarnation, exitcode: int | None, error: Exception) -> None:
        """Handle a death all the same when handling it has failed, and fail the pool for it."""
        detail = f"the pool failed to handle its end: {type(error).__name__}: {error}"
        incident = Incident(
            one.worker_id,
            one.number,
            ExitCause.LOST,
            detail=detail,
            exitcode=exitcode,
            remedy=Remedy.ESCALATED,
            monotonic=self._clock(),
        )
        if one.handle is not None:
            one.handle.kill()
        one.conclude(_lost(one, detail, incident))
        self.fail(error)  # first: nothing is started in the place of this one
        self._advance(machine.Exited(one.worker_id, one.number, ExitCause.LOST))
        known = any(
            (one.worker_id, one.number) == (known.worker_id, known.incarnation)
            for known in self.incidents
        )
        if not known:
            self.incidents.append(incident)
            self._publish(events.WorkerIncident(incident))
        self._close_if_terminal(one.worker_id)

    def _close_if_terminal(self, worker_id: int) -> None:
        if self.is_closed(worker_id):
            self._port.on_slot_closed(worker_id)
        self._changed.set()

    def _incident(
        self, one: Incarnation, verdict: Verdict, words: LastWords, exitcode: int | None
    ) -> Incident | None:
        """Return the record of a failure, ``None`` for an end that is none."""
        if not verdict.cause.is_failure:
            return None
        return Incident(
            worker_id=one.worker_id,
            incarnation=one.number,
            cause=verdict.cause,
            detail=verdict.detail,
            exitcode=exitcode,
            phase=words.phase,
            traceback=words.traceback or one.crash_report() or None,
            weights_version=words.version,
            experiences_lost=words.experiences_lost,
            commands_lost=words.commands_lost,
            monotonic=self._clock(),
            last_command=words.last_command,
            rss=words.rss or None,
            stderr=one.stderr_tail(),
        )

    def _remedy(self, worker_id: int, actions: list[machine.Action]) -> Remedy:
        if any(isinstance(action, machine.Escalate) for action in actions):
            return Remedy.ESCALATED
        if any(isinstance(action, machine.GiveUp) for action in actions):
            return Remedy.GAVE_UP
        return Remedy.NONE if self.is_closed(worker_id) else Remedy.RESTARTED

    def _carry_out(self, actions: list[machine.Action], incident: Incident) -> None:
        for action in actions:
            match action:
                case machine.Withdraw(version, number):
                    self._port.withdraw_weights(number, version, incident)
                case machine.GiveUp(worker_id):
                    self._publish(events.WorkerGivenUp(worker_id, incident))
                case machine.Escalate(_, reason):
                    self._escalate(incident, reason)
                case _:
                    pass  # carried out by ``_advance``

    def _escalate(self, incident: Incident, reason: str) -> None:
        failure: Exception
        is_first_start = incident.cause is ExitCause.START_FAILED and not self._table.was_complete
        if is_first_start or reason == machine.FIRST_EXPERIENCE:
            what = "could not start" if is_first_start else "failed in its first collect()"
            failure = WorkerStartError(
                f"worker {incident.worker_id} {what}: {incident.detail}",
                incident.worker_id,
                incident.incarnation,
                incident.exitcode,
                incident.traceback or incident.stderr or None,
            )
        else:
            failure = PoolExhausted(
                f"the pool has failed: {reason}; last: {incident.summary}", self.incidents
            )
        self._publish(events.PoolEscalated(incident))
        self.fail(failure)


def _is_at_its_first(words: LastWords) -> bool:
    """Return whether a process ended in its first ``collect``, and had no weights to blame."""
    return words.phase == "collect" and words.delivered == 0 and words.version <= 1


def _lost(one: Incarnation, why: str, incident: Incident | None = None) -> WorkerLost:
    what = incident.summary if incident is not None else why
    return WorkerLost(
        f"worker {one.worker_id} was lost: {what}",
        one.worker_id,
        one.number,
        incident.exitcode if incident is not None else 0,
        incident.traceback if incident is not None else None,
    )


def _delay(actions: list[machine.Action]) -> float:
    return sum(action.delay for action in actions if isinstance(action, machine.Schedule))


__all__ = ["Supervisor"]
