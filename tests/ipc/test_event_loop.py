"""The library's need of asyncio is told where another library runs."""

from __future__ import annotations

import asyncio
import sys
import types

import pytest

import pool_workers
from keisei.exceptions import ManagerStateError
from keisei.ipc.event_loop import require_asyncio
from keisei.training.parallel.parallel_manager import ParallelManager


async def test_the_running_loop_is_returned():
    """Under asyncio it is what asyncio itself returns."""
    assert require_asyncio() is asyncio.get_running_loop()


def test_without_a_loop_asyncio_is_named():
    """The error is the library's own, and names the two ways to run it."""
    with pytest.raises(ManagerStateError, match="no asyncio event loop is running") as caught:
        require_asyncio()
    assert "asyncio.run()" in str(caught.value)
    assert 'backend="asyncio"' in str(caught.value)


@pytest.mark.parametrize(
    ("is_running", "where"), [(True, "under trio"), (False, "where no asyncio")]
)
def test_trio_is_named_where_it_runs(monkeypatch, is_running, where):
    """It is asked whether it runs; that the application has loaded it says nothing."""

    def token() -> object:
        if not is_running:
            raise RuntimeError("must be called from async context")
        return object()

    trio = types.SimpleNamespace(lowlevel=types.SimpleNamespace(current_trio_token=token))
    monkeypatch.setitem(sys.modules, "trio", trio)
    with pytest.raises(ManagerStateError, match=f"a pool was used {where}"):
        require_asyncio()


def test_a_manager_under_another_library_is_an_error_of_ours():
    """Its start, driven as trio would, raises before anything is started; it can start later."""
    manager = ParallelManager(pool_workers.Counting, config={"num_workers": 1})
    with pytest.raises(ManagerStateError, match="keisei needs asyncio"):
        manager.start().send(None)
    with pytest.raises(ManagerStateError, match="not started"):
        manager.collect().send(None)
