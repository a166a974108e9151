"""The supervisor on a real loop, with processes and a pool that do what the test says."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from typing import Any

import pytest

from keisei import events
from keisei.config import ParallelConfig
from keisei.events import ExitCause, Remedy
from keisei.exceptions import PoolExhausted, WorkerStartError
from keisei.ipc.status import Phase
from keisei.protocol import messages
from keisei.protocol.last_words import LastWords
from keisei.supervision import incarnation, shutdown, stalls
from keisei.supervision.slots import SlotStatus
from keisei.supervision.supervisor import Supervisor
from supervision.fakes import FakeHandle, FakePort, turn

FOREVER = 3600.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the fixed graces short, where a test has to wait for one."""
    monkeypatch.setattr(shutdown, "KILL_GRACE", 0.02)
    monkeypatch.setattr(shutdown, "HURRIED_GRACE", 0.02)
    monkeypatch.setattr(incarnation, "_DYING_TIME", 0.0)
    monkeypatch.setattr(stalls, "_DUMP_TIME", 0.0)


# By a signal, so that a test which waits in vain fails alone.
pytestmark = pytest.mark.timeout(30, method="signal")


class Scene:
    """A supervisor with its fake crew, and everything that it published."""

    def __init__(self, crew: FakePort, **config: Any) -> None:
        restart = {"backoff_base": 0.0, "backoff_cap": 0.0, **config.pop("restart", {})}
        values = {
            "num_workers": 1,
            "start_timeout": FOREVER,
            "collect_timeout": FOREVER,
            "command_timeout": FOREVER,
            "shutdown_timeout": FOREVER,
            **config,
        }
        self.crew = crew
        self.published: list[events.Event] = []
        self.supervisor = Supervisor(
            crew, ParallelConfig(**values, restart=restart), self.published.append
        )

    async def start(self, slots: int = 1) -> None:
        """Fill slots, and have every process say that it is ready."""
        for worker_id in range(slots):
            self.supervisor.add(worker_id)
        await turn()
        for worker_id in range(slots):
            await self.ready(worker_id)

    async def ready(self, worker_id: int = 0) -> None:
        self.crew.enter(worker_id, Phase.IDLE)
        self.crew.say(worker_id, messages.Ready(0, True))
        await turn()

    def handle(self, worker_id: int = 0) -> FakeHandle:
        running = self.supervisor.running(worker_id)
        assert running is not None
        assert isinstance(running.handle, FakeHandle)
        return running.handle

    def poke(self, worker_id: int = 0) -> None:
        """Tell the watchdog that a slot's process was given something to do."""
        self.supervisor.running(worker_id).on_work()

    def status(self, worker_id: int = 0) -> SlotStatus:
        return self.supervisor.slots[worker_id].status

    async def stop(self) -> None:
        """Stop, with processes that end when they are asked."""
        # A successor may be on its way.
        for reacts in (self.crew.reacts, *(handle.reacts for handle in self.crew.handles.values())):
            reacts.setdefault("ask", 0)
            reacts.setdefault("terminate", -15)
        await self.supervisor.stop()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    def told(self, name: str) -> list[tuple[object, ...]]:
        return [one for one in self.crew.told if one[0] == name]

    def kinds(self) -> list[str]:
        return [type(event).__name__ for event in self.published]


@pytest.fixture
def crew() -> Iterator[FakePort]:
    crew = FakePort()
    yield crew
    crew.close()


@pytest.fixture
def scene(crew: FakePort) -> Scene:
    return Scene(crew)


# an incarnation's life


async def test_the_life_of_a_pool(scene):
    """Slots are filled, told of as started and ready, asked to stop, and closed."""
    await scene.start(2)
    await scene.supervisor.wait_settled()
    assert scene.kinds() == ["WorkerStarted", "WorkerStarted", "WorkerReady", "WorkerReady"]
    assert scene.published[3] == events.WorkerReady(1, 0, 1000)
    scene.crew.words = {0: LastWords(said_goodbye=True), 1: LastWords(said_goodbye=True)}
    await scene.stop()
    assert scene.crew.launches == [(0, 0), (1, 0)]
    assert [handle.calls for handle in scene.crew.handles.values()] == [
        ["ask", "kill", "close"]
    ] * 2
    assert scene.published[4:] == [
        events.WorkerExited(0, 0, ExitCause.REQUESTED),
        events.WorkerExited(1, 0, ExitCause.REQUESTED),
    ]
    assert scene.told("on_slot_closed") == [("on_slot_closed", 0), ("on_slot_closed", 1)]
    assert scene.supervisor.incidents == []
    assert scene.supervisor.num_restarts == 0


