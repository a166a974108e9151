"""What PPO learns from: the batches of one update as one training set, and its minibatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from keisei.exceptions import ConfigurationError
from keisei.training.legal_actions import LegalActions
from keisei.training.normalization import RewardNormalizer
from keisei.training.parallel.batch import ExperienceBatch
from keisei.training.rollouts import (
    Observations,
    generalized_advantage_estimate,
    get_observations,
)

_STATE = "states"


@dataclass(frozen=True, slots=True)
class Minibatch:
    """Some steps, and what the policy's ``evaluate`` is called with.

    Attributes:
        arguments: Observations, actions, and for a policy with a memory ``states`` and
            ``episode_starts``: steps ``[B]``, or whole rollouts ``[T, N]``.
        keywords: Masks of actions, if there are any.
        keep: ``bool [T, N]``, the true steps among whole rollouts; ``None`` keeps all.
        log_probs: ``[B]`` when the actions were taken; of the steps that are kept, as the next two.
        advantages: ``[B]``.
        returns: ``[B]``.
    """

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    keep: torch.Tensor | None
    log_probs: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    def evaluate(self, policy: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give the log-probabilities, entropies and values ``[B]`` of the steps that are kept."""
        judged = policy.evaluate(*self.arguments, **self.keywords)
        keep = self.keep
        log_probs, entropies, values = judged if keep is None else (one[keep] for one in judged)
        return log_probs, entropies, values


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """The rollouts ``[T, N]`` of one update, of all environments side by side.

    Attributes:
        data: Tensors ``[T, N, …]`` by the names of the batches, and ``advantages`` and ``returns``.
        observations: As the policy takes them, ``[T, N, …]``.
        mask: ``bool [T, N]``, the true steps.
        states: The memory at the start of the rollouts ``[N, …]``, or ``None``.
        legal: Lists for T times N positions, those of one step side by side, or ``None``.
    """

    data: Mapping[str, torch.Tensor]
    observations: Observations
    mask: torch.Tensor
    states: Any
    legal: LegalActions | None

    @classmethod
    def of(
        cls,
        batches: Sequence[ExperienceBatch],
        *,
        gamma: float,
        gae_lambda: float,
        reward_normalizer: RewardNormalizer | None = None,
    ) -> TrainingSet:
        """Join batches of rollouts of one length; copies.

        Args:
            batches: Those of one worker in their order.
            gamma: The discount factor.
            gae_lambda: The weight of longer returns.
            reward_normalizer: Counts the batches' rewards, then scales them.

        Raises:
            ConfigurationError: There is no true step.
            ValueError: A reward that is normalised is not finite.
        """
        names = batches[0].data
        apart = {name for name in names if name.split(".")[0] == _STATE}
        apart |= {"legal_actions", "legal_offsets"}
        data = {
            name: torch.cat([batch.data[name] for batch in batches], dim=1)
            for name in names
            if name not in apart
        }
        if reward_normalizer is not None:
            for batch in batches:
                reward_normalizer.update(batch, gamma=gamma)
            data["rewards"] = reward_normalizer(data["rewards"])
        mask = data.get("mask", torch.ones_like(data["terminated"]))
        if not mask.any():
            raise ConfigurationError(["no batch holds a true step: make the rollouts longer"])
        estimates = generalized_advantage_estimate(data, gamma=gamma, gae_lambda=gae_lambda)
        data["advantages"], data["returns"] = estimates
        states = {
            name: torch.cat([batch.data[name] for batch in batches])
            for name in names
            if name.split(".")[0] == _STATE
        }
        return cls(
            data=data,
            observations=get_observations(data),
            mask=mask,
            states=_states_of(states),
            legal=_legal_of(batches) if "legal_offsets" in names else None,
        )

    def true_observations(self) -> Observations:
        """Give the observations of the true steps, ``[B, …]``."""
        return _picked(self.observations, self.mask)

    def minibatches(self, size: int) -> Iterator[Minibatch]:
        """Go over all true steps once, in random order from torch's global generator."""
        return self._of_steps(size) if self.states is None else self._of_rollouts(size)

    def _of_steps(self, size: int) -> Iterator[Minibatch]:
        chosen = self.mask.flatten().nonzero().squeeze(-1)
        data = {name: tensor.flatten(0, 1) for name, tensor in self.data.items()}
        observations = _apply(self.observations, lambda tensor: tensor.flatten(0, 1))
        order = chosen[torch.randperm(len(chosen))]
        for rows in torch.split(order, size):
            keywords: dict[str, Any] = {}
            if "action_masks" in data:
                keywords["action_mask"] = data["action_masks"][rows]
            if self.legal is not None:
                keywords["legal_actions"] = self.legal.pick(rows)
            yield Minibatch(
                (_picked(observations, rows), data["actions"][rows]),
                keywords,
                None,
                *(data[name][rows] for name in ("log_probs", "advantages", "returns")),
            )

    def _of_rollouts(self, size: int) -> Iterator[Minibatch]:
        steps, num_envs = self.mask.shape
        data = self.data
        order = torch.randperm(num_envs)
        for envs in torch.split(order, max(size // steps, 1)):
            keep = self.mask[:, envs]
            if not keep.any():
                continue
            keywords: dict[str, Any] = {}
            if "action_masks" in data:
                # A step that only resets an environment has no actions; it is not kept.
                masks = data["action_masks"][:, envs]
                keywords["action_mask"] = masks | keep.logical_not().unsqueeze(-1)
            if self.legal is not None:
                places = torch.arange(steps * num_envs, device=envs.device).view(steps, num_envs)
                keywords["legal_actions"] = self.legal.pick(places[:, envs].flatten())
            yield Minibatch(
                (
                    _apply(self.observations, partial(torch.index_select, dim=1, index=envs)),
                    data["actions"][:, envs],
                    _picked(self.states, envs),
                    data["episode_starts"][:, envs],
                ),
                keywords,
                keep,
                *(data[name][:, envs][keep] for name in ("log_probs", "advantages", "returns")),
            )


def _apply(tensors: Observations, function: Callable[[torch.Tensor], torch.Tensor]) -> Observations:
    if isinstance(tensors, Mapping):
        return {name: function(tensor) for name, tensor in tensors.items()}
    return function(tensors)


def _picked(tensors: Observations, rows: torch.Tensor) -> Observations:
    return _apply(tensors, lambda tensor: tensor[rows])


def _states_of(states: Mapping[str, torch.Tensor]) -> Any:
    """Give the memory in the policy's form: one tensor, or tensors by name."""
    if not states:
        return None
    if _STATE in states:
        return states[_STATE]
    return {name.removeprefix(f"{_STATE}."): tensor for name, tensor in states.items()}


def _legal_of(batches: Sequence[ExperienceBatch]) -> LegalActions:
    """Join the lists of several batches, each ``[T, N]`` row by row, to ``[T, sum of N]``."""
    parts, places, first = [], [], 0
    for batch in batches:
        steps, num_envs = batch.data["terminated"].shape
        parts.append(LegalActions(batch.data["legal_actions"], batch.data["legal_offsets"]))
        places.append(first + torch.arange(steps * num_envs).view(steps, num_envs))
        first += steps * num_envs
    return LegalActions.cat(parts).pick(torch.cat(places, dim=1).flatten())
