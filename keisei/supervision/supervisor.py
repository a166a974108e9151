"""Keeps every slot filled: carries out what the pure machine decides.

One task per incarnation owns its whole life: start, wait for the end, read the queues to theirs,
classify, tell the machine. State is changed in ``_advance`` only.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from keisei import events
from keisei.config import ParallelConfig
from keisei.events import ExitCause, Incident, Remedy
from keisei.exceptions import PoolExhausted, WorkerStartError
from keisei.ipc.status import Phase, StatusLine
from keisei.supervision import machine, shutdown
from keisei.supervision.exits import LastWords, Verdict, classify
from keisei.supervision.machine import SlotStatus
from keisei.supervision.process import ProcessHandle
from keisei.supervision.watchdog import Observation, Watchdog


_DYING_TIME = 0.5
"""Seconds between the end of a queue and the end of the process that are not suspicious."""


class Crew(Protocol):
    """What the supervisor asks of the pool whose workers it supervises."""

    async def launch(self, worker_id: int, incarnation: int) -> ProcessHandle:
        """Make fresh queues and start a process on them."""
        ...

    def abort_launch(self) -> None:
        """Make a ``launch`` that takes too long fail."""
        ...

    def status(self, worker_id: int) -> StatusLine:
        """Return the line on which the slot's process says what it is doing."""
        ...

    def owes(self, worker_id: int) -> bool:
        """Return whether the slot's process has been given something to do."""
        ...

    def ask_to_stop(self, worker_id: int) -> bool:
        """Send the stop frame; return whether it could be sent."""
        ...

    def read_last_words(self, worker_id: int) -> LastWords:
        """Read the queues of the slot's ended process to their end."""
        ...

    def withdraw_weights(self, version: int, incident: Incident) -> None:
        """Put the weights before ``version`` back."""
        ...

    def on_lost(self, worker_id: int, incident: Incident | None) -> None:
        """Hear that the slot's process has ended; what was expected of it will not come."""
        ...

    def on_escalated(self, error: Exception) -> None:
        """Hear that the pool has failed for good."""
        ...

    def on_slot_closed(self, worker_id: int) -> None:
        """Hear that the slot will have no process any more."""
        ...


@dataclass(slots=True)
class Running:
    """One incarnation, as long as it has a task."""

    incarnation: int
    task: asyncio.Task[None] | None = None
    handle: ProcessHandle | None = None
    watchdog: Watchdog | None = None
    ended_for: tuple[ExitCause, str] | None = None
    stop_requested: asyncio.Event = field(default_factory=asyncio.Event)
    stacks: str = ""


