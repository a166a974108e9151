"""What the application tells a worker: commands, pause and resume, settings, stop."""

from __future__ import annotations

from collections import deque

from keisei.child.frames import Tell, arrived
from keisei.child.hooks import HookFailed, Hooks
from keisei.child.settings import HeldSettings
from keisei.exceptions import SerializationError
from keisei.ipc import failures, serialize
from keisei.ipc.frame_reader import FrameReader
from keisei.ipc.status import Phase, StatusLine
from keisei.protocol import messages
from keisei.worker import Worker


class Commands:
    """Carries out what arrives in the control queue.

    Attributes:
        paused: No experience may be begun.
        stopping: The worker was told to stop, or the application has gone.
        between: What waits for a moment in which nothing is collected: pauses and settings, in
            order.
        settings: What the worker was told to be set to.
    """

    def __init__(self, control: FrameReader, hooks: Hooks, status: StatusLine, tell: Tell) -> None:
        self.paused = False
        self.stopping = False
        self._control = control
        self._hooks = hooks
        self._status = status
        self._tell = tell
        self.between: deque[messages.Pause | messages.Configure] = deque()
        self.settings = HeldSettings(hooks, tell)

    async def obey(self, worker: Worker) -> None:
        """Handle every frame that has arrived, in order."""
        for payload, fds in arrived(self._control):
            message = messages.unpack(payload, messages.CONTROL, fds)
            if isinstance(message, messages.Command):
                await self._answer(worker, message)
            elif isinstance(message, messages.Pause):
                self.paused = True
                self.between.append(message)
            elif isinstance(message, messages.Configure):
                self.between.append(message)
            elif isinstance(message, messages.Resume):
                self.paused = False
            else:
                self.stopping = True
        if self._control.ended is not None:
            self.stopping = True

    async def _answer(self, worker: Worker, command: messages.Command) -> None:
        self._status.command = command.sequence
        name = command.name
        try:
            data = serialize.loads(command.payload, f"the data of command {name!r}")
            if name == "reset":
                value = await self._hooks.call(Phase.COMMAND, worker.reset)
            else:
                value = await self._hooks.call(Phase.COMMAND, worker.on_command, name, data)
            payload = serialize.dumps(value, f"the reply to command {name!r}")
        except HookFailed as failure:
            await self._tell(
                messages.ReplyError(command.sequence, failure.summary, failure.traceback)
            )
        except SerializationError as error:
            await self._tell(messages.ReplyError(command.sequence, str(error), ""))
        except KeyboardInterrupt as error:  # raised by what was pickled, which is the user's
            await self._tell(
                messages.ReplyError(
                    command.sequence, failures.summary(error), failures.trace(error)
                )
            )
        else:
            await self._tell(messages.Reply(command.sequence, payload))

    async def obey_between(self, worker: Worker) -> None:
        """Apply settings and answer those who wait for a pause; nothing is being collected now.

        Raises:
            HookFailed: ``configure`` raised, and once more when it was given the former settings.
        """
        while self.between:
            message = self.between.popleft()
            if isinstance(message, messages.Configure):
                await self.settings.apply(worker, message)
            else:
                await self._tell(messages.Reply(message.sequence, serialize.dumps(None)))
