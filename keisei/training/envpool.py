"""EnvPool's vector environments, which take their seed when they are made and never again."""

from __future__ import annotations

from typing import Any

from keisei.training.spaces import VectorEnv


def is_envpool(env: Any) -> bool:
    """Return whether ``env`` was made by EnvPool; imports nothing."""
    return any(kind.__module__.partition(".")[0] == "envpool" for kind in type(env).__mro__)


class EnvPoolVectorEnv(VectorEnv[Any, Any, Any]):
    """Makes the environments anew where ``reset`` is given a seed, since that is EnvPool's way.

    Args:
        pool: What ``envpool.make_gymnasium`` returned; it is taken over.
    """

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.metadata = dict(pool.metadata)
        self.num_envs = int(pool.config["num_envs"])
        self.single_observation_space = pool.observation_space
        self.single_action_space = pool.action_space

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        """Begin new episodes, with new generators if ``seed`` is given."""
        if seed is not None:
            spec = type(self.pool.spec)
            config = spec.gen_config(**{**self.pool.config, "seed": int(seed)})
            kind = type(self.pool)
            self.pool.close()
            self.pool = kind(spec(config))
        if options:
            return self.pool.reset(options=options)
        return self.pool.reset()

    def step(self, actions: Any) -> Any:
        """Step all environments."""
        return self.pool.step(actions)

    def close_extras(self, **_: Any) -> None:
        """Close the environments."""
        self.pool.close()
