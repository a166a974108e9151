"""The settings that a worker has, and the change from one version of them to the next."""

from __future__ import annotations

from typing import Any

from keisei.child.frames import Tell
from keisei.child.hooks import HookFailed, Hooks
from keisei.exceptions import SerializationError
from keisei.ipc import serialize
from keisei.ipc.status import Phase
from keisei.protocol import messages
from keisei.protocol.settings import values_of
from keisei.worker import Settings, Worker


class HeldSettings:
    """The settings of one worker.

    Attributes:
        values: The worker's view of them.
        version: Their version; 0 is those that the manager began with.
    """

    def __init__(self, hooks: Hooks, tell: Tell) -> None:
        self.values = Settings()
        self.version = 0
        self._hooks = hooks
        self._tell = tell

    def begin(self, message: messages.Configure) -> None:
        """Take the settings that the process begins with.

        Raises:
            SerializationError: One of them cannot be rebuilt here.
        """
        self.values._replace(_unpickled(message))
        self.version = message.version

    async def apply(self, worker: Worker, message: messages.Configure) -> None:
        """Give the worker changed settings, and answer; nothing is being collected now.

        Raises:
            HookFailed: ``configure`` raised, and once more when it was given the former settings.
        """
        former = dict(self.values)
        try:
            settings = {**former, **_unpickled(message)}
        except (SerializationError, KeyboardInterrupt) as error:
            failure = HookFailed(Phase.CONFIGURE, error)
            await self._refuse(message, failure)
            return
        try:
            await self._give(worker, settings)
        except HookFailed as failure:
            await self._refuse(message, failure)
            await self._give(worker, former)
        else:
            self.version = message.version
            await self._tell(messages.Configured(message.version))

    async def _give(self, worker: Worker, settings: dict[str, Any]) -> None:
        self.values._replace(settings)
        await self._hooks.call(Phase.CONFIGURE, worker.configure, dict(settings))

    async def _refuse(self, message: messages.Configure, failure: HookFailed) -> None:
        await self._tell(messages.Refused(message.version, failure.summary, failure.traceback))


def _unpickled(message: messages.Configure) -> dict[str, Any]:
    return {name: serialize.loads(value, f"setting {name!r}") for name, value in values_of(message)}
