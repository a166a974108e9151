"""Batches as TensorDicts: exact keys, shapes and memory, and torchrl's own parts run on them."""

from __future__ import annotations

import re
import sys
from functools import partial

import pytest
import torch
from torch import nn

from keisei import ExperienceBatch
from keisei.testing.scenarios import fail_after
from keisei.training.gymnasium import (
    ActorCritic,
    GymnasiumWorker,
    generalized_advantage_estimate,
)
from keisei.worker import WorkerContext
from training.environments import CountingDictEnv, CountingEnv, CountingPolicy

pytest.importorskip("tensordict")

T, N = 6, 3
TOLD = {"worker_id": 2, "incarnation": 1, "sequence": 5, "weights_version": 7, "staleness": 3}
SEED = 2**62 + 1


def batch_of(data, num_steps=0, **told):
    return ExperienceBatch(data, {}, num_steps, **{**TOLD, "seed": SEED, **told})


def keys_of(td):
    """Return every key of a TensorDict with its shape, by dotted name, but the provenance."""
    return {
        ".".join((key,) if isinstance(key, str) else key): list(value.shape)
        for key, value in td.items(include_nested=True, leaves_only=True)
        if key[0] != "provenance"
    }


def rollout(env, policy=CountingPolicy, length=T):
    """Return a rollout of ``GymnasiumWorker`` as a batch."""
    worker = GymnasiumWorker(env, policy, num_envs=N, rollout_length=length)
    worker.setup(WorkerContext(worker_id=0, incarnation=0, num_workers=1, seed=7))
    experience = worker.collect()
    worker.teardown()
    return batch_of(experience.data, experience.num_steps)


def test_names_are_nested_by_their_dots():
    """The tensors are the batch's own, in its memory."""
    obs, after = torch.zeros(8, 3), torch.ones(8, 3)
    td = batch_of({"obs": obs, "next.obs": after, "next.reward": torch.ones(8)}, 8).to_tensordict()
    assert keys_of(td) == {"obs": [8, 3], "next.obs": [8, 3], "next.reward": [8]}
    assert td.batch_size == td["next"].batch_size == torch.Size([8])
    assert td["obs"].data_ptr() == obs.data_ptr()
    assert td["next", "obs"].data_ptr() == after.data_ptr()


def test_every_row_tells_where_it_comes_from():
    """The provenance stays with rows that are picked, shuffled and mixed."""
    data = {"a": torch.arange(4.0)}
    both = torch.cat([batch_of(data, 4, worker_id=n).to_tensordict() for n in (0, 1)])
    picked = both[torch.tensor([6, 1])]
    assert picked["provenance"].batch_size == torch.Size([2])
    expected = {
        "worker_id": [1, 0],
        "incarnation": [1, 1],
        "sequence": [5, 5],
        "weights_version": [7, 7],
        "staleness": [3, 3],
        "seed": [SEED, SEED],
    }
    assert {key: picked["provenance", key].tolist() for key in expected} == expected
    named = batch_of(data, 4, weights_versions={"main": 7, "critic": 2}).to_tensordict()
    assert named["provenance", "weights_versions", "critic"].tolist() == [2, 2, 2, 2]
    assert "provenance" not in batch_of(data, 4).to_tensordict(provenance=False)


@pytest.mark.parametrize(
    ("shapes", "num_steps", "batch_size"),
    [
        ([[8, 3], [8]], 8, [8]),
        ([[8, 3], [8, 3]], 8, [8]),
        ([[8, 3], [8, 3]], 24, [8, 3]),
        ([[8, 3, 5], [8, 3]], 17, [8, 3]),
        ([[8, 3], [7, 3]], 8, []),
        ([[8, 1], [8, 1]], 8, [8]),
        ([[1, 8], [1, 8, 2]], 8, [1, 8]),
        ([[0, 4], [0, 4]], 0, [0]),
        ([[], [8]], 8, []),
    ],
)
def test_the_batch_size_is_what_all_share(shapes, num_steps, batch_size):
    """Up to where it counts the steps, if it does; one that is given is taken."""
    data = {str(number): torch.zeros(shape) for number, shape in enumerate(shapes)}
    batch = batch_of(data, num_steps)
    assert list(batch.to_tensordict().batch_size) == batch_size
    assert list(batch.to_tensordict(batch_size=batch_size[:1]).batch_size) == batch_size[:1]


