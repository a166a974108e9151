"""Weights in a worker: what was announced, loading the newest, acknowledging what was asked for."""

from __future__ import annotations

from typing import Any

from torch import nn

from keisei import state_dicts
from keisei.child.catalogue import Catalogue, Entry
from keisei.child.frames import Tell
from keisei.child.hooks import Hooks, failing_as
from keisei.exceptions import WeightsError
from keisei.ipc.frame_reader import FrameReader
from keisei.ipc.status import Phase, StatusLine
from keisei.protocol import messages
from keisei.worker import MAIN, Models, Weights, Worker


def why_no_weights(worker: Worker) -> str:
    """Return why ``worker`` cannot take weights, with the remedy; "" if it can."""
    if _loads_by_itself(worker):
        return ""
    name, model = type(worker).__name__, worker.model
    if model is None:
        problem = f"{name} has neither a self.model nor a load_weights() of its own"
    elif not callable(getattr(model, "load_state_dict", None)):
        problem = f"self.model of {name} is a {type(model).__name__} without load_state_dict()"
    elif not _has_tensors(model):
        problem = f"self.model of {name}, a {type(model).__name__}, has no parameters"
    else:
        return ""
    return f"{problem}, so it cannot take weights; {state_dicts.REMEDY}"


def _loads_by_itself(worker: Worker) -> bool:
    """Return whether ``load_weights`` is the user's, of the class or set on the worker."""
    return getattr(worker.load_weights, "__func__", None) is not Worker.load_weights


def _has_tensors(model: Any) -> bool:
    if not isinstance(model, nn.Module):
        return True  # whatever it is, it has a load_state_dict()
    return any(True for _ in model.parameters()) or any(True for _ in model.buffers())


class Loading:
    """Loads weights into one worker's models, and hands them out.

    Attributes:
        version: The version of "main" that the worker has; 0 is none.
    """

    def __init__(
        self, announcements: FrameReader, hooks: Hooks, status: StatusLine, tell: Tell
    ) -> None:
        self.version = 0
        self._catalogue = Catalogue(announcements, status)
        self._hooks = hooks
        self._status = status
        self._tell = tell
        self._models = Models()
        self._seen = 0
        self.introduce = self._catalogue.introduce
        self.take_announcements = self._catalogue.take

    @property
    def others(self) -> tuple[tuple[int, int], ...]:
        """Numbers and versions of the other weights that the worker has taken."""
        return self._catalogue.versions

    def serve(self, worker: Worker) -> None:
        """Load weights into the models of ``worker`` from now on."""
        if isinstance(worker.models, Models):
            self._models = worker.models

    @property
    def is_behind(self) -> bool:
        """Whether there may be newer weights or a new model, or an acknowledgement is owed."""
        catalogue = self._catalogue
        return (
            catalogue.generation != self._seen or catalogue.is_asked or bool(self._models.changed)
        )

    async def load_newest(self, worker: Worker) -> None:
        """Load what is newer into the worker's models, and acknowledge what was asked for.

        What was published first is loaded first.

        Raises:
            HookFailed: The worker cannot take them.
            QueueEnded: The application has gone.
        """
        catalogue = self._catalogue
        seen = catalogue.generation
        await catalogue.complete()
        with failing_as(Phase.LOAD_WEIGHTS):
            self._forget_what_former_models_had(worker)
            wanted = [entry for entry in catalogue.entries.values() if _is_wanted(worker, entry)]
        for entry in sorted(wanted, key=lambda entry: entry.reader.published):
            await self._load(worker, entry)
        self._seen = seen
        for number, version in catalogue.answers(worker.models):
            await self._tell(messages.Applied(number, version))

    def _forget_what_former_models_had(self, worker: Worker) -> None:
        """Have models be filled that were put in the place of others."""
        changed, self._models.changed = self._models.changed, set()
        for name in changed:
            entry = self._catalogue.entries.get(name)
            if entry is not None and not (name == MAIN and _loads_by_itself(worker)):
                entry.loaded = 0

    async def _load(self, worker: Worker, entry: Entry) -> None:
        with failing_as(Phase.LOAD_WEIGHTS):
            by_itself = entry.name == MAIN and _loads_by_itself(worker)
        call = self._hooks.call
        if by_itself:
            with failing_as(Phase.LOAD_WEIGHTS):
                tensors, version = entry.reader.read()
            self._begin(entry, version)
            await call(Phase.LOAD_WEIGHTS, worker.load_weights, tensors, version)
        else:
            version = await call(Phase.LOAD_WEIGHTS, self._load_into_model, worker, entry)
        entry.loaded = version
        self._catalogue.took(entry, version)
        if entry.name == MAIN:
            self.version = version

    def _begin(self, entry: Entry, version: int) -> None:
        """Say in the status page which version is being loaded."""
        self._catalogue.suspect(entry, version)
        if entry.name == MAIN:
            self._status.version = version

    def _load_into_model(self, worker: Worker, entry: Entry) -> int:
        model = _model_for(worker, entry.name)
        self._begin(entry, entry.reader.latest)
        targets = entry.in_place.targets(model, entry.reader.layout)
        if targets is not None:
            version = entry.reader.read_into(targets)
            self._begin(entry, version)
            return version
        tensors, version = entry.reader.read()
        self._begin(entry, version)
        try:
            state_dicts.load_into(model, tensors)
        except Exception as error:
            if entry.name != MAIN:
                error.add_note(f"in loading weights {entry.name!r} into self.models")
            raise
        return version

    def look(self, name: str, *, may_wait: bool) -> Weights:
        """Return the newest weights of a name, for code of the worker.

        Args:
            name: Their name.
            may_wait: Whether the application goes on while this thread waits.

        Raises:
            WeightsError: There are none of that name.
        """
        catalogue = self._catalogue
        catalogue.complete_now(may_wait=may_wait)
        entry = catalogue.find(name)
        tensors, version = entry.reader.look()
        catalogue.suspect(entry, version)
        catalogue.took(entry, version)
        return Weights(tensors, version)


def _is_wanted(worker: Worker, entry: Entry) -> bool:
    """Return whether there is something newer to load, and something to load it into."""
    if entry.reader.latest <= entry.loaded:
        return False
    return entry.name == MAIN or worker.models.get(entry.name) is not None


def _model_for(worker: Worker, name: str) -> Any:
    if name == MAIN:
        if problem := why_no_weights(worker):
            raise WeightsError(problem)
        return worker.model
    model = worker.models[name]
    if not callable(getattr(model, "load_state_dict", None)):
        raise WeightsError(
            f"self.models[{name!r}] of {type(worker).__name__} is a {type(model).__name__} without "
            "load_state_dict(), so it cannot take weights; assign a network, or use "
            f"context.weights({name!r})"
        )
    return model
