"""What a user's worker module needs to import: Worker, WorkerContext, Experience."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from keisei import state_dicts
from keisei.exceptions import WeightsError
from keisei.naming import public

if TYPE_CHECKING:
    import torch


MAIN = "main"
"""The name of the weights that are pushed without one, and of the model that takes them."""


def _nothing(*_: object) -> None:
    """Do nothing, in a context that was made by hand."""


def _no_weights(name: str) -> Weights:
    """Have no weights, in a context that was made by hand."""
    raise WeightsError(f"there are no weights {name!r}: this context belongs to no pool")


@public
class Weights(NamedTuple):
    """Weights of one name, as ``WorkerContext.weights`` returns them.

    Attributes:
        tensors: By name, on the CPU. They stay valid and unchanged as long as any of them lives,
            whatever is pushed or dropped meanwhile. Do not write to them: they are shared.
        version: 1, 2, 3 … of this name.
    """

    tensors: Mapping[str, torch.Tensor]
    version: int


class Models(dict[str, "torch.nn.Module"]):
    """A worker's models by name, which notes those that are new.

    Attributes:
        changed: The names of models that were assigned and not filled yet.
    """

    def __init__(self) -> None:
        super().__init__()
        self.changed: set[str] = set()

    def __setitem__(self, name: str, model: torch.nn.Module) -> None:
        super().__setitem__(name, model)
        self.changed.add(name)

    def update(self, *others: Any, **models: Any) -> None:
        """Assign several models."""
        for name, model in dict(*others, **models).items():
            self[name] = model

    def setdefault(self, name: str, model: Any = None) -> Any:
        """Return the model of ``name``, which becomes ``model`` if there is none."""
        if name not in self:
            self[name] = model
        return self[name]

    def __ior__(self, others: Any) -> Models:  # type: ignore[misc,override]
        self.update(others)
        return self


class _AllModels:
    """``Worker.models``: made when it is first asked for, and the same object from then on."""

    def __get__(self, worker: Worker | None, owner: type) -> Any:
        if worker is None:
            return {}
        mine = vars(worker).get("_models")
        if mine is None:
            mine = vars(worker)["_models"] = Models()
        return mine

    def __set__(self, worker: Worker, models: Mapping[str, torch.nn.Module]) -> None:
        if not isinstance(models, Mapping):
            raise TypeError(
                f"models of {type(worker).__name__} is a {type(models).__name__}; the attribute is "
                "a mapping of names of weights to networks, which the pool fills"
            )
        given = dict(models)
        mine = worker.models
        mine.clear()
        mine.update(given)


class _MainModel:
    """``Worker.model``: what ``Worker.models`` has under "main"."""

    def __get__(self, worker: Worker | None, owner: type) -> Any:
        return None if worker is None else worker.models.get(MAIN)

    def __set__(self, worker: Worker, model: torch.nn.Module | None) -> None:
        if model is None:
            worker.models.pop(MAIN, None)
        else:
            worker.models[MAIN] = model


class Settings(Mapping[str, Any]):
    """A worker's settings, as they are at each look: a mapping that only the pool changes."""

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        """Begin with a copy of ``values``."""
        self._values = dict(values or {})

    def __getitem__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            known = ", ".join(map(str, self._values)) or "none"
            raise KeyError(f"no setting {name!r}; the settings are: {known}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Settings({self._values!r})"

    def _replace(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)


@public
@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What a worker is told about itself, once, in ``setup``.

    Attributes:
        worker_id: The slot, 0 … ``num_workers`` - 1; it stays when the process is replaced.
        incarnation: 0 for the first process in the slot, one more for each that follows.
        num_workers: Slots in the pool when this process was started.
        seed: A 63-bit seed derived from the pool's seed, the slot and the incarnation. The
            global generators of ``random``, NumPy and torch are seeded with it before ``setup``.
        device: Where the worker should put its model, as a torch device string.
        weights_version: The newest weights version when this process was started; 0 is none.
        settings: What ``ParallelManager(settings=...)`` and ``manager.configure`` gave this slot:
            a read-only mapping, as it is at each look. It changes between two collects only.
    """

    worker_id: int
    incarnation: int
    num_workers: int
    seed: int
    device: str = "cpu"
    weights_version: int = 0
    settings: Mapping[str, Any] = field(default_factory=Settings)
    _progress: Callable[[], None] = field(default=_nothing, repr=False, compare=False)
    _turn_soon: Callable[..., None] = field(default=_nothing, repr=False, compare=False)
    _weights: Callable[[str], Weights] = field(default=_no_weights, repr=False, compare=False)

    def progress(self) -> None:
        """Tell the supervisor that a long ``collect`` or ``setup`` is moving.

        The hang deadline of the current phase starts again. One write to shared memory; call it
        as often as once a step.
        """
        self._progress()

    def weights(self, name: str = MAIN) -> Weights:
        """Return the newest weights of a name, pushed up to this moment, and their version.

        In any hook, ``setup`` included, from the thread that runs it. A name that was pushed once
        is looked at where it lies in shared memory, so it costs nothing in any worker. Of a name
        that was pushed again, the worker has one copy as long as it uses it.

        Raises:
            WeightsError: Nothing was pushed under that name, or it was dropped; the message lists
                the names.
        """
        return self._weights(name)


@public
@dataclass(frozen=True, slots=True)
class Experience:
    """What one ``collect`` returns.

    Attributes:
        data: Named tensors or NumPy arrays, on the CPU or a device, of any shape and dtype that
            torch has. They are copied once, into shared memory, before the next ``collect``.
            Mappings of these, also TensorDicts, may be nested: ``{"next": {"obs": x}}`` arrives as
            ``"next.obs"``.
        info: Small picklable values that travel with the batch.
        num_steps: Environment steps in ``data``; ``None`` takes the largest leading dimension, or
            what the batch size of a TensorDict counts.
    """

    data: Mapping[str, Any]
    info: Mapping[str, Any] | None = None
    num_steps: int | None = None


@public
class Worker:
    """User code that runs in a process of its own; subclass it and override the hooks.

    Every hook may be ``def`` or ``async def``. They are called one at a time, in this order:
    ``setup``, then ``load_weights`` and ``collect`` in turn, with ``reset`` and ``on_command``
    between two collects (or beside one when ``collect`` is a coroutine), ``configure`` between two
    collects, and ``teardown`` at an orderly end. A hook that raises ends the process; the pool
    records the traceback and restarts the slot. Only an error in ``reset``, ``on_command`` or
    ``configure`` is answered to the caller instead.

    ``async def`` hooks run in the worker's event loop, where tasks that they start go on between
    hooks. ``def`` hooks run outside it: they have no running loop, and may use ``asyncio.run``,
    loops of their own, and blocking interfaces over coroutine libraries.

    ``self.models`` are filled like ``self.model``, each by the weights of its name. A model that is
    assigned later, under a name that has weights, is filled before the next ``collect``.

    Attributes:
        model: The network of the weights "main"; it is ``models["main"]``. Set it in ``setup`` to
            have the default ``load_weights`` fill it. A worker that is given weights needs it, or a
            ``load_weights`` of its own.
        models: The networks that are filled with weights before each ``collect``, by name of
            weights. A name without weights is left alone until some are pushed. When weights are
            dropped, the model keeps the last ones.
    """

    model: torch.nn.Module | None = cast("Any", _MainModel())
    models: dict[str, torch.nn.Module] = cast("Any", _AllModels())

    def setup(self, context: WorkerContext) -> Any:
        """Build the environment and the model."""

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> Any:
        """Take a new weights version; the default loads it into ``self.model``.

        It does so by the model's ``load_state_dict``, with all its hooks. The prefixes of
        ``torch.compile`` and ``DataParallel`` may be there on one side only.

        Args:
            weights: Tensors on the CPU, the worker's own: they stay valid and unchanged.
            version: 1, 2, 3 …; versions may be left out but never come back.

        Raises:
            WeightsError: There is no ``self.model``, or it knows none of these entries.
        """
        if self.model is None:
            raise WeightsError(
                f"{type(self).__name__} has no self.model to load weights into; "
                f"{state_dicts.REMEDY}"
            )
        state_dicts.load_into(self.model, weights)

    def collect(self) -> Any:
        """Collect one experience.

        Returns:
            An ``Experience``, or just its ``data``: a mapping of names to tensors or arrays, which
            may be nested, or a TensorDict.
        """
        raise NotImplementedError(f"{type(self).__name__} must define collect()")

    def configure(self, settings: dict[str, Any]) -> Any:
        """Take changed settings, between two collects; the default does nothing.

        Not called for the settings that the process begins with: those are there in ``setup``, as
        ``context.settings``. If it raises, the caller of ``manager.configure`` gets the error, and
        it is called again with the former settings, which the worker and its slot keep. If it
        raises again then, the process ends, and the next one begins with the former settings.

        Args:
            settings: All settings of this slot, the changed ones included; the worker's own to
                keep. ``context.settings`` says the same.
        """

    def reset(self) -> Any:
        """Begin again: new episodes. Called by ``manager.reset()``."""

    def on_command(self, command: str, data: Any) -> Any:
        """Handle a command of the application's own; the return value is the reply.

        Raises:
            LookupError: The command is not known; the caller receives it as ``CommandError``.
        """
        raise LookupError(f"{type(self).__name__} knows no command {command!r}")

    def teardown(self) -> Any:
        """Close what ``setup`` opened. Called at an orderly end only, never after a kill."""