def test_a_tensordict_comes_back_as_it_was():
    """Flattened by a worker and nested again: the same keys, values and batch size."""
    from tensordict import TensorDict

    from keisei.ipc import nested

    sent = TensorDict({"a": torch.rand(4, 2), "n": {"b": torch.rand(4, 2, 1)}}, batch_size=[4, 2])
    batch = batch_of(nested.flatten(sent), nested.steps_of(sent))
    back = batch.to_tensordict(provenance=False)
    assert back.batch_size == sent.batch_size
    assert (back == sent).all()


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (
            {"a": torch.zeros(3), "a.b": torch.zeros(3)},
            {},
            "'a.b' has no place in a TensorDict: it would lie below the tensor 'a'; rename one of "
            "them",
        ),
        (
            {"a.b": torch.zeros(3), "a": torch.zeros(3)},
            {},
            "'a' has no place in a TensorDict: other tensors lie below it; rename one of them",
        ),
        (
            {"provenance.seed": torch.zeros(3)},
            {},
            "'provenance.seed' has no place in a TensorDict: two tensors have this key; rename one "
            "of them",
        ),
        (
            {"a": torch.zeros(3, 2), "b.c": torch.zeros(4, 2), "d": torch.zeros(())},
            {"batch_size": [3]},
            "the batch size [3] does not fit: b.c has the shape [4, 2]; d has the shape []",
        ),
        (
            {"rewards": torch.zeros(3, 2), "mine": torch.zeros(2)},
            {"keys": "torchrl"},
            "the batch size [3, 2] does not fit: mine has the shape [2]",
        ),
        (
            {"obs": torch.zeros(3, 2)},
            {"keys": "torchrl"},
            "a rollout for torchrl has rewards; this one has obs: give batch_size",
        ),
        (
            {"observations": torch.zeros(3), "observation": torch.zeros(3)},
            {"keys": "torchrl", "batch_size": [3]},
            "'observation' has no place in a TensorDict: two tensors have this key; rename one of "
            "them",
        ),
        ({"a": torch.zeros(3)}, {"keys": "td"}, 'keys = \'td\': must be "own" or "torchrl"'),
    ],
)
def test_what_fits_no_tensordict_is_told(data, options, message):
    """The error names each tensor and the way out."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        batch_of(data).to_tensordict(**options)


def test_without_tensordict_the_error_names_the_extra(monkeypatch):
    """Nothing else of a batch needs it."""
    monkeypatch.setitem(sys.modules, "tensordict", None)
    message = re.escape('install it with: pip install "keisei[tensordict]"')
    with pytest.raises(ImportError, match=message):
        batch_of({"a": torch.zeros(2)}).to_tensordict()


def test_a_rollout_has_the_keys_of_torchrl():
    """Exact keys and shapes; everything but ``done`` is the batch's own memory."""
    batch = rollout(CountingEnv)
    td = batch.to_tensordict("torchrl")
    assert keys_of(td) == {
        "observation": [T, N, *batch["observations"].shape[2:]],
        "action": [T, N],
        "action_log_prob": [T, N],
        "sample_log_prob": [T, N],
        "state_value": [T, N, 1],
        "mask": [T, N],
        "next.state_value": [T, N, 1],
        "next.reward": [T, N, 1],
        "next.terminated": [T, N, 1],
        "next.truncated": [T, N, 1],
        "next.done": [T, N, 1],
    }
    assert (td.batch_size, td.names) == (torch.Size([T, N]), ["time", None])
    done = batch["terminated"] | batch["truncated"]
    assert done.any()
    assert torch.equal(td["next", "done"][..., 0], done)
    assert td["next", "reward"].data_ptr() == batch["rewards"].data_ptr()
    assert td["action_log_prob"].data_ptr() == batch["log_probs"].data_ptr()


