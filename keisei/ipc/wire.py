"""What goes over a queue's socket pair.

One way go frames: a header (56 bits of length, 8 bits that count the descriptors coming with its
first byte) and as many bytes. The other way go credits: how many more frames the reader is ready
for, as 32-bit numbers that add up.
"""

from __future__ import annotations

import socket
import struct

HEADER = struct.Struct("<Q")
LENGTH_BITS = 56
LENGTH_MASK = (1 << LENGTH_BITS) - 1
CREDIT = struct.Struct("<I")

CHUNK = 1 << 16
"""Bytes per read, except into the body of a larger frame."""
SHARE = 1 << 20
"""Bytes after which one end lets the event loop turn before it moves more."""
MAX_FDS = 4
"""Descriptors that may come with one frame."""
MAX_PARTS = 64
"""Parts of frames that one system call takes; the least that POSIX systems allow is 16."""

SEND_FLAGS = getattr(socket, "MSG_NOSIGNAL", 0)
"""A reader that has gone is an error here, never a SIGPIPE to an application that allows those."""
RECV_FLAGS = getattr(socket, "MSG_CMSG_CLOEXEC", 0)

Part = bytes | memoryview
Payload = Part | tuple[Part, ...]
"""What one frame holds: one stretch of bytes, or several that go one behind the other.

Large values come in parts, so that they are neither joined nor copied on their way to the socket,
and so that one value can go to any number of workers.
"""


ALIGNMENT = 64
"""Bytes to which buffers are aligned, in shared memory and in frames."""


def padding(nbytes: int) -> bytes:
    """Return the padding that aligns a buffer behind ``nbytes`` bytes."""
    return bytes(-nbytes % ALIGNMENT)


def nbytes_of(payload: Payload) -> int:
    """Return how many bytes ``payload`` has.

    Raises:
        TypeError: A part of it is not contiguous, so it cannot be sent as it is.
    """
    if isinstance(payload, tuple):
        return sum(map(nbytes_of, payload))
    return len(payload.cast("B") if isinstance(payload, memoryview) else payload)
