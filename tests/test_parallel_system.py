"""The tests that the audit of the earlier system named, and those that it asked for.

Where the earlier ones fell back to "does not crash", these have real workers answer.
"""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
import torch

from keisei import (
    CommandTimeout,
    ConfigurationError,
    ManagerStateError,
    ModelSynchronizer,
    ParallelConfig,
    ParallelManager,
    QueueEnded,
    QueueTimeout,
    QueueWouldBlock,
    WorkerCommunicator,
    WorkerLost,
)
from keisei.events import ExitCause, WorkerIncident, WorkerReady
from keisei.testing import failpoints
from keisei.testing.failpoints import Failpoint, Gate, armed
from keisei.testing.leaks import Resources, left_since
from keisei.testing.scenarios import fail_after, next_event
from parallel_system_helpers import RecordingLearner, worker_processes
from pool_workers import Counting, Modelled, Recording, Reporting

LIMIT = 60.0


def a_model() -> torch.nn.Module:
    """Return the model that workers and learners of these tests have."""
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


class TestParallelSystem:
    """The audit's tests of the communication between the pool and its workers."""

    async def test_worker_communicator_init(self):
        """A communicator has one private queue of each kind for each worker, all empty."""
        communicator = WorkerCommunicator(3, max_queue_size=5, timeout=1.0)
        try:
            assert communicator.num_workers == 3
            assert len(communicator.experience_queues) == 3
            assert len(communicator.model_queues) == 3
            assert len(communicator.control_queues) == 3
            queues = [
                *communicator.experience_queues,
                *communicator.model_queues,
                *communicator.control_queues,
            ]
            assert len(set(map(id, queues))) == 9
            assert [queue.qsize() for queue in queues] == [0] * 9
            with pytest.raises(QueueTimeout):
                await communicator.collect_experiences(timeout=0.01)
        finally:
            await communicator.cleanup()

    def test_model_synchronizer_init(self):
        """A synchronizer keeps its settings and has done nothing yet."""
        synchronizer = ModelSynchronizer(sync_interval=50, compression_enabled=True)
        stats = synchronizer.get_sync_stats()
        assert (stats.sync_interval, stats.compression_enabled) == (50, True)
        assert (stats.last_sync_step, stats.syncs_completed, stats.models_prepared) == (0, 0, 0)
        with pytest.raises(ConfigurationError, match="sync_interval = 0"):
            ModelSynchronizer(sync_interval=0)

    async def test_parallel_manager_init(self, parallel_config):
        """A new manager has a validated configuration and has started nothing."""
        before = Resources.now()
        manager = ParallelManager(Counting, model=a_model(), config=parallel_config)
        assert manager.config == ParallelConfig(**parallel_config)
        assert manager.config.num_workers == 2
        assert manager.workers == ()
        assert manager.incidents == ()
        assert manager.weights_version == 0
        assert not manager.is_healthy
        with pytest.raises(ManagerStateError, match="not started"):
            await manager.collect()
        assert left_since(before) == []
        with pytest.raises(ConfigurationError, match="did you mean 'num_workers'"):
            ParallelManager(Counting, config={**parallel_config, "num_worker": 2})

    async def test_control_commands(self):
        """Real workers receive each command once, in order, and each answers for itself."""
        communicator = WorkerCommunicator(2, max_queue_size=4, timeout=LIMIT)
        async with fail_after(LIMIT), worker_processes(communicator, Counting):
            for number in range(20):
                data = {"number": number, "tensor": torch.arange(number)}
                replies = await communicator.send_control_command("echo", data)
                assert sorted(replies) == [0, 1]
                for reply in replies.values():
                    assert reply["number"] == number
                    assert torch.equal(reply["tensor"], torch.arange(number))
            assert await communicator.send_control_command("worker_id") == {0: 0, 1: 1}
            assert await communicator.send_control_command("worker_id", worker_ids=[1]) == {1: 1}
            await communicator.send_control_command("reset", worker_ids=[1])
            assert await communicator.send_control_command("resets") == {0: 0, 1: 1}

    async def test_model_weight_transmission(self):
        """Weights arrive bit-equal in every worker and take effect in its next experience."""
        communicator = WorkerCommunicator(2, max_queue_size=1, timeout=LIMIT)
        async with (
            fail_after(LIMIT),
            worker_processes(communicator, ModelledBy),
        ):
            for expected in (1, 2, 3):
                model = a_model()
                version = await communicator.send_model_weights(model, wait=True)
                assert version == expected
                fresh: set[int] = set()
                while fresh != {0, 1}:
                    for batch in await communicator.collect_experiences():
                        if batch.weights_version == version:
                            fresh.add(batch.worker_id)
                            for name, tensor in model.state_dict().items():
                                assert torch.equal(batch.data[name], tensor)

    async def test_experience_collection(self):
        """Experiences of real workers come back complete, once each and in order."""
        communicator = WorkerCommunicator(2, max_queue_size=3, timeout=LIMIT)
        async with fail_after(LIMIT), worker_processes(communicator, Counting):
            numbers: dict[int, list[int]] = {0: [], 1: []}
            while min(map(len, numbers.values())) < 20:
                for batch in await communicator.collect_experiences(max_batches=2):
                    assert batch.sequence == len(numbers[batch.worker_id])
                    assert batch.data["worker"].tolist() == [batch.worker_id]
                    numbers[batch.worker_id] += batch.data["number"].tolist()
            for seen in numbers.values():
                assert seen == list(range(1, len(seen) + 1))

    async def test_queue_info(self):
        """Queue sizes are what was put and not taken up, and room ends where it is said to."""
        communicator = WorkerCommunicator(2, max_queue_size=2, timeout=1.0)
        ends = communicator.endpoints(0)
        try:
            for number in range(3):
                communicator.channels[0].control.put_nowait(number)
            info = communicator.get_queue_info()
            assert (info.num_workers, info.max_queue_size) == (2, 2)
            assert info.control_queue_sizes == (3, 0)
            ends.control.get_nowait()
            ends.control.get_nowait()
            ends.control.get_nowait()
            assert communicator.get_queue_info().control_queue_sizes == (0, 0)
            assert communicator.get_queue_info().model_queue_sizes == (0, 0)
            assert communicator.get_queue_info().experience_queue_sizes == (0, 0)
            with pytest.raises(QueueWouldBlock):
                ends.experience.put_nowait(b"an experience without a credit")
            communicator.channels[0].grant(2)
            assert ends.experience.refresh() == 2
        finally:
            ends.close()
            await communicator.cleanup()

    async def test_cleanup(self):
        """Cleaning up fails those who wait, closes everything, and may be repeated."""
        communicator = WorkerCommunicator(2, max_queue_size=2, timeout=LIMIT)
        ends = [communicator.endpoints(worker_id) for worker_id in (0, 1)]
        waiting = asyncio.create_task(communicator.send_control_command("echo", worker_ids=[0]))
        while communicator.get_queue_info().control_queue_sizes != (1, 0):
            await turn()
        await communicator.cleanup()
        with pytest.raises(WorkerLost, match="the pool has ended"):
            await waiting
        await communicator.cleanup()
        for one in ends:
            one.control.drain()
            assert isinstance(one.control.ended, QueueEnded)
            one.close()


