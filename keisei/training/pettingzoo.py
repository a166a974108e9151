"""Rollouts of several agents from any PettingZoo environment: ``PettingZooWorker``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from keisei.exceptions import ConfigurationError
from keisei.training.agent_columns import AgentColumns
from keisei.training.agent_envs import (
    AgentEnvMaker,
    Driver,
    EnvKwargs,
    EnvSource,
    Seen,
    TogetherDriver,
    TurnDriver,
    takes_turns,
)
from keisei.training.agent_groups import AgentGroup, make_groups
from keisei.training.agent_rows import Decision
from keisei.training.policy_base import make_policy
from keisei.training.rollouts import Observations, entries_below
from keisei.training.sources import find_count_problems
from keisei.training.spaces import Space, np
from keisei.worker import Experience, Worker, WorkerContext

__all__ = ["PettingZooWorker", "get_policy_data"]

PolicySource = Callable[[Space[Any], Space[Any]], nn.Module] | nn.Module
PolicyMapping = Mapping[Any, str] | Callable[[Any], str]

_MASKS = ("auto", "info", "observation", None)


class PettingZooWorker(Worker):
    """Collects rollouts of every agent of ``num_envs`` PettingZoo environments.

    Parallel environments, whose agents act together, and AEC environments, whose agents act in
    turns, deliver the same tensors. ``T`` is the rollout length. Each of the ``C`` columns belongs
    to one agent of one environment: with ``A`` possible agents, column ``i * A + j`` is agent ``j``
    of environment ``i``. A row is one decision of an agent, with all that it got until its
    next one.

    ======================= ============== =====================================================
    ``observations``        space's dtype  ``[T, C, *shape]``, floats as ``float32``; for a
                                           ``Dict`` space one ``observations.<name>`` for each
                                           leaf. The ``"action_mask"`` is taken out of it, and
                                           if nothing but ``"observation"`` is left, that is
                                           the observation
    ``action_masks``        ``bool``       ``[T, C, n]``, true where an action is allowed; only
                                           where there are masks
    ``actions``             space's dtype  ``[T, C, *shape]`` as the policy returned them
    ``log_probs``           ``float32``    ``[T, C]`` of those actions
    ``values``              ``float32``    ``[T, C]`` of the observations
    ``next_values``         ``float32``    ``[T, C]`` values of what the agent saw at its next
                                           decision: 0 after a termination, that of its last
                                           observation after a truncation
    ``rewards``             ``float32``    ``[T, C]``; in AEC environments the sum of what the
                                           agent got from this decision until its next turn
    ``terminated``          ``bool``       ``[T, C]``
    ``truncated``           ``bool``       ``[T, C]``; also where an agent left without an end
    ``mask``                ``bool``       ``[T, C]``; where false there is no transition, and
                                           all other entries are 0 (masks are true): leave it
                                           out of the loss
    ``agents``              ``int64``      ``[T, C]``, the agent: its index in ``info["agents"]``
    ``episodes``            ``int64``      ``[T, C]``, the episode of the row, counted from 0 in
                                           each environment
    ======================= ============== =====================================================

    In a parallel environment row ``t`` of all its columns is the same step, and agents that are not
    there have a false ``mask``. In an AEC environment a column is the sequence of the agent's own
    turns; a rollout ends when an agent has ``T`` of them, others may have fewer. A decision
    whose reward is not known by then is the first row of the next rollout, with the
    log-probability and value of the weights that it was taken with.

    ``generalized_advantage_estimate`` takes these tensors as they are. With policies by name, each
    policy has tensors of its own, ``<policy>.observations`` and so on, of the columns of its
    agents: ``get_policy_data`` picks them.

    ``info`` has, one entry for each agent and episode that ended, oldest first,
    ``episode_returns`` (``float``, undiscounted, also what came before the agent's first decision),
    ``episode_lengths`` (its decisions) and ``episode_agents`` (its name); ``agents``, the names by
    index; and the worker's ``seed``. ``num_steps`` counts the true entries of ``mask``.

    Environment ``i`` is reset with a seed of ``context.seed`` plus ``i`` once, and without a seed
    from then on. The same ``context.seed`` gives the same rollouts, if the policies draw from
    torch's global generator and that is seeded, as the pool does.

    Args:
        env: An id, such as ``"classic/connect_four_v3"``, or the name of a module, such as
            ``"mpe2.simple_spread_v3"``: the parallel environment, if there is one, else the AEC
            one. Or a callable that returns a ``ParallelEnv`` or ``AECEnv``.
        policy: One policy for all agents, as ``GymnasiumWorker`` takes it: a callable
            ``policy(observation_space, action_space)`` that makes a module with ``act`` and
            ``value``, or such a module, which is copied. Or a mapping of names to these;
            ``self.model`` is then a ``ModuleDict`` of these names. Where masks are used, ``act`` is
            called with ``action_mask=``, ``bool`` ``[B, n]``.
        num_envs: Environments in this worker, stepped one after the other; their agents act
            in one batch for each policy.
        rollout_length: Steps of each parallel environment in one rollout, or turns of the busiest
            agent of an AEC environment.
        policy_mapping: Which agent has which policy: a mapping, or a callable of the agent. Agents
            with the same policy must have equal spaces. Needed with policies by name, unless those
            are the names of the agents.
        env_kwargs: Arguments for every environment, or a callable that gives those for a context
            and an index.
        action_masks: Where masks are: ``"info"`` of each agent, or in its ``"observation"``, under
            the key ``"action_mask"``. ``"auto"`` takes those of the observation if its space has
            them, else none.

    Raises:
        ConfigurationError: An argument that cannot work.
    """

    def __init__(
        self,
        env: EnvSource,
        policy: PolicySource | Mapping[str, PolicySource],
        num_envs: int = 1,
        rollout_length: int = 128,
        *,
        policy_mapping: PolicyMapping | None = None,
        env_kwargs: EnvKwargs | None = None,
        action_masks: str | None = "auto",
    ) -> None:
        self._maker = AgentEnvMaker(env, num_envs, {} if env_kwargs is None else env_kwargs)
        problems = list(self._maker.find_problems())
        problems += find_count_problems(num_envs=num_envs, rollout_length=rollout_length)
        problems += _find_policy_problems(policy, policy_mapping)
        if action_masks not in _MASKS:
            known = ", ".join(map(repr, _MASKS))
            problems.append(f"action_masks = {action_masks!r}: must be one of {known}")
        if problems:
            raise ConfigurationError(problems)
        self._policy = policy
        self._policy_mapping = policy_mapping
        self._rollout_length = rollout_length
        self._action_masks = action_masks
        self._envs: list[Any] = []

    @property
    def envs(self) -> list[Any]:
        """The environments; empty before ``setup`` and after ``teardown``."""
        return self._envs

    def setup(self, context: WorkerContext) -> None:
        """Build environments and policies, and begin episodes.

        Raises:
            ConfigurationError: The spaces are not supported, or policies do not fit them.
        """
        self.context = context
        self._envs = envs = self._maker.make(context)
        is_in_turns = takes_turns(envs[0])
        agents = list(envs[0].possible_agents)
        self._groups = groups = make_groups(
            envs[0], agents, self._name_of_policy(agents), self._action_masks
        )
        self._policies = {name: self._make_policy(name, groups[name]) for name in groups}
        if isinstance(self._policy, Mapping):
            self.model = nn.ModuleDict(self._policies)
        else:
            self.model = self._policies[""]
        self._columns = AgentColumns(
            groups, agents, len(envs), self._rollout_length, in_turns=is_in_turns
        )
        make: Callable[..., Driver] = TurnDriver if is_in_turns else TogetherDriver
        self._drivers = [
            make(env, record, context.progress)
            for env, record in zip(envs, self._columns.records, strict=True)
        ]
        # 31 bits less the index, since environments exist that take no more than 32.
        seed = int(np.random.SeedSequence(context.seed).generate_state(1)[0]) >> 1
        for index, driver in enumerate(self._drivers):
            driver.begin(seed + index)
        for name, policy in self._policies.items():
            groups[name].check_policy(partial(self._act, name), partial(self._value, policy))

    def collect(self) -> Experience:
        """Step every environment until ``rollout_length`` is reached in it."""
        columns = self._columns
        columns.begin()
        running = list(enumerate(self._drivers))
        while running:
            deciding = [(index, driver, driver.who_acts()) for index, driver in running]
            self._decide([(index, driver, seen) for index, driver, seen in deciding if seen])
            running = [(index, driver) for index, driver, seen in deciding if seen]
        for index, driver in enumerate(self._drivers):
            if isinstance(driver, TogetherDriver):
                columns.note_following(index, driver.following())
        data = columns.finish(
            {name: partial(self._value, policy) for name, policy in self._policies.items()}
        )
        info = {**columns.take_episodes(), "agents": columns.agents, "seed": self.context.seed}
        return Experience(data, info, num_steps=columns.num_transitions)

    def reset(self) -> None:
        """Begin new episodes in all environments; those in progress are not reported."""
        self._columns.forget()
        for driver in self._drivers:
            driver.begin(None)

    def teardown(self) -> None:
        """Close the environments."""
        envs, self._envs = self._envs, []
        for env in envs:
            env.close()

    def _decide(self, deciding: list[tuple[int, Driver, list[Seen]]]) -> None:
        """Have the policies act for all agents that must, and the environments go on."""
        columns = self._columns
        waiting: dict[str, list[tuple[int, Any, Decision]]] = {}
        for index, _, seen in deciding:
            for one in seen:
                name, decision = columns.decision_of(index, one)
                waiting.setdefault(name, []).append((index, one.agent, decision))
        actions: dict[int, dict[Any, Any]] = {
            index: dict.fromkeys(one.agent for one in seen) for index, _, seen in deciding
        }
        for name in self._policies:
            if name not in waiting:
                continue
            decisions = [decision for _, _, decision in waiting[name]]
            chosen = columns.rows[name].decide(decisions, partial(self._act, name))
            to_env = self._groups[name].to_env
            for (index, agent, _), action in zip(waiting[name], chosen, strict=True):
                actions[index][agent] = to_env(action)
        for index, driver, _ in deciding:
            driver.act(actions[index])

    def _act(self, name: str, observations: Observations, masks: torch.Tensor | None) -> Any:
        act = self._policies[name].act
        with torch.inference_mode():
            if masks is None:
                return act(self._on_device(observations))
            return act(self._on_device(observations), action_mask=masks.to(self.context.device))

    def _value(self, policy: Any, observations: Observations) -> torch.Tensor:
        with torch.inference_mode():
            values: torch.Tensor = policy.value(self._on_device(observations))
        return values

    def _on_device(self, observations: Observations) -> Observations:
        device = self.context.device
        if isinstance(observations, torch.Tensor):
            return observations.to(device)
        return {name: tensor.to(device) for name, tensor in observations.items()}

    def _name_of_policy(self, agents: list[Any]) -> dict[Any, str]:
        if not isinstance(self._policy, Mapping):
            return dict.fromkeys(agents, "")
        mapping = self._policy_mapping
        problems, names = [], {}
        for agent in agents:
            if mapping is None:
                name = agent
            else:
                name = mapping(agent) if callable(mapping) else mapping.get(agent)
            if name not in self._policy:
                known = ", ".join(map(repr, self._policy))
                problems.append(
                    f"policy_mapping gives agent {agent!r} the policy {name!r}; there are {known}"
                )
            names[agent] = str(name)
        unused = [name for name in self._policy if name not in names.values()]
        problems += [f"policy {name!r} is given to no agent" for name in unused]
        if problems:
            raise ConfigurationError(problems)
        return names

    def _make_policy(self, name: str, group: AgentGroup) -> Any:
        source: Any = self._policy[name] if isinstance(self._policy, Mapping) else self._policy
        policy: Any = make_policy(source, group.observation_space, group.action_space)
        called = f"policy {name!r}" if name else "policy"
        if not (
            isinstance(policy, nn.Module)
            and callable(getattr(policy, "act", None))
            and callable(getattr(policy, "value", None))
        ):
            raise ConfigurationError(
                [f"{called} made {policy!r}: must be an nn.Module with methods act() and value()"]
            )
        return policy.to(self.context.device).eval()


def get_policy_data(data: Mapping[str, torch.Tensor], policy: str) -> dict[str, torch.Tensor]:
    """Pick the tensors of one policy out of a rollout with policies by name.

    Args:
        data: What ``PettingZooWorker`` delivers.
        policy: The policy's name.

    Returns:
        The tensors themselves, by the names that they have where there is one policy.

    Raises:
        KeyError: There are none.
    """
    picked = entries_below(data, policy)
    if not picked:
        raise KeyError(f"no tensors of policy {policy!r} among {', '.join(data) or 'no names'}")
    return picked


def _find_policy_problems(policy: Any, mapping: Any) -> list[str]:
    problems = []
    by_name = policy if isinstance(policy, Mapping) else {"": policy}
    for name, source in by_name.items():
        called = f"policy[{name!r}]" if by_name is policy else "policy"
        if not callable(source):
            problems.append(f"{called} = {source!r}: must be a module or a callable that makes one")
        if by_name is policy and (not isinstance(name, str) or not name or "." in name):
            problems.append(f"{called}: names are strings without dots, and not empty")
    if not by_name:
        problems.append("policy = {}: must hold at least one policy")
    if mapping is not None and not isinstance(policy, Mapping):
        problems.append("policy_mapping: give policies by name, or leave it out")
    if mapping is not None and not callable(mapping) and not isinstance(mapping, Mapping):
        problems.append(f"policy_mapping = {mapping!r}: must be a mapping or a callable")
    return problems
