"""Anonymous shared memory: sizes, sharing, lifetimes, and errors that leave nothing open."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

import ipc_helpers
from ipc_helpers import open_fds, process
from keisei.ipc import memory
from keisei.ipc.memory import PAGE, round_up


@pytest.mark.parametrize(
    ("size", "step", "rounded"), [(0, 64, 0), (1, 64, 64), (64, 64, 64), (65, 64, 128), (7, 1, 7)]
)
def test_sizes_are_rounded_up(size, step, rounded):
    """round_up gives the smallest multiple that is large enough."""
    assert round_up(size, step) == rounded


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, 10 * PAGE])
def test_memory_is_zeroed_whole_pages(size):
    """New memory has at least the size that was asked for, in pages of zeros, one at least."""
    fd, shared = memory.create(size)
    os.close(fd)
    assert len(shared) == max(PAGE, -(-size // PAGE) * PAGE)
    assert shared[:] == bytes(len(shared))


def test_every_page_is_reserved_at_once():
    """The pages exist before anybody writes, so that no write can find none left."""
    fd, _ = memory.create(100 * PAGE)
    assert os.fstat(fd).st_blocks * 512 >= 100 * PAGE
    os.close(fd)


def test_both_mappings_show_the_same_bytes():
    """What one side writes the other reads; attach closes the descriptor that it was given."""
    fd, mine = memory.create(PAGE)
    before = open_fds()
    passed = os.dup(fd)
    theirs = memory.attach(passed)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(passed)
    mine[10:13] = b"abc"
    theirs[13:16] = b"def"
    assert mine[10:16] == theirs[10:16] == b"abcdef"
    del theirs
    assert open_fds() == before
    os.close(fd)


def test_another_process_writes_into_it():
    """A process that received the descriptor shares the bytes, which outlive it."""
    fd, shared = memory.create(PAGE)
    with process(ipc_helpers.write_into_memory, fd) as child:
        assert child.wait(60) == -9
    assert shared[:5] == b"child"


def test_memory_lives_as_long_as_its_mapping():
    """Without any descriptor the mapping keeps the bytes, writable."""
    before = open_fds()
    fd, mine = memory.create(PAGE)
    theirs = memory.attach(fd)
    mine[0] = 7
    del mine
    theirs[1] = 8
    assert theirs[:3] == bytes([7, 8, 0])
    del theirs
    assert open_fds() == before


def test_memory_has_no_name_and_is_not_inherited():
    """Nothing appears in a file system, and other programs do not get the descriptor."""
    files = set(Path("/dev/shm").iterdir()) if Path("/dev/shm").is_dir() else set()
    fd, _ = memory.create(PAGE, "keisei-test")
    assert not os.get_inheritable(fd)
    assert os.fstat(fd).st_nlink == 0
    if Path("/dev/shm").is_dir():
        new = {path for path in set(Path("/dev/shm").iterdir()) - files if "keisei" in path.name}
        assert new == set()
    os.close(fd)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_memory_can_be_told_apart_in_the_list_of_mappings():
    """The name that it was given is shown where the system lists a process's memory."""
    fd, _ = memory.create(PAGE, "keisei-seen")
    assert "keisei-seen" in Path("/proc/self/maps").read_text()
    os.close(fd)


def test_memory_that_cannot_be_had_is_an_error_that_leaves_nothing_open():
    """Where the system refuses, OSError is raised before anything is written; no SIGBUS later."""
    with process(ipc_helpers.ask_for_too_much_memory) as child:
        assert child.wait(60) == 0


@pytest.mark.parametrize("missing", [(os, "memfd_create"), (os, "posix_fallocate")])
def test_other_systems_share_memory_too(missing, monkeypatch, tmp_path):
    """Without memfd_create an unlinked file serves; without posix_fallocate the size is set."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delattr(*missing)
    fd, mine = memory.create(PAGE + 1)
    assert list(tmp_path.iterdir()) == []
    theirs = memory.attach(os.dup(fd))
    mine[PAGE] = 9
    assert (len(theirs), theirs[PAGE]) == (2 * PAGE, 9)
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_an_anonymous_file_grows_as_it_is_written():
    """anonymous_file is empty, nameless, and of any size."""
    fd = memory.anonymous_file("keisei-file")
    assert os.fstat(fd).st_size == 0
    os.write(fd, b"12345")
    assert os.pread(fd, 10, 0) == b"12345"
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)


def test_pages_are_the_systems():
    """The unit of all sizes is the system's page."""
    assert mmap.PAGESIZE == PAGE
