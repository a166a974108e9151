"""Named weights: each name has its own memory, layout and versions, which never come back."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial

import pytest
import torch

import named_workers
from keisei.events import WeightsPushed, WorkerIncident
from keisei.exceptions import (
    ManagerStateError,
    PoisonedWeights,
    WeightsError,
    WorkerLost,
)
from keisei.testing.failpoints import Failpoint, Gate, armed, kill
from keisei.testing.scenarios import fail_after, next_event
from named_workers import Scale, Several, weights

BACKENDS = pytest.mark.parametrize("backend", ["local", "inline"])
BOTH = partial(Several, ("main", "opponent"))


async def batch_when(manager, wanted):
    """Return the first batch for which ``wanted`` is true."""
    async for batch in manager.experiences():
        if wanted(batch):
            return batch
    raise AssertionError("the pool has ended")


@BACKENDS
@pytest.mark.parametrize("kind", [Several, named_workers.CoroutineSeveral])
async def test_models_are_filled_by_the_weights_of_their_names(make_manager, backend, kind):
    """Each push is in the next batch, under its own name and version, and changes no other."""
    worker = partial(kind, ("main", "opponent"))
    manager = make_manager(worker, mode="sync", backend=backend)
    async with fail_after(60), manager:
        expected = {"main": (0, 0.0), "opponent": (0, 0.0)}
        for name, value in [("opponent", 5), ("main", 1), ("main", 2), ("opponent", 6), ("x", 9)]:
            version = await manager.push_weights(weights(value), name)
            expected[name] = (version, float(value))
            for batch in await manager.collect():
                for known in ("main", "opponent"):
                    assert batch.data[f"model {known}"].tolist() == [expected[known][1]] * 3
                assert batch.weights_version == expected["main"][0]
                assert batch.weights_versions == {
                    name: version
                    for name, (version, _) in expected.items()
                    if version and name != "x"
                }
        assert {name: version for name, (version, _) in expected.items()} == {
            "main": 2,
            "opponent": 2,
            "x": 1,
        }
        assert manager.weights_versions == {"main": 2, "opponent": 2, "x": 1}


@BACKENDS
async def test_the_managers_models_are_version_1_of_each(make_manager, backend):
    """Workers have all of them before they collect for the first time."""
    models = {"main": Scale(), "opponent": weights(4)}
    manager = make_manager(BOTH, models=models, backend=backend)
    async with fail_after(30), manager:
        for batch in await manager.collect(min_steps=8):
            assert batch.weights_versions == {"main": 1, "opponent": 1}
            assert batch.data["model opponent"].tolist() == [4, 4, 4]


async def test_main_is_given_once(make_manager):
    """``model`` and ``models["main"]`` are the same thing, and names are text."""
    with pytest.raises(WeightsError, match=r"model=\.\.\. is models\['main'\]"):
        make_manager(Several, model=Scale(), models={"main": Scale()})
    with pytest.raises(WeightsError, match="the name of weights is text, not a int"):
        make_manager(Several, models={3: Scale()})


@pytest.mark.parametrize(
    ("name", "problem"),
    [("", "has 1 to 200 characters, not 0"), ("x" * 201, "not 201"), (None, "not a NoneType")],
)
async def test_what_is_no_name_is_refused(make_manager, name, problem):
    """Nothing is published under it."""
    async with fail_after(30), make_manager(Several, backend="inline") as manager:
        with pytest.raises(WeightsError, match=problem):
            await manager.push_weights(weights(1), name)
        assert manager.weights_versions == {}


def test_model_is_the_main_one_of_models():
    """Either way of assigning is seen by the other, and no two workers share anything."""
    first, second = Several(), Several()
    net, other = Scale(), Scale()
    first.model = net
    assert first.models == {"main": net}
    first.models = {"main": other, "opponent": net}
    assert first.model is other
    first.model = None
    assert first.models == {"opponent": net}
    assert (second.model, second.models, Several.model) == (None, {}, None)
    with pytest.raises(TypeError, match="models of Several is a list"):
        first.models = [net]


# on demand


@BACKENDS
async def test_weights_are_handed_out_on_demand(make_manager, backend):
    """``context.weights`` gives the newest tensors and version, and the batch names them."""
    manager = make_manager(
        partial(Several, (), ["past/1"]),
        backend=backend,
        mode="sync",
        models={"past/1": weights(1)},
    )
    async with fail_after(30), manager:
        for value in (1, 2, 3, 4):
            if value > 1:
                assert await manager.push_weights(weights(value), "past/1") == value
            for batch in await manager.collect():
                assert batch.data["asked past/1"].tolist() == [value] * 3
                assert batch.info["past/1"] == value
                assert batch.weights_versions == {"past/1": value}


@BACKENDS
async def test_an_unknown_name_is_an_error_that_lists_the_names(make_manager, backend):
    """In a command it is the answer; the worker goes on."""
    manager = make_manager(BOTH, backend=backend, models={"main": Scale(), "past/1": weights(1)})
    async with fail_after(30), manager:
        with pytest.raises(Exception, match=r"no weights 'past/2'; there are 'main', 'past/1'"):
            await manager.send_command("look", "past/2")
        with pytest.raises(WeightsError, match=r"no weights 'past/2'; there are 'main', 'past/1'"):
            manager.drop_weights("past/2")
        with pytest.raises(WeightsError, match=r"no weights 'past/2'; there are 'main', 'past/1'"):
            await manager.snapshot("past/2")
        await manager.push_weights(weights(7), "past/2")
        assert set(map(str, (await manager.send_command("look", "past/2")).values())) == {
            str(({"w": [7.0] * 3}, 1))
        }


async def test_setup_may_ask(make_manager):
    """All names are there before ``setup``, in a replacement too."""
    worker = armed(named_workers.AsksInSetup, Failpoint("there", kill, worker_id=0))
    manager = make_manager(worker, models={"base": weights(3), "main": Scale()})
    async with fail_after(30), manager:
        assert await manager.send_command("first") == {0: [3.0] * 3, 1: [3.0] * 3}
        await manager.push_weights(weights(5), "base")
        with pytest.raises(WorkerLost):
            await manager.send_command("reach", "there", worker_ids=[0])
        await batch_when(manager, lambda batch: batch.incarnation == 1)
        assert await manager.send_command("first") == {0: [5.0] * 3, 1: [3.0] * 3}


@BACKENDS
async def test_what_was_handed_out_stays_as_it_is(make_manager, backend):
    """Later versions, a drop and another layout under the name change nothing of it."""
    manager = make_manager(partial(Several, ()), backend=backend, num_workers=1)
    async with fail_after(30), manager:
        for value in (1, 2, 3):
            await manager.push_weights(weights(value), "opponent")
            await manager.send_command("keep", "opponent")
        manager.drop_weights("opponent")
        for value in (4, 5):
            await manager.push_weights({"w": torch.full((7,), float(value))}, "opponent")
            await manager.send_command("keep", "opponent")
        (kept,) = (await manager.send_command("kept")).values()
        assert kept == [[1.0] * 3, [2.0] * 3, [3.0] * 3, [4.0] * 7, [5.0] * 7]


@pytest.mark.parametrize("pushes", [1, 3])
async def test_writing_to_what_was_handed_out_reaches_no_other(make_manager, pushes):
    """It is the worker's own mistake: no crash, and no other worker sees it."""
    async with fail_after(30), make_manager(partial(Several, ())) as manager:
        for _ in range(pushes):
            await manager.push_weights(weights(2), "opponent")
        assert await manager.send_command("scribble", "opponent", worker_ids=[0]) == {0: [-1.0] * 3}
        replies = await manager.send_command("look", "opponent", worker_ids=[1])
        assert replies == {1: ({"w": [2.0] * 3}, pushes)}
        assert (await manager.snapshot("opponent")).model_data["w"].tolist() == [2.0] * 3


