"""What is read from the infos of environments, however a vector environment packs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keisei.training.arrays import to_array
from keisei.training.hosting import INFO, Boxed


class MergedInfo:
    """One environment's part of infos that are merged as Gymnasium does it.

    Entry ``key`` has one value for each environment, and ``_key``, if it is there, says who has
    one. A value without a place for each environment is everybody's.
    """

    def __init__(self, infos: Mapping[str, Any], env: int) -> None:
        self._infos = infos
        self._env = env

    def get(self, key: str, default: Any = None) -> Any:
        """Return this environment's value of ``key``, or ``default``."""
        if key not in self._infos:
            return default
        present = self._infos.get(f"_{key}")
        if present is not None and not present[self._env]:
            return default
        value = self._infos[key]
        if isinstance(value, Mapping):
            return MergedInfo(value, self._env)
        try:
            return value[self._env]
        except (TypeError, IndexError):
            return value


Info = Mapping[str, Any] | MergedInfo
"""The info of one environment at one step, or the part of a merged one that is its."""

_NOTHING: Info = {}
_OF_EPISODES = frozenset({INFO, "episode", "final_info"})


def info_of(infos: Any, env: int) -> Info:
    """Return what ``infos`` of a vector environment say about one environment."""
    if not infos:
        return _NOTHING
    if not isinstance(infos, Mapping):  # a sequence with one info for each
        one: Info = infos[env] or _NOTHING
        return one
    if INFO in infos:
        boxed = infos[INFO][env]
        if isinstance(boxed, Boxed):
            return boxed.info
        return _NOTHING
    return MergedInfo(infos, env)


def final_info_of(infos: Any, env: int) -> Info:
    """Return the info of the last step of an episode that ended in a SAME_STEP environment.

    Without a ``final_info`` it is the plain one: the environment merged both.
    """
    final = infos.get("final_info") if isinstance(infos, Mapping) else None
    if final is None:
        return info_of(infos, env)
    if isinstance(final, Mapping):
        return info_of(final, env)
    last: Info = final[env] or _NOTHING  # an array of infos
    return last


def episode_of(info: Info) -> tuple[float, int] | None:
    """Return the return and the length that ``info["episode"]`` tells, if it does.

    The form is that of Gymnasium's ``RecordEpisodeStatistics``; an entry without "r" and "l" is
    something else.
    """
    told = info.get("episode")
    if told is None or not hasattr(told, "get"):
        return None
    total, length = told.get("r"), told.get("l")
    if total is None or length is None:
        return None
    return float(to_array(total).item()), int(to_array(length).item())


def may_tell_episodes(infos: Any) -> bool:
    """Return whether ``infos`` of one step may tell of an episode of any environment."""
    if isinstance(infos, Mapping):
        return not _OF_EPISODES.isdisjoint(infos)
    return bool(infos)


def tells_episodes(envs: Any) -> bool:
    """Return whether a wrapper of the environments records episode statistics.

    Args:
        envs: A vector environment, perhaps wrapped.
    """
    layer = envs
    while layer is not None:
        if type(layer).__name__ == "RecordEpisodeStatistics":
            return True
        layer = vars(layer).get("env") if hasattr(layer, "__dict__") else None
    inner = getattr(envs, "unwrapped", envs)
    if not (hasattr(inner, "call") and (hasattr(inner, "envs") or hasattr(inner, "processes"))):
        return False
    try:
        return bool(inner.call("has_wrapper_attr", "episode_returns")[0])
    except Exception:  # noqa: BLE001 - an environment without that method has no such wrapper
        return False
