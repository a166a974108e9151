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
"""Bytes after which one end lets the event loop turn, whatever more there is to move."""
MAX_FDS = 4
"""Descriptors that may come with one frame."""

SEND_FLAGS = getattr(socket, "MSG_NOSIGNAL", 0)
"""A reader that has gone is an error here, never a SIGPIPE to an application that allows those."""
RECV_FLAGS = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
