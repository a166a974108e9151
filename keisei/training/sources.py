"""How one worker gets its vector environment, and what it may be given to make it from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from keisei.exceptions import ConfigurationError
from keisei.training.envpool import EnvPoolVectorEnv, is_envpool
from keisei.training.hosting import EnvMaker, HostedEnv
from keisei.training.spaces import (
    AsyncVectorEnv,
    AutoresetMode,
    EnvSpec,
    SyncVectorEnv,
    VectorEnv,
    gymnasium,
    observation_leaves,
)
from keisei.worker import WorkerContext

_VECTORIZATIONS = ("sync", "async", "vector_entry_point")

Source = str | EnvSpec | Callable[..., Any]
"""An environment id, a specification, or a callable that returns an environment."""
EnvKwargs = Mapping[str, Any] | Callable[[WorkerContext, int], Mapping[str, Any]]
"""Arguments for each environment, or a callable that gives those for one index."""


@dataclass(frozen=True)
class OpenEnvs:
    """A vector environment that is open.

    Attributes:
        envs: The vector environment.
        mode: When it resets.
        each: Its single environments where the worker may step them one by one, else ``None``.
    """

    envs: VectorEnv[Any, Any, Any]
    mode: AutoresetMode
    each: Sequence[gymnasium.Env[Any, Any]] | None = None


@dataclass(frozen=True)
class EnvSource:
    """A picklable recipe for a vector environment; it is cheap until it is opened.

    Attributes:
        env: An id, an ``EnvSpec``, a callable that returns an environment or a vector environment,
            or a sequence of these, one for each index.
        num_envs: How many environments.
        env_kwargs: Arguments for each of them.
        vectorization: ``"sync"``, ``"async"`` or ``"vector_entry_point"``.
        autoreset_mode: A mode, its value, or ``None``.
        info_keys: The entries of the infos that are read.
    """

    env: Source | Sequence[Source]
    num_envs: int
    env_kwargs: EnvKwargs = field(default_factory=dict)
    vectorization: str = "sync"
    autoreset_mode: AutoresetMode | str | None = None
    info_keys: frozenset[str] = frozenset()

    def find_problems(self) -> Iterator[str]:
        """Say what cannot work, one line for each problem: key, value, remedy."""
        yield from find_count_problems(num_envs=self.num_envs)
        for name, source in self._named_sources():
            if not isinstance(source, str | EnvSpec) and not callable(source):
                yield (
                    f"{name} = {source!r}: must be an environment id, an EnvSpec, or a callable "
                    "that makes one"
                )
            elif self.vectorization == "vector_entry_point" and not isinstance(
                source, str | EnvSpec
            ):
                yield f"{name} = {source!r}: only an id can have a vector entry point"
        if not isinstance(self.env, str | EnvSpec) and isinstance(self.env, Sequence):
            if self.vectorization == "vector_entry_point":
                yield "env is a sequence: a vector entry point is made from one id"
            elif self.num_envs not in (1, len(self.env)):
                yield f"num_envs = {self.num_envs!r}: env has {len(self.env)} entries"
        kwargs: object = self.env_kwargs
        if not isinstance(kwargs, Mapping) and not callable(kwargs):
            yield (
                f"env_kwargs = {kwargs!r}: must be a mapping, or a callable "
                "(context, index) that returns one"
            )
        if self.vectorization not in _VECTORIZATIONS:
            known = ", ".join(map(repr, _VECTORIZATIONS))
            yield f"vectorization = {self.vectorization!r}: must be one of {known}"
        modes = [mode.value for mode in AutoresetMode]
        if self.autoreset_mode not in (None, *modes, *AutoresetMode):
            known = ", ".join(map(repr, modes))
            yield f"autoreset_mode = {self.autoreset_mode!r}: must be one of {known}"

    def open(self, context: WorkerContext) -> OpenEnvs:
        """Make the environments; each that is made counts as progress.

        Raises:
            ConfigurationError: They cannot be made as told; says what to change.
        """
        if self.vectorization == "vector_entry_point":
            envs = self._make_vector(context)
            context.progress()
            return self._foreign(envs)
        makers = [
            EnvMaker(self._bound(source, context, index), index, context.seed)
            for index, source in enumerate(self._sources())
        ]
        first = makers[0]()
        context.progress()
        if is_vectorized(first) or is_envpool(first):
            return self._foreign(first)
        with contextlib.ExitStack() as on_error:
            on_error.callback(_close, first)
            opened = self._opened(first, makers, context, on_error)
            on_error.pop_all()
            return opened

    def _opened(
        self,
        first: Any,
        makers: Sequence[EnvMaker],
        context: WorkerContext,
        on_error: contextlib.ExitStack,
    ) -> OpenEnvs:
        _check_env(first, 0)
        mode = AutoresetMode(self.autoreset_mode or AutoresetMode.DISABLED)
        leaves = observation_leaves(first.observation_space)

        def hosted(maker: EnvMaker, index: int) -> HostedEnv:
            env = maker()
            _check_env(env, index)
            context.progress()
            host = HostedEnv(env, index, self.info_keys, context.progress)
            host.fit(leaves)
            return host

        makers[0].keep(first)
        if self.vectorization == "async":
            factories: list[Any] = [
                partial(hosted, maker, index) for index, maker in enumerate(makers)
            ]
            # Processes are forked, whatever the platform's default: they inherit what the worker
            # has registered, and tell of their progress in its memory.
            envs: Any = AsyncVectorEnv(factories, context="fork", copy=False, autoreset_mode=mode)
            return OpenEnvs(envs, mode)
        made: list[Any] = []
        for index, maker in enumerate(makers):
            if mode is AutoresetMode.DISABLED:
                env = maker()
                _check_env(env, index)
                context.progress()
            else:
                env = hosted(maker, index)
            if index:
                on_error.callback(_close, env)
            made.append(env)
        factories = [partial(_same, env) for env in made]
        envs = SyncVectorEnv(factories, copy=False, autoreset_mode=mode)
        return OpenEnvs(envs, mode, made if mode is AutoresetMode.DISABLED else None)

    def _foreign(self, envs: Any) -> OpenEnvs:
        """Take a vector environment that is not made of single ones here."""
        with contextlib.ExitStack() as on_error:
            on_error.callback(_close, envs)
            if self.vectorization == "async":
                raise ConfigurationError(
                    [
                        "vectorization = 'async': env makes a vector environment, which steps its "
                        "environments itself; leave it out"
                    ]
                )
            if is_envpool(envs):
                envs = EnvPoolVectorEnv(envs)
            if self.num_envs not in (1, envs.num_envs):
                raise ConfigurationError(
                    [
                        f"num_envs = {self.num_envs}: env makes a vector environment of "
                        f"{envs.num_envs}; leave num_envs out, or give the factory as many"
                    ]
                )
            mode = self._mode_of(envs)
            on_error.pop_all()
        return OpenEnvs(envs, mode)

    def _mode_of(self, envs: Any) -> AutoresetMode:
        declared = (getattr(envs, "metadata", None) or {}).get("autoreset_mode")
        told = self.autoreset_mode
        name = type(envs).__name__
        if declared is None and told is None:
            raise ConfigurationError(
                [
                    f"the vector environment {name} does not say when it resets: give "
                    "autoreset_mode, or put it into its metadata['autoreset_mode']"
                ]
            )
        try:
            mode = AutoresetMode(told if declared is None else declared)
        except ValueError:
            known = ", ".join(repr(mode.value) for mode in AutoresetMode)
            raise ConfigurationError(
                [f"metadata['autoreset_mode'] of {name} is {declared!r}: must be one of {known}"]
            ) from None
        if told is not None and AutoresetMode(told) is not mode:
            raise ConfigurationError(
                [f"autoreset_mode = {told!r}: the vector environment {name} has its own, {mode}"]
            )
        return mode

    def _make_vector(self, context: WorkerContext) -> Any:
        kwargs = self._kwargs(context, 0)
        with _registered(self.env):
            env: Any = self.env
            return gymnasium.make_vec(
                env, self.num_envs, vectorization_mode="vector_entry_point", **kwargs
            )

    def _bound(self, source: Source, context: WorkerContext, index: int) -> Callable[[], Any]:
        kwargs = self._kwargs(context, index)
        if isinstance(source, str | EnvSpec):
            return partial(_make_registered, source, kwargs)
        return partial(source, **kwargs)

    def _kwargs(self, context: WorkerContext, index: int) -> dict[str, Any]:
        if isinstance(self.env_kwargs, Mapping):
            return dict(self.env_kwargs)
        kwargs = self.env_kwargs(context, index)
        if not isinstance(kwargs, Mapping):
            raise ConfigurationError(
                [f"env_kwargs(context, {index}) returned {kwargs!r}: must be a mapping"]
            )
        return dict(kwargs)

    def _sources(self) -> list[Source]:
        if isinstance(self.env, str | EnvSpec) or not isinstance(self.env, Sequence):
            env: Any = self.env
            return [env] * self.num_envs
        return list(self.env)

    def _named_sources(self) -> Iterator[tuple[str, Any]]:
        env: Any = self.env
        if isinstance(env, str | EnvSpec) or not isinstance(env, Sequence) or not env:
            yield "env", env
        else:
            yield from ((f"env[{index}]", source) for index, source in enumerate(env))


def find_count_problems(**counts: object) -> Iterator[str]:
    """Say which of the named values is not an integer of at least 1, one line for each."""
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            yield f"{name} = {value!r}: must be an integer of at least 1"


def is_vectorized(env: Any) -> bool:
    """Return whether ``env`` is a vector environment, also one that is no ``VectorEnv``."""
    names = ("num_envs", "single_observation_space", "single_action_space")
    return isinstance(env, VectorEnv) or all(hasattr(env, name) for name in names)


def _make_registered(source: str | EnvSpec, kwargs: Mapping[str, Any]) -> Any:
    with _registered(source):
        return gymnasium.make(source, **kwargs)


@contextlib.contextmanager
def _registered(source: Any) -> Iterator[None]:
    """Say what to do about an id that only the application has registered."""
    try:
        yield
    except gymnasium.error.UnregisteredEnv as error:
        raise ConfigurationError(
            [
                f"env = {source!r}: {error} In the worker's process only what it imports is "
                f"registered: give 'module:{source}', gymnasium.spec({source!r}), or a factory"
            ]
        ) from error


def _check_env(env: Any, index: int) -> None:
    if not isinstance(env, gymnasium.Env):
        raise ConfigurationError(
            [
                f"env made {env!r} for index {index}: must make a gymnasium.Env or a "
                "gymnasium.vector.VectorEnv"
            ]
        )


def _same(env: Any) -> Any:
    return env


def _close(env: Any) -> None:
    with contextlib.suppress(Exception):  # the error that led here is raised
        env.close()
