"""IPC: a worker that dies, floods, lies or goes silent on its queues troubles nobody else."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from functools import partial

import pytest

import fault_workers
import pool_workers
from fault_helpers import (
    LIMIT,
    METHODS,
    check_order,
    crashing,
    kinds,
    next_incident,
    until_ready,
    watched,
)
from keisei.events import ExitCause
from keisei.exceptions import WorkerLost, WorkerStartError
from keisei.testing import failpoints, leaks
from keisei.testing.failpoints import Failpoint, Gate, armed
from keisei.testing.scenarios import fail_after


def failing(fault, worker=pool_workers.Counting, *, place="collect", hit=2):
    """Return a worker of which number 1 meets ``fault`` when it comes to ``place``."""
    return armed(worker, Failpoint(place, fault, worker_id=1, hit=hit))


async def test_a_frame_that_was_cut_is_discarded(make_manager):
    """SIGKILL in the middle of a frame of 1 MiB: what came before it counts, it does not."""
    async with crashing(make_manager(failing(failpoints.torn_frame))) as incident:
        assert (incident.cause, incident.signal_name) == (ExitCause.SIGNAL, "SIGKILL")
        assert incident.experiences_lost == 1


async def test_a_worker_killed_while_it_sends_holds_nobody_up(make_manager):
    """There is no lock to die with: siblings deliver on while a sender of 2 MB frames is killed."""
    async with fail_after(LIMIT), make_manager(fault_workers.Talkative) as manager:
        events = manager.events()
        batches = []
        for incarnation in range(10):
            batches += await manager.collect()
            os.kill(manager.workers[1].pid, signal.SIGKILL)
            incident = await next_incident(events)
            assert (incident.worker_id, incident.incarnation) == (1, incarnation)
            known = len(batches)
            while not any(batch.worker_id == 0 for batch in batches[known:]):
                batches += await manager.collect()
            await until_ready(events, 1, incarnation + 1)
        check_order(batches)
        for batch in batches:
            number = int(batch.data["number"][0])
            assert batch.info["text"] == bytes([number % 256]) * 2_000_000
        assert len(manager.incidents) == 10
        assert manager.workers[0].incarnation == 0


@pytest.mark.parametrize("state", ["paused", "without credit"])
async def test_a_worker_killed_while_it_waits_does_not_hold_up_the_stop(make_manager, state):
    """A waiter that is dead, or stopped by SIGSTOP, is no reason for stop() to hang."""
    async with fail_after(LIMIT):
        async with make_manager(pool_workers.Counting, shutdown_timeout=0.2) as manager:
            if state == "paused":
                await manager.pause()
            else:
                await until_full(manager)
            os.kill(manager.workers[0].pid, signal.SIGSTOP)
            os.kill(manager.workers[1].pid, signal.SIGKILL)
        assert {info.pid for info in manager.workers} == {None}
    assert len(manager.incidents) <= 1


async def until_full(manager):
    """Return when every worker has delivered all that its queue takes."""
    sizes = manager.config.num_workers * [manager.config.max_queue_size]
    while list(manager.queue_info().experience_queue_sizes) != sizes:
        await pool_workers.turn()


async def test_a_flood_without_a_reader_blocks_the_worker(make_manager):
    """Nobody collects: each worker fills its queue and waits; memory and frames stay bounded."""
    config = {"max_queue_size": 3, "overflow": "block"}
    async with fail_after(LIMIT), make_manager(fault_workers.Talkative, **config) as manager:
        await until_full(manager)
        assert await manager.send_command("number") == {0: 3, 1: 3}
        assert manager.stats().num_dropped == 0
        batches = await manager.collect(min_steps=30)
        check_order(batches)


async def test_a_flood_without_a_reader_drops_the_oldest(make_manager):
    """With ``drop_oldest`` workers go on, the newest are kept, and what was dropped is counted."""
    config = {"num_workers": 1, "max_queue_size": 3, "overflow": "drop_oldest"}
    async with fail_after(LIMIT), make_manager(pool_workers.Counting, **config) as manager:
        while manager.stats().num_dropped < 20:
            await pool_workers.turn()
        await manager.pause()
        batches = await manager.collect()
        assert len(batches) == 3
        assert batches[-1].sequence == manager.stats().num_dropped + 2
        check_order(batches, gaps=True)


async def test_what_an_earlier_process_sent_is_not_taken_for_a_later_one(make_manager):
    """Batches of a killed process come before those of its successor, under its own number."""
    worker = failing(failpoints.kill, hit=4)
    async with (
        fail_after(LIMIT),
        watched(make_manager(worker, max_queue_size=4)) as (manager, events),
    ):
        await until_ready(events, 1, 1)  # nobody has collected: three frames of the first wait
        batches, ours = [], []
        while len(ours) < 10:
            batches += await manager.collect()
            ours = [batch.incarnation for batch in batches if batch.worker_id == 1]
        check_order(batches)
        assert ours[:3] == [0, 0, 0]
        assert set(ours[3:]) == {1}
        assert len(manager.incidents) == 1


@pytest.mark.parametrize("worker", [pool_workers.Counting, pool_workers.Coroutine])
@pytest.mark.parametrize("number", [2, 8, 15])
async def test_what_a_worker_sent_while_its_queue_rested_outlives_it(
    make_manager, force_rests, worker, number
):
    """Nobody was about to look at its queue when it died; still each batch arrives, once."""
    force_rests(3600.0)
    with Gate() as gate:
        worker = armed(
            partial(worker, gate=gate), Failpoint("collect", failpoints.kill, hit=number + 1)
        )
        async with (
            fail_after(LIMIT),
            watched(make_manager(worker, max_queue_size=16)) as (manager, events),
        ):
            for visitor in [await gate.visitor(), await gate.visitor()]:
                visitor.release()
            while manager.stats().num_queued < 2:  # one look at each queue
                await pool_workers.turn()
            gate.open()
            incidents = [await next_incident(events) for _ in range(2)]
            batches = [batch for batch in await manager.collect() if batch.incarnation == 0]
            found = sorted((batch.worker_id, batch.sequence) for batch in batches)
            assert found == [(worker, n) for worker in (0, 1) for n in range(number)]
            assert [incident.experiences_lost for incident in incidents] == [1, 1]


@pytest.mark.parametrize("rests", [None, 0.02], ids=["", "rests"])
@pytest.mark.parametrize("worker", [pool_workers.Counting, pool_workers.Coroutine])
async def test_no_death_in_a_stream_loses_a_batch(make_manager, force_rests, worker, rests):
    """Every process of both slots dies after its fortieth batch; all forty of each arrive."""
    if rests is not None:
        force_rests(rests)
    worker = armed(worker, Failpoint("collect", failpoints.kill, incarnation=None, hit=41))
    config = {"max_queue_size": 16, "restart": {"max_restarts": 1000, "backoff_base": 0.0}}
    async with fail_after(LIMIT), make_manager(worker, **config) as manager:
        counts = Counter()
        while len(counts) < 8:
            for batch in await manager.collect():
                process = batch.worker_id, batch.incarnation
                assert batch.sequence == counts[process]
                counts[process] += 1
        replaced = [one for one in counts if (one[0], one[1] + 1) in counts]
        assert len(replaced) == 6
        assert [counts[one] for one in replaced] == [40] * 6
        assert {incident.experiences_lost for incident in manager.incidents} == {1}


async def test_a_late_reply_of_an_earlier_process_answers_nobody(make_manager):
    """A command that died with its process is not answered by the next one."""
    worker = failing(failpoints.kill, place="on_command", hit=1)
    async with fail_after(LIMIT), make_manager(worker) as manager:
        events = manager.events()
        asked = await asyncio.gather(
            *(manager.send_command("echo", n, worker_ids=[1]) for n in range(3)),
            return_exceptions=True,
        )
        assert {type(answer).__name__ for answer in asked} == {"WorkerLost"}
        await until_ready(events, 1, 1)
        assert await manager.send_command("echo", "new", worker_ids=[1]) == {1: "new"}
        assert manager.incidents[0].commands_lost == 3


@pytest.mark.parametrize(
    "fault", [failpoints.close_queues, fault_workers.steal_descriptors], ids=["shutdown", "closed"]
)
async def test_a_worker_that_loses_its_queues_does_not_live_on_by_halves(make_manager, fault):
    """A process whose queues are closed, by whatever code, ends and is replaced."""
    async with crashing(make_manager(failing(fault))) as incident:
        assert incident.cause in {ExitCause.PROTOCOL, ExitCause.EXIT, ExitCause.SIGNAL}


async def test_a_worker_that_closes_its_queues_and_hangs_is_killed(make_manager):
    """Nothing can be heard of it any more, so it is ended at once, long before any deadline."""
    async with crashing(make_manager(failing(fault_workers.close_queues_and_hang))) as incident:
        assert incident.cause is ExitCause.PROTOCOL
        assert "a queue has ended" in incident.detail


async def test_nonsense_on_a_queue_costs_its_sender(make_manager):
    """A frame that cannot be read is told as a protocol error; the process is replaced."""
    async with crashing(make_manager(failing(failpoints.garbage)), gaps=True) as incident:
        assert incident.cause is ExitCause.PROTOCOL
        assert "a frame makes no sense" in incident.detail


@pytest.mark.parametrize("fault", fault_workers.LIES, ids=lambda fault: fault.__name__)
async def test_a_well_formed_lie_on_a_queue_costs_its_sender(make_manager, fault):
    """Pickles of other things, impossible places and enormous lengths end in a protocol error."""
    async with crashing(make_manager(failing(fault)), gaps=True) as incident:
        assert incident.cause is ExitCause.PROTOCOL


@pytest.mark.parametrize("fault", fault_workers.LARGE_LIES, ids=lambda fault: fault.__name__)
async def test_a_large_lie_in_the_place_of_a_reply_costs_its_sender(make_manager, fault):
    """The worker is condemned at once, before any deadline, and whoever asked hears it."""
    worker = failing(fault, place="on_command", hit=1)
    async with fail_after(LIMIT), watched(make_manager(worker)) as (manager, events):
        with pytest.raises(WorkerLost, match="worker 1 was lost") as caught:
            await manager.send_command("echo", 5)
        assert (caught.value.worker_id, caught.value.incarnation) == (1, 0)
        assert caught.value.replies == {0: 5}
        incident = await next_incident(events)
        assert incident.cause is ExitCause.PROTOCOL
        assert "a frame makes no sense" in incident.detail
        assert incident.commands_lost == 1
        await until_ready(events, 1, 1)
        assert await manager.send_command("echo", 6) == {0: 6, 1: 6}
        assert kinds(manager.incidents) == [(1, 0, ExitCause.PROTOCOL)]


async def test_ten_megabytes_of_output_disturb_nothing(make_manager, capfd):
    """Python and C code may print: nothing of it reaches the protocol."""
    worker = failing(fault_workers.shout, hit=1)
    async with fail_after(LIMIT), make_manager(worker) as manager:
        check_order(await manager.collect(min_steps=30))
        await manager.send_command("echo")
        assert manager.incidents == ()
    capfd.readouterr()


@METHODS
async def test_the_last_lines_of_standard_error_are_in_the_incident(
    make_manager, start_method, capfd
):
    """Of Python and of C; all else that it wrote was passed on, and no worker's is another's."""
    worker = failing(partial(fault_workers.shout_and_die, b"the last line\n"), hit=2)
    async with crashing(make_manager(worker, start_method=start_method)) as incident:
        lines = incident.stderr.splitlines()
        assert lines[-1] == "the last line"
        assert set(lines[:-1]) == {fault_workers.SHOUTED}, "whole lines, and its own alone"
        assert 4000 < len(incident.stderr) <= 4096
    passed_on = capfd.readouterr().err
    assert passed_on.count(fault_workers.SHOUTED) == fault_workers.NUM_SHOUTED
    assert passed_on.count("the last line") == 1


async def test_a_start_that_dies_without_a_word_shows_its_standard_error(make_manager):
    """Where there is no traceback the error shows what the process wrote."""
    worker = failing(fault_workers.complain_and_exit, place="setup", hit=1)
    manager = make_manager(worker, restart={"max_restarts": 0})
    async with fail_after(LIMIT):
        with pytest.raises(WorkerStartError, match="no display"):
            await manager.start()


async def test_a_blocked_terminal_blocks_workers_alone(make_manager):
    """Nobody reads the application's standard error: its event loop turns, and stop ends."""
    terminal, write_end = os.pipe()
    saved = os.dup(2)
    os.dup2(write_end, 2)
    try:
        worker = failing(fault_workers.shout, hit=1)
        async with fail_after(LIMIT):
            async with make_manager(worker, shutdown_timeout=0.1) as manager:
                batches = await manager.collect(min_steps=50)
                assert {batch.worker_id for batch in batches} == {0}
                assert manager.workers[1].phase == "collect"
            assert manager.incidents == ()
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(write_end)
        while os.read(terminal, 1 << 20):
            pass
        os.close(terminal)


