"""RecurrentActorCritic: a policy with a memory, for environments that do not show everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from keisei.exceptions import ConfigurationError
from keisei.training.legal_actions import LegalActions
from keisei.training.policy_base import SpacePolicy
from keisei.training.rollouts import Observations
from keisei.training.spaces import Space
from keisei.training.twin_layers import TwinNetwork, output_layer

_GATES = {"lstm": 4, "gru": 3}
_PARTS = {"lstm": 2, "gru": 1}


class RecurrentActorCritic(SpacePolicy):
    """Actor and critic with an LSTM or GRU each, between their hidden layers and their outputs.

    The cells are those of Hochreiter and Schmidhuber, "Long Short-Term Memory" (1997), with the
    forget gate of Gers et al. (2000), and of Cho et al., "Learning Phrase Representations using RNN
    Encoder-Decoder" (2014), as ``torch.nn.LSTM`` and ``torch.nn.GRU`` compute them. Actor and
    critic share no weights and no memory, and run as one batched product.

    The memory of each environment is a row of one tensor: ``float32 [N, 2, P, state_size]``, of
    actor and critic, with P being 2 for an LSTM (output and cell) and 1 for a GRU. A new episode
    begins with zeros: wherever ``episode_starts`` is true, the row that is passed in is not read.

    Args:
        observation_space: As for ``ActorCritic``; an action mask in it is treated alike.
        action_space: As for ``ActorCritic``.
        hidden_sizes: Units of the layers before the memory; there may be none.
        state_size: Units of the memory, of the actor and of the critic alike.
        cell: ``"lstm"`` or ``"gru"``.
        normalize_observations: As for ``ActorCritic``.
        normalize_rewards: As for ``ActorCritic``.

    Raises:
        ConfigurationError: A space of another kind, or no such cell.
    """

    def __init__(
        self,
        observation_space: Space[Any],
        action_space: Space[Any],
        *,
        hidden_sizes: Sequence[int] = (64,),
        state_size: int = 64,
        cell: str = "lstm",
        normalize_observations: bool = False,
        normalize_rewards: bool = False,
    ) -> None:
        if cell not in _GATES:
            raise ConfigurationError([f"cell = {cell!r}: must be 'lstm' or 'gru'"])
        super().__init__(
            observation_space,
            action_space,
            normalize_observations=normalize_observations,
            normalize_rewards=normalize_rewards,
        )
        sizes = [self._encoder.size, *hidden_sizes]
        self.hidden = TwinNetwork(sizes)
        self.memory = _TwinCell(sizes[-1], state_size, cell)
        self.actor_output = output_layer(state_size, self.head.num_inputs, gain=0.01)
        self.critic_output = output_layer(state_size, 1, gain=1.0)

    def initial_state(self, num_envs: int) -> torch.Tensor:
        """Return the memory ``[num_envs, 2, P, state_size]`` of episodes that begin: zeros."""
        weight = self.actor_output.weight
        return weight.new_zeros((num_envs, 2, self.memory.num_parts, self.memory.size))

    def act(
        self,
        observations: Observations,
        state: torch.Tensor,
        episode_starts: torch.Tensor,
        *,
        deterministic: bool = False,
        action_mask: torch.Tensor | None = None,
        legal_actions: LegalActions | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sample actions from torch's global generator, and remember the observations.

        Args:
            observations: ``[B, *shape]``, or a mapping of such tensors.
            state: ``[B, 2, P, state_size]``, from ``initial_state`` or the last call; not changed.
            episode_starts: ``bool [B]``, true where an observation is the first of its episode.
            deterministic: As for ``ActorCritic.act``.
            action_mask: As for ``ActorCritic.act``.
            legal_actions: As for ``ActorCritic.act``.

        Returns:
            Actions ``[B, *action_shape]``, their log-probabilities ``[B]``, the values ``[B]``, and
            the new state, which is for the next observations.

        Raises:
            ValueError: As for ``ActorCritic.act``.
        """
        outputs, values, state = self.step(observations, state, episode_starts)
        allowed = self._allowed(observations, action_mask, legal_actions)
        actions, log_probs = self.head.sample(outputs, deterministic=deterministic, allowed=allowed)
        return actions, log_probs, values, state

    def value(
        self, observations: Observations, state: torch.Tensor, episode_starts: torch.Tensor
    ) -> torch.Tensor:
        """Estimate the values ``[B]`` of observations that follow what ``state`` remembers."""
        return self.step(observations, state, episode_starts)[1]

    def step(
        self, observations: Observations, state: torch.Tensor, episode_starts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give the actor's outputs ``[B, n]``, the values ``[B]`` and the new state."""
        features = self._features(observations).unsqueeze(0)
        outputs, values, state = self._run(features, state, episode_starts.unsqueeze(0))
        return outputs.squeeze(0), values.squeeze(0), state

    def evaluate(
        self,
        observations: Observations,
        actions: torch.Tensor,
        states: torch.Tensor,
        episode_starts: torch.Tensor,
        *,
        action_mask: torch.Tensor | None = None,
        legal_actions: LegalActions | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Judge actions of whole rollouts, with gradients through time, for the learner.

        Args:
            observations: ``[T, N, *shape]``, or a mapping of such tensors.
            actions: ``[T, N, *action_shape]``.
            states: The memory at the start of the rollout, ``[N, 2, P, state_size]``.
            episode_starts: ``bool [T, N]``.
            action_mask: ``bool [T, N, n]``.
            legal_actions: Lists for T times N positions, those of one step side by side.

        Returns:
            Log-probabilities, entropies and values, each ``[T, N]``; see ``ActorCritic.evaluate``.

        Raises:
            ValueError: As for ``ActorCritic.evaluate``.
        """
        features = self._features(observations)
        outputs, values, _ = self._run(features, states, episode_starts)
        allowed = self._allowed(observations, action_mask, legal_actions)
        if isinstance(allowed, torch.Tensor):
            allowed = allowed.flatten(0, 1)
        judged = self.head.evaluate(outputs.flatten(0, 1), actions.flatten(0, 1), allowed=allowed)
        log_probs, entropies = (one.reshape(values.shape) for one in judged)
        return log_probs, entropies, values

    def forward(
        self, observations: Observations, states: torch.Tensor, episode_starts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the actor's outputs ``[T, N, n]`` and the values ``[T, N]`` of whole rollouts."""
        outputs, values, _ = self._run(self._features(observations), states, episode_starts)
        return outputs, values

    def _run(
        self, features: torch.Tensor, state: torch.Tensor, episode_starts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        steps, num_envs, size = features.shape
        flat = features.reshape(1, steps * num_envs, size).expand(2, -1, -1)
        hidden = self.hidden(flat).reshape(2, steps, num_envs, -1)
        remembered, state = self.memory(hidden, state, episode_starts)
        actor, critic = remembered.unbind()
        return self.actor_output(actor), self.critic_output(critic).squeeze(-1), state


class _TwinCell(nn.Module):
    """Two LSTM or GRU cells, run over whole sequences.

    The products with the inputs are those of all steps at once; only what depends on the step
    before is computed step by step.
    """

    def __init__(self, inputs: int, size: int, kind: str) -> None:
        super().__init__()
        self.size = size
        self.num_parts = _PARTS[kind]
        self._kind = kind
        outputs = _GATES[kind] * size
        self.input_weight = nn.Parameter(torch.empty(2, inputs, outputs))
        self.state_weight = nn.Parameter(torch.empty(2, size, outputs))
        self.input_bias = nn.Parameter(torch.zeros(2, 1, outputs))
        self.state_bias = nn.Parameter(torch.zeros(2, 1, outputs))
        with torch.no_grad():
            for weight in (*self.input_weight, *self.state_weight):
                for first in range(0, outputs, size):
                    gate = torch.empty(len(weight), size)
                    weight[:, first : first + size] = nn.init.orthogonal_(gate)

    def forward(
        self, inputs: torch.Tensor, state: torch.Tensor, episode_starts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run over ``[2, T, N, inputs]``; return ``[2, T, N, size]`` and the state at the end."""
        _, steps, num_envs, _ = inputs.shape
        projected = torch.baddbmm(self.input_bias, inputs.flatten(1, 2), self.input_weight)
        projected = projected.reshape(2, steps, num_envs, -1)
        step = self._lstm if self._kind == "lstm" else self._gru
        parts = state.permute(2, 1, 0, 3)  # [P, 2, N, size]
        outputs = []
        for row, starts in zip(projected.unbind(1), episode_starts.unbind(0), strict=True):
            parts = torch.where(starts.unsqueeze(-1), 0.0, parts)
            parts = step(row, parts)
            outputs.append(parts[0])
        return torch.stack(outputs, dim=1), parts.permute(2, 1, 0, 3)

    def _lstm(self, projected: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        output, cell = parts.unbind()
        gates = projected + torch.baddbmm(self.state_bias, output, self.state_weight)
        enter, forget, update, leave = gates.chunk(4, dim=-1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * update.tanh()
        return torch.stack([leave.sigmoid() * cell.tanh(), cell])

    def _gru(self, projected: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        (output,) = parts.unbind()
        recurrent = torch.baddbmm(self.state_bias, output, self.state_weight)
        reset_in, update_in, new_in = projected.chunk(3, dim=-1)
        reset_by, update_by, new_by = recurrent.chunk(3, dim=-1)
        keep = (update_in + update_by).sigmoid()
        new = (new_in + (reset_in + reset_by).sigmoid() * new_by).tanh()
        return (new + keep * (output - new)).unsqueeze(0)
