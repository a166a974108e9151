"""The leak check as pytest fixtures; the only module here that needs pytest.

Load it in a ``conftest.py`` with ``pytest_plugins = ["keisei.testing.pytest_plugin"]``, and have
every test checked with ``pytestmark = pytest.mark.usefixtures("no_leaks")`` or an autouse fixture
that asks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from keisei.testing import leaks


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves a process, descriptor, thread, task or shared file behind.

    It also fails one in whose background an asyncio task or callback failed unheard.
    """
    unheard = _Unheard()
    logger = logging.getLogger("asyncio")
    logger.addHandler(unheard)
    before = leaks.Resources.now()
    try:
        yield
        left = leaks.left_since(before)
    finally:
        logger.removeHandler(unheard)
    if left or unheard.messages:
        pytest.fail("left behind: " + "\n  - ".join([*left, *unheard.messages]), pytrace=False)


class _Unheard(logging.Handler):
    """Keeps what asyncio logs as errors: exceptions never retrieved, tasks destroyed."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(self.format(record))