class TestModelSynchronization:
    """The audit's tests of snapshots."""

    def test_model_compression(self):
        """A compressed snapshot has its true sizes and restores every bit."""
        model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.BatchNorm1d(100))
        torch.nn.init.zeros_(model[0].weight)
        prepared = ModelSynchronizer(compression_enabled=True).prepare_model_for_sync(model)
        metadata = prepared.metadata
        state = model.state_dict()
        assert metadata.compressed
        assert metadata.version == 1
        assert metadata.total_parameters == 100 * 100 + 100 + 100 + 100
        assert metadata.original_bytes == sum(tensor.nbytes for tensor in state.values())
        payloads = [len(entry.payload) for entry in prepared.model_data.values()]
        assert metadata.compressed_bytes == sum(payloads)
        assert metadata.ratio == metadata.original_bytes / metadata.compressed_bytes
        assert metadata.ratio > 10
        other = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.BatchNorm1d(100))
        ModelSynchronizer().restore_model_from_sync(prepared, other)
        for name, tensor in state.items():
            assert torch.equal(other.state_dict()[name], tensor)

    def test_model_sync_timing(self):
        """A sync is due at the interval exactly, and counts on from the last completed one."""
        synchronizer = ModelSynchronizer(sync_interval=10)
        assert [step for step in range(12) if synchronizer.should_sync(step)] == [10, 11]
        synchronizer.mark_sync_completed(11)
        assert [step for step in range(11, 24) if synchronizer.should_sync(step)] == [21, 22, 23]
        assert synchronizer.get_sync_stats().last_sync_step == 11


