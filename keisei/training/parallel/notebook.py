"""Managers in a notebook: running a cell again ends the pool that it had started before."""

from __future__ import annotations

import contextlib
import sys
import weakref
from typing import Any, NamedTuple, Protocol


class Cell(NamedTuple):
    """Where in a notebook something was made.

    Attributes:
        name: The same whenever this cell is run.
        execution: Another one each time.
    """

    name: str
    execution: str


class StartedManager(Protocol):
    """What is asked of a manager."""

    async def stop(self) -> None:
        """End every worker."""
        ...


_started: list[tuple[Cell, weakref.ref[StartedManager]]] = []


def current_cell() -> Cell | None:
    """Return the cell that is being run, ``None`` outside of a notebook; costs nothing there."""
    shell = sys.modules.get("IPython")
    if shell is None:
        return None
    with contextlib.suppress(Exception):  # a kernel of another kind tells less
        kernel = shell.get_ipython().kernel
        parent = kernel.get_parent()
        execution = str(parent["header"]["msg_id"])
        name = parent.get("metadata", {}).get("cellId") or _file_of_the_cell()
        return Cell(str(name), execution) if name else None
    return None


def _file_of_the_cell() -> str:
    """Return the name that the kernel has given to the source of the cell on the stack."""
    frame: Any = sys._getframe()  # noqa: SLF001 - the only way to the caller's source
    while frame is not None:
        if frame.f_globals.get("__name__") == "__main__":
            return str(frame.f_code.co_filename)
        frame = frame.f_back
    return ""


async def take_over(manager: StartedManager, cell: Cell) -> None:
    """End what earlier runs of ``cell`` have started and left running, and remember ``manager``."""
    earlier = [
        one
        for known, reference in _started
        if known.name == cell.name
        and known.execution != cell.execution
        and (one := reference()) is not None
    ]
    _started[:] = [
        (known, reference)
        for known, reference in _started
        if reference() is not None and not any(reference() is one for one in earlier)
    ]
    _started.append((cell, weakref.ref(manager)))
    for one in earlier:
        await one.stop()
