"""What a forked child must leave alone: the memory, sockets and watches that are its parent's.

A fork copies every object, finalisers included, but not what they stand for: a cell of a ring, a
socket and the loop's epoll set are shared with the parent. So each fork begins a new generation.
What an older generation made is disowned in the child: it is closed there and never acts again.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

generation = 0
"""How many forks lie between this process and the one that imported this module first."""


class Disownable(Protocol):
    """Something that acts on what it shares with other processes."""

    def disown(self) -> None:
        """Close what this process has of it, without a word to anyone; called in the child."""
        ...


_owned: weakref.WeakSet[Disownable] = weakref.WeakSet()


def own(thing: Disownable) -> None:
    """Have ``thing`` disowned in every child that this process forks from now on."""
    _owned.add(thing)


def _begin_generation() -> None:
    global generation  # noqa: PLW0603 - one number of the process, read on hot paths
    generation += 1
    for thing in list(_owned):
        thing.disown()
    _owned.clear()


os.register_at_fork(after_in_child=_begin_generation)