async def test_a_dead_process_is_replaced(scene):
    """Its queues are read, an incident tells everything, and the next incarnation starts."""
    await scene.start()
    old = scene.handle()
    scene.crew.words[0] = LastWords(
        phase="collect",
        version=7,
        experiences_lost=1,
        commands_lost=2,
        last_command="evaluate",
        rss=2**20,
    )
    old.report = "Fatal Python error: Segmentation fault"
    old.exit(-11)
    await turn()
    assert old.calls == ["kill", "close"]
    assert scene.crew.launches == [(0, 0), (0, 1)]
    (incident,) = scene.supervisor.incidents
    assert (incident.worker_id, incident.incarnation, incident.exitcode) == (0, 0, -11)
    assert (incident.cause, incident.detail) == (ExitCause.SIGNAL, "SIGSEGV")
    assert (incident.phase, incident.weights_version) == ("collect", 7)
    assert (incident.experiences_lost, incident.commands_lost) == (1, 2)
    assert (incident.last_command, incident.rss) == ("evaluate", 2**20)
    assert incident.traceback == "Fatal Python error: Segmentation fault"
    assert (incident.remedy, incident.delay) == (Remedy.RESTARTED, 0.0)
    assert scene.kinds()[2:] == ["WorkerIncident", "WorkerStarted"]
    assert scene.supervisor.num_restarts == 1
    await scene.stop()


async def test_the_queues_are_read_before_the_next_process_is_launched(scene):
    """The last words of a process belong to it, not to its successor."""
    await scene.start()
    order = []
    read, launch = scene.crew.lines[0].read_to_the_end, scene.crew.launch
    scene.crew.lines[0].read_to_the_end = lambda: order.append("read") or read()
    scene.crew.launch = lambda line: order.append("launch") or launch(line)
    scene.handle().exit(1)
    await turn()
    assert order == ["read", "launch"]
    await scene.stop()


async def test_the_remote_traceback_goes_before_the_crash_report(scene):
    """What the worker told itself says more than what its crash handler wrote."""
    await scene.start()
    scene.crew.words[0] = LastWords(failure="ValueError: no", traceback="Traceback: no")
    scene.handle().report = "stacks"
    scene.handle().exit(1)
    await turn()
    (incident,) = scene.supervisor.incidents
    assert (incident.cause, incident.detail) == (ExitCause.USER_ERROR, "ValueError: no")
    assert incident.traceback == "Traceback: no"
    scene.crew.words.clear()
    await scene.stop()


async def test_a_recycled_worker_is_no_incident(scene):
    """A goodbye that asks for a successor gets one, and is published as an exit."""
    await scene.start()
    scene.crew.words[0] = LastWords(said_goodbye=True, recycle="it is worn out")
    scene.handle().exit(0)
    await turn()
    assert scene.crew.launches == [(0, 0), (0, 1)]
    assert scene.supervisor.incidents == []
    assert scene.supervisor.num_restarts == 1
    assert events.WorkerExited(0, 0, ExitCause.RECYCLED) in scene.published
    await scene.stop()


async def test_readiness_that_comes_before_the_launch_is_known_is_told_after_it(crew):
    """A worker may be ready before its starter knows of it; it is told of as started first."""
    launched = asyncio.Event()

    async def launch(worker_id: int, incarnation: int) -> FakeHandle:
        await launched.wait()
        return FakeHandle(55)

    crew._launch = launch
    scene = Scene(crew)
    scene.supervisor.add(0)
    await turn()
    await scene.ready()
    assert scene.supervisor.is_ready(0)
    assert scene.published == []
    settled = asyncio.create_task(scene.supervisor.wait_settled())
    await turn()
    assert not settled.done(), "its pid is not known yet"
    launched.set()
    await turn()
    assert settled.done()
    assert scene.published == [events.WorkerStarted(0, 0, 55), events.WorkerReady(0, 0, 55)]
    await scene.stop()


async def test_readiness_is_told_once(scene):
    """A worker that says so twice breaks the protocol, and is replaced."""
    assert not scene.supervisor.is_ready(0)
    scene.supervisor.add(0)
    await turn()
    assert not scene.supervisor.is_ready(0)
    await scene.ready()
    assert scene.supervisor.is_ready(0)
    await scene.ready()
    assert scene.kinds().count("WorkerReady") == 1
    assert scene.status() is SlotStatus.STARTING
    assert not scene.supervisor.is_ready(0)
    (incident,) = scene.supervisor.incidents
    assert incident.cause is ExitCause.PROTOCOL
    await scene.stop()


