"""How a worker steps its environments: one by one where it may, else as a vector environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from keisei.training.actions import make_action_filter
from keisei.training.arrays import to_array
from keisei.training.episodes import EpisodeLog
from keisei.training.infos import Info, episode_of, final_info_of, info_of, may_tell_episodes
from keisei.training.rollout_buffer import RolloutBuffer
from keisei.training.sources import OpenEnvs
from keisei.training.spaces import AutoresetMode, gymnasium, np

_Array = np.ndarray[Any, Any]


class Stepper(Protocol):
    """Steps all environments, and records what they return."""

    def begin(self, seed: int | None) -> None:
        """Begin new episodes in all environments, seeded with ``seed`` and the index if given."""
        ...

    def step(self, row: int) -> None:
        """Take the actions of ``row``, and record what follows."""
        ...


def make_stepper(
    opened: OpenEnvs, buffer: RolloutBuffer, episodes: EpisodeLog, progress: Callable[[], None]
) -> Stepper:
    """Return the fastest stepper that the environments allow.

    Args:
        opened: The environments.
        buffer: Where rows are recorded.
        episodes: Where episodes are counted.
        progress: Called whenever an environment has moved.
    """
    if opened.each is not None:
        return EachStepper(opened, opened.each, buffer, episodes, progress)
    return VectorStepper(opened, buffer, episodes, progress)


class EachStepper:
    """Steps environments of this process one by one, and resets each that ended.

    What ``SyncVectorEnv.step`` does beyond this, above all gathering infos that are not read, takes
    longer than an actor's forward pass.
    """

    def __init__(
        self,
        opened: OpenEnvs,
        envs: Sequence[gymnasium.Env[Any, Any]],
        buffer: RolloutBuffer,
        episodes: EpisodeLog,
        progress: Callable[[], None],
    ) -> None:
        self._envs = envs
        self._buffer = buffer
        self._episodes = episodes
        self._progress = progress
        self._filter_actions = make_action_filter(opened.envs.single_action_space, one_by_one=True)

    def begin(self, seed: int | None) -> None:
        """Reset every environment."""
        observations = []
        for index, env in enumerate(self._envs):
            observation, _ = env.reset(seed=None if seed is None else seed + index)
            self._progress()
            observations.append(observation)
        self._buffer.write_each(-1, observations)
        self._buffer.episode_starts[-1] = True
        self._episodes.begin()

    def step(self, row: int) -> None:
        """Step every environment once."""
        buffer, progress = self._buffer, self._progress
        actions = self._filter_actions(buffer.actions[row])
        observations, rewards, terminated, truncated = [], [], [], []
        ended = []
        for index, (env, action) in enumerate(zip(self._envs, actions, strict=True)):
            observation, reward, has_terminated, was_truncated, info = env.step(action)
            if info and "episode" in info:
                self._note_episode(info)
            if has_terminated or was_truncated:
                ended.append(index)
                if buffer.keeps_every_end or not has_terminated:
                    buffer.add_final_observation(row, index, observation)
                progress()
                observation, _ = env.reset()
            progress()
            observations.append(observation)
            rewards.append(float(reward))
            terminated.append(has_terminated)
            truncated.append(was_truncated)
        buffer.write_each(row + 1, observations)
        buffer.rewards[row] = rewards
        buffer.terminated[row] = terminated
        buffer.truncated[row] = truncated
        self._episodes.add(rewards)
        if ended:
            self._episodes.end(ended)
            buffer.episode_starts[row + 1, ended] = True

    def _note_episode(self, info: Info) -> None:
        told = episode_of(info)
        if told is not None:
            self._episodes.tell(*told)


class VectorStepper:
    """Steps a vector environment of any kind and mode."""

    def __init__(
        self,
        opened: OpenEnvs,
        buffer: RolloutBuffer,
        episodes: EpisodeLog,
        progress: Callable[[], None],
    ) -> None:
        self._envs = opened.envs
        self._mode = opened.mode
        self._buffer = buffer
        self._episodes = episodes
        self._progress = progress
        self._filter_actions = make_action_filter(opened.envs.single_action_space)
        self._num_envs = opened.envs.num_envs
        self._resetting: _Array | None = None

    def begin(self, seed: int | None) -> None:
        """Reset the vector environment."""
        observations, _ = self._envs.reset(seed=seed)
        self._progress()
        self._buffer.write_observations(-1, observations)
        self._buffer.episode_starts[-1] = True
        self._episodes.begin()
        self._resetting = None

    def step(self, row: int) -> None:
        """Step the vector environment once."""
        buffer = self._buffer
        actions = self._filter_actions(buffer.actions[row])
        observations, *results, infos = self._envs.step(actions)
        self._progress()
        rewards = self._per_env("rewards", results[0])
        terminated = self._per_env("terminated", results[1]).astype(np.bool_, copy=False)
        truncated = self._per_env("truncated", results[2]).astype(np.bool_, copy=False)
        if self._resetting is not None:
            buffer.mask[row] = running = ~self._resetting
            buffer.episode_starts[row + 1] = self._resetting
            rewards = np.where(running, rewards, 0)
            terminated, truncated = terminated & running, truncated & running
            self._resetting = None
        buffer.rewards[row] = rewards
        buffer.terminated[row] = terminated
        buffer.truncated[row] = truncated
        self._episodes.add(rewards)
        self._note_episodes(infos)
        if np.count_nonzero(terminated) or np.count_nonzero(truncated):
            observations = self._end_episodes(row, observations, terminated, truncated, infos)
        buffer.write_observations(row + 1, observations)

    def _end_episodes(
        self, row: int, observations: Any, terminated: _Array, truncated: _Array, infos: Any
    ) -> Any:
        """Account for episodes that ended at ``row``, and return what the next step starts from.

        In ``NEXT_STEP`` mode the final observation is the next row's, and so is its value: the
        step that begins there only resets the environment, and is masked.
        """
        buffer, ended = self._buffer, terminated | truncated
        envs = np.flatnonzero(ended).tolist()
        if self._mode is AutoresetMode.NEXT_STEP:
            self._resetting = ended
            self._episodes.end(envs, pause=1)
            return observations
        self._episodes.end(envs)
        buffer.episode_starts[row + 1] = ended
        wanted = [env for env in envs if buffer.keeps_every_end or not terminated[env]]
        if wanted:
            finals = observations
            if self._mode is AutoresetMode.SAME_STEP:
                finals = self._final_observations(infos, wanted, row)
            for env in wanted:
                buffer.add_final_observation(row, env, _pick(finals, env))
        if self._mode is AutoresetMode.DISABLED:
            observations, _ = self._envs.reset(options={"reset_mask": ended})
            self._progress()
        return observations

    def _final_observations(self, infos: Any, envs: Sequence[int], row: int) -> Any:
        """Return the final observations, which all of ``envs`` need."""
        for key in ("final_obs", "final_observation"):
            finals = infos.get(key) if isinstance(infos, Mapping) else None
            if finals is None:
                continue
            present = infos.get(f"_{key}")
            missing = [
                env
                for env in envs
                if (present is not None and not present[env]) or _pick(finals, env) is None
            ]
            if not missing:
                return finals
            envs = missing
        raise ValueError(
            f"the last observation of environment {envs[0]}, whose episode ended at step {row} of "
            f"the rollout, is missing: {type(self._envs).__name__} resets in the same step, so it "
            "must give it as infos['final_obs']; or give it another autoreset_mode"
        )

    def _note_episodes(self, infos: Any) -> None:
        """Note the episodes of which the environments tell themselves."""
        mode = self._mode
        if not may_tell_episodes(infos):
            return
        for env in range(self._num_envs):
            told = episode_of(info_of(infos, env))
            if told is None and mode is AutoresetMode.SAME_STEP and "final_info" in infos:
                told = episode_of(final_info_of(infos, env))
            if told is not None:
                self._episodes.tell(*told)

    def _per_env(self, name: str, values: Any) -> _Array:
        array = to_array(values)
        if array.shape != (self._num_envs,):
            raise ValueError(
                f"{type(self._envs).__name__} returned {name} of the shape {array.shape}, not "
                f"({self._num_envs},)"
            )
        return array


def _pick(observations: Any, env: int) -> Any:
    """Take one environment's observation out of a batch, or out of an array of observations."""
    if isinstance(observations, Mapping):
        return {key: _pick(child, env) for key, child in observations.items()}
    return observations[env]
