"""Weights in a worker: what was announced, loading the newest, acknowledging what was asked for."""

from __future__ import annotations

from typing import Any

from torch import nn

from keisei import state_dicts
from keisei.child.frames import Tell, arrived
from keisei.child.hooks import Hooks, failing_as
from keisei.child.in_place import InPlace
from keisei.exceptions import WeightsError
from keisei.ipc.frame_reader import FrameReader
from keisei.ipc.status import Phase, StatusLine
from keisei.ipc.weights import WeightsReader
from keisei.protocol import messages
from keisei.worker import Worker


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
    """Loads weights into one worker.

    Attributes:
        version: What the worker has; 0 is none.
    """

    def __init__(self, announcements: FrameReader, hooks: Hooks, status: StatusLine, tell: Tell):
        self.version = 0
        self._announcements = announcements
        self._hooks = hooks
        self._status = status
        self._tell = tell
        self._reader: WeightsReader | None = None
        self._in_place = InPlace()
        self._owed_version = 0

    def take_announcements(self) -> None:
        """Take in what was announced up to now."""
        for payload, fds in arrived(self._announcements):
            message = messages.unpack(payload, messages.MODEL, fds)
            if isinstance(message, messages.Arena):
                self._reader = WeightsReader(fds.claim(), message.layout)
            elif message.acknowledge:
                self._owed_version = max(self._owed_version, message.version)

    @property
    def is_behind(self) -> bool:
        """Whether there are newer weights, or an acknowledgement is owed."""
        reader = self._reader
        return self._owed_version > 0 or (reader is not None and reader.latest > self.version)

    async def load_newest(self, worker: Worker) -> None:
        """Load the newest weights, if they are newer, and acknowledge what was asked for.

        Raises:
            HookFailed: The worker cannot take them.
        """
        reader = self._reader
        if reader is not None and reader.latest > self.version:
            with failing_as(Phase.LOAD_WEIGHTS):
                loads_by_itself = _loads_by_itself(worker)
            if loads_by_itself:
                tensors = self._read(reader)
                version = self._status.version
                await self._hooks.call(Phase.LOAD_WEIGHTS, worker.load_weights, tensors, version)
            else:
                await self._hooks.call(Phase.LOAD_WEIGHTS, self._load_into_model, worker, reader)
            self.version = self._status.version
        if self._owed_version and self.version >= self._owed_version:
            self._owed_version = 0
            await self._tell(messages.Applied(self.version))

    def _read(self, reader: WeightsReader) -> Any:
        """Return a copy of the newest weights; their version is that of the status line now."""
        with failing_as(Phase.LOAD_WEIGHTS):
            tensors, self._status.version = reader.read()
        return tensors

    def _load_into_model(self, worker: Worker, reader: WeightsReader) -> None:
        if problem := why_no_weights(worker):
            raise WeightsError(problem)
        model = worker.model
        targets = self._in_place.targets(model, reader.layout)
        if targets is not None:
            self._status.version = reader.latest
            self._status.version = reader.read_into(targets)
        else:
            tensors, self._status.version = reader.read()
            state_dicts.load_into(model, tensors)