async def test_a_process_that_dies_before_it_is_ready_counts_as_a_failed_start(scene):
    """An exit code without a word is a failed start, and the next try follows."""
    scene.supervisor.add(0)
    await turn()
    scene.handle().exit(1)
    await turn()
    assert [one.cause for one in scene.supervisor.incidents] == [ExitCause.START_FAILED]
    assert scene.crew.launches == [(0, 0), (0, 1)]
    await scene.stop()


async def test_a_process_that_was_ready_in_its_last_words_was_ready(scene):
    """Readiness that is read only after the end makes it a crash of a running worker."""
    scene.supervisor.add(0)
    await turn()

    scene.crew.say(0, messages.Ready(0, True))
    scene.handle().exit(3)
    await turn()
    assert [one.cause for one in scene.supervisor.incidents] == [ExitCause.EXIT]
    await scene.stop()


# back-off


async def test_the_back_off_is_kept(crew):
    """The second failure in a row waits for its timer, and the incident tells how long."""
    scene = Scene(crew, restart={"backoff_base": FOREVER, "backoff_cap": FOREVER})
    scene.supervisor._random.random = lambda: 0.5
    await scene.start()
    scene.handle().exit(1)
    await turn()
    scene.handle().exit(1)
    await turn()
    assert scene.status() is SlotStatus.BACKOFF
    assert [one.delay for one in scene.supervisor.incidents] == [0.0, FOREVER / 2]
    assert scene.supervisor.running(0) is None
    assert len(crew.launches) == 2
    (timer,) = scene.supervisor._incarnations[0]._timers
    assert timer.when() - asyncio.get_running_loop().time() == pytest.approx(FOREVER / 2, abs=5)
    await scene.stop()
    assert timer.cancelled()
    assert scene.status() is SlotStatus.STOPPED


async def test_a_back_off_ends_by_itself(crew):
    """When the timer fires the next process starts."""
    scene = Scene(crew, restart={"backoff_base": 0.01, "backoff_cap": 0.01})
    relaunched = asyncio.Event()

    async def launch(worker_id: int, incarnation: int) -> FakeHandle:
        if incarnation == 2:
            relaunched.set()
        return FakeHandle(kill=-9)

    crew._launch = launch
    scene.supervisor._random.random = lambda: 0.9
    scene.supervisor.add(0)
    await turn()
    scene.handle().exit(1)
    await turn()
    scene.handle().exit(1)
    await relaunched.wait()
    assert scene.supervisor.num_restarts == 2
    await turn()
    await scene.stop()


# launches that fail


async def test_a_launch_that_raises_is_tried_again(crew):
    """What the system refuses is a failed start without a process, and nothing is read."""
    refusals = [OSError(errno.EMFILE, "Too many open files"), BlockingIOError("no room")]

    async def launch(worker_id: int, incarnation: int) -> FakeHandle:
        if refusals:
            raise refusals.pop(0)
        return FakeHandle(kill=-9)

    crew._launch = launch
    scene = Scene(crew)
    await scene.start()
    causes = [(one.cause, one.exitcode, one.phase) for one in scene.supervisor.incidents]
    assert causes == [(ExitCause.START_FAILED, None, "")] * 2
    assert "Too many open files" in scene.supervisor.incidents[0].detail
    assert crew.launches == [(0, 0), (0, 1), (0, 2)]
    assert scene.kinds() == ["WorkerIncident", "WorkerIncident", "WorkerStarted", "WorkerReady"]
    await scene.stop()


async def test_a_launch_that_can_only_fail_again_escalates_at_once(crew):
    """An error that is not the system's is not tried again at the first start."""

    async def launch(worker_id: int, incarnation: int) -> FakeHandle:
        raise AssertionError("daemonic processes are not allowed to have children")

    crew._launch = launch
    scene = Scene(crew)
    scene.supervisor.add(0)
    with pytest.raises(WorkerStartError, match="daemonic processes are not allowed"):
        await scene.supervisor.wait_settled()
    assert crew.launches == [(0, 0)]
    await scene.stop()


async def test_a_launch_that_takes_too_long_is_aborted(crew):
    """After ``start_timeout`` it is made to fail, and the start is tried again."""

    async def launch(worker_id: int, incarnation: int) -> FakeHandle:
        if incarnation == 0:
            await crew.aborted.wait()
            raise ChildProcessError("the fork server ended")
        return FakeHandle(kill=-9)

    crew._launch = launch
    scene = Scene(crew, start_timeout=0.01)
    scene.supervisor.add(0)
    await crew.aborted.wait()
    await turn()
    (incident,) = scene.supervisor.incidents
    assert incident.cause is ExitCause.START_FAILED
    assert "no process within start_timeout (0.01 s)" in incident.detail
    assert crew.launches == [(0, 0), (0, 1)]
    await scene.stop()


