"""The descriptors that came with a frame, owned until the receiver of the frame claims them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable


class Descriptors:
    """Descriptors in the order in which they were sent; those not claimed are closed.

    Closing happens by ``close``, or when nothing refers to this object any more.
    """

    __slots__ = ("_fds",)

    def __init__(self, fds: Iterable[int] = ()) -> None:
        """Take ``fds`` over."""
        self._fds = deque(fds)

    def __len__(self) -> int:
        return len(self._fds)

    def claim(self) -> int:
        """Return the next descriptor, which is the caller's from now on.

        Raises:
            IndexError: There is none left.
        """
        return self._fds.popleft()

    def close(self) -> None:
        """Close those that were not claimed."""
        while self._fds:
            os.close(self._fds.popleft())

    def __del__(self) -> None:
        self.close()


NO_DESCRIPTORS = Descriptors()
"""What nearly every frame comes with: one object for all of them."""
