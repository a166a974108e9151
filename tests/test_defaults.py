"""Defaults of the public interface: each is a decision, and changes together with the changelog."""

from __future__ import annotations

import enum
import importlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel

import keisei

ELSEWHERE = [
    "keisei.backends.local.LocalBackend",
    "keisei.observers.log.LogObserver",
    "keisei.observers.progress.RichProgress",
    "keisei.testing.chaos.ChaosMonkey",
    "keisei.testing.failpoints.Failpoint",
    "keisei.testing.failpoints.Gate",
    "keisei.testing.scenarios.next_event",
    "keisei.training.actor_critic.ActorCritic",
    "keisei.training.gymnasium.GymnasiumWorker",
    "keisei.training.rollout_buffer.RolloutBuffer",
]
"""What users import beside the package's own names."""

EXPECTED = """
ActorCritic.act: action_mask=None
ActorCritic.act: deterministic=False
ActorCritic.act: legal_actions=None
ActorCritic.evaluate: action_mask=None
ActorCritic.evaluate: legal_actions=None
ActorCritic: hidden_sizes=(64, 64)
ActorCritic: normalize_observations=False
ActorCritic: normalize_rewards=False
AsyncQueue.get: timeout=None
AsyncQueue.put: timeout=None
AsyncQueue: manual=False
AsyncQueue: maxsize=0
ChaosMonkey: faults=('kill',)
ChaosMonkey: rate=1.0
ChaosMonkey: seed=0
Evaluation: every=1
Evaluation: on_error='raise'
Evaluation: timeout=None
Experience: info=None
Experience: num_steps=None
ExperienceBatch.get: default=None
ExperienceBatch.to: non_blocking=False
ExperienceBatch.to_tensordict: batch_size=None
ExperienceBatch.to_tensordict: keys='own'
ExperienceBatch.to_tensordict: provenance=True
ExperienceBatch: incarnation=0
ExperienceBatch: parts=()
ExperienceBatch: seed=0
ExperienceBatch: sequence=0
ExperienceBatch: settings_version=0
ExperienceBatch: staleness=0
ExperienceBatch: weights_version=0
ExperienceBatch: weights_versions=<factory>
ExperienceBatch: worker_id=0
Failpoint: hit=1
Failpoint: incarnation=0
Failpoint: worker_id=None
Gate.hold: label=''
Gate.wait: label=''
GymnasiumWorker: autoreset_mode=None
GymnasiumWorker: env_kwargs=None
GymnasiumWorker: next_observations=False
GymnasiumWorker: num_envs=1
GymnasiumWorker: rollout_length=128
GymnasiumWorker: vectorization='sync'
Incident: commands_lost=0
Incident: delay=0.0
Incident: detail=''
Incident: exitcode=None
Incident: experiences_lost=0
Incident: last_command=None
Incident: monotonic=0.0
Incident: phase=''
Incident: remedy=restarted
Incident: rss=None
Incident: stderr=''
Incident: time=<factory>
Incident: traceback=None
Incident: weights_version=0
LearnerTimeout: stack=''
LogObserver: logger=None
ModelSynchronizer.push: name='main'
ModelSynchronizer.raise_if_withdrawn: name='main'
ModelSynchronizer.snapshot: name='main'
ModelSynchronizer.wait_applied: name='main'
ModelSynchronizer.wait_applied: worker_ids=None
ModelSynchronizer.withdraw: number=0
ModelSynchronizer: check_finite=False
ModelSynchronizer: compression_enabled=False
ModelSynchronizer: lines=mappingproxy({})
ModelSynchronizer: sync_interval=100
ParallelManager.collect: min_steps=None
ParallelManager.collect: timeout=None
ParallelManager.configure: timeout=None
ParallelManager.configure: worker_ids=None
ParallelManager.pause: timeout=None
ParallelManager.push_weights: name='main'
ParallelManager.push_weights: timeout=None
ParallelManager.push_weights: wait=False
ParallelManager.reset: timeout=None
ParallelManager.run: evaluate=None
ParallelManager.run: evaluate_every=None
ParallelManager.run: max_seconds=None
ParallelManager.run: max_steps=None
ParallelManager.run: steps_per_update=None
ParallelManager.send_command: data=None
ParallelManager.send_command: timeout=None
ParallelManager.send_command: worker_ids=None
ParallelManager.snapshot: name='main'
ParallelManager: backend=None
ParallelManager: config=None
ParallelManager: learner=None
ParallelManager: model=None
ParallelManager: models=None
ParallelManager: observers=()
ParallelManager: settings=None
PoisonedWeights: replacement=0
PoisonedWeights: version=0
PoolExhausted: incidents=()
RichProgress: console=None
RichProgress: line_interval=10.0
RichProgress: refresh_interval=0.1
RichProgress: return_key='mean_return'
RichProgress: total_steps=None
RolloutBuffer: next_observations=False
RunReport: evaluations=()
WorkerCommunicator.collect_experiences: max_batches=None
WorkerCommunicator.collect_experiences: timeout=None
WorkerCommunicator.get_queue_info: num_queued_of=None
WorkerCommunicator.get_queue_info: worker_ids=None
WorkerCommunicator.pause: timeout=None
WorkerCommunicator.pause: worker_ids=None
WorkerCommunicator.renew: incarnation=None
WorkerCommunicator.send_control_command: data=None
WorkerCommunicator.send_control_command: timeout=None
WorkerCommunicator.send_control_command: worker_ids=None
WorkerCommunicator.send_model_weights: name='main'
WorkerCommunicator.send_model_weights: timeout=None
WorkerCommunicator.send_model_weights: wait=False
WorkerCommunicator.send_model_weights: worker_ids=None
WorkerCommunicator: lines=None
WorkerCommunicator: max_queue_size=4
WorkerCommunicator: synchronizer=None
WorkerCommunicator: timeout=30.0
WorkerContext.weights: name='main'
WorkerContext: device='cpu'
WorkerContext: settings=<factory>
WorkerContext: weights_version=0
WorkerError: exitcode=None
WorkerError: incarnation=-1
WorkerError: remote_traceback=None
WorkerError: worker_id=-1
next_event: when=None
"""


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Find every public function and method; the configuration has tests of its own."""
    values = [getattr(keisei, name) for name in keisei.__all__]
    for path in ELSEWHERE:
        module, _, name = path.rpartition(".")
        values.append(getattr(importlib.import_module(module), name))
    names = {value.__name__ for value in values}
    for value in values:
        if not inspect.isclass(value):
            yield value.__name__, value
        elif not issubclass(value, BaseModel):
            for name, method in inspect.getmembers(value, inspect.isfunction):
                # Under the name of the class that defines it, which may be a hidden base.
                owner = method.__qualname__.partition(".")[0]
                owner = owner if owner in names else value.__name__
                if name == "__init__":
                    yield owner, method
                elif not name.startswith("_"):
                    yield f"{owner}.{name}", method


def defaults_of(name: str, function: Callable[..., Any]) -> Iterator[str]:
    """Describe the defaults of what callers give; functions are seams for tests."""
    for key, parameter in inspect.signature(function).parameters.items():
        default = parameter.default
        is_seam = isinstance(default, types.FunctionType | types.BuiltinFunctionType)
        if default is not parameter.empty and not key.startswith("_") and not is_seam:
            text = str(default) if isinstance(default, enum.Enum) else repr(default)
            yield f"{name}: {key}={text}"


def test_the_defaults_of_the_public_interface_are_these():
    """A caller who says less gets what the last version gave."""
    found = {
        line
        for name, function in public()
        if not function.__module__.startswith("torch")  # of whose modules some are subclasses
        for line in defaults_of(name, function)
    }
    assert sorted(found) == EXPECTED.split("\n")[1:-1]