async def test_a_launch_that_cannot_be_aborted_is_left_behind(crew):
    """The slot goes on without it, and the process that it brings up in the end is killed."""
    late = FakeHandle(kill=-9)
    go_on = asyncio.Event()

    async def launch(worker_id: int, incarnation: int) -> FakeHandle:
        if incarnation == 0:
            await go_on.wait()
            return late
        return FakeHandle(kill=-9)

    crew._launch = launch
    scene = Scene(crew, start_timeout=0.01)
    scene.supervisor.add(0)
    await crew.aborted.wait()
    while len(crew.launches) < 2:
        await turn()
    assert late.calls == []
    go_on.set()
    await turn()
    assert late.calls == ["kill", "close"]
    assert scene.handle() is not late
    await scene.stop()


async def test_a_late_launch_that_fails_in_the_end_disturbs_nobody(crew):
    """The error of a launch that was left behind is nobody's."""
    go_on = asyncio.Event()

    async def launch(worker_id: int, incarnation: int) -> FakeHandle:
        if incarnation == 0:
            await go_on.wait()
            raise OSError("too late")
        return FakeHandle(kill=-9)

    crew._launch = launch
    scene = Scene(crew, start_timeout=0.01)
    scene.supervisor.add(0)
    while len(crew.launches) < 2:
        await turn()
    go_on.set()
    await turn()
    await scene.stop()


# stopping


async def test_a_pool_that_is_stopped_while_it_launches_waits_for_the_launch(crew):
    """The process that comes up is ended like any other, and nothing is leaked."""
    launched = asyncio.Event()
    handle = FakeHandle(terminate=-15)

    async def launch(worker_id: int, incarnation: int) -> FakeHandle:
        await launched.wait()
        return handle

    crew._launch = launch
    scene = Scene(crew)
    scene.supervisor.add(0)
    await turn()
    stopping = asyncio.create_task(scene.supervisor.stop())
    await turn()
    assert not stopping.done()
    launched.set()
    await stopping
    assert handle.calls == ["terminate", "kill", "close"]
    assert scene.supervisor.incidents == []
    assert scene.told("abort_launch") == []


async def test_a_pool_that_is_stopped_before_it_launches_launches_nothing(scene):
    """A slot whose task has not begun has no process to end."""
    scene.supervisor.add(0)
    await scene.supervisor.stop()
    assert scene.crew.launches == []
    assert scene.published == [events.WorkerExited(0, 0, ExitCause.REQUESTED)]


@pytest.mark.parametrize("hurried", [False, True])
async def test_a_pool_that_is_stopped_while_a_launch_hangs_aborts_it(crew, hurried):
    """The launch has the grace of a worker, which a second request shortens, and no more."""

    async def launch(worker_id: int, incarnation: int) -> FakeHandle:
        await crew.aborted.wait()
        raise ChildProcessError("the fork server ended")

    crew._launch = launch
    scene = Scene(crew, shutdown_timeout=FOREVER if hurried else 0.01)
    scene.supervisor.add(0)
    await turn()
    if hurried:
        scene.supervisor.hurry()
    await scene.supervisor.stop()
    assert scene.told("abort_launch") == [("abort_launch",)]
    assert scene.supervisor.incidents == []
    assert scene.status() is SlotStatus.STOPPED


async def test_a_pool_stops_though_a_launch_hangs_for_good(crew):
    """A launch that nothing moves is left behind, in bounded time."""
    never = asyncio.Event()

    async def launch(worker_id: int, incarnation: int) -> FakeHandle:
        await never.wait()
        return FakeHandle()

    crew._launch = launch
    scene = Scene(crew, shutdown_timeout=0.01)
    scene.supervisor.add(0)
    await turn()
    await scene.supervisor.stop()
    assert scene.status() is SlotStatus.STOPPED
    never.set()
    await turn()


async def test_a_process_that_starts_is_not_asked_but_terminated(scene):
    """A worker that imports or sets up would not hear the question, so it gets no grace."""
    scene.crew.reacts = {"terminate": -15}
    scene.supervisor.add(0)
    await turn()
    await scene.supervisor.stop()
    assert scene.crew.handles[0, 0].calls == ["terminate", "kill", "close"]
    assert scene.told("ask_to_stop") == []
    assert scene.supervisor.incidents == []


async def test_all_processes_are_ended_at_the_same_time(scene):
    """Nobody waits for the grace of another."""
    await scene.start(4)
    stopping = asyncio.create_task(scene.supervisor.stop())
    await turn()
    assert [handle.calls for handle in scene.crew.handles.values()] == [["ask"]] * 4
    for handle in scene.crew.handles.values():
        handle.exit(0)
    await stopping


