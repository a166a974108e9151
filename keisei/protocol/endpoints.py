"""The worker's ends of its private queues, and its status line."""

from __future__ import annotations

import os
import select
import socket
from dataclasses import dataclass

from keisei.ipc.queues import FrameReader, FrameWriter
from keisei.ipc.status import StatusLine

REPLY = 2
"""The place of the reply queue among the descriptors."""


@dataclass(slots=True)
class WorkerEndpoints:
    """What one incarnation talks through; the application has the other ends.

    Attributes:
        control: Commands, pause, stop.
        model: Weights announcements.
        reply: Answers, failures, goodbye.
        experience: Frames about experiences in shared memory; bounded by credits.
        status: What the worker is doing.
    """

    control: FrameReader
    model: FrameReader
    reply: FrameWriter
    experience: FrameWriter
    status: StatusLine

    def poll(self) -> select.poll:
        """Return what tells, in one system call, whether anything has arrived."""
        poll = select.poll()
        # They are looked at in this order, so that weights which were announced before a credit
        # was given are found with it.
        for end in (self.experience, self.model, self.control):
            poll.register(end.fileno(), select.POLLIN)
        return poll

    def detach(self) -> list[int]:
        """Give all descriptors away, in the order that ``attach`` takes.

        Raises:
            OSError: There is no descriptor left; nothing was given away.
        """
        status = os.dup(self.status.fd)  # first, since it alone can fail
        return [
            self.control.detach(),
            self.model.detach(),
            self.reply.detach(),
            self.experience.detach(),
            status,
        ]

    @classmethod
    def attach(cls, fds: list[int]) -> WorkerEndpoints:
        """Build the ends around descriptors from ``detach``, which are taken over."""
        control, model, reply, experience, status = fds
        return cls(
            control=FrameReader(socket.socket(fileno=control)),
            model=FrameReader(socket.socket(fileno=model)),
            reply=FrameWriter(socket.socket(fileno=reply), None),
            experience=FrameWriter(socket.socket(fileno=experience), 0),
            status=StatusLine(status),
        )

    def close(self) -> None:
        """Close every end; the application reads the rest and then the end."""
        self.control.close()
        self.model.close()
        self.reply.close()
        self.experience.close()
