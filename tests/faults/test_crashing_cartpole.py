"""The example's CartPole that crashes and stalls: its schedule, and training through it."""

from __future__ import annotations

import random
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("gymnasium", reason="needs the extra 'gymnasium'")

import faulty_cartpole
import gymnasium
from cartpole_ppo import Hyperparameters, PPOLearner, make_policy
from faulty_cartpole import (
    CRASHING,
    EXIT_CODE,
    RLLIB_SCHEDULE,
    SCHEDULE,
    STALLING,
    Faults,
    FaultyEnv,
    make_faulty_worker,
)

from fault_helpers import LIMIT, check_order
from keisei.events import Remedy, WorkerReady
from keisei.testing.scenarios import fail_after, next_event
from keisei.worker import WorkerContext

PARAMETERS = Hyperparameters(num_workers=4, envs_per_worker=2, rollout_length=16, epochs=1)
ENDS = {-signal.SIGKILL, -signal.SIGABRT, EXIT_CODE}


@pytest.fixture
def sleeps(monkeypatch):
    """Give the seconds that the environments would have slept; they do not."""
    taken = []
    monkeypatch.setattr(faulty_cartpole, "time", SimpleNamespace(sleep=taken.append))
    return taken


@pytest.fixture
def make_worker():
    """Give a maker of workers of this process, set up; they are torn down after the test."""
    workers = []

    def make(faults):
        worker = make_faulty_worker((Faults(), faults), PARAMETERS)()
        workers.append(worker)
        random.seed(7)
        worker.setup(WorkerContext(worker_id=1, incarnation=0, num_workers=2, seed=7))
        return worker

    yield make
    for worker in workers:
        worker.teardown()


def test_the_schedule_is_the_published_one():
    """Which slots crash and stall, and the rates and times, are those that the example names."""
    times = {"stall_seconds": (2.0, 5.0), "build_seconds": 2.0}
    crashing = Faults(crash_in_step=1e-4, crash_in_reset=1e-3, **times)
    stalling = Faults(stall_in_step=5e-4, stall_in_reset=1e-3, **times)
    assert list(SCHEDULE) == [crashing, crashing, stalling, stalling]
    both = replace(crashing, stall_in_step=5e-4, stall_in_reset=1e-3)
    assert list(RLLIB_SCHEDULE) == [crashing, both, stalling, Faults(**times)]


def test_each_environment_of_a_worker_has_the_faults(make_worker, sleeps):
    """Each construction takes its time, each step and each reset of each one meets its chance."""
    worker = make_worker(Faults(stall_in_step=1.0, build_seconds=9.0))
    assert sleeps == [9.0, 9.0]
    worker.collect()
    assert len(sleeps) == 2 + 2 * PARAMETERS.rollout_length
    sleeps.clear()
    worker = make_worker(Faults(stall_in_reset=1.0, build_seconds=9.0))
    assert len(sleeps) == 2 + 2
    ended = sum(len(worker.collect().info["episode_returns"]) for _ in range(4))
    assert ended > 0
    assert len(sleeps) == 2 + 2 + ended


def test_stalls_come_as_often_and_last_as_long_as_told(sleeps):
    """A quarter of the steps stall, for anything between two and five seconds."""
    env = FaultyEnv(gymnasium.Env(), Faults(stall_in_step=0.25, build_seconds=0.0))
    env.env.step = lambda action: None
    sleeps.clear()
    random.seed(7)
    for _ in range(4000):
        env.step(0)
    assert 0.23 < len(sleeps) / 4000 < 0.27
    assert 2.0 <= min(sleeps) < 2.1
    assert 4.9 < max(sleeps) <= 5.0
    assert 3.4 < sum(sleeps) / len(sleeps) < 3.6


class Recording(PPOLearner):
    """Notes where each batch came from."""

    def __init__(self, parameters):
        super().__init__(make_policy(parameters), parameters)
        self.origins = []

    def learn(self, batches):
        self.origins += [
            SimpleNamespace(
                worker_id=batch.worker_id,
                incarnation=batch.incarnation,
                sequence=batch.sequence,
                seed=batch.info["seed"],
                num_steps=batch.num_steps,
            )
            for batch in batches
        ]
        return super().learn(batches)

    def incarnations_of(self, worker_id):
        return [one.incarnation for one in self.origins if one.worker_id == worker_id]


@pytest.fixture
def learner():
    """Give a learner that was made outside the loop: torch loads much for its first optimizer."""
    return Recording(PARAMETERS)


async def test_training_goes_on_while_workers_crash_and_stall(make_manager, learner):
    """Each crash has one incident and each slot its next process; what arrives is in order."""
    crashing = replace(CRASHING, crash_in_step=0.01, crash_in_reset=0.02, build_seconds=0.01)
    stalling = replace(STALLING, stall_in_step=0.02, stall_seconds=(0.01, 0.05), build_seconds=0.01)
    worker = make_faulty_worker((crashing, crashing, stalling, stalling), PARAMETERS)
    config = {
        "num_workers": 4,
        "poison_threshold": None,
        "restart": {"max_restarts": 1000, "backoff_base": 0.0, "backoff_cap": 0.0},
    }
    async with fail_after(LIMIT), make_manager(worker, learner=learner, **config) as manager:
        updates = 0
        while min(max(learner.incarnations_of(slot), default=0) for slot in (0, 1)) < 2:
            updates += (await manager.run(max_steps=512, steps_per_update=128)).num_updates
        events = manager.events()
        await manager.pause()
        while [info.state for info in manager.workers] != ["running"] * 4:
            await next_event(events, WorkerReady)
        assert manager.is_healthy
        incarnations = {info.worker_id: info.incarnation for info in manager.workers}
        stats, incidents = manager.stats(), manager.incidents
    assert manager.incidents == incidents
    assert {incident.exitcode for incident in incidents} <= ENDS
    assert {incident.remedy for incident in incidents} == {Remedy.RESTARTED}
    ended = sorted((incident.worker_id, incident.incarnation) for incident in incidents)
    assert ended == [(slot, past) for slot in (0, 1) for past in range(incarnations[slot])]
    assert (incarnations[2], incarnations[3]) == (0, 0)
    assert stats.num_restarts == len(incidents)
    assert stats.weights_version == 1 + updates
    check_order(learner.origins)
    for slot in range(4):
        assert learner.incarnations_of(slot) == sorted(learner.incarnations_of(slot))
        assert learner.incarnations_of(slot)
    seeds = {(one.worker_id, one.incarnation, one.seed) for one in learner.origins}
    assert len({seed for *_, seed in seeds}) == len(seeds) == len({one[:2] for one in seeds})
    assert {one.num_steps for one in learner.origins} == {32}
    assert learner.num_steps == 32 * len(learner.origins)
