"""Kernels that say no: each call is tried once, and what is refused has a way around."""

from __future__ import annotations

import errno
import fcntl
import os

import pytest

from ipc_helpers import open_fds
from keisei.ipc import kernel, memory
from keisei.ipc.memory import PAGE
from keisei.ipc.status import Phase, StatusLine


@pytest.fixture(autouse=True)
def probed_anew():
    """Have this process ask the kernel anew, now and after the test."""
    kernel.forget()
    yield
    kernel.forget()


class Refusing:
    """Takes the place of a call; raises an error, or lets it through."""

    def __init__(self, call, number, when=lambda *_: True):
        self.call = call
        self.number = number
        self.when = when
        self.tried = 0

    def __call__(self, *args):
        if not self.when(*args):
            return self.call(*args)
        self.tried += 1
        raise OSError(self.number, os.strerror(self.number))


def refuse(monkeypatch, name, number):
    """Have the kernel refuse a call, or a seal."""
    if name in ("seals", "write_seal"):
        wanted = kernel.SIZE_SEALS if name == "seals" else kernel.WRITE_SEAL

        def is_meant(_, command, argument=0):
            return command == kernel.F_ADD_SEALS and bool(argument & wanted)

        refusing = Refusing(fcntl.fcntl, number, is_meant)
        monkeypatch.setattr(fcntl, "fcntl", refusing)
    else:
        refusing = Refusing(getattr(os, name), number)
        monkeypatch.setattr(os, name, refusing)
    return refusing


CALLS = ["memfd_create", "seals", "write_seal", "posix_fallocate", "pidfd_open"]
REFUSED = [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL]
AFTER = {"memfd_create": {"seals", "write_seal"}, "seals": {"write_seal"}}
BEFORE = {"seals": "memfd_create", "write_seal": "seals"}


def can_be_tried(name, allowed):
    """Return whether this kernel has what the call needs: a filter may refuse that for real."""
    return name not in BEFORE or allowed[BEFORE[name]]


@pytest.mark.parametrize("number", REFUSED, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", CALLS)
def test_what_is_refused_is_known_after_one_try(monkeypatch, name, number):
    """Each of the errors means that there is no such call; it is not tried again."""
    before = open_fds()
    allowed = kernel.capabilities()
    kernel.forget()
    refusing = refuse(monkeypatch, name, number)
    for _ in range(3):
        found = kernel.capabilities()
        refused = {name, *AFTER.get(name, ())}
        assert found == {call: allowed[call] and call not in refused for call in CALLS}
    assert refusing.tried == can_be_tried(name, allowed)
    assert open_fds() == before


@pytest.mark.parametrize("name", CALLS)
def test_an_error_of_the_moment_is_not_remembered(monkeypatch, name):
    """EMFILE says nothing about the kernel: the call counts as there, and is tried again."""
    allowed = kernel.capabilities()
    kernel.forget()
    with monkeypatch.context() as patch:
        refuse(patch, name, errno.EMFILE)
        assert kernel.capabilities()[name] is can_be_tried(name, allowed)
    with monkeypatch.context() as patch:
        refuse(patch, name, errno.ENOSYS)
        assert not kernel.capabilities()[name]


@pytest.mark.parametrize("name", ["memfd_create", "posix_fallocate", "pidfd_open"])
def test_a_python_without_a_call_has_none(monkeypatch, name):
    """As on systems whose C library lacks it."""
    monkeypatch.delattr(os, name)
    assert not kernel.capabilities()[name]


@pytest.mark.parametrize("name", CALLS)
def test_memory_is_shared_whatever_is_refused(monkeypatch, tmp_path, name):
    """Segments, read-only segments and status lines work; what is sealed depends on the kernel."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = open_fds()
    refuse(monkeypatch, name, errno.EPERM)
    for writable in (True, False):
        fd, mine = memory.create(PAGE + 1, writable=writable)
        theirs = memory.attach(os.dup(fd), PAGE + 1, writable=writable)
        mine[PAGE] = 9
        assert (len(theirs), theirs[PAGE]) == (2 * PAGE, 9)
        os.close(fd)
        del mine, theirs
    line = StatusLine()
    other = StatusLine(os.dup(line.fd))
    other.enter(Phase.IDLE)
    assert line.phase is Phase.IDLE
    line.close()
    other.close()
    assert list(tmp_path.iterdir()) == []
    assert open_fds() == before


def test_unsealed_memory_is_taken_where_there_are_no_seals(monkeypatch):
    """A kernel without seals shares memory as it always did."""
    refuse(monkeypatch, "seals", errno.EINVAL)
    fd = memory.anonymous_file("keisei-test")
    os.ftruncate(fd, PAGE)
    assert len(memory.attach(fd, PAGE)) == PAGE


def test_seals_that_are_not_kept_count_as_none(monkeypatch):
    """A kernel that accepts seals and forgets them has none."""
    real = fcntl.fcntl

    def forgetful(fd, command, argument=0):
        return 0 if command == kernel.F_ADD_SEALS else real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", forgetful)
    assert not kernel.can_seal()
