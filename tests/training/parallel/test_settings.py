"""configure(): settings reach every process that fills a slot, and batches name them."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from functools import partial

import pytest
import torch

import settings_workers
from keisei.events import SettingsChanged, SettingsRefused
from keisei.exceptions import (
    CommandError,
    CommandTimeout,
    ManagerStateError,
    SerializationError,
)
from keisei.testing.failpoints import Failpoint, Gate, armed, kill
from keisei.testing.scenarios import fail_after, next_event
from settings_workers import Set, SetByCoroutines

BACKENDS = pytest.mark.parametrize("backend", ["local", "inline"])
WORKERS = pytest.mark.parametrize("worker", [Set, SetByCoroutines])


def told(batch):
    return batch.settings_version, batch.info["settings"]


async def next_of(manager, worker_id, incarnation):
    """Return the first batch of a slot's process that comes from now on."""
    while True:
        for batch in await manager.collect():
            if (batch.worker_id, batch.incarnation) == (worker_id, incarnation):
                return batch


@BACKENDS
@WORKERS
async def test_what_is_collected_after_configure_has_the_settings(make_manager, backend, worker):
    """They are merged by name; no later batch of the worker has those before."""
    async with (
        fail_after(30),
        make_manager(worker, backend=backend, settings={"a": 0, "b": 0}) as manager,
    ):
        assert told((await manager.collect())[0]) == (0, {"a": 0, "b": 0})
        assert await manager.configure({"a": 1}) == 1
        assert await manager.configure({"c": 2}, [1]) == 2
        assert manager.settings_version == 2
        await manager.pause()
        while manager.stats().num_queued:
            await manager.collect()
        await manager.resume()
        for worker_id, expected in ((0, (1, {"a": 1, "b": 0})), (1, (2, {"a": 1, "b": 0, "c": 2}))):
            assert told(await next_of(manager, worker_id, 0)) == expected
            assert manager.settings_of(worker_id) == expected[1]
            assert await manager.send_command("context", worker_ids=[worker_id]) == {
                worker_id: expected[1]
            }


@BACKENDS
async def test_each_worker_may_begin_with_its_own(make_manager, backend):
    """A callable is asked for each slot, also for one that is added; settings are in setup."""
    begin = lambda worker_id: {"env": f"level-{worker_id}"}  # noqa: E731 - short, and not sent
    async with fail_after(30), make_manager(Set, backend=backend, settings=begin) as manager:
        await manager.configure({"speed": 2})
        await manager.configure({"env": "special"}, [0])
        await manager.scale(3)
        found = told(await next_of(manager, 2, 0))
        assert found == (1, {"env": "level-2", "speed": 2})
        assert await manager.send_command("heard", worker_ids=[2]) == {2: []}
        assert manager.settings_of(0) == {"env": "special", "speed": 2}


@BACKENDS
async def test_a_replacement_begins_with_the_settings(make_manager, backend):
    """What was sent to the process before it is there in setup, and no change is told."""
    async with fail_after(30), make_manager(Set, backend=backend, settings={"x": 0}) as manager:
        await manager.configure({"level": 3})
        await manager.configure({"level": 4}, [1])
        manager._pool.supervisor.running(1).handle.kill()
        assert told(await next_of(manager, 1, 1)) == (2, {"x": 0, "level": 4})
        assert await manager.send_command("heard", worker_ids=[1]) == {1: []}


@pytest.mark.parametrize("place", ["configure", "collect"])
async def test_a_worker_that_dies_meanwhile_counts_as_done(make_manager, place):
    """Configure returns, and what takes its place begins with the settings."""
    worker = armed(Set, Failpoint(place, kill, worker_id=0, hit=1))
    async with fail_after(30), make_manager(worker, num_workers=1) as manager:
        assert await manager.configure({"level": 3}) == 1
        assert told(await next_of(manager, 0, 1)) == (1, {"level": 3})
        if place == "configure":
            assert [incident.phase for incident in manager.incidents] == ["configure"]


@WORKERS
async def test_it_waits_for_what_is_being_collected(make_manager, worker):
    """Settings change between two collects, and only then has the worker taken them."""
    with Gate() as gate:
        async with (
            fail_after(30),
            make_manager(partial(worker, gate), num_workers=1, settings={"a": 0}) as manager,
        ):
            visitor = await gate.visitor()
            configuring = asyncio.create_task(manager.configure({"a": 1}))
            await asyncio.wait([configuring], timeout=0.05)
            assert not configuring.done()
            visitor.release()
            assert await configuring == 1
            assert told((await manager.collect())[0]) == (0, {"a": 0})
            gate.open()
            assert told((await manager.collect())[0]) == (1, {"a": 1})