def test_leaves_and_further_tensors_have_their_keys():
    """Leaves lie below the observation; states are no steps; others keep their names."""
    batch = rollout(CountingDictEnv)
    leaves = {name for name in batch if name.startswith("observations.")}
    assert leaves
    further = {
        "next_observations": torch.zeros(T, N, 4),
        "action_masks": torch.ones(T, N, 2, dtype=torch.bool),
        "episode_starts": torch.zeros(T, N, dtype=torch.bool),
        "infos.is_success": torch.zeros(T, N),
        "states.h": torch.zeros(N, 5),
        "legal_actions": torch.zeros(99),
        "legal_offsets": torch.zeros(T * N + 1),
    }
    keys = keys_of(batch_of({**batch.data, **further}).to_tensordict("torchrl"))
    for name in leaves:
        below = name.removeprefix("observations.")
        assert keys[f"observation.{below}"] == list(batch[name].shape)
    plain = keys_of(rollout(CountingEnv).to_tensordict("torchrl"))
    del plain["observation"]
    assert {key: shape for key, shape in keys.items() if "observation." not in key} == {
        **plain,
        "next.observation": [T, N, 4],
        "action_mask": [T, N, 2],
        "is_init": [T, N, 1],
        "infos.is_success": [T, N],
    }


def test_states_that_are_observations_stay():
    """Left out are those of recurrent policies alone, which come with ``episode_starts``."""
    data = {"rewards": torch.zeros(3), "states": torch.zeros(3, 4), "legal_actions": torch.zeros(3)}
    keys = keys_of(batch_of(data).to_tensordict("torchrl"))
    assert keys == {"next.reward": [3, 1], "states": [3, 4], "legal_actions": [3]}


def test_torchrls_advantages_are_ours():
    """``GAE`` finds the time, the values and the ends, and gives the same numbers."""
    from torchrl.objectives.value import GAE

    batch = rollout("CartPole-v1", ActorCritic, length=64)
    assert batch["terminated"].any()
    td = GAE(gamma=0.9, lmbda=0.8, value_network=None)(batch.to_tensordict("torchrl"))
    advantages, returns = generalized_advantage_estimate(batch, gamma=0.9, gae_lambda=0.8)
    torch.testing.assert_close(td["advantage"][..., 0], advantages)
    torch.testing.assert_close(td["value_target"][..., 0], returns)


def make_loss(policy):
    """Return torchrl's clipped loss over the networks of an ``ActorCritic``, which it trains."""
    from tensordict.nn import TensorDictModule
    from torchrl.modules import ProbabilisticActor
    from torchrl.objectives import ClipPPOLoss

    class Part(nn.Module):
        def __init__(self, number):
            super().__init__()
            self.policy, self.number = policy, number

        def forward(self, observations):
            output = self.policy(observations)[self.number]
            return output if self.number == 0 else output.unsqueeze(-1)

    actor = ProbabilisticActor(
        TensorDictModule(Part(0), ["observation"], ["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
    )
    return ClipPPOLoss(actor, TensorDictModule(Part(1), ["observation"], ["state_value"]))


async def test_torchrl_trains_on_batches_of_a_pool(make_manager):
    """Advantages, a loss and a step, with no line between them and the batch."""
    import gymnasium
    from torchrl.objectives.value import GAE

    env = gymnasium.make("CartPole-v1")
    policy = ActorCritic(env.observation_space, env.action_space)
    env.close()
    worker = partial(GymnasiumWorker, "CartPole-v1", ActorCritic, num_envs=N, rollout_length=32)
    loss = make_loss(policy)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.01)
    advantages = GAE(gamma=0.99, lmbda=0.95, value_network=None)
    async with fail_after(100), make_manager(worker, model=policy, num_workers=1) as manager:
        batch = (await manager.collect())[0]
        rows = advantages(batch.to_tensordict("torchrl")).reshape(-1)
        assert rows.batch_size == torch.Size([32 * N])
        before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        losses = loss(rows)
        # The worker's weights are these: its actions are exactly as likely here.
        torch.testing.assert_close(losses["kl_approx"], torch.tensor(0.0), atol=1e-6, rtol=0)
        assert losses["clip_fraction"] == 0
        mean = rows["advantage"].mean()
        torch.testing.assert_close(losses["loss_objective"], -mean, atol=1e-5, rtol=1e-5)
        sum(losses[key] for key in ("loss_objective", "loss_critic", "loss_entropy")).backward()
        optimizer.step()
        after = policy.state_dict()
        assert all(not torch.equal(after[name], before[name]) for name in before)
        assert await manager.push_weights(policy, wait=True) == 2
