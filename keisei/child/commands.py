"""What the application tells a worker: commands, pause and resume, stop."""

from __future__ import annotations

from keisei.child.frames import Tell, arrived
from keisei.child.hooks import HookFailed, Hooks
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
        pausing: The pauses that are to be answered once nothing is collected.
    """

    def __init__(self, control: FrameReader, hooks: Hooks, status: StatusLine, tell: Tell) -> None:
        self.paused = False
        self.stopping = False
        self._control = control
        self._hooks = hooks
        self._status = status
        self._tell = tell
        self.pausing: list[int] = []

    async def obey(self, worker: Worker) -> None:
        """Handle every frame that has arrived, in order."""
        for payload, fds in arrived(self._control):
            message = messages.unpack(payload, messages.CONTROL, fds)
            if isinstance(message, messages.Command):
                await self._answer(worker, message)
            elif isinstance(message, messages.Pause):
                self.paused = True
                self.pausing.append(message.sequence)
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

    async def stand_still(self) -> None:
        """Answer those who wait for the pause; nothing is being collected now."""
        while self.pausing:
            none = serialize.dumps(None)
            await self._tell(messages.Reply(self.pausing.pop(0), none))
