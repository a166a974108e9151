"""Anonymous shared memory: sizes, sharing, lifetimes, and errors that leave nothing open."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
from pathlib import Path

import pytest

import ipc_helpers
from ipc_helpers import open_fds, process
from keisei.ipc import kernel, memory, room
from keisei.ipc.memory import PAGE, NotShared, round_up

SEALS = pytest.mark.skipif(not kernel.can_seal(), reason="needs seals")


@pytest.fixture
def probed_anew():
    """Have this process ask the kernel anew, now and after the test."""
    kernel.forget()
    yield
    kernel.forget()


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
def test_other_systems_share_memory_too(missing, monkeypatch, tmp_path, probed_anew):
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


# seals


@SEALS
@pytest.mark.parametrize("writable", [True, False])
def test_the_size_of_memory_is_final(writable):
    """It can neither be shrunk nor grown, by anybody who has its descriptor, nor unsealed."""
    fd, shared = memory.create(3 * PAGE, writable=writable)
    try:
        for size in (0, PAGE, 4 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            os.posix_fallocate(fd, 0, 4 * PAGE)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, kernel.F_ADD_SEALS, 0x8)
        shared[3 * PAGE - 1] = 1
    finally:
        os.close(fd)


@pytest.mark.skipif(not kernel.can_seal_writes(), reason="needs F_SEAL_FUTURE_WRITE")
def test_read_only_memory_is_written_by_its_maker_alone():
    """Others cannot map it for writing, write to it, punch holes, or reopen it to do so."""
    fd, mine = memory.create(PAGE, writable=False)
    theirs = memory.attach(os.dup(fd), PAGE, writable=False)
    mine[:3] = b"abc"
    assert theirs[:3] == b"abc"
    with pytest.raises(TypeError):
        theirs[0] = 1
    with pytest.raises(NotShared, match="cannot be mapped"):
        memory.attach(os.dup(fd), PAGE)
    with pytest.raises(PermissionError):
        os.write(fd, b"x")
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.pwrite(again, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(again, PAGE)
    os.close(again)
    os.close(fd)
    assert mine[:3] == b"abc"


@SEALS
@pytest.mark.parametrize("flags", [0, 0x2])
@pytest.mark.parametrize("seals", [0, 0x2, 0x4, 0x2 | 0x4])
def test_memory_that_is_not_sealed_is_refused(flags, seals):
    """Whoever sends it could still take it away; nothing is mapped and the descriptor closed."""
    fd = os.memfd_create("keisei-test", flags)
    os.ftruncate(fd, PAGE)
    if flags:
        fcntl.fcntl(fd, kernel.F_ADD_SEALS, seals)
    before = open_fds()
    with pytest.raises(NotShared, match=r"^the size of shared memory is not sealed$"):
        memory.attach(fd, PAGE)
    assert open_fds() == before - 1


@pytest.mark.parametrize("claimed", [1, PAGE, 2 * PAGE, 4 * PAGE])
def test_memory_of_another_size_than_claimed_is_refused(claimed):
    """Sizes count in whole pages."""
    fd, _ = memory.create(3 * PAGE)
    with pytest.raises(NotShared, match=f"^shared memory of {3 * PAGE} bytes is said to have"):
        memory.attach(fd, claimed)


@pytest.mark.parametrize("size", [None, 1, PAGE])
def test_what_is_no_memory_is_refused(size):
    """Pipes, sockets, directories and empty files are."""
    pipe = os.pipe()
    near, far = socket.socketpair()
    empty = memory.anonymous_file("keisei-test")
    folder = os.open("/", os.O_RDONLY)
    for fd in (*pipe, near.detach(), far.detach(), empty, folder):
        with pytest.raises(NotShared, match=r"^the descriptor is not shared memory$"):
            memory.attach(fd, size)
    with pytest.raises(OSError, match="Bad file descriptor"):
        memory.attach(pipe[0], size)


def test_what_the_machine_has_not_is_refused_before_it_is_reserved(monkeypatch, probed_anew):
    """The kernel would end processes of others first; the error tells both sizes."""
    kernel.capabilities()
    before = open_fds()
    reserved: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, start, size: reserved.append(size))
    monkeypatch.setattr(room, "available", lambda: 123_456_789)
    with pytest.raises(OSError, match=r"memory: 123,456,789 .*\(1,073,741,824 bytes of shared"):
        memory.create(1 << 30)
    assert (reserved, open_fds()) == ([], before)


def test_an_error_says_how_much_was_asked_for(monkeypatch, probed_anew):
    """Memory that cannot be had is told with its size."""
    kernel.capabilities()  # asked before the system refuses
    monkeypatch.setattr(room, "available", lambda: None)
    before = open_fds()

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(OSError, match=r"\(1,152,921,504,606,846,976 bytes of shared memory\)"):
        memory.create(1 << 60)
    assert open_fds() == before