async def test_hurry_shortens_an_end_that_is_under_way(scene):
    """Deaf workers are killed soon after the second request, not after the long grace."""
    await scene.start(2)
    stopping = asyncio.create_task(scene.supervisor.stop())
    await turn()
    scene.supervisor.hurry()
    await stopping
    assert [handle.calls for handle in scene.crew.handles.values()] == [
        ["ask", "terminate", "kill", "kill", "close"]
    ] * 2
    assert scene.supervisor.incidents == []


async def test_stopping_twice_is_stopping_once(scene):
    """Two who stop at the same time both return when all is gone, and so does a third later."""
    await scene.start()
    scene.handle().reacts["ask"] = 0
    await asyncio.gather(scene.supervisor.stop(), scene.supervisor.stop())
    await scene.supervisor.stop()
    assert scene.crew.handles[0, 0].calls.count("ask") == 1
    assert scene.kinds().count("WorkerExited") == 1


async def test_nothing_is_started_after_the_stop(scene):
    """A slot that is added too late stays unknown."""
    await scene.stop()
    scene.supervisor.add(0)
    await turn()
    assert scene.crew.launches == []
    assert scene.supervisor.slots == {}


async def test_a_crash_while_stopping_is_told_of(scene):
    """A worker that is asked to stop and segfaults instead makes an incident, and no successor."""
    await scene.start()
    scene.handle().reacts["ask"] = -11
    await scene.supervisor.stop()
    (incident,) = scene.supervisor.incidents
    assert (incident.cause, incident.remedy) == (ExitCause.SIGNAL, Remedy.NONE)
    assert scene.crew.launches == [(0, 0)]


async def test_a_process_that_cannot_be_killed_is_abandoned(scene):
    """The stop returns, the incident tells the process's state, and its handle is closed."""
    scene.crew.reacts = {}
    await scene.start()
    handle = scene.handle()
    handle.letter = "D"
    scene.supervisor.hurry()
    await scene.supervisor.stop()
    (incident,) = scene.supervisor.incidents
    assert (incident.cause, incident.remedy) == (ExitCause.ABANDONED, Remedy.NONE)
    assert incident.detail == "process 0 is in state 'D' and did not end by SIGKILL"
    assert incident.exitcode is None
    assert handle.calls[-1] == "close"
    assert scene.status() is SlotStatus.STOPPED
    handle.exit(-9)


# removing and adding


async def test_a_removed_slot_closes(scene):
    """Its process is asked, the others are not touched, and the slot is told of as closed."""
    await scene.start(2)
    scene.handle(1).reacts["ask"] = 0
    scene.supervisor.remove(1)
    await scene.supervisor.wait_settled()
    assert scene.status(1) is SlotStatus.STOPPED
    assert scene.told("on_slot_closed") == [("on_slot_closed", 1)]
    assert scene.handle(0).calls == []
    await scene.stop()


async def test_a_slot_that_is_added_again_while_its_process_ends(scene):
    """The old process is seen to its end first; the new one is no restart."""
    await scene.start(2)
    scene.supervisor.remove(1)
    await turn()
    scene.supervisor.add(1)
    await turn()
    assert scene.crew.launches == [(0, 0), (1, 0)]
    settled = asyncio.create_task(scene.supervisor.wait_settled())
    scene.crew.handles[1, 0].exit(0)
    await turn()
    assert scene.crew.launches == [(0, 0), (1, 0), (1, 1)]
    assert scene.told("on_slot_closed") == []
    assert not settled.done()
    await scene.ready(1)
    await settled
    assert scene.supervisor.num_restarts == 0
    await scene.stop()


async def test_an_incident_of_a_removed_slot_claims_no_restart(scene):
    """A teardown that raises is told of, and that nothing followed."""
    await scene.start(2)
    scene.crew.words[1] = LastWords(failure="ValueError: no")
    scene.handle(1).reacts["ask"] = 1
    scene.supervisor.remove(1)
    await scene.supervisor.wait_settled()
    (incident,) = scene.supervisor.incidents
    assert (incident.cause, incident.remedy) == (ExitCause.USER_ERROR, Remedy.NONE)
    await scene.stop()


# escalation