@BACKENDS
@WORKERS
async def test_a_refusal_is_told_and_leaves_what_was(make_manager, backend, worker):
    """The hook gets the former settings again; slot, process and successors have them."""
    async with fail_after(30), make_manager(worker, backend=backend, settings={"a": 0}) as manager:
        events = manager.events()
        await manager.configure({"a": 1})
        with pytest.raises(CommandError, match="worker 1 refused settings version 2") as caught:
            await manager.configure({"a": 2, "refuse": 1})
        assert "these settings will not do" in caught.value.remote_traceback
        assert list(caught.value.errors) == [1]
        refused = await next_event(events, SettingsRefused)
        assert (refused.worker_id, refused.incarnation, refused.version) == (1, 0, 2)
        assert manager.settings_of(0) == {"a": 2, "refuse": 1}
        assert manager.settings_of(1) == {"a": 1}
        heard = (await manager.send_command("heard", worker_ids=[1]))[1]
        assert heard == [{"a": 1}, {"a": 2, "refuse": 1}, {"a": 1}]
        assert await manager.configure({"b": 3}) == 3
        manager._pool.supervisor.running(1).handle.kill()
        assert told(await next_of(manager, 1, 1)) == (3, {"a": 1, "b": 3})
        await manager.scale(3)
        assert told(await next_of(manager, 2, 0)) == (3, {"a": 1, "b": 3})
        assert [one.worker_id for one in manager.incidents] == [1]


async def test_a_worker_that_refuses_the_former_settings_too_is_replaced(make_manager):
    """Its state is unknown; the next process begins with the former settings."""
    worker = settings_workers.NeverSatisfied
    async with fail_after(30), make_manager(worker, num_workers=1) as manager:
        with pytest.raises(CommandError, match="ValueError: never"):
            await manager.configure({"a": 1})
        assert told(await next_of(manager, 0, 1)) == (0, {})
        assert [one.phase for one in manager.incidents] == ["configure"]


async def test_a_timeout_leaves_the_settings_to_the_worker(make_manager):
    """They are the slot's; the worker takes them when it can."""
    with Gate() as gate:
        async with fail_after(30), make_manager(partial(Set, gate), num_workers=1) as manager:
            visitor = await gate.visitor()
            with pytest.raises(CommandTimeout, match="has not taken settings version 1 within"):
                await manager.configure({"a": 1}, timeout=0.05)
            assert manager.settings_of(0) == {"a": 1}
            cancelled = asyncio.create_task(manager.configure({"a": 2}))
            await asyncio.wait([cancelled], timeout=0.05)
            cancelled.cancel()
            await asyncio.wait([cancelled])
            assert cancelled.cancelled()
            visitor.release()
            gate.open()
            while told((await manager.collect())[0]) != (2, {"a": 2}):
                pass


async def test_a_worker_that_hangs_in_its_hook_is_replaced(make_manager):
    """The hang deadline holds for configure, and the next process begins with the settings."""
    with Gate() as gate:
        worker = armed(Set, Failpoint("configure", gate.hold))
        limits = {"collect_timeout": 0.4, "command_timeout": 0.4}
        async with fail_after(30), make_manager(worker, num_workers=1, **limits) as manager:
            assert await manager.configure({"a": 1}, timeout=20) == 1
            assert told(await next_of(manager, 0, 1)) == (1, {"a": 1})
            assert [(one.cause, one.phase) for one in manager.incidents] == [("hang", "configure")]


@BACKENDS
async def test_settings_that_come_while_a_worker_starts_are_there_before_it_collects(
    make_manager, backend
):
    """Its setup may have begun without them; its first experience has them."""
    with Gate() as gate:
        worker = armed(Set, Failpoint("setup", gate.hold, worker_id=2))
        inline = backend == "inline"
        if inline:  # where a gate would hold the loop
            worker = Set
        async with fail_after(30), make_manager(worker, backend=backend) as manager:
            scaling = asyncio.create_task(manager.scale(3))
            if not inline:
                visitor = await gate.visitor()
            assert await manager.configure({"a": 1}) == 1
            if not inline:
                visitor.release()
            await scaling
            assert told(await next_of(manager, 2, 0)) == (1, {"a": 1})


async def test_a_paused_pool_takes_settings_and_stands_still(make_manager):
    """Nothing is collected for them."""
    async with fail_after(30), make_manager(Set) as manager:
        await manager.pause()
        before = manager.stats().num_queued
        assert await manager.configure({"a": 1}) == 1
        await manager.pause()
        assert manager.stats().num_queued == before
        assert await manager.send_command("context") == {0: {"a": 1}, 1: {"a": 1}}


@BACKENDS
async def test_every_round_has_the_same_settings(make_manager, backend):
    """In sync mode a change comes between two rounds, whoever collects meanwhile."""
    async with fail_after(60), make_manager(Set, backend=backend, mode="sync") as manager:

        async def change() -> None:
            for level in range(20):
                await manager.configure({"level": level})

        changing = asyncio.create_task(change())
        versions = []
        while not changing.done() or versions[-1] < 20:
            batches = await manager.collect()
            (version,) = {batch.settings_version for batch in batches}
            assert {batch.info["settings"].get("level", -1) for batch in batches} == {version - 1}
            versions.append(version)
        await changing
        assert versions == sorted(versions)