@pytest.mark.parametrize(
    "fault", [fault_workers.close_standard_streams, fault_workers.replace_standard_streams]
)
async def test_a_worker_may_close_its_standard_streams(make_manager, fault):
    """Without 0, 1 and 2, or without sys.stdout, it collects, answers and says goodbye."""
    async with fail_after(LIMIT):
        async with make_manager(failing(fault, hit=1)) as manager:
            check_order(await manager.collect(min_steps=30))
            assert await manager.send_command("echo", 1) == {0: 1, 1: 1}
        assert manager.incidents == ()


async def test_an_unsettled_process_is_still_a_worker(make_manager):
    """Other directory, environment, clock, generators, signals, recursion limit: it goes on."""
    async with fail_after(LIMIT):
        async with make_manager(failing(fault_workers.unsettle, hit=1)) as manager:
            check_order(await manager.collect(min_steps=30))
            assert await manager.push_weights(fault_workers.weights(1.0), wait=True) == 1
            assert await manager.send_command("version") == {0: 1, 1: 1}
        assert manager.incidents == ()


@pytest.mark.parametrize("end", ["kill", "stop", "exit"])
async def test_children_that_hold_the_queues_open_hide_no_death(make_manager, end):
    """A death is noticed although a forked child has every descriptor, and the child ends too."""
    faults = [Failpoint("setup", fault_workers.fork_a_child_that_stays, worker_id=1)]
    if end == "kill":
        faults.append(Failpoint("collect", failpoints.kill, worker_id=1, hit=2))
    elif end == "exit":
        faults.append(Failpoint("collect", failpoints.exit_now, worker_id=1, hit=2))
    async with (
        fail_after(LIMIT),
        watched(make_manager(armed(pool_workers.Counting, *faults))) as (manager, events),
    ):
        assert len(await manager.collect(min_steps=10)) == 10
        if end != "stop":
            incident = await next_incident(events)
            assert (incident.worker_id, incident.incarnation) == (1, 0)
            await until_ready(events, 1, 1)
    assert len(manager.incidents) == (end != "stop")


