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
from typing import Protocol

from keisei import events
from keisei.config import ParallelConfig
from keisei.events import ExitCause, Incident, Remedy
from keisei.exceptions import PoolExhausted, WorkerStartError
from keisei.supervision import machine
from keisei.supervision.exits import LastWords, Verdict, classify
from keisei.supervision.incarnation import Incarnation, Launcher, Stall
from keisei.supervision.machine import SlotStatus
from keisei.supervision.process import ProcessHandle


class Crew(Launcher, Protocol):
    """What the supervisor asks of the pool whose workers it supervises."""

    def read_last_words(self, worker_id: int) -> LastWords:
        """Read the queues of the slot's ended process to their end."""
        ...

    def withdraw_weights(self, version: int, incident: Incident) -> None:
        """Put the weights before ``version`` back."""
        ...

    def on_lost(self, worker_id: int, incident: Incident | None) -> None:
        """Hear that the slot's process has ended; what was expected of it will not come."""
        ...

    def on_escalated(self) -> None:
        """Hear that the pool has failed for good."""
        ...

    def on_slot_closed(self, worker_id: int) -> None:
        """Hear that the slot will have no process any more."""
        ...


class Supervisor:
    """Supervises the slots of one pool, in one event loop.

    Attributes:
        incidents: Every failure so far, oldest first.
        num_restarts: Processes started in the place of one that failed or was recycled.
        failure: Why the pool has failed for good, if it has.
    """

    def __init__(
        self,
        crew: Crew,
        config: ParallelConfig,
        publish: Callable[[events.Event], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._crew = crew
        self._config = config
        self._publish = publish
        self._clock = clock
        self._random = random.Random()  # noqa: S311 - jitter is no secret
        self._running: dict[int, Incarnation] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._hurry = asyncio.Event()
        self._changed = asyncio.Event()
        self.incidents: list[Incident] = []
        self.num_restarts = 0
        self.failure: Exception | None = None
        self._pool = machine.Pool(
            policy=config.restart,
            min_workers=config.min_workers,
            degrade=config.on_exhausted == "degrade",
            poison_threshold=config.poison_threshold,
        )

    # what the pool asks

    @property
    def slots(self) -> Mapping[int, machine.Slot]:
        """Every slot's state, by worker id."""
        return self._pool.slots

    def running(self, worker_id: int) -> Incarnation | None:
        """Return the incarnation that the slot has now, or ``None``."""
        return self._running.get(worker_id)

    def is_closed(self, worker_id: int) -> bool:
        """Return whether the slot will have no process any more."""
        return self._pool.slots[worker_id].status.is_terminal

    def is_ready(self, worker_id: int) -> bool:
        """Return whether the slot's process has finished its start and was not asked to end."""
        slot = self._pool.slots.get(worker_id)
        return slot is not None and slot.status is SlotStatus.RUNNING

    def add(self, worker_id: int) -> None:
        """Fill a new slot."""
        self._advance(machine.Added(worker_id))

    def remove(self, worker_id: int) -> None:
        """End a slot's process in an orderly way and leave the slot empty."""
        self._advance(machine.Removed(worker_id))

    def readied(self, worker_id: int, incarnation: int) -> None:
        """Hear that a process has finished its start."""
        self._advance(machine.Readied(worker_id, incarnation))
        running = self._running.get(worker_id)
        if running is None or running.is_ready or running.incarnation != incarnation:
            return
        if self.is_ready(worker_id):
            running.is_ready = True
            if running.handle is not None:
                self._tell_ready(running)

    def _tell_ready(self, running: Incarnation) -> None:
        self._publish(events.WorkerReady(running.worker_id, running.incarnation, running.pid))

    def expect_progress(self, worker_id: int) -> None:
        """Hear that the slot's process was given something to do."""
        running = self._running.get(worker_id)
        if running is not None:
            running.expect_progress()

    def condemn(self, worker_id: int, cause: ExitCause, detail: str) -> None:
        """Kill a slot's process because it cannot be trusted any more; the policy follows."""
        running = self._running.get(worker_id)
        if running is not None:
            running.condemn(cause, detail)

    def doubt(self, worker_id: int, detail: str) -> None:
        """Kill a slot's process that has closed a queue, unless it turns out to be dying."""
        running = self._running.get(worker_id)
        if running is not None:
            running.doubt(detail)

    async def wait_settled(self) -> None:
        """Wait until every slot is running, given up or stopped.

        Raises:
            WorkerStartError: A worker's first start failed by an exception of its own.
            PoolExhausted: The restart policy was exceeded.
        """
        while True:
            self._changed.clear()
            if self.failure is not None:
                raise self.failure
            if all(self._is_settled(worker_id) for worker_id in self._pool.slots):
                return
            await self._changed.wait()

    def _is_settled(self, worker_id: int) -> bool:
        if self.is_ready(worker_id):
            return self._running[worker_id].handle is not None  # it may be ready before that
        return self.is_closed(worker_id)

    async def stop(self) -> None:
        """End every process and return when all are gone or abandoned.

        ``hurry`` shortens what is left of the grace.
        """
        self._advance(machine.Stopping())
        while self._tasks:
            await asyncio.wait(self._tasks)

    def hurry(self) -> None:
        """Leave processes that are being ended two more seconds at most."""
        self._hurry.set()

    # the machine

    def _advance(self, happening: machine.Happening) -> list[machine.Action]:
        """Feed the machine and carry out what it decides."""
        self._pool, actions = machine.step(self._pool, happening, self._clock())
        for action in actions:
            match action:
                case machine.Spawn(worker_id, incarnation, is_restart):
                    self.num_restarts += is_restart
                    self._spawn(worker_id, incarnation)
                case machine.Schedule(worker_id, incarnation, delay):
                    due = machine.Due(worker_id, incarnation)
                    loop = asyncio.get_running_loop()
                    self._timers[worker_id] = loop.call_later(delay, self._advance, due)
                case machine.End(worker_id):
                    self._running[worker_id].end()
                case machine.Withdraw() | machine.GiveUp() | machine.Escalate():
                    pass  # these need the incident; ``_conclude`` carries them out
        if isinstance(happening, machine.Stopping):
            for timer in self._timers.values():
                timer.cancel()
            self._timers.clear()
        self._changed.set()
        return actions

    def _spawn(self, worker_id: int, incarnation: int) -> None:
        running = Incarnation(
            worker_id, incarnation, self._crew, self._config, self._hurry, self._clock
        )
        self._running[worker_id] = running
        task = asyncio.get_running_loop().create_task(
            self._see_through(running), name=f"keisei-worker-{worker_id}.{incarnation}"
        )
        self._tasks.add(task)
        task.add_done_callback(self._on_seen_through)

    def _on_seen_through(self, task: asyncio.Task[None]) -> None:
        """Let no error of our own end supervision in silence."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            self._fail(error)

    # one incarnation, from its start to its end

    async def _see_through(self, running: Incarnation) -> None:
        exitcode: int | None = None
        launch_error: Exception | None = None
        try:
            handle = await running.start()
        except Exception as error:  # noqa: BLE001 - whatever it is, the policy decides about it
            launch_error, handle = error, None
        try:
            if handle is not None:
                self._on_started(running, handle)
                exitcode = await running.wait_gone(handle)
        except asyncio.CancelledError:
            running.close()  # somebody ends the whole loop; the process has been killed
            raise
        self._conclude(running, exitcode, launch_error)

    def _on_started(self, running: Incarnation, handle: ProcessHandle) -> None:
        worker_id, number = running.worker_id, running.incarnation
        self._changed.set()
        self._publish(events.WorkerStarted(worker_id, number, running.pid))
        if running.is_ready:  # its own word came first
            self._tell_ready(running)

        def on_stall(stall: Stall) -> None:
            self._publish(
                events.WorkerSuspected(worker_id, number, stall.phase, stall.seconds, stall.stacks)
            )

        running.watch(handle, on_stall)

    def _conclude(
        self, running: Incarnation, exitcode: int | None, launch_error: Exception | None
    ) -> None:
        """Read what is left, classify, let the machine decide, and tell everybody."""
        worker_id = running.worker_id
        words = LastWords()
        if running.handle is not None:
            words = self._crew.read_last_words(worker_id)
        verdict = classify(
            words,
            exitcode=exitcode,
            was_ready=running.is_ready,
            ended_for=running.ended_for,
            launch_error=launch_error,
        )
        report, stderr = running.crash_report(), running.stderr_tail()
        running.close()
        del self._running[worker_id]
        actions = self._advance(
            machine.Exited(
                worker_id,
                running.incarnation,
                verdict.cause,
                jitter=self._random.random(),
                version=words.version if verdict.blames_weights else 0,
                raised=verdict.raised and verdict.cause is ExitCause.START_FAILED,
            )
        )
        if not verdict.cause.is_failure:
            self._crew.on_lost(worker_id, None)
            self._publish(events.WorkerExited(worker_id, running.incarnation, verdict.cause))
        else:
            incident = self._incident(running, verdict, words, exitcode, report, stderr)
            incident = replace(
                incident, remedy=self._remedy(worker_id, actions), delay=_delay(actions)
            )
            self.incidents.append(incident)
            self._crew.on_lost(worker_id, incident)
            self._publish(events.WorkerIncident(incident))
            self._carry_out(actions, incident)
        if self.is_closed(worker_id):
            self._crew.on_slot_closed(worker_id)
        self._changed.set()

    def _incident(
        self,
        running: Incarnation,
        verdict: Verdict,
        words: LastWords,
        exitcode: int | None,
        report: str,
        stderr: str,
    ) -> Incident:
        return Incident(
            worker_id=running.worker_id,
            incarnation=running.incarnation,
            cause=verdict.cause,
            detail=verdict.detail,
            exitcode=exitcode,
            phase=words.phase,
            traceback=words.traceback or report or None,
            weights_version=words.version,
            experiences_lost=words.experiences_lost,
            commands_lost=words.commands_lost,
            monotonic=self._clock(),
            last_command=words.last_command,
            rss=words.rss or None,
            stderr=stderr,
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
                case machine.Withdraw(version):
                    self._crew.withdraw_weights(version, incident)
                case machine.GiveUp(worker_id):
                    self._publish(events.WorkerGivenUp(worker_id, incident))
                case machine.Escalate(_, reason):
                    self._escalate(incident, reason)
                case _:
                    pass  # carried out by ``_advance``

    def _escalate(self, incident: Incident, reason: str) -> None:
        failure: Exception
        if incident.cause is ExitCause.START_FAILED and not self._pool.was_complete:
            failure = WorkerStartError(
                f"worker {incident.worker_id} could not start: {incident.detail}",
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
        self._fail(failure)

    def _fail(self, failure: Exception) -> None:
        if self.failure is None:
            self.failure = failure
            self._advance(machine.Stopping())
            self._crew.on_escalated()


def _delay(actions: list[machine.Action]) -> float:
    return sum(action.delay for action in actions if isinstance(action, machine.Schedule))


__all__ = ["Crew", "Incarnation", "Supervisor"]
