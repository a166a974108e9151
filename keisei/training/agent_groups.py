"""Agents sorted by policy: what each policy sees, what it may do, and how that reaches an agent."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from keisei.exceptions import ConfigurationError
from keisei.training.agent_envs import Seen
from keisei.training.rollouts import Observations
from keisei.training.spaces import (
    Box,
    Dict,
    Discrete,
    Leaf,
    MultiBinary,
    MultiDiscrete,
    Space,
    np,
    observation_leaves,
    tensor_dtype,
)

_MASK = "action_mask"
_Array = np.ndarray[Any, Any]
Value = Callable[[Observations], torch.Tensor]


@dataclass(frozen=True)
class AgentGroup:
    """The agents that share a policy.

    Attributes:
        name: The policy's; ``""`` if it is the only one.
        agents: Who.
        observation_space: What the policy sees.
        action_space: What it returns.
        leaves: Where its tensors are in an observation of the environment's.
        mask_place: ``"info"``, ``"observation"`` or ``None``.
        mask_size: Entries of a mask, or ``None``.
    """

    name: str
    agents: tuple[Any, ...]
    observation_space: Space[Any]
    action_space: Space[Any]
    leaves: tuple[Leaf, ...]
    mask_place: str | None
    mask_size: int | None

    def to_env(self, action: _Array) -> Any:
        """Turn a recorded action into one for the environment, which shares no memory with it."""
        space = self.action_space
        if isinstance(space, Discrete):
            return int(action)
        if isinstance(space, Box):
            return np.clip(action, space.low, space.high).astype(space.dtype)
        return action.copy()

    def mask_of(self, seen: Seen) -> _Array | None:
        """Return what an agent may do.

        Raises:
            ValueError: There is no mask, or it does not fit.
        """
        if self.mask_place is None:
            return None
        source = seen.info if self.mask_place == "info" else seen.observation
        if _MASK not in source:
            raise ValueError(
                f"agent {seen.agent!r} has no {_MASK!r} in its {self.mask_place}: give "
                "action_masks another value, or None"
            )
        mask = np.asarray(source[_MASK])
        if mask.shape != (self.mask_size,):
            raise ValueError(
                f"the action mask of agent {seen.agent!r} has the shape {mask.shape}, not "
                f"({self.mask_size},)"
            )
        mask = mask.astype(bool)
        if not mask.any():
            raise ValueError(f"agent {seen.agent!r} must act, and its action mask allows nothing")
        return mask

    def check_policy(self, act: Callable[..., Any], value: Value) -> None:
        """Try a policy on one observation, before anything depends on it.

        Raises:
            ConfigurationError: What it returns does not fit.
        """
        samples = [torch.as_tensor(copy.deepcopy(leaf.space).sample()) for leaf in self.leaves]
        pairs = zip(self.leaves, samples, strict=True)
        tensors = {leaf.path: one.to(tensor_dtype(leaf.space))[None] for leaf, one in pairs}
        inputs: Observations = tensors[""] if list(tensors) == [""] else tensors
        size = self.mask_size
        mask = None if size is None else torch.ones(1, size, dtype=torch.bool)
        results, single = tuple(act(inputs, mask)), value(inputs)
        called = f"policy {self.name!r}" if self.name else "policy"
        if len(results) != 3:  # noqa: PLR2004 - as the sentence says
            raise ConfigurationError(
                [f"{called}: act() returned {len(results)} values, not actions, log_probs, values"]
            )
        shapes = [(1, *(self.action_space.shape or ())), (1,), (1,), (1,)]
        names = ["act() returned actions", "act() returned log_probs", "act() returned values"]
        problems = [
            f"{called}: {name} of shape {tuple(tensor.shape)}, not {shape}"
            for name, tensor, shape in zip(
                [*names, "value() returned values"], [*results, single], shapes, strict=True
            )
            if tuple(tensor.shape) != shape
        ]
        if not problems and not torch.can_cast(results[0].dtype, tensor_dtype(self.action_space)):
            problems.append(f"{called}: actions of {results[0].dtype} for {self.action_space}")
        if problems:
            raise ConfigurationError(problems)


def make_groups(
    env: Any, agents: Sequence[Any], names: Mapping[Any, str], action_masks: str | None
) -> dict[str, AgentGroup]:
    """Sort agents by policy, and look what each policy sees and may do.

    Args:
        env: A PettingZoo environment.
        agents: All that may appear.
        names: Their policies.
        action_masks: As ``PettingZooWorker`` takes it.

    Raises:
        ConfigurationError: Spaces are not supported, or differ where a policy is shared.
    """
    members: dict[str, list[Any]] = {}
    for agent in agents:
        members.setdefault(names[agent], []).append(agent)
    kinds = ("observation", "action")
    problems: list[str] = []
    groups = {}
    for name, several in members.items():
        spaces = (env.observation_space(several[0]), env.action_space(several[0]))
        for agent in several[1:]:
            others = (env.observation_space(agent), env.action_space(agent))
            problems += [
                f"agents {several[0]!r} and {agent!r} share a policy, but have the {what} spaces "
                f"{space} and {other}: give them policies of their own with policy_mapping"
                for what, space, other in zip(kinds, spaces, others, strict=True)
                if space != other
            ]
        if not problems:
            groups[name] = _make_group(name, tuple(several), *spaces, action_masks)
    if problems:
        raise ConfigurationError(problems)
    return groups


def _make_group(
    name: str,
    agents: tuple[Any, ...],
    observations: Space[Any],
    actions: Space[Any],
    action_masks: str | None,
) -> AgentGroup:
    size = _num_logits(actions)
    inner = dict(observations.spaces) if isinstance(observations, Dict) else {}
    mask_space = inner.pop(_MASK, None)
    if action_masks == "auto":
        fits = mask_space is not None and size is not None and mask_space.shape == (size,)
        action_masks = "observation" if fits else None
    if action_masks is not None and size is None:
        raise ConfigurationError(
            [
                f"action_masks = {action_masks!r}: actions of {actions} have no masks; they are "
                "for Discrete and MultiDiscrete"
            ]
        )
    keys: tuple[str, ...] = ()
    if action_masks == "observation":
        if mask_space is None:
            raise ConfigurationError(
                [
                    f"action_masks = 'observation': the observation space of agent {agents[0]!r} "
                    f"has no {_MASK!r}: {observations}"
                ]
            )
        observations = Dict(inner)
        if list(inner) == ["observation"]:
            observations, keys = inner["observation"], ("observation",)
    leaves = tuple(
        replace(leaf, keys=(*keys, *leaf.keys)) for leaf in observation_leaves(observations)
    )
    if not isinstance(actions, Box | Discrete | MultiDiscrete | MultiBinary):
        raise ConfigurationError(
            [
                f"the action space of agent {agents[0]!r} is {actions}: convert it to Box, "
                "Discrete, MultiDiscrete or MultiBinary"
            ]
        )
    mask_size = None if action_masks is None else size
    return AgentGroup(name, agents, observations, actions, leaves, action_masks, mask_size)


def _num_logits(actions: Space[Any]) -> int | None:
    if isinstance(actions, Discrete):
        return int(actions.n)
    return int(actions.nvec.sum()) if isinstance(actions, MultiDiscrete) else None