async def test_the_application_does_not_hold_the_workers_ends(make_manager):
    """Each queue has one end here: as many socket descriptors as queues, and no more."""

    def sockets():
        return leaks.Resources.now().descriptors["socket"]

    async with fail_after(LIMIT), make_manager(pool_workers.Counting, num_workers=3) as manager:
        three = sockets()
        await manager.scale(1)
        one = sockets()
    assert three - one == 2 * 4


async def test_descriptors_do_not_grow_with_batches_and_pushes(make_manager):
    """A worker costs as many descriptors after a hundred pushes and batches as before."""

    def descriptors():
        return leaks.Resources.now().descriptors.total()

    async with fail_after(LIMIT), make_manager(pool_workers.Assorted) as manager:
        await manager.push_weights({"w": fault_workers.weights(0.0)["w"]}, wait=True)
        await manager.collect(min_steps=1)
        counts = []
        for version in range(100):
            await manager.push_weights({"w": fault_workers.weights(float(version))["w"]})
            batches = await manager.collect()
            counts.append(descriptors())
            del batches
        assert max(counts[50:]) <= max(counts[:50]) + 2
        assert kinds(manager.incidents) == []


async def test_a_command_reaches_a_worker_at_most_once(make_manager):
    """The worker that dies on a command is not given it again after its restart."""
    worker = armed(
        pool_workers.Counting,
        Failpoint("on_command", partial(failpoints.exit_now, 9), worker_id=1, incarnation=None),
    )
    async with fail_after(LIMIT), make_manager(worker) as manager:
        events = manager.events()
        with pytest.raises(Exception, match="worker 1 was lost"):
            await manager.send_command("echo")
        await until_ready(events, 1, 1)
        check_order(await manager.collect(min_steps=10))
        assert kinds(manager.incidents) == [(1, 0, ExitCause.EXIT)]
