"""Fixtures for the tests of the backends."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["forkserver", "spawn"])
def start_method(request: pytest.FixtureRequest) -> str:
    """Run the test under each start method."""
    return request.param
