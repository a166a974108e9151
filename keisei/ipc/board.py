"""The board: one page on which a pool tells its workers, in one word, that weights have changed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from keisei.ipc import forks, window
from keisei.ipc.memory import PAGE
from keisei.ipc.window import Access

GENERATION = 0
"""The word that counts every version of every name, and every change of the names."""
EDITION = 1
"""The word that counts the frames about names: a worker that has read fewer of them waits."""
_NUM_WORDS = 2


class Board:
    """The application's side. Any thread may publish.

    Attributes:
        fd: The page's descriptor, to hand to workers; -1 when closed.
        edition: Changes of the names so far.
    """

    def __init__(self) -> None:
        """Make the page.

        Raises:
            OSError: There is no memory or no descriptor for it.
        """
        self.fd, shared = window.create(PAGE, "keisei-board")
        self.edition = 0
        self._generation = 0
        self._words: Any = shared.words(_NUM_WORDS)
        self._lock = threading.Lock()
        forks.own(self)

    def publish(self, tell: Callable[[int], None]) -> None:
        """Begin a generation: call ``tell`` with its number, then show it to the workers."""
        with self._lock:
            self._generation += 1
            tell(self._generation)
            self._words[GENERATION] = self._generation

    def change_names(self) -> None:
        """Begin an edition; every worker was sent the frame about it before."""
        self.edition += 1
        self._words[EDITION] = self.edition
        self.publish(lambda _: None)

    def close(self) -> None:
        """Unmap the page; workers keep theirs."""
        self._words = [0] * _NUM_WORDS
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def disown(self) -> None:
        """Close a forked child's copy."""
        self.close()


def look_at(fd: int) -> Any:
    """Return the board's words as a worker sees them; takes ``fd`` over.

    Raises:
        NotShared: It is no board.
        OSError: It cannot be mapped.
    """
    return window.attach(fd, PAGE, Access.READ).words(_NUM_WORDS)
