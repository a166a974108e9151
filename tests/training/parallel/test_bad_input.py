"""Bad input, and what it gets: an error that names who, what, and what to do."""

from __future__ import annotations

import functools
import threading

import numpy as np
import pytest
import torch

import pool_workers
from keisei.events import ExitCause
from keisei.exceptions import ConfigurationError, SerializationError, WorkerStartError
from keisei.testing.leaks import check_no_leaks
from keisei.testing.scenarios import fail_after
from keisei.training.parallel.parallel_manager import ParallelManager
from keisei.worker import Experience, Worker


class Local(Worker):
    """Lies in a module that child processes cannot import by this name."""


def test_every_problem_of_a_configuration_is_listed_at_once():
    """Unknown keys with the nearest known name, and values with what they must be."""
    with pytest.raises(ConfigurationError) as caught:
        ParallelManager(pool_workers.Counting, config={"num_worker": 2, "mode": "snyc", "seed": -1})
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert "num_worker" in text
    assert "did you mean 'num_workers'?" in text
    assert "did you mean 'sync'?" in text
    assert "seed = -1" in text


def a_local_class():
    class Inner(Worker):
        pass

    return Inner


@pytest.mark.parametrize(
    ("factory", "problem"),
    [
        (lambda: None, r"<lambda> is a lambda; define the worker class at the top level"),
        (a_local_class(), r"Inner is defined inside a function; define the worker class at the"),
        (
            functools.partial(pool_workers.Returning, lambda: 1),
            r"functools.partial\(Returning, …\) cannot be sent to a process: .*<lambda> is a lam",
        ),
        (
            functools.partial(pool_workers.Returning, pool_workers.ExitsOnPickling()),
            r"functools.partial\(Returning, …\) cannot be pickled \(SystemExit: 3\)",
        ),
        (
            functools.partial(pool_workers.Returning, threading.Lock()),
            r"functools.partial\(Returning, …\) cannot be pickled \(TypeError: cannot pickle '_th",
        ),
    ],
    ids=["lambda", "local class", "partial of a lambda", "exits", "lock"],
)
def test_a_factory_that_cannot_travel_is_refused_at_once(factory, problem):
    """Before anything is started; the error names the object and the remedy."""
    with check_no_leaks(), pytest.raises(SerializationError, match=problem):
        ParallelManager(factory)


@pytest.mark.parametrize(
    ("factory", "problem"),
    [
        (pool_workers.Counting(), "worker is an instance of Counting; give the class itself"),
        (42, "worker is 42; give a class or another callable"),
        (None, "worker is None; give a class or another callable"),
    ],
)
def test_what_is_no_factory_is_refused(factory, problem):
    """An instance or a value is no way to make workers."""
    with pytest.raises(TypeError, match=problem):
        ParallelManager(factory)


async def test_a_factory_that_makes_no_worker_fails_the_start(make_manager):
    """The error says what it returned and what it should."""
    manager = make_manager(functools.partial(dict, a=1), num_workers=1)
    async with fail_after(30):
        with pytest.raises(
            Exception, match="returned dict; it must return an instance of a keisei"
        ):
            await manager.start()


BAD_EXPERIENCES = {
    "None": (None, "an experience must be a mapping of names to tensors or arrays, not NoneType"),
    "list": ([1], "an experience must be a mapping of names to tensors or arrays, not list"),
    "empty": ({}, "an experience must hold at least one tensor"),
    "number": ({"x": 3.0}, r"experience\['x'\] is float; give a torch tensor or a NumPy array"),
    "object array": (
        {"x": np.array([object()])},
        r"experience\['x'\] is an array of dtype object",
    ),
    "text array": ({"x": np.array(["a"])}, r"experience\['x'\] is an array of dtype <U1"),
    "sparse": (pool_workers.sparse, r"experience\['x'\] is a torch.sparse_coo tensor; make it de"),
    "meta": (pool_workers.on_meta, r"experience\['x'\] is on the meta device"),
    "key": ({1: torch.zeros(1)}, "experience keys must be strings, not 1"),
    "negative steps": (
        pool_workers.negative_steps,
        "Experience.num_steps is -1; it must not be negative",
    ),
    "no integer": (pool_workers.steps_of_text, "Experience.num_steps|integer"),
    "info": (pool_workers.unpicklable_info, "Experience.info cannot be pickled"),
    "info no mapping": (pool_workers.info_of_text, "dictionary update sequence"),
}


@pytest.mark.parametrize(("value", "problem"), BAD_EXPERIENCES.values(), ids=BAD_EXPERIENCES.keys())
@pytest.mark.parametrize("backend", ["local", "inline"])
async def test_an_experience_that_cannot_be_shared_names_the_key_and_the_type(
    make_manager, backend, value, problem
):
    """It is an error of the worker, with its traceback, and counts as one by the policy."""
    worker = functools.partial(pool_workers.Returning, value)
    config = {"backend": backend, "mode": "sync", "num_workers": 1}
    manager = make_manager(worker, **config, restart={"max_restarts": 0})
    async with fail_after(30), manager:
        with pytest.raises(WorkerStartError, match=problem):
            await manager.collect()
        (incident,) = manager.incidents
        assert (incident.worker_id, incident.phase) == (0, "collect")
        assert incident.cause is ExitCause.USER_ERROR
        assert incident.traceback


async def test_an_experience_of_arrays_and_an_experience_object_are_the_same(make_manager):
    """A bare mapping will do."""
    for value in ({"x": np.ones(3)}, Experience({"x": torch.ones(3, dtype=torch.float64)})):
        worker = functools.partial(pool_workers.Returning, value)
        async with fail_after(30), make_manager(worker, num_workers=1) as manager:
            batch = (await manager.collect())[0]
            assert torch.equal(batch.data["x"], torch.ones(3, dtype=torch.float64))
            assert (batch.num_steps, batch.info) == (3, {})


@pytest.mark.parametrize("hook", ["setup", "collect", "load_weights", "reset", "on_command"])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt], ids=lambda e: e.__name__)
async def test_exits_by_exception_are_errors_of_the_hook(make_manager, hook, error):
    """SystemExit and KeyboardInterrupt of user code are told with a traceback, as any other."""
    worker = functools.partial(pool_workers.Raising, hook, error)
    config = {"num_workers": 1, "restart": {"max_restarts": 0}}
    manager = make_manager(worker, **config)

    async def use():
        async with manager:
            await manager.push_weights({"w": torch.zeros(1)}, wait=True)
            await manager.reset()
            await manager.send_command("echo")
            await manager.collect(min_steps=100)

    async with fail_after(30):
        with pytest.raises(Exception, match=error.__name__):
            await use()
        assert all("pool_workers.py" in (one.traceback or "") for one in manager.incidents)


async def test_a_hook_that_is_not_there_is_explained(make_manager):
    """A worker without collect says which class must define it."""
    manager = make_manager(Worker, mode="sync", num_workers=1, restart={"max_restarts": 0})
    async with fail_after(30), manager:
        with pytest.raises(WorkerStartError, match="Worker must define collect"):
            await manager.collect()
