"""ExperienceBatch as a mapping, on devices, and several batches as one: exact contents."""

from __future__ import annotations

import pickle
import re
from dataclasses import fields, replace

import pytest
import torch

from keisei import ExperienceBatch
from keisei.training.gymnasium import generalized_advantage_estimate
from keisei.training.legal_actions import LegalActions

T, N = 3, 2


def rollout(number=0, envs=N, **told):
    """Make a batch of ``[3, envs]`` whose values are its own and in order."""
    rewards = torch.arange(T * envs).view(T, envs) + 100.0 * number
    data = {"rewards": rewards, "next.obs": rewards.unsqueeze(-1).repeat(1, 1, 4)}
    info = {"episode_returns": [float(number)], "seed": number}
    provenance = {"worker_id": number, "sequence": 5, "weights_version": 7 - number, "seed": 9}
    return ExperienceBatch(data, info, T * envs, **{**provenance, "staleness": number, **told})


def provenance(batch):
    names = {field.name for field in fields(batch)} - {"data", "info", "parts"}
    return {name: getattr(batch, name) for name in sorted(names)}


def test_a_batch_is_the_mapping_of_its_tensors():
    """Subscript, membership, length, iteration and views are those of ``data``."""
    batch = rollout()
    assert batch["rewards"] is batch.data["rewards"]
    assert batch["next.obs"] is batch["next", "obs"] is batch.data["next.obs"]
    assert ("rewards" in batch, ("next", "obs") in batch, "next" in batch) == (True, True, False)
    assert (5 in batch, ("next", 5) in batch) == (False, False)
    assert (list(batch), len(batch)) == (["rewards", "next.obs"], 2)
    assert list(batch.keys()) == list(batch.data)
    assert [id(value) for value in batch.values()] == [id(one) for one in batch.data.values()]
    assert dict(batch) == batch.data
    assert batch.get("mask") is None


@pytest.mark.parametrize(
    ("released", "message"),
    [
        (False, "no tensor 'reward' in this batch: it has rewards, next.obs"),
        (True, "no tensor 'reward' in this batch: it was released"),
    ],
)
def test_a_name_that_is_not_there_is_told_with_those_that_are(released, message):
    """A misspelt name and a released batch are told apart."""
    batch = rollout()
    if released:
        batch.release()
    with pytest.raises(KeyError) as error:
        batch["reward"]
    assert error.value.args == (message,)


def test_a_batch_equals_itself_alone():
    """Equal tensors make no equal batch, so that batches may be members of sets and lists."""
    batch = rollout()
    assert [batch] == [batch]
    assert batch != replace(batch)
    assert batch.__eq__(batch) is True
    assert len({batch, rollout(), replace(batch)}) == 3


def test_a_batch_may_be_pickled():
    """Its tensors, info and provenance come back."""
    batch = ExperienceBatch.cat([rollout(0), rollout(1)], dim=1)
    copy = pickle.loads(pickle.dumps(batch))
    assert torch.equal(copy["rewards"], batch["rewards"])
    assert (provenance(copy), copy.info) == (provenance(batch), batch.info)
    assert [provenance(part) for part in copy.parts] == [provenance(part) for part in batch.parts]


def test_functions_of_rollouts_take_a_batch():
    """A batch stands where a mapping of tensors is wanted."""
    rewards = torch.ones(T, N)
    ended = torch.zeros(T, N, dtype=torch.bool)
    data = {name: torch.zeros(T, N) for name in ("values", "next_values")}
    data |= {"rewards": rewards, "terminated": ended, "truncated": ended}
    batch = ExperienceBatch(data, {}, T * N)
    advantages, _ = generalized_advantage_estimate(batch, gamma=1.0, gae_lambda=1.0)
    assert advantages.tolist() == [[3, 3], [2, 2], [1, 1]]


@pytest.mark.parametrize(("dim", "shape"), [(0, [6, 2]), (1, [3, 4])])
def test_batches_are_joined_along_a_dimension(dim, shape):
    """Each tensor holds those of the parts one behind the other, as ``torch.cat`` has it."""
    parts = [rollout(0), rollout(1)]
    joined = ExperienceBatch.cat(parts, dim=dim)
    assert list(joined["rewards"].shape) == shape
    assert list(joined) == list(parts[0])
    for name in joined:
        assert torch.equal(joined[name], torch.cat([part[name] for part in parts], dim))