class ModelledBy(Modelled):
    """Delivers the state dict of ``a_model``."""

    def __init__(self) -> None:
        super().__init__(a_model)


async def turn() -> None:
    """Let the loop turn once."""
    turned = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(turned.set_result, None)
    await turned


# what the audit recommended


@pytest.mark.parametrize("backend", ["local", "inline"])
async def test_full_parallel_training_cycle(make_manager, backend):
    """Collect, learn and push turn in real workers: each round has the weights before it."""
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    learner = RecordingLearner(model)
    manager = make_manager(LinearWorker, model=model, learner=learner, mode="sync", backend=backend)
    async with fail_after(LIMIT):
        report = await manager.run(max_steps=10)
    assert (report.num_updates, report.num_steps, report.num_batches) == (5, 10, 10)
    assert report.weights_version == 6
    assert report.metrics == {"updates": 5.0}
    assert report.reason == "max_steps"
    assert report.incidents == ()
    for number, batches in enumerate(learner.updates):
        assert [batch.worker_id for batch in batches] == [0, 1]
        assert [batch.weights_version for batch in batches] == [number + 1] * 2
        assert [batch.data["weight"].tolist() for batch in batches] == [[[number, number]]] * 2


class LinearWorker(Modelled):
    """Delivers the weight of a small linear model, as one step."""

    def __init__(self) -> None:
        super().__init__(lambda: torch.nn.Linear(2, 1, bias=False))


async def test_worker_crash(make_manager):
    """A killed worker is one incident and a new process; the others never notice."""
    async with fail_after(LIMIT), make_manager(Counting) as manager:
        events = manager.events()
        victim, other = manager.workers
        os.kill(victim.pid, signal.SIGKILL)
        incident = (await next_event(events, WorkerIncident)).incident
        assert (incident.worker_id, incident.incarnation) == (0, 0)
        assert (incident.cause, incident.signal_name) == (ExitCause.SIGNAL, "SIGKILL")
        ready = await next_event(events, WorkerReady)
        assert (ready.worker_id, ready.incarnation) == (0, 1)
        assert manager.workers[1].pid == other.pid
        assert manager.incidents == (incident,)
        async for batch in manager.experiences():
            if batch.worker_id == 0 and batch.incarnation == 1:
                break


@pytest.mark.parametrize(
    ("fault", "causes"),
    [
        # Whoever notices first: the worker, which exits, or the pool, which kills it.
        (failpoints.close_queues, {ExitCause.EXIT, ExitCause.PROTOCOL}),
        (failpoints.garbage, {ExitCause.PROTOCOL}),
        (failpoints.torn_frame, {ExitCause.SIGNAL}),
    ],
)
async def test_communication_failure(make_manager, fault, causes):
    """A worker whose queues cannot be trusted is replaced; what it had delivered counts."""
    worker = armed(Counting, Failpoint("collect", fault, worker_id=0, hit=3))
    async with fail_after(LIMIT), make_manager(worker) as manager:
        seen = []
        async for batch in manager.experiences():
            if batch.worker_id == 0:
                seen.append((batch.incarnation, batch.sequence))
            if seen and seen[-1] == (1, 2):
                break
        first = [sequence for incarnation, sequence in seen if incarnation == 0]
        assert first[:2] == [0, 1]
        assert first == list(range(len(first)))
        (incident,) = manager.incidents
        assert incident.cause in causes


