"""What goes wrong when the other end does not speak as it should."""

from __future__ import annotations


class ProtocolError(Exception):
    """A frame is malformed, or says what its sender may not say at this point.

    Always its sender's error. The application turns it into the end of that worker, so it is no
    part of the public errors.
    """
