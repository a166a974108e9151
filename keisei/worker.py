"""What a user's worker module needs to import: Worker, WorkerContext, Experience."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from keisei import state_dicts
from keisei.exceptions import WeightsError
from keisei.naming import public

if TYPE_CHECKING:
    import torch


def _nothing(*_: object) -> None:
    """Do nothing, in a context that was made by hand."""


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
    """

    worker_id: int
    incarnation: int
    num_workers: int
    seed: int
    device: str = "cpu"
    weights_version: int = 0
    _progress: Callable[[], None] = field(default=_nothing, repr=False, compare=False)
    _turn_soon: Callable[..., None] = field(default=_nothing, repr=False, compare=False)

    def progress(self) -> None:
        """Tell the supervisor that a long ``collect`` or ``setup`` is moving.

        The hang deadline of the current phase starts again. One write to shared memory; call it
        as often as once a step.
        """
        self._progress()


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
    between two collects (or beside one when ``collect`` is a coroutine), and ``teardown`` at an
    orderly end. A hook that raises ends the process; the pool records the traceback and restarts
    the slot. Only an error in ``reset`` or ``on_command`` is answered to the caller instead.

    ``async def`` hooks run in the worker's event loop, where tasks that they start go on between
    hooks. ``def`` hooks run outside it: they have no running loop, and may use ``asyncio.run``,
    loops of their own, and blocking interfaces over coroutine libraries.

    Attributes:
        model: Set it in ``setup`` to have the default ``load_weights`` fill it. A worker that is
            given weights needs it, or a ``load_weights`` of its own.
    """

    model: torch.nn.Module | None = None

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
