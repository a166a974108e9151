"""The shutdown ladder, and clean-up that is carried to its end."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from keisei.supervision import shutdown
from keisei.supervision.shutdown import to_completion, within
from supervision.fakes import FakeHandle, turn

FOREVER = 3600.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the fixed graces short; a grace that must not be waited for is ``FOREVER``."""
    monkeypatch.setattr(shutdown, "KILL_GRACE", 0.01)
    monkeypatch.setattr(shutdown, "HURRIED_GRACE", 0.01)


async def end(handle: FakeHandle, *, asks: bool = True, grace: float = 0.01, hurry=None) -> bool:
    def ask() -> bool:
        if asks:
            handle._call("ask")
        return asks

    async with asyncio.timeout(30):
        return await shutdown.end(handle, ask=ask, grace=grace, hurry=hurry or asyncio.Event())


# the ladder


async def test_a_process_that_hears_the_question_ends_by_itself():
    """Asked, it ends, and nothing more is done to it."""
    handle = FakeHandle(ask=0)
    assert await end(handle, grace=FOREVER)
    assert handle.calls == ["ask"]


async def test_a_process_that_is_deaf_gets_sigterm_then_sigkill():
    """Each rung is taken in its turn, as far as needed."""
    handle = FakeHandle(terminate=-15)
    assert await end(handle)
    assert handle.calls == ["ask", "terminate"]
    handle = FakeHandle(kill=-9)
    assert await end(handle)
    assert handle.calls == ["ask", "terminate", "kill"]


async def test_a_process_that_cannot_be_asked_gets_sigterm_at_once():
    """There is no grace for a question that nobody heard."""
    handle = FakeHandle(terminate=-15)
    assert await end(handle, asks=False, grace=FOREVER)
    assert handle.calls == ["terminate"]


async def test_a_process_that_nothing_ends_is_told_of():
    """The ladder is over in bounded time, and says that the process is not gone."""
    handle = FakeHandle()
    assert not await end(handle)
    assert handle.calls == ["ask", "terminate", "kill"]


async def test_a_process_that_is_gone_already_is_gone():
    """An end that came first is noticed at the first rung."""
    handle = FakeHandle()
    handle.exit()
    assert await end(handle, grace=FOREVER)


async def test_hurry_shortens_the_grace():
    """A second request leaves the rest of the rungs the short grace, not the long one."""
    handle, hurry = FakeHandle(kill=-9), asyncio.Event()
    ending = asyncio.create_task(end(handle, grace=FOREVER, hurry=hurry))
    await turn()
    assert handle.calls == ["ask"]
    hurry.set()
    assert await ending
    assert handle.calls == ["ask", "terminate", "kill"]


async def test_hurry_before_the_end_began_counts():
    """Whoever is in a hurry before has a short ladder from the first rung on."""
    hurry = asyncio.Event()
    hurry.set()
    assert await end(FakeHandle(kill=-9), grace=FOREVER, hurry=hurry)


async def test_hurry_lengthens_nothing(monkeypatch):
    """What is left of a grace stays when it is shorter than the hurried one."""
    monkeypatch.setattr(shutdown, "HURRIED_GRACE", FOREVER)
    hurry = asyncio.Event()
    hurry.set()
    assert await end(FakeHandle(kill=-9), grace=0.01, hurry=hurry)


async def test_a_process_that_ends_in_a_hurry_is_gone(monkeypatch):
    """There is a grace even then, and an end within it is enough."""
    monkeypatch.setattr(shutdown, "HURRIED_GRACE", FOREVER)
    handle, hurry = FakeHandle(), asyncio.Event()
    ending = asyncio.create_task(end(handle, grace=FOREVER, hurry=hurry))
    await turn()
    hurry.set()
    await turn()
    assert not ending.done()
    handle.exit()
    assert await ending
    assert handle.calls == ["ask"]


async def test_each_rung_has_its_own_grace(monkeypatch):
    """The question has all of it, SIGTERM a quarter more, and SIGKILL what a kill takes."""
    graces = []

    async def record(work, seconds: float, hurry: asyncio.Event | None = None) -> bool:
        work.close()
        graces.append((seconds, hurry is not None))
        return False

    monkeypatch.setattr(shutdown, "within", record)
    assert not await end(FakeHandle(), grace=8.0)
    assert graces == [(8.0, True), (2.0, True), (shutdown.KILL_GRACE, False)]


async def test_an_end_that_is_cancelled_leaves_no_task_behind():
    """Cancelled on any rung, the ladder is left at once."""
    handle = FakeHandle()
    ending = asyncio.create_task(end(handle, grace=FOREVER))
    await turn()
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_what_is_waited_for_is_cancelled_when_the_grace_is_over():
    """Work that is not shielded does not go on behind the caller's back."""
    event = asyncio.Event()
    waiting = asyncio.create_task(event.wait())
    assert not await within(waiting, 0.0)
    assert waiting.cancelled()


