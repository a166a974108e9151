"""Nested experiences and TensorDicts from real workers."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch

import pool_workers
from keisei import ExperienceBatch, WorkerStartError
from keisei.testing.scenarios import fail_after

OBS = torch.arange(24.0).view(8, 3)
NESTED = {"obs": OBS, "next": {"obs": OBS + 1, "reward": torch.zeros(8, 1)}}


@pytest.mark.parametrize("backend", ["local", "inline"])
@pytest.mark.parametrize("kind", ["mapping", "tensordict"])
async def test_a_nested_experience_arrives_under_dotted_names(make_manager, backend, kind):
    """Plain mappings and TensorDicts alike, without cost of configuration."""
    value = NESTED
    if kind == "tensordict":
        value = pytest.importorskip("tensordict").TensorDict(NESTED, batch_size=[8])
    worker = partial(pool_workers.Returning, value)
    async with fail_after(60), make_manager(worker, num_workers=1, backend=backend) as manager:
        batch = (await manager.collect())[0]
        assert list(batch) == ["obs", "next.obs", "next.reward"]
        assert torch.equal(batch["obs"], OBS)
        assert torch.equal(batch["next", "obs"], OBS + 1)
        assert batch.num_steps == 8


@pytest.mark.parametrize(
    ("batch_size", "given", "steps"), [([4, 6], None, 24), ([4, 6], 7, 7), ([], None, 4)]
)
async def test_a_tensordict_counts_its_steps(make_manager, batch_size, given, steps):
    """By its batch size, unless the experience says otherwise or it has none."""
    td = pytest.importorskip("tensordict")
    value = td.TensorDict({"a": torch.zeros(4, 6)}, batch_size=batch_size)
    worker = partial(pool_workers.Returning, pool_workers.Experience(value, num_steps=given))
    config = {"num_workers": 1, "backend": "inline"}
    async with fail_after(60), make_manager(worker, **config) as manager:
        assert (await manager.collect())[0].num_steps == steps


async def test_a_nested_name_that_clashes_is_told(make_manager):
    """The worker ends in its first ``collect``, and the application reads why."""
    worker = partial(pool_workers.Returning, {"a": {"b": OBS}, "a.b": OBS})
    config = {"num_workers": 1, "restart": {"max_restarts": 0}}
    message = "two entries of the experience have the name 'a.b'"
    with pytest.raises(WorkerStartError, match=re.escape(message)):
        async with fail_after(60), make_manager(worker, **config) as manager:
            await manager.collect()


async def test_joined_batches_are_never_overwritten(make_manager):
    """What was joined stays as it was while its worker writes where the batches were."""
    worker = partial(pool_workers.Counting, 8)
    async with fail_after(60), make_manager(worker, num_workers=1) as manager:
        batches = await manager.collect(min_steps=32)
        joined = ExperienceBatch.cat(batches)
        numbers = [part.sequence + 1 for part in joined.parts]
        del batches
        async for batch in manager.experiences():
            if batch.sequence > 100:
                break
    assert joined["number"].view(-1, 8).unique(dim=1).flatten().tolist() == numbers
