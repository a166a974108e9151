"""Playing whole episodes: environments of this process, one policy, any kind of memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch

from keisei.exceptions import ConfigurationError
from keisei.training.infos import episode_of
from keisei.training.spaces import (
    Box,
    Space,
    gymnasium,
    np,
    observation_leaves,
    tensor_dtype,
)


class Player:
    """Some environments, played one step each in turn.

    Args:
        env: An environment id, or a callable that returns an environment.
        num_envs: How many.
        env_kwargs: Arguments for each.
        seed: From which each has its own seed, for its first episode; ``None`` draws one.
        deterministic: Whether policies take their likeliest actions.
        progress: Called at every step.

    Raises:
        ConfigurationError: ``env`` makes no ``gymnasium.Env``, or its spaces are not supported.
    """

    def __init__(
        self,
        env: str | Callable[..., gymnasium.Env[Any, Any]],
        num_envs: int,
        env_kwargs: Mapping[str, Any],
        seed: int | None,
        *,
        deterministic: bool = True,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.envs: list[gymnasium.Env[Any, Any]] = []
        try:
            for _ in range(num_envs):
                self.envs.append(make_env(env, env_kwargs))
                progress()
            self._leaves = observation_leaves(self.envs[0].observation_space)
        except BaseException:
            self.close()
            raise
        self._deterministic = deterministic
        self._progress = progress
        # 31 bits, since environments exist that hand their seed on to a 32-bit generator.
        states = np.random.SeedSequence(seed).generate_state(num_envs)
        self._seeds: list[int | None] = [int(state) >> 1 for state in states]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the environments; may be called again."""
        envs, self.envs = self.envs, []
        for env in envs:
            env.close()

    def play(self, policy: Any, shares: Sequence[int]) -> list[list[tuple[float, int]]]:
        """Play so many episodes in each environment.

        Returns:
            For each environment its episodes in order of time: return and length.

        Raises:
            ConfigurationError: The policy's ``act`` cannot be asked to be deterministic.
        """
        was_training = policy.training
        policy.eval()
        try:
            with torch.no_grad():
                return self._play(policy, shares)
        finally:
            policy.train(was_training)

    def _play(self, policy: Any, shares: Sequence[int]) -> list[list[tuple[float, int]]]:
        keywords = {"deterministic": True} if self._deterministic else {}
        _check_keywords(policy, keywords)
        device = next((p.device for p in policy.parameters()), torch.device("cpu"))
        played: list[list[tuple[float, int]]] = [[] for _ in shares]
        running = [index for index, share in enumerate(shares) if share]
        observations = {index: self._reset(index) for index in running}
        totals = dict.fromkeys(running, 0.0)
        lengths = dict.fromkeys(running, 0)
        is_recurrent = hasattr(policy, "initial_state")
        state = policy.initial_state(len(running)) if is_recurrent else None
        while running:
            batch = self._batch([observations[index] for index in running], device)
            memory: list[Any] = []
            if is_recurrent:
                starts = [lengths[index] == 0 for index in running]
                memory = [state, torch.tensor(starts, device=device)]
            actions, _, _, *rest = policy.act(batch, *memory, **keywords)
            kept = []
            for row, index in enumerate(list(running)):
                space = self.envs[index].action_space
                step = self.envs[index].step(_as_action(space, actions[row]))
                observations[index], reward, terminated, truncated, info = step
                self._progress()
                totals[index] += float(reward)
                lengths[index] += 1
                if terminated or truncated:
                    played[index].append(episode_of(info) or (totals[index], lengths[index]))
                    totals[index], lengths[index] = 0.0, 0
                    if len(played[index]) == shares[index]:
                        running.remove(index)
                        continue
                    observations[index] = self._reset(index)
                kept.append(row)
            if is_recurrent:
                state = _rows(rest[0], torch.tensor(kept, device=device, dtype=torch.int64))
        return played

    def _reset(self, index: int) -> Any:
        seed, self._seeds[index] = self._seeds[index], None
        observation, _ = self.envs[index].reset(seed=seed)
        self._progress()
        return observation

    def _batch(self, observations: Sequence[Any], device: torch.device) -> Any:
        tensors = {}
        for leaf in self._leaves:
            stacked = np.stack([np.asarray(leaf.take_from(one)) for one in observations])
            shape = (len(observations), *(leaf.space.shape or ()))
            tensor = torch.from_numpy(stacked.reshape(shape)).to(tensor_dtype(leaf.space))
            tensors[leaf.path] = tensor.to(device)
        return tensors.get("", tensors)


def make_env(
    env: str | Callable[..., gymnasium.Env[Any, Any]], env_kwargs: Mapping[str, Any]
) -> gymnasium.Env[Any, Any]:
    """Make one environment from an id or a callable.

    Raises:
        ConfigurationError: What was made is no ``gymnasium.Env``.
    """
    made: Any = gymnasium.make(env, **env_kwargs) if isinstance(env, str) else env(**env_kwargs)
    if not isinstance(made, gymnasium.Env):
        raise ConfigurationError(
            [f"env made {made!r}: evaluation plays environments that are gymnasium.Env"]
        )
    return made


def _check_keywords(policy: Any, keywords: Mapping[str, Any]) -> None:
    parameters = inspect.signature(policy.act).parameters
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    missing = [] if takes_any else [name for name in keywords if name not in parameters]
    if missing:
        raise ConfigurationError(
            [
                f"{type(policy).__name__}.act takes no {name!r}: add the keyword, or evaluate with "
                f"{name}=False"
                for name in missing
            ]
        )


def _as_action(space: Space[Any], action: torch.Tensor) -> Any:
    """Give an environment its action: in the space's dtype, clipped to a ``Box``, no view."""
    array = action.cpu().numpy()
    if isinstance(space, Box):
        array = np.minimum(np.maximum(array, space.low), space.high)
    return array.astype(space.dtype, copy=True)[()]


def _rows(state: Any, rows: torch.Tensor) -> Any:
    """Pick rows of a state: of a tensor, or of a tuple, list or mapping of them."""
    if isinstance(state, Mapping):
        return {key: _rows(child, rows) for key, child in state.items()}
    if isinstance(state, tuple | list):
        return tuple(_rows(child, rows) for child in state)
    return state[rows]
