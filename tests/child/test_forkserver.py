"""The fork server's protocol, without forking, and what it does with what it is sent."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from keisei.child import generators, process, surroundings
from keisei.child.forkserver import MAX_FDS, NUMBER, REQUEST, _receive, _Server, request
from keisei.ipc.memory import anonymous_file


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Return the application's and the server's end of the request socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def server(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> Iterator[_Server]:
    """Return a server that runs in this process, and adopts nothing."""
    monkeypatch.setattr(process, "adopt_orphans", lambda: False)
    monkeypatch.setattr(process, "tie_to", os.dup)
    monkeypatch.setattr(generators, "remember", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    lifeline, application = os.pipe()
    made = _Server(pair[1], lifeline, -1)
    yield made
    made._selector.close()
    for fd in (*made._own, lifeline, application):
        os.close(fd)


def ask(sock: socket.socket, modules: list[str], num_fds: int) -> int:
    """Send a request whose report is a pipe, and return the pipe's reading end."""
    report, their_report = os.pipe()
    data, folder = anonymous_file("test"), os.open(".", os.O_RDONLY)
    os.write(data, request(surroundings.told(sys.path), modules) + b"the rest")
    os.lseek(data, 0, os.SEEK_SET)
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(num_fds)]
    socket.send_fds(sock, [REQUEST], [data, their_report, folder, *fds])
    for fd in (data, folder, their_report, *fds):
        os.close(fd)
    return report


def read_and_close(fd: int) -> bytes:
    with open(fd, "rb") as stream:
        return stream.read()


def test_two_requests_are_two(pair):
    """What lies in the socket together is read one by one, and no descriptor is inheritable."""
    reports = [ask(pair[0], [], 8), ask(pair[0], [], 1)]
    first, second = _receive(pair[1]), _receive(pair[1])
    assert (len(first), len(second)) == (11, 4)
    assert not any(os.get_inheritable(fd) for fd in (*first, *second))
    for fd in (*reports, *first, *second):
        os.close(fd)


def test_the_end_of_the_application_is_the_end(pair):
    """A socket that closes asks for nothing."""
    pair[0].close()
    assert _receive(pair[1]) == []


def test_the_request_is_read_and_no_more(pair, server, monkeypatch):
    """Names of many modules arrive, and the process reads on where the request ends."""
    names = [f"package.module_{number}" for number in range(50_000)]
    found: list[list[str]] = []
    monkeypatch.setattr(server, "_import", found.append)
    rest: list[bytes] = []

    def fork() -> int:
        (data,) = (fd for fd in range(3, 64) if _is_the_file(fd))
        rest.append(os.read(data, 100))
        return -1

    monkeypatch.setattr(os, "fork", fork)
    os.close(ask(pair[0], names, 1))
    assert server._answer()
    assert found == [names]
    assert rest == [b"the rest"]


def _is_the_file(fd: int) -> bool:
    try:
        return "memfd:test" in str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return False


def test_a_request_that_is_cut_short_is_an_error(pair, server, monkeypatch):
    """The application is told, and nothing is forked."""
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    report, their_report = os.pipe()
    empty = os.open(os.devnull, os.O_RDONLY)
    socket.send_fds(pair[0], [REQUEST], [empty, their_report, empty])
    os.close(their_report)
    os.close(empty)
    assert server._answer()
    assert read_and_close(report) == NUMBER.pack(-errno.EIO)


def test_a_system_without_room_is_reported(pair, server, monkeypatch):
    """When it cannot fork, the server says why, closes all, and goes on."""

    def refuse() -> int:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", refuse)
    report = ask(pair[0], [], 5)
    assert server._answer()
    assert read_and_close(report) == NUMBER.pack(-errno.EAGAIN)
    assert server._reports == {}


def test_the_application_may_have_gone(pair, server, monkeypatch):
    """A report without a reader is dropped."""
    monkeypatch.setattr(os, "fork", lambda: 12345)
    os.close(ask(pair[0], [], 1))
    assert server._answer()
    assert server._reports == {}


def test_an_exit_is_reported_once(pair, server, monkeypatch):
    """The exit code of each process goes to the pipe of its start, which is closed then."""
    monkeypatch.setattr(os, "fork", lambda: 12345)
    report = ask(pair[0], [], 1)
    assert server._answer()
    ended = [(12345, 3 << 8), (99999, 0), (0, 0)]
    monkeypatch.setattr(process, "reap", lambda pid: ended.pop(0))
    server._reap()
    assert read_and_close(report) == NUMBER.pack(12345) + NUMBER.pack(3)
    assert server._reports == {}


def test_a_server_without_children_reaps_nothing(pair, server, monkeypatch):
    """Asked too often, a server tells nothing, and what it tells when a child ends is untouched."""
    monkeypatch.setattr(os, "fork", lambda: 12345)
    report = ask(pair[0], [], 1)
    assert server._answer()
    asked: list[int | None] = []
    ended: list[tuple[int, int]] = []

    def reap(pid: int | None) -> tuple[int, int]:
        asked.append(pid)
        if not ended:
            raise ChildProcessError
        return ended.pop()

    monkeypatch.setattr(process, "reap", reap)
    server._reap()
    assert asked == [None], "once, for any child"
    assert list(server._reports) == [12345]
    ended.append((12345, 7 << 8))
    server._reap()
    assert asked == [None] * 3, "until nobody is left"
    assert server._reports == {}
    assert read_and_close(report) == NUMBER.pack(12345) + NUMBER.pack(7)


def test_what_is_buffered_is_written_before_the_fork(pair, server, monkeypatch):
    """Output of imports would otherwise come once more from each worker."""
    flushed = []
    monkeypatch.setattr(process, "flush", lambda: flushed.append(True))
    monkeypatch.setattr(os, "fork", lambda: flushed.append(False) or -1)
    os.close(ask(pair[0], [], 1))
    server._answer()
    assert flushed == [True, False]


def test_modules_that_fail_are_tried_once(server, monkeypatch, tmp_path):
    """Neither an error nor ``sys.exit`` in an import ends the server, nor is it repeated."""
    log = tmp_path / "log"
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, end in [("keisei_fails", "1 / 0"), ("keisei_exits", "raise SystemExit(3)")]:
        text = f"with open({str(log)!r}, 'a') as log: print({name!r}, file=log)\n{end}\n"
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    (tmp_path / "keisei_works.py").write_text("", encoding="utf-8")
    for _ in range(2):
        modules = ["keisei_fails", "keisei_missing", "keisei_exits", "keisei_works"]
        server._import(server._missing(modules))
    assert log.read_text(encoding="utf-8").split() == ["keisei_fails", "keisei_exits"]
    assert sys.modules.pop("keisei_works")


def test_the_server_forgets_nothing_in_a_worker(server):
    """Everything that is the server's own is known, so that a worker can close it."""
    assert set(server._own) >= {server._woken, server._waker}
    assert MAX_FDS >= 10