async def test_too_many_failures_end_the_pool(crew):
    """One more than allowed stops the others, and everybody who waits learns why."""
    scene = Scene(crew, num_workers=2, restart={"max_restarts": 1})
    await scene.start(2)
    scene.handle(0).exit(1)
    await turn()
    crew.handles[1, 0].reacts["ask"] = 0
    scene.handle(0).reacts["ask"] = 0
    scene.handle(0).exit(5)
    with pytest.raises(PoolExhausted, match="more than 1 failures in 60 s"):
        await scene.supervisor.wait_settled()
    await turn()
    first, last = scene.supervisor.incidents
    assert (first.remedy, last.remedy) == (Remedy.RESTARTED, Remedy.ESCALATED)
    assert scene.supervisor.failure.incidents == (first, last)
    assert scene.told("on_failed") == [("on_failed",)]
    assert events.PoolEscalated(last) in scene.published
    assert crew.handles[1, 0].calls == ["ask", "kill", "close"]
    assert crew.launches == [(0, 0), (1, 0), (0, 1)]
    await scene.stop()


async def test_a_first_start_that_raises_ends_the_pool_at_once(crew):
    """The error carries the worker, its exit code and its traceback."""
    scene = Scene(crew, num_workers=2)
    crew.reacts = {"terminate": -15}
    crew.words[1] = LastWords(failure="ValueError: no", traceback="Traceback: no", phase="start")
    scene.supervisor.add(0)
    scene.supervisor.add(1)
    await turn()
    crew.handles[1, 0].exit(1)
    with pytest.raises(
        WorkerStartError, match="worker 1 could not start: ValueError: no"
    ) as caught:
        await scene.supervisor.wait_settled()
    error = caught.value
    facts = (error.worker_id, error.incarnation, error.exitcode, error.remote_traceback)
    assert facts == (1, 0, 1, "Traceback: no")
    await turn()
    assert crew.handles[0, 0].calls == ["terminate", "kill", "close"]
    await scene.stop()


async def test_a_slot_is_given_up(crew):
    """With ``degrade`` the others go on, and the slot is closed."""
    scene = Scene(crew, num_workers=2, on_exhausted="degrade", restart={"max_restarts": 0})
    await scene.start(2)
    scene.handle(0).exit(1)
    await turn()
    await scene.supervisor.wait_settled()
    (incident,) = scene.supervisor.incidents
    assert incident.remedy is Remedy.GAVE_UP
    assert events.WorkerGivenUp(0, incident) in scene.published
    assert scene.told("on_slot_closed") == [("on_slot_closed", 0)]
    assert scene.supervisor.is_closed(0)
    assert scene.supervisor.is_ready(1)
    await scene.stop()


async def test_weights_that_kill_are_withdrawn(crew):
    """The crew is told the version and the incident that was one too many."""
    scene = Scene(crew, num_workers=2, poison_threshold=2)
    await scene.start(2)
    for worker_id in (0, 1):
        crew.words[worker_id] = LastWords(version=4, phase="load_weights")
        scene.handle(worker_id).exit(-11)
        await turn()
    assert scene.told("withdraw_weights") == [
        ("withdraw_weights", 0, 4, scene.supervisor.incidents[1])
    ]
    await scene.stop()


async def test_an_error_of_the_crew_ends_the_pool_and_is_not_hidden(crew):
    """Whatever goes wrong in supervision itself, the death is recorded and every wait ends."""
    scene = Scene(crew)
    await scene.start(2)

    def last_words() -> LastWords:
        raise ZeroDivisionError("a bug")

    scene.crew.lines[0].last_words = last_words
    settled = asyncio.create_task(scene.supervisor.wait_settled())
    scene.crew.handles[1, 0].reacts["ask"] = 0
    scene.handle(0).exit(1)
    await turn()
    await settled
    with pytest.raises(ZeroDivisionError, match="a bug"):
        await scene.supervisor.wait_settled()
    assert scene.told("on_failed") == [("on_failed",)]
    await scene.stop()


async def test_the_first_of_two_failures_is_the_one_that_is_raised(crew):
    """What fails because the pool has failed is not why it has; it is told once that it has."""
    scene = Scene(crew)
    await scene.start()
    scene.handle().reacts["ask"] = 0
    scene.supervisor.fail(ZeroDivisionError("the cause"))
    scene.supervisor.fail(KeyError("a consequence"))
    with pytest.raises(ZeroDivisionError, match="the cause"):
        await scene.supervisor.wait_settled()
    assert scene.told("on_failed") == [("on_failed",)]
    await scene.stop()


# hangs and doubts


@pytest.fixture
def hanging(crew: FakePort) -> Scene:
    """Return a scene in which half of the deadline is half a tenth of a second."""
    return Scene(crew, collect_timeout=0.1)