async def test_work_that_fails_is_done():
    """How the work ends does not matter to the wait."""

    async def fail() -> None:
        raise ValueError

    assert await within(fail(), FOREVER)


async def test_an_end_that_is_seen_together_with_the_end_of_the_grace_counts():
    """A loop that stood still meanwhile finds both in one turn."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    async def wait():
        await asyncio.shield(ended)

    def stand_still():
        until = loop.time() + 0.05
        while loop.time() < until:
            pass

    loop.call_later(0.02, ended.set_result, None)
    loop.call_soon(loop.call_soon, stand_still)
    assert await within(wait(), 0.02)


# to_completion


class Work:
    """Clean-up in two steps that the test lets go on."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.gates = [asyncio.Event(), asyncio.Event()]
        self.steps = 0

    async def __call__(self) -> str:
        for gate in self.gates:
            await gate.wait()
            self.steps += 1
        if self.error is not None:
            raise self.error
        return "done"

    async def go_on(self) -> None:
        for gate in self.gates:
            gate.set()
            await turn()


async def test_completed_work_returns_its_result():
    """Without a cancellation it is an await."""
    work = Work()
    running = asyncio.create_task(to_completion(work()))
    await work.go_on()
    assert await running == "done"


async def test_an_error_passes_through():
    """What the work raises is raised."""
    work = Work(ValueError("no"))
    running = asyncio.create_task(to_completion(work()))
    await work.go_on()
    with pytest.raises(ValueError, match=r"^no$"):
        await running


@pytest.mark.parametrize("times", [1, 2, 5])
async def test_a_cancelled_caller_is_cancelled_when_the_work_is_done(times):
    """However often it is cancelled: the work goes on to its end, and then the cancellation."""
    work = Work()
    running = asyncio.create_task(to_completion(work()))
    for _ in range(times):
        await turn()
        running.cancel("please")
    await turn()
    assert not running.done()
    await work.go_on()
    assert work.steps == 2
    with pytest.raises(asyncio.CancelledError, match="please"):
        await running


async def test_a_cancellation_before_the_first_step_is_held_off_too():
    """Work that has not begun is begun and done."""
    work = Work()
    started = asyncio.Event()

    async def caller() -> None:
        started.set()
        await to_completion(work())

    running = asyncio.create_task(caller())
    await started.wait()
    running.cancel()
    await work.go_on()
    assert work.steps == 2
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_an_error_of_cancelled_work_is_the_cause_of_the_cancellation():
    """The caller is cancelled, and can see why the work failed."""
    error = ValueError("no")
    work = Work(error)
    running = asyncio.create_task(to_completion(work()))
    await turn()
    running.cancel()
    await work.go_on()
    with pytest.raises(asyncio.CancelledError) as caught:
        await running
    assert caught.value.__cause__ is error


async def test_work_that_is_itself_cancelled_cancels_the_caller():
    """Somebody who ends every task of the loop does not leave the caller waiting."""
    event = asyncio.Event()
    running = asyncio.create_task(to_completion(event.wait()))
    await turn()
    for task in asyncio.all_tasks() - {asyncio.current_task(), running}:
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_timeout_strikes_when_the_work_is_done():
    """``asyncio.timeout`` around it is late, and no less a timeout."""
    work = Work()

    async def caller() -> None:
        async with asyncio.timeout(0):
            await to_completion(work())

    running = asyncio.create_task(caller())
    await turn()
    assert not running.done()
    await work.go_on()
    with pytest.raises(TimeoutError):
        await running
    assert work.steps == 2


async def test_an_anyio_scope_that_is_cancelled_waits_too():
    """Cancellation of an anyio scope around it is held off until the work is done."""
    work = Work()
    scope = anyio.CancelScope()
    results = []

    async def caller() -> None:
        with scope:
            results.append(await to_completion(work()))
            await anyio.lowlevel.checkpoint()
            results.append("went on")

    running = asyncio.create_task(caller())
    await turn()
    scope.cancel()
    await turn()
    assert not running.done()
    await work.go_on()
    await running
    assert results == ["done"]
    assert scope.cancelled_caught


async def test_an_anyio_scope_and_a_cancellation_at_once():
    """Both kinds together neither interrupt the work nor get lost."""
    work = Work()
    scope = anyio.CancelScope()

    async def caller() -> None:
        with scope:
            await to_completion(work())

    running = asyncio.create_task(caller())
    await turn()
    scope.cancel()
    running.cancel()
    await turn()
    assert not running.done()
    await work.go_on()
    assert work.steps == 2
    with pytest.raises(asyncio.CancelledError):
        await running