@pytest.mark.parametrize("pushes", [1, 2])
async def test_asking_twice_copies_nothing_again(make_manager, pushes):
    """Two looks at one version are looks at the same memory."""
    async with fail_after(30), make_manager(partial(Several, ()), num_workers=1) as manager:
        for _ in range(pushes):
            await manager.push_weights(weights(2), "opponent")
        assert await manager.send_command("same", "opponent") == {0: True}


async def test_a_long_collect_sees_what_is_pushed_meanwhile(make_manager):
    """Names that are new since the collect began, more of them than the queue holds, are found."""
    with Gate() as gate:
        worker = armed(partial(Several, (), []), Failpoint("collect", gate.hold, hit=2))
        async with fail_after(60), make_manager(worker, num_workers=1) as manager:
            held = await gate.visitor()
            names = [f"past/{number}" for number in range(150)]
            for number, name in enumerate(names):
                await manager.push_weights(weights(number), name)
            held.release()
            await manager.send_command("ask", names)
            batch = await batch_when(manager, lambda batch: names[-1] in batch.info)
            assert [int(batch.data[f"asked {name}"][0]) for name in names] == list(range(150))
            assert batch.weights_versions == dict.fromkeys(names, 1)


async def test_a_frozen_opponent_costs_its_memory_once(make_manager):
    """Workers that look at 32 MB of weights keep none of it as their own."""
    size = 8_000_000
    worker = partial(Several, ())
    async with fail_after(60), make_manager(worker, num_workers=3) as manager:
        pids = {info.pid for info in manager.workers}
        before = sum(map(private_bytes, pids))
        await manager.push_weights(weights(1, size), "opponent")
        await manager.send_command("keep", "opponent")
        sums = await manager.send_command("sum kept")
        assert sums == dict.fromkeys(range(3), float(size))
        assert sum(map(private_bytes, pids)) - before < size
        assert sum(memory_named("keisei-weights", os.getpid())) < 1.01 * 4 * size


