"""When a worker wants a successor: it has collected enough, or holds too much memory."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

import child_workers
from keisei.child import wear
from keisei.child.delivery import peak_memory
from keisei.child.wear import own_memory, worn_out
from keisei.testing.scenarios import fail_after

LIMIT = 60
MIB = 1 << 20


@pytest.mark.parametrize(
    ("committed", "max_experiences", "max_rss", "reason"),
    [
        (0, 1, 1, ""),
        (1, None, None, ""),
        (1, 2, None, ""),
        (2, 2, None, "it collected 2 experiences"),
        (3, 2, 1, "it collected 3 experiences"),
        (1, 2, 600 * MIB, ""),
        (1, 2, 500 * MIB, ""),
        (1, 2, 500 * MIB - 1, "its own memory is 500 MiB"),
    ],
)
def test_the_limits_are_exact(monkeypatch, committed, max_experiences, max_rss, reason):
    """Nothing before the first experience; more than the limit of memory, as many experiences."""
    monkeypatch.setattr(wear, "own_memory", lambda: 500 * MIB)
    assert worn_out(committed, max_experiences, max_rss) == reason


def test_shared_pages_are_not_its_own():
    """Memory that is shared does not count, private memory does."""
    size = 64 * MIB
    before = own_memory()
    with mmap.mmap(-1, size) as shared:
        shared.write(b"x" * size)
        assert own_memory() - before < size / 2
    private = bytearray(b"x") * size
    assert own_memory() - before > size / 2
    assert len(private) == size


def test_without_proc_the_peak_counts(monkeypatch):
    """Where the system does not tell what is shared, the most that was ever held decides."""
    monkeypatch.setattr(wear, "_STATM", Path("/nowhere/statm"))
    assert own_memory() == peak_memory()


async def test_experiences_that_the_application_keeps_are_not_the_workers(make_manager):
    """A worker whose kept experiences exceed its limit is not replaced for them."""
    manager = make_manager(
        child_workers.SharesMuch, num_workers=1, max_worker_rss=400 * MIB, max_queue_size=1
    )
    async with fail_after(LIMIT), manager:
        kept = []
        async for batch in manager.experiences():
            kept.append(batch)
            if len(kept) == 15:
                break
        assert sum(batch.data["x"].nbytes for batch in kept) > 500 * MIB
        assert {batch.incarnation for batch in kept} == {0}