async def test_a_hung_worker_is_suspected_killed_and_replaced(hanging):
    """It is suspected with its stacks, and the incident has phase, state, stacks and successor."""
    await hanging.start()
    old = hanging.handle()
    old.dump, old.letter = "stack of the stall", "T"
    hanging.crew.enter(0, Phase.COLLECT)
    hanging.poke()
    while len(hanging.crew.launches) < 2:
        await turn()
    (suspected,) = [e for e in hanging.published if isinstance(e, events.WorkerSuspected)]
    assert (suspected.worker_id, suspected.incarnation, suspected.phase) == (0, 0, "collect")
    assert suspected.stacks == "stack of the stall"
    assert 0.05 <= suspected.seconds < 0.1
    (incident,) = hanging.supervisor.incidents
    assert incident.cause is ExitCause.HANG
    assert incident.detail.startswith("no progress in collect for 0.1 s")
    assert incident.detail.endswith(", process state 'T'")
    assert incident.traceback == "stack of the stall"
    assert old.calls == ["dump_stacks", "dump_all_stacks", "kill", "kill", "close"]
    await hanging.stop()


@pytest.mark.parametrize(
    ("code", "cause"), [(-11, ExitCause.HANG), (-9, ExitCause.HANG), (3, ExitCause.EXIT)]
)
async def test_a_hung_worker_that_dies_of_the_dump_was_hung(hanging, code, cause):
    """A signal that ends it after its deadline is the hang's; an exit of its own is not."""
    hanging.crew.reacts["dump_all_stacks"] = code
    await hanging.start()
    hanging.crew.enter(0, Phase.COLLECT)
    hanging.poke()
    while not hanging.supervisor.incidents:
        await turn()
    (incident,) = hanging.supervisor.incidents
    assert incident.cause is cause
    await hanging.stop()


async def test_a_worker_that_owes_nothing_may_be_idle_for_ever(hanging):
    """Idle without a duty there is no deadline, and no timer either."""
    await hanging.start()
    watchdog = hanging.supervisor.running(0)._watch._watchdog
    hanging.poke()
    while watchdog._timer is not None:
        await turn()
    assert hanging.published[2:] == []
    assert hanging.handle().calls == []
    await hanging.stop()


async def test_an_idle_worker_that_owes_something_hangs(hanging):
    """A duty that nobody takes up is a stall in the phase "idle"."""
    await hanging.start()
    hanging.crew.lines[0].grant(1)
    while not hanging.supervisor.incidents:
        await turn()
    assert "no progress in idle" in hanging.supervisor.incidents[0].detail
    await hanging.stop()


async def test_a_start_has_a_deadline_of_its_own(crew):
    """A process that never becomes ready is killed after ``start_timeout``, not before."""
    scene = Scene(crew, start_timeout=0.1, collect_timeout=0.001)
    scene.supervisor.add(0)
    await turn()
    while not scene.supervisor.incidents:
        await turn()
    incident = scene.supervisor.incidents[0]
    assert incident.cause is ExitCause.HANG
    assert incident.detail.startswith("no progress in start for 0.1 s")
    await scene.stop()


@pytest.mark.parametrize("phase", [Phase.COMMAND, Phase.LOAD_WEIGHTS])
async def test_a_command_may_take_as_long_as_commands_may(crew, phase):
    """The deadline of ``collect`` does not kill a worker in the middle of a longer command."""
    scene = Scene(crew, collect_timeout=0.01)
    await scene.start()
    crew.enter(0, phase)
    scene.poke()
    watchdog = scene.supervisor.running(0)._watch._watchdog
    assert watchdog._observe().deadline == FOREVER
    crew.enter(0, Phase.COLLECT)
    assert watchdog._observe().deadline == 0.01
    await scene.stop()


async def test_a_stall_that_was_overcome_is_not_why_it_died_later(crew):
    """The dump of an old stall does not appear as the traceback of an unrelated end."""
    scene = Scene(crew, collect_timeout=2.0)
    await scene.start()
    handle = scene.handle()
    handle.dump = "an old stall\n"
    scene.supervisor.running(0)._watch._dump(lambda: None, all_threads=False)
    await turn()
    handle.report += "Fatal Python error: Aborted"
    handle.exit(-6)
    await turn()
    assert scene.supervisor.incidents[0].traceback == "Fatal Python error: Aborted"
    handle = scene.handle()
    scene.supervisor.running(0)._watch._dump(lambda: None, all_threads=False)
    await turn()
    handle.exit(-9)
    await turn()
    assert scene.supervisor.incidents[1].traceback is None
    await scene.stop()