def recurrent(number):
    states = torch.full((N, 5), float(number))
    starts = torch.zeros(T, N, dtype=torch.bool)
    data = {**rollout(number).data, "episode_starts": starts, "states.h": states}
    return ExperienceBatch(data, {}, T * N)


def test_states_of_recurrent_policies_are_joined_with_their_columns():
    """They have no time, so that columns and states stay together; along time there is none."""
    joined = ExperienceBatch.cat([recurrent(1), recurrent(2)], dim=1)
    assert joined["states.h"][:, 0].tolist() == [1, 1, 2, 2]
    assert joined["episode_starts"].shape == (T, 2 * N)
    message = (
        "batches cannot be joined along dim 0: its states are those at the beginning of one "
        "rollout: use dim=1"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ExperienceBatch.cat([recurrent(1), recurrent(2)])
    plain = ExperienceBatch({"states": torch.zeros(3, 2)}, {}, 3)
    assert ExperienceBatch.cat([plain, plain])["states"].shape == (6, 2)


def listed(lists):
    legal = LegalActions.from_lists(lists)
    data = {"a": torch.arange(len(lists)), "legal_actions": legal.indices}
    return ExperienceBatch({**data, "legal_offsets": legal.offsets}, {}, len(lists))


def test_lists_of_legal_actions_are_joined_with_their_rows():
    """Each row keeps its own list; along another dimension than the rows' there is no order."""
    joined = ExperienceBatch.cat([listed([[1, 2], [3]]), listed([[4], [], [5, 6]])])
    assert joined["legal_actions"].tolist() == [1, 2, 3, 4, 5, 6]
    assert joined["legal_offsets"].tolist() == [0, 2, 3, 4, 4, 6]
    assert joined["a"].tolist() == [0, 1, 0, 1, 2]
    with pytest.raises(ValueError, match=r"legal_actions are lists in the order of all rows"):
        ExperienceBatch.cat([listed([[1]]), listed([[1]])], dim=1)


def test_sizes_may_differ_along_the_joined_dimension():
    """And only there."""
    joined = ExperienceBatch.cat([rollout(0, envs=1), rollout(1, envs=3)], dim=1)
    assert joined["rewards"].tolist() == [
        [0, 100, 101, 102],
        [1, 103, 104, 105],
        [2, 106, 107, 108],
    ]
    assert joined.num_steps == 12


def test_the_joined_provenance_is_what_is_true_of_all():
    """Agreement is kept; versions are the oldest, staleness the largest, other numbers -1."""
    joined = ExperienceBatch.cat([rollout(0), rollout(2), rollout(1)], dim=1)
    told = provenance(joined)
    expected = {
        "incarnation": 0,
        "num_steps": 18,
        "seed": 9,
        "sequence": 5,
        "staleness": 2,
        "weights_version": 5,
        "worker_id": -1,
    }
    assert {name: told[name] for name in expected} == expected
    assert joined.info == {"episode_returns": [0.0, 2.0, 1.0]}
    assert repr(joined) == (
        "<ExperienceBatch of 3 v5 (18 steps) "
        "{rewards: [3, 6] torch.float32, next.obs: [3, 6, 4] torch.float32}>"
    )


def test_versions_by_name_are_the_oldest_that_all_have():
    """A name that one of the parts had no weights of is left to the parts."""
    versions = [{"main": 3, "critic": 1}, {"main": 2}, {"main": 4, "critic": 5}]
    batches = [rollout(0, weights_versions=each) for each in versions]
    joined = ExperienceBatch.cat(batches, dim=1)
    assert joined.weights_versions == {"main": 2}
    assert [part.weights_versions for part in joined.parts] == versions


def test_the_parts_keep_their_provenance_and_no_tensors():
    """Each part tells everything but its data, and parts of parts stand in one row."""
    batches = [rollout(0), rollout(1), rollout(2)]
    joined = ExperienceBatch.cat([ExperienceBatch.cat(batches[:2], dim=1), batches[2]], dim=1)
    assert [provenance(part) for part in joined.parts] == [provenance(one) for one in batches]
    assert [part.info for part in joined.parts] == [one.info for one in batches]
    assert [dict(part) for part in joined.parts] == [{}, {}, {}]
    assert joined.info == {"episode_returns": [0.0, 1.0, 2.0]}
    assert [part.parts for part in joined.clone().parts] == [(), (), ()]


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_joined_is_a_copy(count):
    """Also of a single batch: nothing keeps the parts' memory, and writing changes no part."""
    batches = [rollout(number) for number in range(count)]
    joined = ExperienceBatch.cat(batches, dim=1)
    joined["rewards"].zero_()
    assert batches[0]["rewards"].tolist() == [[0, 1], [2, 3], [4, 5]]
    storages = {tensor.untyped_storage().data_ptr() for one in batches for tensor in one.values()}
    assert not storages & {one.untyped_storage().data_ptr() for one in joined.values()}
    assert len(joined.parts) == count


def changed(**tensors):
    batch = rollout(1)
    return replace(batch, data={**batch.data, **tensors})


def without(name):
    batch = rollout(1)
    return replace(batch, data={key: batch[key] for key in batch if key != name})


@pytest.mark.parametrize(
    ("batches", "dim", "message"),
    [
        ([], 0, "there are no batches to join: cat() needs at least one"),
        (
            [rollout(), without("rewards")],
            0,
            "batches cannot be joined along dim 0: batches[1] has no rewards, which batches[0] has",
        ),
        (
            [rollout(), rollout(), changed(mask=torch.ones(3))],
            0,
            "batches cannot be joined along dim 0: batches[2] has mask, which batches[0] has not",
        ),
        (
            [rollout(), changed(rewards=torch.zeros(3, 2, dtype=torch.float64))],
            0,
            "batches cannot be joined along dim 0: rewards has the dtype torch.float32 in "
            "batches[0] and torch.float64 in batches[1]",
        ),
        (
            [rollout(), changed(rewards=torch.zeros(3, 2, device="meta"))],
            0,
            "batches cannot be joined along dim 0: rewards has the device cpu in "
            "batches[0] and meta in batches[1]",
        ),
        (
            [rollout(envs=2), rollout(envs=3)],
            0,
            "batches cannot be joined along dim 0: rewards has the shape [3, 2] in batches[0] and "
            "[3, 3] in batches[1]; next.obs has the shape [3, 2, 4] in batches[0] and [3, 3, 4] in "
            "batches[1]",
        ),
        (
            [rollout(), rollout()],
            2,
            "batches cannot be joined along dim 2: rewards of shape [3, 2] has no dimension 2",
        ),
        (
            [rollout(), rollout()],
            -3,
            "batches cannot be joined along dim -3: rewards of shape [3, 2] has no dimension -3",
        ),
        (
            [changed(states=torch.tensor(1.0))] * 2,
            0,
            "batches cannot be joined along dim 0: states of shape [] has no dimension 0",
        ),
    ],
)
def test_batches_that_do_not_fit_are_told(batches, dim, message):
    """The error names every tensor and batch; nothing is broadcast, promoted or left out."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ExperienceBatch.cat(batches, dim=dim)


def test_a_batch_that_is_there_already_is_not_copied():
    """``to`` the same device gives the same tensors and provenance, in a batch of its own."""
    batch = rollout(1)
    same = batch.to("cpu", non_blocking=True)
    assert [id(tensor) for tensor in same.values()] == [id(tensor) for tensor in batch.values()]
    assert (provenance(same), same.info) == (provenance(batch), batch.info)
    batch.release()
    assert same["rewards"].shape == (T, N)


def test_a_batch_goes_to_a_device():
    """Each tensor is on the device that was asked for."""
    there = rollout(1).to(torch.device("meta"))
    assert {tensor.device.type for tensor in there.values()} == {"meta"}
    assert there["rewards"].shape == (T, N)
    assert provenance(there) == provenance(rollout(1))


@pytest.mark.parametrize("change", ["clone", "pin_memory"])
def test_copies_keep_nothing_of_the_batch(change, monkeypatch):
    """A clone, or a batch in pinned memory, is one of its own with the same provenance."""
    pinned = []

    def pin(tensor):  # there is no pinned memory without an accelerator
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = rollout(1)
    copy = getattr(batch, change)()
    assert len(pinned) == (2 if change == "pin_memory" else 0)
    batch["rewards"].zero_()
    assert copy["rewards"].tolist() == [[100, 101], [102, 103], [104, 105]]
    assert (provenance(copy), copy.info) == (provenance(batch), batch.info)
