"""The event loop is not blocked: no callback takes 20 ms, large work is done in other threads."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from functools import partial
from typing import ClassVar

import pytest
import torch

import pool_workers
from blocked import in_one_of, unblocked
from keisei.events import WorkerReady
from keisei.testing.failpoints import Gate
from keisei.testing.scenarios import fail_after, next_event

WITH_MANY_TENSORS = 0.3
"""Seconds. A model of very many tensors is described and compared in a thread, but its names and
tensors are made, counted and let go in the loop; all of it there takes most of a second."""
WHILE_THE_LOCK_IS_HELD = 0.06
"""Seconds. Where a thread packs or unpacks much, the loop waits for the interpreter's lock too, and
on a busy machine for the thread that holds it. In the loop itself the same work takes longer."""

MIB = 1 << 20
LARGE = {"w": torch.ones(16 * MIB)}
MANY = {f"w{number}": torch.zeros(4) for number in range(10_000)}


def weights(nbytes):
    return {"w": torch.ones(nbytes // 4)}


@pytest.mark.parametrize("config", [{}, {"check_finite": True}, {"mode": "sync"}], ids=str)
@in_one_of(3)
async def test_pushes_do_not_block_the_loop(make_manager, config):
    """Small ones, which are copied in the loop, and large ones, the first with its memory too."""
    few = weights(17_000)
    async with fail_after(60):
        async with make_manager(pool_workers.Counting, **config) as manager:
            with unblocked():
                for _ in range(100):
                    await manager.push_weights(few)
                await manager.push_weights(few, wait=True)
                assert await manager.push_weights(few) == 102
        async with make_manager(pool_workers.Counting, **config) as manager:
            with unblocked():
                for version in (1, 2, 3):
                    assert await manager.push_weights(LARGE, wait=True) == version


@in_one_of(3)
async def test_a_push_of_many_tensors_does_not_block_the_loop(make_manager):
    """What is small in bytes may be much in number."""
    async with fail_after(60):
        with unblocked(WITH_MANY_TENSORS):
            async with make_manager(pool_workers.Counting) as manager:
                for _ in range(2):
                    await manager.push_weights(MANY)


@pytest.mark.parametrize("num_workers", [1, 8])
@in_one_of(3)
async def test_starts_and_ends_of_processes_do_not_block_the_loop(make_manager, num_workers):
    """The first ones, a successor, those of a pool that grows or shrinks, and the end of all."""
    async with fail_after(60):
        with unblocked():
            async with make_manager(pool_workers.Counting, num_workers=num_workers) as manager:
                await manager.collect(min_steps=20)
                events = manager.events()
                os.kill(manager.workers[0].pid, signal.SIGKILL)
                await next_event(events, WorkerReady)
                await manager.scale(num_workers + 1)
                await manager.collect(min_steps=20)
                await manager.scale(1)


@in_one_of(3)
async def test_a_start_by_spawn_does_not_block_the_loop(make_manager):
    """It takes a second, of which the loop's thread hears nothing."""
    async with fail_after(60):
        with unblocked():
            async with make_manager(pool_workers.Counting, start_method="spawn") as manager:
                await manager.collect(min_steps=20)


@pytest.mark.parametrize("mode", ["async", "sync"])
@in_one_of(3)
async def test_batches_and_small_commands_do_not_block_the_loop(make_manager, mode):
    """A stream of batches, with commands, pauses and resets beside it."""
    async with fail_after(60):
        with unblocked():
            async with make_manager(pool_workers.Counting, mode=mode) as manager:
                for _ in range(20):
                    await manager.collect(min_steps=20)
                    await manager.send_command("echo", bytes(1000))
                    await manager.pause()
                    await manager.resume()
                    await manager.reset()


@pytest.mark.parametrize("data", ["bytes", "tensor"])
@in_one_of(3)
async def test_large_command_data_does_not_block_the_loop(make_manager, data):
    """Pickled once, in a thread, and sent to every worker in shares."""
    data = bytes(64 * MIB) if data == "bytes" else torch.ones(16 * MIB)
    async with fail_after(60):
        with unblocked(WHILE_THE_LOCK_IS_HELD):
            async with make_manager(pool_workers.Counting) as manager:
                assert await manager.send_command("worker_id", data) == {0: 0, 1: 1}


@in_one_of(3)
async def test_much_command_data_does_not_block_the_loop(make_manager):
    """Hundreds of thousands of small values are as much work as one large one."""
    data = [(number, str(number)) for number in range(300_000)]
    async with fail_after(60):
        with unblocked(WHILE_THE_LOCK_IS_HELD):
            async with make_manager(pool_workers.Counting) as manager:
                assert await manager.send_command("worker_id", data) == {0: 0, 1: 1}


@in_one_of(3)
async def test_replies_of_many_values_do_not_block_the_loop(make_manager):
    """Hundreds of thousands of small values are unpickled in a thread; others are served."""
    async with fail_after(60):
        with unblocked():
            async with make_manager(pool_workers.Verbose) as manager:
                asking = asyncio.create_task(manager.send_command("many", 300_000, worker_ids=[0]))
                while not asking.done():
                    assert await manager.send_command("echo", 1, worker_ids=[1]) == {1: 1}
                reply = await asking
        assert len(reply[0][0]) == 300_000