@pytest.mark.parametrize(
    ("dumps", "told"),
    [
        pytest.param(["stall", "end"], "end", id="it hung elsewhere in the end"),
        pytest.param(["stall", ""], "stall", id="it was stopped and could write no more"),
        pytest.param(["", ""], "late", id="it wrote late and no more"),
    ],
)
async def test_the_last_stacks_that_there_are_are_told(hanging, dumps, told):
    """They are asked for at half of the time, and once more at its end."""
    await hanging.start()
    old = hanging.handle()
    old.dumps = list(dumps)
    old.late = "late" if told == "late" else ""
    hanging.crew.enter(0, Phase.COLLECT)
    hanging.poke()
    while not hanging.supervisor.incidents:
        await turn()
    assert hanging.supervisor.incidents[0].traceback == told
    await hanging.stop()


async def test_the_incident_tells_the_last_lines_of_standard_error(scene):
    """They are read when the process has ended."""
    await scene.start()
    scene.handle().stderr = "out of paper\n"
    scene.handle().exit(1)
    await turn()
    assert scene.supervisor.incidents[0].stderr == "out of paper\n"
    await scene.stop()


async def test_a_condemned_process_is_killed_and_replaced(scene):
    """The incident has the cause and the detail that it was condemned for."""
    await scene.start()
    scene.supervisor.running(0).condemn(ExitCause.PROTOCOL, "a frame makes no sense")
    await turn()
    (incident,) = scene.supervisor.incidents
    assert (incident.cause, incident.detail) == (ExitCause.PROTOCOL, "a frame makes no sense")
    assert incident.exitcode == -9
    assert scene.crew.launches == [(0, 0), (0, 1)]
    await scene.stop()


async def test_a_process_that_is_condemned_while_it_is_launched_is_killed_then(crew):
    """The sentence waits for the process."""
    launched = asyncio.Event()

    async def launch(worker_id: int, incarnation: int) -> FakeHandle:
        if incarnation == 0:
            await launched.wait()
        return FakeHandle(kill=-9)

    crew._launch = launch
    scene = Scene(crew)
    scene.supervisor.add(0)
    await turn()
    scene.supervisor.running(0).condemn(ExitCause.PROTOCOL, "garbage")
    launched.set()
    await turn()
    assert [one.cause for one in scene.supervisor.incidents] == [ExitCause.PROTOCOL]
    assert crew.launches == [(0, 0), (0, 1)]
    await scene.stop()


async def test_a_condemned_process_that_cannot_be_killed_is_abandoned(scene):
    """The slot is not lost with it: after a bounded wait the next process starts."""
    scene.crew.reacts = {}
    await scene.start()
    stuck = scene.handle()
    stuck.letter = "D"
    scene.crew.reacts = {"kill": -9}
    scene.supervisor.running(0).condemn(ExitCause.HANG, "no progress")
    while len(scene.crew.launches) < 2:
        await turn()
    (incident,) = scene.supervisor.incidents
    assert (incident.cause, incident.remedy) == (ExitCause.ABANDONED, Remedy.RESTARTED)
    assert stuck.calls[-1] == "close"
    await turn()
    await scene.stop()
    stuck.exit(-9)


async def test_a_sentence_on_the_dead_changes_nothing(scene):
    """A process that has ended by itself is judged by its own end."""
    await scene.start()
    scene.handle().exit(7)
    scene.supervisor.running(0).condemn(ExitCause.HANG, "too late")
    await turn()
    assert [one.cause for one in scene.supervisor.incidents] == [ExitCause.EXIT]
    await scene.stop()


async def test_a_doubted_process_that_is_dying_dies_its_own_death(scene, monkeypatch):
    """The end of a queue shortly before the end of the process is not held against it."""
    monkeypatch.setattr(incarnation, "_DYING_TIME", 0.001)
    await scene.start()
    scene.supervisor.running(0).suspect_dying("a queue has ended")
    scene.handle().exit(-11)
    await turn()
    successor = scene.handle()
    decided = asyncio.Event()
    asyncio.get_running_loop().call_later(0.01, decided.set)
    await decided.wait()
    assert [one.detail for one in scene.supervisor.incidents] == ["SIGSEGV"]
    assert successor.calls == []
    await scene.stop()


async def test_a_doubted_process_that_lives_on_is_killed(scene):
    """A process without its queues is not left half dead."""
    await scene.start()
    scene.supervisor.running(0).suspect_dying("a queue has ended")
    while not scene.supervisor.incidents:
        await turn()
    (incident,) = scene.supervisor.incidents
    assert (incident.cause, incident.detail) == (ExitCause.PROTOCOL, "a queue has ended")
    await scene.stop()


async def test_somebody_ends_every_task_of_the_loop(crew):
    """Processes whose supervision is cancelled are killed, and their handles closed."""
    scene = Scene(crew)
    await scene.start(2)
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert [handle.calls for handle in scene.crew.handles.values()] == [["kill", "close"]] * 2
    assert scene.crew.launches == [(0, 0), (1, 0)]