async def test_communication_timeout(make_manager):
    """A command to a worker that is busy times out by name; the worker and its queue live on."""
    with Gate() as gate:
        worker = armed(Counting, Failpoint("collect", gate.hold, worker_id=0, hit=1))
        async with fail_after(LIMIT), make_manager(worker) as manager:
            visitor = await gate.visitor()
            with pytest.raises(CommandTimeout, match="worker 0 did not answer 'echo'") as caught:
                await manager.send_command("echo", 1, timeout=0.05)
            assert caught.value.replies == {1: 1}
            visitor.release()
            assert await manager.send_command("echo", 2) == {0: 2, 1: 2}
            assert manager.incidents == ()


@pytest.mark.parametrize("num_workers", [1, 2, 4])
async def test_scalability(make_manager, num_workers):
    """As many workers as there are collect at the same time, and share the work evenly."""
    with Gate() as gate:
        manager = make_manager(
            armed(Counting, Failpoint("collect", gate.hold, hit=1)),
            mode="sync",
            num_workers=num_workers,
        )
        async with fail_after(LIMIT), manager:
            collecting = asyncio.create_task(manager.collect())
            visitors = [await gate.visitor() for _ in range(num_workers)]
            # All of them stand inside their collect now, none has delivered.
            assert len({visitor.pid for visitor in visitors}) == num_workers
            assert not collecting.done()
            for visitor in visitors:
                visitor.release()
            assert [batch.worker_id for batch in await collecting] == list(range(num_workers))
            for _ in range(9):
                await manager.collect()
            assert [info.experiences for info in manager.workers] == [10] * num_workers


async def test_parallel_against_sequential(make_manager):
    """Two processes deliver bit for bit what the same workers deliver one after the other."""

    async def rounds(backend: str) -> list[list[torch.Tensor]]:
        async with make_manager(Recording, mode="sync", backend=backend) as manager:
            found = []
            for number in range(5):
                await manager.push_weights({"w": torch.full((4,), float(number))})
                found.append([batch.data["w"].clone() for batch in await manager.collect()])
            return found

    async with fail_after(LIMIT):
        parallel, sequential = await rounds("local"), await rounds("inline")
    assert len(parallel) == len(sequential) == 5
    for ours, theirs in zip(parallel, sequential, strict=True):
        assert all(map(torch.equal, ours, theirs))


async def test_isolation(make_manager):
    """A pool that served, failed and was replaced leaves no process, descriptor or thread."""
    async with fail_after(LIMIT), make_manager(Counting):
        pass
    before = Resources.now()
    async with fail_after(LIMIT), make_manager(Counting) as manager:
        await manager.push_weights(torch.nn.Linear(3, 3))
        await manager.collect(min_steps=20)
        events = manager.events()
        os.kill(manager.workers[0].pid, signal.SIGKILL)
        await next_event(events, WorkerReady)
    del manager, events
    assert left_since(before) == []


async def test_teardown_of_every_worker(make_manager):
    """At an orderly end every worker tears down, once."""
    with Gate() as gate:
        async with fail_after(LIMIT):
            manager = make_manager(ReportingTo(gate))
            async with manager:
                await manager.collect(min_steps=4)
                stopping = asyncio.create_task(manager.stop())
                visitors = [await gate.visitor() for _ in range(2)]
                assert sorted(visitor.label.split()[0] for visitor in visitors) == ["0", "1"]
                for visitor in visitors:
                    visitor.release()
                await stopping
            assert manager.incidents == ()


class ReportingTo:
    """A picklable way to make ``Reporting`` workers."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def __call__(self) -> Reporting:
        return Reporting(self.gate)