@in_one_of(3)
async def test_large_replies_do_not_block_the_loop(make_manager):
    """Received in shares and unpickled in a thread, which lets others run."""
    async with fail_after(60):
        with unblocked(WHILE_THE_LOCK_IS_HELD):
            async with make_manager(pool_workers.Verbose) as manager:
                asking = asyncio.create_task(
                    manager.send_command("large", 128 * MIB, worker_ids=[0])
                )
                while not asking.done():
                    assert await manager.send_command("echo", 1, worker_ids=[1]) == {1: 1}
                reply = await asking
        assert len(reply[0][0]) == 128 * MIB


@in_one_of(3)
async def test_large_info_does_not_block_the_loop(make_manager):
    """Whatever an experience brings along."""
    async with fail_after(60):
        with unblocked(WHILE_THE_LOCK_IS_HELD):
            worker = partial(pool_workers.Laden, info=64 * MIB)
            async with make_manager(worker, max_queue_size=1) as manager:
                batches = await manager.collect(min_steps=2)
        assert len(batches[0].info["large"]) == 64 * MIB


@in_one_of(3)
async def test_large_batches_do_not_block_the_loop(make_manager):
    """Memory of 64 MiB for each is mapped, handed out and given back."""
    async with fail_after(60):
        worker = partial(pool_workers.Laden, data=64 * MIB)
        async with make_manager(worker, max_queue_size=1) as manager:
            with unblocked():
                for _ in range(5):
                    await manager.collect(min_steps=2)


@in_one_of(3)
async def test_the_end_of_a_pool_of_large_batches_does_not_block_the_loop(make_manager):
    """Half a gigabyte of shared memory is given back beside it."""
    async with fail_after(60):
        worker = partial(pool_workers.Laden, data=64 * MIB)
        async with make_manager(worker, max_queue_size=4) as manager:
            while manager.queue_info().experience_queue_sizes != (4, 4):
                await pool_workers.turn()
            with unblocked():
                await manager.stop()


@in_one_of(3)
async def test_a_stop_amid_work_does_not_block_the_loop(make_manager):
    """Workers stand in a collect, one does not listen, one is stopped; commands are unanswered."""
    with Gate() as gate:
        worker = partial(pool_workers.Counting, gate=gate)
        config = {"num_workers": 3, "shutdown_timeout": 0.2}
        async with fail_after(60):
            with unblocked():
                async with make_manager(worker, **config) as manager:
                    for _ in range(3):
                        await gate.visitor()
                    os.kill(manager.workers[0].pid, signal.SIGSTOP)
                    asking = asyncio.create_task(manager.send_command("echo"))
                    await pool_workers.turn()
                await asyncio.wait([asking])
            assert asking.exception() is not None


# in which thread


class Telling(torch.Tensor):
    """Tells in which threads it is copied."""

    threads: ClassVar[set[int]] = set()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in {"copy_", "clone", "to", "contiguous"}:
            cls.threads.add(threading.get_ident())
        return super().__torch_function__(func, types, args, kwargs or {})


async def test_large_weights_are_copied_in_another_thread(make_manager, monkeypatch):
    """So are many, and so is memory reserved; a few small ones are copied in the loop's, faster."""
    here = threading.get_ident()
    large = {"w": torch.ones(16 * MIB).as_subclass(Telling)}
    many = {f"w{number}": torch.ones(1).as_subclass(Telling) for number in range(2000)}
    small = {"w": torch.ones(4000).as_subclass(Telling)}
    reserved = set()
    reserve = os.posix_fallocate

    def tell_and_reserve(fd, offset, length):
        if length >= 64 * MIB:
            reserved.add(threading.get_ident())
        reserve(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", tell_and_reserve)
    async with fail_after(60):
        for tensors, threads_are_others in ((large, True), (many, True), (small, False)):
            async with make_manager(pool_workers.Counting) as manager:
                Telling.threads.clear()
                for version in (1, 2, 3):
                    assert await manager.push_weights(tensors, wait=True) == version
                    assert Telling.threads, "it was copied"
                    if version > 1 or threads_are_others:  # the first makes the memory
                        assert (here not in Telling.threads) is threads_are_others
                    Telling.threads.clear()
    assert reserved, "memory was reserved"
    assert here not in reserved


class TellsWhenPickled:
    """Remembers the threads that pickle it."""

    def __init__(self):
        self.threads = []

    def __reduce__(self):
        self.threads.append(threading.get_ident())
        return int, ()


async def test_large_command_data_is_pickled_in_another_thread(make_manager):
    """Once for all workers; small data is pickled in the loop's."""
    async with fail_after(60), make_manager(pool_workers.Counting) as manager:
        for nbytes, is_large in ((100, False), (2 * MIB, True)):
            telling = TellsWhenPickled()
            data = [bytes(nbytes), telling]
            replies = await manager.send_command("echo", data)
            assert replies[0] == replies[1] == [bytes(nbytes), 0]
            (thread,) = telling.threads
            assert (thread != threading.get_ident()) is is_large


async def test_large_replies_are_unpickled_in_another_thread(make_manager):
    """Small ones in the loop's."""
    async with fail_after(60), make_manager(pool_workers.Verbose) as manager:
        for nbytes, is_large in ((100, False), (2 * MIB, True)):
            replies = await manager.send_command("large", nbytes)
            for data, thread in replies.values():
                assert len(data) == nbytes
                assert (thread != threading.get_ident()) is is_large


async def test_large_info_is_unpickled_in_another_thread(make_manager):
    """As a large reply is."""
    worker = partial(pool_workers.Laden, info=8 * MIB)
    async with fail_after(60), make_manager(worker, max_queue_size=1) as manager:
        for batch in await manager.collect(min_steps=2):
            assert len(batch.info["large"]) == 8 * MIB
            assert batch.info["where"] != threading.get_ident()
