"""What a batch, a push and a command cost, in calls: no timing would show a small regression."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import types
from collections import Counter

import torch

import costs_workers
from costs_workers import FIELDS, CallCounter
from keisei.testing.scenarios import fail_after
from torch_helpers import Copies

NUM = 400
FEW = 50
SOCKET_CALLS = ("socket.send", "socket.sendmsg", "socket.recv", "socket.recvmsg")


def system_calls(calls: Counter[str]) -> int:
    return sum(calls[name] for name in (*SOCKET_CALLS, "epoll.poll", "poll.poll"))


async def stream(manager, number):
    async for _ in manager.experiences():
        number -= 1
        if number == 0:
            return


async def test_a_batch_costs_the_application_a_few_calls(make_manager):
    """At most one wake-up, one frame and one credit; no element of a tensor is touched."""
    counter, copies = CallCounter(), Copies()
    async with fail_after(60), make_manager(costs_workers.Counted, num_workers=1) as manager:
        await stream(manager, 100)
        turns = []
        with copies:
            for _ in range(10):  # where the worker is the slower one, each batch is waited for
                counter.begin()
                await stream(manager, NUM)
                calls = counter.end()
                turns.append(calls["epoll.poll"])
                if turns[-1] <= NUM + 10:
                    break
    assert min(turns) <= NUM + 10
    assert calls["socket.recvmsg"] <= NUM + 10
    assert calls["socket.send"] <= 0.8 * NUM + 10
    assert system_calls(calls) <= 2.8 * NUM + 30
    assert counter.num_python <= 120 * NUM
    assert not [name for name, _ in copies.seen if "copy" in name or "clone" in name]


async def test_a_steady_worker_wakes_nobody_for_each_batch(make_manager):
    """Several batches are read at once where the worker has credits for a while."""
    counter = CallCounter()
    config = {"num_workers": 1, "max_queue_size": 16}
    looks, turns = [], []
    async with fail_after(60), make_manager(costs_workers.Steady, **config) as manager:
        await stream(manager, 100)
        for _ in range(40):  # on a starved machine no worker is steady for long
            counter.begin()
            await stream(manager, FEW)
            calls = counter.end()
            looks.append(calls["socket.recvmsg"])
            turns.append(calls["epoll.poll"])
    # One look at the queue for some batches, and one turn of the loop for whom it woke.
    assert min(looks) <= 0.7 * FEW
    assert min(turns) <= 1.4 * FEW


@types.coroutine
def counting_suspensions(coroutine):
    """Return what ``coroutine`` returns, and how often it was suspended."""
    steps, number = coroutine.__await__(), 0
    while True:
        try:
            future = next(steps)
        except StopIteration as done:
            return done.value, number
        number += 1
        yield future


async def test_a_wait_for_many_steps_is_woken_once(make_manager):
    """What arrives before there is enough does not resume who waits."""
    async with fail_after(60), make_manager(costs_workers.Steady, num_workers=2) as manager:
        batches = await manager.collect()
        wanted = 50 * batches[0].num_steps
        batches, number = await counting_suspensions(manager.collect(min_steps=wanted))
    assert len(batches) == 50
    assert number == 1


async def test_a_batch_costs_its_worker_a_few_calls(make_manager):
    """One look, one frame, one copy of each field; its loop turns once in a while only."""
    async with fail_after(60), make_manager(costs_workers.Counted, num_workers=1) as manager:
        await stream(manager, 100)
        await manager.send_command("begin")
        await stream(manager, NUM)
        calls, num_python, number = (await manager.send_command("end"))[0]
    assert number >= NUM - 10
    assert calls["socket.sendmsg"] <= number + 5
    assert calls["poll.poll"] <= 2 * number + 5  # once more for each time that it slept
    assert calls["Tensor.copy_"] == FIELDS * number
    # A look, a frame and, where it has run ahead, a sleep and the credit that ends it.
    assert system_calls(calls) <= 6 * number
    assert num_python <= 120 * number


async def test_a_push_costs_one_copy_and_wakes_nobody(make_manager):
    """Whatever the number of workers: no frame, and each tensor is copied once."""
    weights = {f"w{number}": torch.zeros(100) for number in range(FIELDS)}
    counter, copies = CallCounter(), Copies()
    async with fail_after(60), make_manager(costs_workers.Counted, num_workers=3) as manager:
        await manager.pause()
        await manager.push_weights(weights, wait=True)
        with copies:
            counter.begin()
            for _ in range(50):
                await manager.push_weights(weights)
            calls = counter.end()
        assert sum(calls[name] for name in SOCKET_CALLS) == 0
        assert [name for name, _ in copies.seen].count("copy_.default") == FIELDS * 50
        counter.begin()
        await manager.push_weights(weights, wait=True)
        calls = counter.end()
    assert calls["socket.sendmsg"] == 3, "one announcement for each worker"


async def test_a_push_costs_as_many_calls_for_many_workers(make_manager):
    """Nothing of it is done for each worker."""
    weights = {"weight": torch.zeros(100)}
    counter, counts = CallCounter(), []
    for num_workers in (1, 4):
        config = {"num_workers": num_workers}
        async with fail_after(60), make_manager(costs_workers.Counted, **config) as manager:
            await manager.pause()
            await manager.push_weights(weights, wait=True)
            counter.begin()
            for _ in range(50):
                await manager.push_weights(weights)
            counter.end()
        counts.append(counter.num_python)
    assert counts[1] <= counts[0] + 50
    assert counts[0] <= 82 * 50


async def test_a_command_costs_one_frame_each_way(make_manager):
    """A send, a receive and two looks of the loop; nobody acknowledges a reply."""
    counter = CallCounter()
    async with fail_after(60), make_manager(costs_workers.Counted, num_workers=1) as manager:
        await manager.pause()
        await manager.send_command("begin")
        counter.begin()
        for _ in range(50):
            await manager.send_command("begin")
        calls = counter.end()
    assert calls["socket.sendmsg"] == 50
    assert system_calls(calls) <= 4.2 * 50
    assert counter.num_python <= 130 * 50


def test_a_pool_imports_nothing_in_the_event_loop():
    """An import blocks the loop for as long as it takes; all of them come with the manager."""
    program = """
        import asyncio, sys
        import torch
        from keisei import ParallelManager
        from keisei.testing.puppet import Puppet

        async def main():
            before = set(sys.modules)
            async with ParallelManager(Puppet, config={"num_workers": 1}) as manager:
                await manager.collect()
                await manager.push_weights({"weight": torch.zeros(1)}, wait=True)
                await manager.send_command("call", (len, ""))
                await manager.pause()
            print(sorted(set(sys.modules) - before))

        if __name__ == "__main__":
            asyncio.run(main())
    """
    result = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


async def test_a_push_beside_many_names_costs_as_many_calls(make_manager):
    """Other names are not looked at, neither by the push nor by the worker's look before it."""
    weights = {"weight": torch.zeros(100)}
    counter, counts, looks = CallCounter(), [], []
    for num_names in (0, 50):
        async with fail_after(60), make_manager(costs_workers.Counted, num_workers=1) as manager:
            for number in range(num_names):
                await manager.push_weights(weights, f"past/{number}")
            await stream(manager, 100)
            await manager.send_command("begin")
            await stream(manager, NUM)
            _, num_python, number = (await manager.send_command("end"))[0]
            looks.append(num_python / number)
            await manager.pause()
            await manager.push_weights(weights, wait=True)
            counter.begin()
            for _ in range(50):
                await manager.push_weights(weights)
            counter.end()
        counts.append(counter.num_python)
    assert counts[1] <= counts[0] + 50
    assert looks[1] <= looks[0] + 25, "half a call for each name would be as much"
