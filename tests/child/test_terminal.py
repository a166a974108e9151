"""Workers of an application that runs in a terminal: in the background of it, and never stopped."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import pty
import sys

import pytest

from keisei.testing.scenarios import fail_after

LIMIT = 60

APPLICATION = """
import asyncio, functools, os, sys, termios
from keisei import ParallelManager
from child_workers import AtATerminal

async def main(use, start_method):
    config = {"num_workers": 1, "start_method": start_method}
    worker = functools.partial(AtATerminal, use)
    async with ParallelManager(worker, config=config) as manager:
        outcomes = [(await manager.collect())[0].data["outcome"].item() for _ in range(3)]
    os.write(report, f"{outcomes} {len(manager.incidents)}".encode())

if __name__ == "__main__":
    terminal, report, use, start_method = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    os.login_tty(terminal)
    settings = termios.tcgetattr(0)
    settings[3] |= termios.TOSTOP
    termios.tcsetattr(0, termios.TCSANOW, settings)
    asyncio.run(main(use, start_method))
"""


@pytest.mark.parametrize(
    ("use", "outcome"),
    [("write", 0), ("configure", 0), ("child", 0), ("read", errno.EIO)],
)
@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
async def test_a_worker_that_uses_the_terminal_is_not_stopped(use, outcome, start_method):
    """Writing works where the terminal is set to stop that, a read is an error that it sees."""
    loop = asyncio.get_running_loop()
    async with fail_after(LIMIT):
        ours, terminal = pty.openpty()
        told, report = os.pipe()
        os.set_blocking(ours, False)

        def drain() -> None:
            with contextlib.suppress(OSError):  # nothing there, or nobody at the other end
                os.read(ours, 1 << 16)

        loop.add_reader(ours, drain)
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", APPLICATION),
                *(str(terminal), str(report), use, start_method),
                pass_fds=[terminal, report],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            os.close(terminal)
            os.close(report)
            assert await process.wait() == 0
            assert os.read(told, 100).decode() == f"{[outcome] * 3} 0"
        finally:
            loop.remove_reader(ours)
            os.close(ours)
            os.close(told)