def private_bytes(pid):
    """Return the memory that a process shares with no other."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="utf-8") as rollup:  # noqa: PTH123
        return sum(1024 * int(line.split()[1]) for line in rollup if line.startswith("Private"))


def memory_named(name, pid):
    """Return the sizes of the mappings of this name."""
    with open(f"/proc/{pid}/maps", encoding="utf-8") as maps:  # noqa: PTH123
        ranges = [line.split()[0].split("-") for line in maps if name in line]
    return tuple(int(end, 16) - int(start, 16) for start, end in ranges)


# later, dropped, added again


@BACKENDS
async def test_a_model_that_is_assigned_later_is_filled(make_manager, backend):
    """Before the next collect, by what was pushed long ago."""
    manager = make_manager(BOTH, backend=backend, mode="sync", models={"past/1": weights(8)})
    async with fail_after(30), manager:
        assert {str(batch.weights_versions) for batch in await manager.collect()} == {"{}"}
        await manager.send_command("add", "past/1")
        for batch in await manager.collect():
            assert batch.data["model past/1"].tolist() == [8] * 3
            assert batch.weights_versions == {"past/1": 1}
        await manager.send_command("add", "past/1")  # a new one in its place
        assert [b.data["model past/1"].tolist() for b in await manager.collect()] == [[8] * 3] * 2


@BACKENDS
async def test_dropped_weights_are_gone_and_their_versions_never_come_back(make_manager, backend):
    """Models keep the last ones; what is pushed again, of any layout, is newer."""
    manager = make_manager(BOTH, backend=backend, mode="sync")
    async with fail_after(30), manager:
        for version in (1, 2, 3):
            assert await manager.push_weights(weights(version), "opponent", wait=True) == version
        manager.drop_weights("opponent")
        assert manager.weights_versions == {}
        for batch in await manager.collect():
            assert batch.data["model opponent"].tolist() == [3] * 3
            assert batch.weights_versions == {"opponent": 3}
        with pytest.raises(Exception, match="no weights 'opponent'; there are none at all"):
            await manager.send_command("look", "opponent")
        assert await manager.push_weights(weights(4), "opponent", wait=True) == 4
        for batch in await manager.collect():
            assert batch.data["model opponent"].tolist() == [4] * 3
            assert batch.weights_versions == {"opponent": 4}
        await manager.drop_weights("opponent")
        assert await manager.push_weights({"other": torch.zeros(2)}, "opponent") == 5
        assert (await manager.snapshot("opponent")).model_data["other"].tolist() == [0, 0]


async def test_on_demand_names_leave_the_batch_when_they_are_dropped(make_manager):
    """What no model holds is named only as long as there is such a name."""
    worker = partial(Several, ())
    models = {"past/1": weights(1), "past/2": weights(2)}
    async with fail_after(30), make_manager(worker, mode="sync", models=models) as manager:
        for name in models:
            await manager.send_command("look", name)
        first = await manager.collect()
        assert [b.weights_versions for b in first] == [{"past/1": 1, "past/2": 1}] * 2
        manager.drop_weights("past/1")
        assert [b.weights_versions for b in await manager.collect()] == [{"past/2": 1}] * 2


async def test_main_may_be_dropped_too(make_manager):
    """Workers keep what they have; another layout, and newer versions, may follow."""
    async with fail_after(30), make_manager(named_workers.Several, mode="sync") as manager:
        await manager.push_weights(weights(1))
        await manager.push_weights(weights(2), wait=True)
        manager.drop_weights("main")
        assert manager.weights_version == 2
        assert [b.weights_version for b in await manager.collect()] == [2, 2]
        assert await manager.push_weights({"w": torch.ones(3)}, wait=True) == 3
        assert [b.weights_versions for b in await manager.collect()] == [{"main": 3}] * 2


async def test_a_drop_in_the_middle_of_a_push_wins(make_manager):
    """The push raises, and its version is never given again."""
    large = 3_000_000
    async with fail_after(30), make_manager(Several, num_workers=1) as manager:
        for _ in range(2):
            await manager.push_weights(weights(1, large), "opponent")
        pushing = asyncio.create_task(manager.push_weights(weights(2, large), "opponent"))
        await asyncio.wait([pushing], timeout=0)
        manager.drop_weights("opponent")
        with pytest.raises(WeightsError, match="'opponent' were dropped while they were pushed"):
            await pushing
        assert manager.weights_versions == {}
        assert await manager.push_weights(weights(3), "opponent") == 4


async def test_a_drop_ends_the_wait_for_it(make_manager):
    """Whoever waits for workers to apply what was dropped waits for nothing."""
    with Gate() as gate:
        worker = armed(BOTH, Failpoint("collect", gate.hold))
        async with fail_after(30), make_manager(worker, num_workers=1) as manager:
            held = await gate.visitor()
            waiting = asyncio.create_task(manager.push_weights(weights(1), "opponent", wait=True))
            await asyncio.wait([waiting], timeout=0.05)
            manager.drop_weights("opponent")
            held.release()
            assert await waiting == 1


# waiting and counting, name by name


async def test_wait_is_for_the_name(make_manager):
    """A worker that is busy has applied neither; one that has no model has it when it knows."""
    with Gate() as gate:
        worker = armed(BOTH, Failpoint("collect", gate.hold))
        async with fail_after(30), make_manager(worker, num_workers=1) as manager:
            held = await gate.visitor()
            tasks = [
                asyncio.create_task(manager.push_weights(weights(1), name, wait=True))
                for name in ("main", "opponent", "unknown")
            ]
            await asyncio.wait(tasks, timeout=0.05)
            assert not any(task.done() for task in tasks)
            held.release()
            assert await asyncio.gather(*tasks) == [1, 1, 1]


async def test_staleness_is_that_of_main(make_manager):
    """Versions of other names do not make a batch stale."""
    worker = partial(Several, ("main", "opponent"))
    async with fail_after(30), make_manager(worker, max_queue_size=2, num_workers=1) as manager:
        await manager.push_weights(weights(1), wait=True)
        await manager.collect()
        await manager.pause()
        for _ in range(5):
            await manager.push_weights(weights(1), "opponent")
        await manager.resume()
        assert {batch.staleness for batch in await manager.collect(min_steps=3)} == {0}


async def test_pushes_are_told_with_their_name(make_manager):
    """Event, versions and counts."""
    manager = make_manager(Several, backend="inline")
    events = manager.events()
    async with fail_after(30), manager:
        await manager.push_weights(weights(1), "opponent")
        assert await next_event(events, WeightsPushed) == WeightsPushed(1, 12, "opponent")
        await manager.push_weights(weights(1))
        assert await next_event(events, WeightsPushed) == WeightsPushed(1, 12, "main")
        assert (manager.stats().num_pushes, manager.stats().weights_version) == (2, 1)
        assert manager.weights_versions == {"main": 1, "opponent": 1}
    assert manager.weights_versions == {"main": 1, "opponent": 1}
    with pytest.raises(ManagerStateError):
        manager.drop_weights("opponent")


async def test_each_name_has_its_own_layout(make_manager):
    """What does not fit one name is refused there, and nothing is published."""
    async with fail_after(30), make_manager(Several, backend="inline") as manager:
        await manager.push_weights(weights(1))
        await manager.push_weights({"a": torch.zeros(2), "b": torch.zeros(3)}, "other")
        for _ in range(2):
            with pytest.raises(WeightsError, match="missing keys: b; unexpected keys: w"):
                await manager.push_weights({"a": torch.zeros(2), "w": torch.zeros(3)}, "other")
        assert manager.weights_versions == {"main": 1, "other": 1}


# poison


@pytest.mark.parametrize("where", ["load_weights", "collect"])
async def test_weights_that_kill_are_withdrawn_under_their_name(make_manager, where):
    """The opponent that kills three slots is put back; main is neither blamed nor changed."""
    worker = partial(named_workers.Delicate, ("main", "opponent"), where)
    models = {"main": weights(1), "opponent": weights(1)}
    manager = make_manager(worker, num_workers=3, models=models)
    async with fail_after(60), manager:
        await manager.push_weights(weights(2))
        await manager.push_weights(weights(2), "opponent", wait=True)
        assert await manager.push_weights(weights(float("nan")), "opponent") == 3
        batch = await batch_when(manager, lambda batch: batch.weights_versions.get("opponent") == 4)
        assert batch.weights_versions == {"main": 2, "opponent": 4}
        assert batch.data["model opponent"].tolist() == [2] * 3
        assert await manager.push_weights(weights(3)) == 3
        with pytest.raises(
            PoisonedWeights, match=r"weights 'opponent', version 3 was withdrawn"
        ) as caught:
            await manager.push_weights(weights(3), "opponent")
        assert (caught.value.version, caught.value.replacement) == (3, 4)
        assert await manager.push_weights(weights(5), "opponent") == 5
        assert {incident.worker_id for incident in manager.incidents} == {0, 1, 2}


async def test_first_weights_that_kill_cannot_be_withdrawn(make_manager):
    """After a drop too: there is nothing to go back to, and that hides no other error."""
    worker = partial(named_workers.Delicate, ("opponent",), "load_weights")
    manager = make_manager(
        worker,
        num_workers=2,
        poison_threshold=2,
        restart={"max_restarts": 100, "backoff_base": 0.001, "backoff_cap": 0.001},
    )
    async with fail_after(60), manager:
        for _ in range(2):
            await manager.push_weights(weights(1), "opponent", wait=True)
        manager.drop_weights("opponent")
        assert await manager.push_weights(weights(float("nan")), "opponent") == 3
        events = manager.events()
        while len(manager.incidents) < 6:
            await next_event(events, WorkerIncident)
        assert await manager.push_weights(weights(2), "opponent") == 4
        await batch_when(manager, lambda batch: batch.weights_versions == {"opponent": 4})


# replacements


@BACKENDS
async def test_new_workers_have_all_names_before_they_collect(make_manager, backend):
    """Workers that are added, among three hundred names, begin with the newest of each."""
    names = [f"past/{number}" for number in range(300)]
    manager = make_manager(partial(Several, ("main", "past/299")), backend=backend, num_workers=1)
    async with fail_after(120), manager:
        await manager.push_weights(weights(1))
        for number, name in enumerate(names):
            await manager.push_weights(weights(number), name)
        for _ in range(2):
            await manager.push_weights(weights(9), names[0])
        await manager.scale(3)
        batch = await batch_when(manager, lambda batch: batch.worker_id == 2)
        assert batch.weights_versions == {"main": 1, "past/299": 1}
        assert batch.data["model past/299"].tolist() == [299] * 3
        replies = await manager.send_command("look", names[0])
        assert {version for _, version in replies.values()} == {3}
        for name in names:
            manager.drop_weights(name)
        with pytest.raises(Exception, match="no weights 'past/7'; there are 'main'"):
            await manager.send_command("look", "past/7")


PLACES = ["setup", "collect", "collected", "committed", "on_command", "there"]


@pytest.mark.parametrize("place", PLACES)
async def test_a_kill_anywhere_leaves_successors_with_the_newest_of_each_name(make_manager, place):
    """A new incarnation has what was pushed last, and nothing that was dropped."""
    second = Failpoint(place, kill, worker_id=0, incarnation=1)
    worker = armed(BOTH, Failpoint("there", kill, worker_id=0), second)
    models = {"main": weights(1), "opponent": weights(1)}
    async with fail_after(60), make_manager(worker, models=models) as manager:
        for value in (2, 3, 4):
            await manager.push_weights(weights(value), "opponent")
            await manager.push_weights(weights(value), "gone")
        manager.drop_weights("gone")
        with pytest.raises(WorkerLost):
            await manager.send_command("reach", "there", worker_ids=[0])
        if place in ("on_command", "there"):
            await batch_when(manager, lambda b: (b.worker_id, b.incarnation) == (0, 1))
            with pytest.raises(WorkerLost):
                await manager.send_command("reach", "there", worker_ids=[0])
        batch = await batch_when(
            manager, lambda batch: (batch.worker_id, batch.incarnation) == (0, 2)
        )
        assert batch.weights_versions == {"main": 1, "opponent": 4}
        assert batch.data["model opponent"].tolist() == [4] * 3
        assert manager.weights_versions == {"main": 1, "opponent": 4}


async def test_a_worker_killed_while_names_are_pushed_holds_nobody_up(make_manager):
    """Frames that it did not read are lost with it, the names are not."""
    with Gate() as gate:
        worker = armed(BOTH, Failpoint("collect", gate.hold, worker_id=0))
        async with fail_after(60), make_manager(worker, num_workers=1) as manager:
            held = await gate.visitor()
            for number in range(100):
                await manager.push_weights(weights(number), f"past/{number}")
            os.kill(held.pid, signal.SIGKILL)
            await batch_when(manager, lambda batch: batch.incarnation == 1)
            replies = await manager.send_command("look", "past/99")
            assert replies == {0: ({"w": [99.0] * 3}, 1)}