async def test_large_values_travel_and_do_not_block_the_loop(make_manager):
    """Tensors arrive as they were, in a running worker and in a replacement."""
    table = torch.arange(1 << 20, dtype=torch.float32)
    async with fail_after(60), make_manager(Set, num_workers=1) as manager:
        await manager.configure({"table": table, "n": 1})
        table.zero_()
        assert torch.equal(
            (await manager.send_command("context"))[0]["table"], torch.arange(1 << 20)
        )
        os.kill(manager.workers[0].pid, signal.SIGKILL)
        batch = await next_of(manager, 0, 1)
        assert torch.equal(batch.info["settings"]["table"], torch.arange(1 << 20))


async def test_what_cannot_be_is_refused_and_changes_nothing(make_manager):
    """An unknown worker, a name that is no text, a value that cannot be pickled."""
    async with fail_after(30), make_manager(Set) as manager:
        with pytest.raises(ValueError, match=r"no such worker: \[2\]; there are \[0, 1\]"):
            await manager.configure({"a": 1}, [0, 2])
        with pytest.raises(SerializationError, match="setting 'f' cannot be pickled"):
            await manager.configure({"f": lambda: None})
        with pytest.raises(TypeError, match="settings are a int"):
            await manager.configure(3)
        assert await manager.configure({"a": 1}, []) == 0
        assert (manager.settings_version, manager.settings_of(0)) == (0, {})
    with pytest.raises(ManagerStateError):
        await manager.configure({"a": 1})


async def test_a_value_that_cannot_be_rebuilt_is_a_refusal(make_manager):
    """The worker keeps the former settings, and the caller learns which value it was."""
    async with fail_after(30), make_manager(Set, num_workers=1) as manager:
        with pytest.raises(CommandError, match="setting 'x' cannot be unpickled"):
            await manager.configure({"x": OnlyHere(), "a": 1})
        assert await manager.send_command("context") == {0: {}}


class OnlyHere:
    """Can be rebuilt in the application alone."""

    pid = os.getpid()

    def __reduce__(self):
        return rebuilt, (self.pid,)


def rebuilt(pid):
    assert os.getpid() == pid
    return OnlyHere()


async def test_events_tell_of_a_change(make_manager):
    """Who, what and which version."""
    async with fail_after(30), make_manager(Set) as manager:
        events = manager.events()
        await manager.configure({"b": 1, "a": 2}, [1])
        assert await next_event(events, SettingsChanged) == SettingsChanged(1, ("b", "a"), (1,))


@BACKENDS
@WORKERS
@pytest.mark.parametrize("seed", range(2))
async def test_every_batch_is_from_a_state_that_its_version_names(
    make_manager, backend, worker, seed
):
    """Whatever the order of changes, kills, sizes, pauses and collects."""
    chance = random.Random(seed)
    history = []
    restart = {"backoff_base": 0.0, "backoff_cap": 0.0, "max_restarts": 1000}
    config = {"backend": backend, "restart": restart, "max_queue_size": 2}
    newest = {}

    def expected(worker_id, version):
        values = {"id": worker_id}
        for number, slots, change in history:
            if number <= version and (slots is None or worker_id in slots):
                values |= change
        return values

    async with (
        fail_after(120),
        make_manager(worker, settings=lambda worker_id: {"id": worker_id}, **config) as manager,
    ):
        for step in range(60):
            match chance.randrange(6):
                case 0 | 1:
                    there = range(manager._pool.num_workers)
                    ids = None if chance.random() < 0.5 else chance.sample(there, 1)
                    change = {chance.choice("abc"): step}
                    history.append((len(history) + 1, ids, change))
                    assert await manager.configure(change, ids) == len(history)
                    for one in there if ids is None else ids:
                        newest[one] = len(history)
                case 2:
                    victim = chance.randrange(manager._pool.num_workers)
                    running = manager._pool.supervisor.running(victim)
                    if running is not None and running.handle is not None:
                        running.handle.kill()
                case 3:
                    await manager.scale(chance.randint(1, 3))
                case 4:
                    await manager.pause()
                    await manager.resume()
                case _:
                    for batch in await manager.collect():
                        version = batch.settings_version
                        assert batch.info["settings"] == expected(batch.worker_id, version)
        # What is collected from now on has the newest.
        await manager.pause()
        while manager.stats().num_queued:
            await manager.collect()
        await manager.resume()
        batch = (await manager.collect())[0]
        last = max(
            number
            for number, slots, _ in [*history, (0, None, {})]
            if slots is None or batch.worker_id in slots
        )
        assert batch.settings_version == last
    assert len(history) > 10