class Supervisor:
    """Supervises the slots of one pool, in one event loop.

    Attributes:
        incidents: Every failure so far, oldest first.
        num_restarts: Processes started in the place of one that failed.
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
        self._random = random.Random()
        self._running: dict[int, Running] = {}
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

    def running(self, worker_id: int) -> Running | None:
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
        if running is not None and self.is_ready(worker_id):
            pid = running.handle.pid if running.handle is not None else None
            self._publish(events.WorkerReady(worker_id, incarnation, pid))

    def expect_progress(self, worker_id: int) -> None:
        """Hear that the slot's process was given something to do."""
        running = self._running.get(worker_id)
        if running is not None and running.watchdog is not None:
            running.watchdog.poke()

    def condemn(self, worker_id: int, cause: ExitCause, detail: str) -> None:
        """Kill a slot's process because it cannot be trusted any more; the policy follows."""
        running = self._running.get(worker_id)
        if running is not None and running.handle is not None and not running.handle.has_exited:
            if running.ended_for is None:
                running.ended_for = (cause, detail)
            running.handle.kill()

    def doubt(self, worker_id: int, detail: str) -> None:
        """Kill a slot's process that has closed a queue, unless it turns out to be dying."""
        running = self._running.get(worker_id)

        def decide() -> None:
            if self._running.get(worker_id) is running:
                self.condemn(worker_id, ExitCause.PROTOCOL, detail)

        asyncio.get_running_loop().call_later(_DYING_TIME, decide)

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
            if all(
                slot.status is SlotStatus.RUNNING or slot.status.is_terminal
                for slot in self._pool.slots.values()
            ):
                return
            await self._changed.wait()

    async def stop(self) -> None:
        """End every process and return when all are gone or abandoned.

        ``hurry`` shortens what is left of the grace.
        """
        self._advance(machine.Stopping())
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    def hurry(self) -> None:
        """Leave processes that are being ended two more seconds at most."""
        self._hurry.set()

    # the machine

    def _advance(self, happening: machine.Happening) -> list[machine.Action]:
        """Feed the machine and carry out what it decides."""
        self._pool, actions = machine.step(self._pool, happening, self._clock())
        for action in actions:
            match action:
                case machine.Spawn(worker_id, incarnation):
                    self._spawn(worker_id, incarnation)
                case machine.Schedule(worker_id, incarnation, delay):
                    due = machine.Due(worker_id, incarnation)
                    loop = asyncio.get_running_loop()
                    self._timers[worker_id] = loop.call_later(delay, self._advance, due)
                case machine.End(worker_id):
                    running = self._running[worker_id]
                    if running.ended_for is None:
                        running.ended_for = (ExitCause.REQUESTED, "")
                    running.stop_requested.set()
                case machine.Withdraw() | machine.GiveUp() | machine.Escalate():
                    pass  # these need the incident; ``_conclude`` carries them out
        if isinstance(happening, machine.Stopping):
            for timer in self._timers.values():
                timer.cancel()
            self._timers.clear()
        self._changed.set()
        return actions

    def _spawn(self, worker_id: int, incarnation: int) -> None:
        if self._timers.pop(worker_id, None) is not None or incarnation > 0:
            self.num_restarts += 1
        running = Running(incarnation)
        self._running[worker_id] = running
        running.task = asyncio.get_running_loop().create_task(
            self._live(worker_id, running), name=f"keisei-worker-{worker_id}.{incarnation}"
        )
        self._tasks.add(running.task)
        running.task.add_done_callback(self._tasks.discard)

    # one incarnation's life

    async def _live(self, worker_id: int, running: Running) -> None:
        launch_error: BaseException | None = None
        exitcode: int | None = None
        try:
            running.handle = await self._launch(worker_id, running)
            self._publish(
                events.WorkerStarted(worker_id, running.incarnation, running.handle.pid)
            )
            self._watch(worker_id, running)
            exitcode = await self._wait_for_end(worker_id, running)
        except Exception as error:
            launch_error = error
        finally:
            if running.watchdog is not None:
                running.watchdog.close()
        if running.handle is not None:
            running.handle.kill()  # what is left of its process group
        self._conclude(worker_id, running, exitcode, launch_error)

    async def _launch(self, worker_id: int, running: Running) -> ProcessHandle:
        launching = asyncio.ensure_future(self._crew.launch(worker_id, running.incarnation))
        done, _ = await asyncio.wait([launching], timeout=self._config.start_timeout)
        if not done:
            self._crew.abort_launch()
        return await launching

    async def _wait_for_end(self, worker_id: int, running: Running) -> int | None:
        handle = running.handle
        assert handle is not None
        exit_ = asyncio.ensure_future(handle.wait())
        stop = asyncio.ensure_future(running.stop_requested.wait())
        try:
            await asyncio.wait([exit_, stop], return_when="FIRST_COMPLETED")
            if not exit_.done():
                is_gone = await shutdown.end(
                    handle,
                    ask=lambda: self._is_past_start(worker_id) and self._crew.ask_to_stop(worker_id),
                    grace=self._config.shutdown_timeout,
                    hurry=self._hurry,
                )
                if not is_gone:
                    running.ended_for = (
                        ExitCause.ABANDONED,
                        f"process {handle.pid} is in state {handle.state()!r} and did not end "
                        "by SIGKILL",
                    )
                    return None
            return await exit_
        finally:
            exit_.cancel()
            stop.cancel()

    def _is_past_start(self, worker_id: int) -> bool:
        return self._crew.status(worker_id).phase is not Phase.START

    # hang detection

    def _watch(self, worker_id: int, running: Running) -> None:
        started = self._clock()
        status = self._crew.status(worker_id)

        def observe() -> Observation:
            if self._is_starting(worker_id, running):
                since = status.since if status.phase is Phase.START else 0.0
                return Observation(True, max(started, since), self._config.start_timeout)
            owes = self._crew.owes(worker_id) or status.phase not in (Phase.IDLE, Phase.TEARDOWN)
            return Observation(owes, status.since, self._config.collect_timeout)

        def suspect(stale: float) -> None:
            self._suspect(worker_id, running, status, stale)

        def hung(stale: float) -> None:
            assert running.handle is not None
            state = running.handle.state()
            detail = f"no progress in {status.phase.name.lower()} for {stale:.1f} s"
            if state:
                detail += f", process state {state!r}"
            self.condemn(worker_id, ExitCause.HANG, detail)

        running.watchdog = Watchdog(observe, on_suspect=suspect, on_hung=hung, clock=self._clock)
        running.watchdog.poke()

    def _is_starting(self, worker_id: int, running: Running) -> bool:
        slot = self._pool.slots[worker_id]
        return slot.status is SlotStatus.STARTING and slot.incarnation == running.incarnation

    def _suspect(
        self, worker_id: int, running: Running, status: StatusLine, stale: float
    ) -> None:
        handle = running.handle
        assert handle is not None
        phase = status.phase.name.lower()
        handle.dump_stacks()

        def tell() -> None:
            if self._running.get(worker_id) is running:
                running.stacks = handle.crash_report()
                self._publish(
                    events.WorkerSuspected(
                        worker_id, running.incarnation, phase, stale, running.stacks
                    )
                )

        # The dump is written by a signal handler within microseconds; one turn of a timer is
        # enough where the process runs at all, and a stopped one writes nothing anyway.
        asyncio.get_running_loop().call_later(0.05, tell)

    # the end of an incarnation

    def _conclude(
        self,
        worker_id: int,
        running: Running,
        exitcode: int | None,
        launch_error: BaseException | None,
    ) -> None:
        """Read what is left, classify, let the machine decide, and tell everybody."""
        words = self._crew.read_last_words(worker_id)
        was_ready = self._pool.slots[worker_id].ready_since is not None
        verdict = classify(
            words,
            exitcode=exitcode,
            was_ready=was_ready,
            ended_for=running.ended_for,
            launch_error=launch_error,
        )
        report = ""
        if running.handle is not None:
            report = running.handle.crash_report()
            running.handle.close()
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
            incident = self._incident(worker_id, running, verdict, words, exitcode, report)
            incident = replace(incident, remedy=self._remedy(actions), delay=_delay(actions))
            self.incidents.append(incident)
            self._crew.on_lost(worker_id, incident)
            self._publish(events.WorkerIncident(incident))
            self._carry_out(actions, incident)
        if self._pool.slots[worker_id].status.is_terminal:
            self._crew.on_slot_closed(worker_id)
        self._changed.set()

    def _incident(
        self,
        worker_id: int,
        running: Running,
        verdict: Verdict,
        words: LastWords,
        exitcode: int | None,
        report: str,
    ) -> Incident:
        return Incident(
            worker_id=worker_id,
            incarnation=running.incarnation,
            cause=verdict.cause,
            detail=verdict.detail,
            exitcode=exitcode,
            phase=words.phase,
            traceback=words.traceback or report or running.stacks or None,
            weights_version=words.version,
            experiences_lost=words.experiences_lost,
            commands_lost=words.commands_lost,
            monotonic=self._clock(),
            last_command=words.last_command,
            rss=words.rss or None,
        )

    def _remedy(self, actions: list[machine.Action]) -> Remedy:
        if any(isinstance(action, machine.Escalate) for action in actions):
            return Remedy.ESCALATED
        if any(isinstance(action, machine.GiveUp) for action in actions):
            return Remedy.GAVE_UP
        return Remedy.NONE if self._pool.is_stopping else Remedy.RESTARTED

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
        if self.failure is not None:
            return
        if incident.cause is ExitCause.START_FAILED and not self._pool.was_complete:
            self.failure = WorkerStartError(
                f"worker {incident.worker_id} could not start: {incident.detail}",
                incident.worker_id,
                incident.incarnation,
                incident.exitcode,
                incident.traceback,
            )
        else:
            self.failure = PoolExhausted(
                f"the pool has failed: {reason}; last: {incident.summary}", self.incidents
            )
        self._publish(events.PoolEscalated(incident))
        self._advance(machine.Stopping())
        self._crew.on_escalated(self.failure)


def _delay(actions: list[machine.Action]) -> float:
    return sum(action.delay for action in actions if isinstance(action, machine.Schedule))


__all__ = ["Crew", "Running", "Supervisor"]
