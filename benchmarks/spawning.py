"""Plain worker processes for the limits and for the peers that bring no pool of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def processes(
    target: Callable[..., None], arguments: Iterable[tuple[Any, ...]], method: str = "spawn"
) -> Iterator[list[BaseProcess]]:
    """Run ``target`` once for each of ``arguments`` in a process; kill them all at the end."""
    context: BaseContext = multiprocessing.get_context(method)
    started: list[BaseProcess] = []
    try:
        for args in arguments:
            process = context.Process(target=target, args=args, daemon=True)  # type: ignore[attr-defined]
            process.start()
            started.append(process)
        yield started
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.join()


def bounded(call: Callable[[], T], seconds: float, what: str) -> T:
    """Return the result of ``call``, but wait no longer than ``seconds``.

    A late call goes on in a daemon thread, so use it only where the process ends soon after.

    Raises:
        TimeoutError: If it is late.
    """
    outcome: list[T] = []
    problems: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:  # noqa: BLE001 - it is raised again by the caller
            problems.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"{what}: nothing happened within {seconds:g} s")
    if problems:
        raise problems[0]
    return outcome[0]
