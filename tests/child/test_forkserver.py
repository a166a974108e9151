"""The fork server's protocol, without forking, and what it does with what it is sent."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator

import pytest

from keisei.child import forkserver, process
from keisei.child.forkserver import LENGTH, NUMBER, _receive, _Server


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Return the application's and the server's end of the request socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def server(pair: tuple[socket.socket, socket.socket]) -> Iterator[_Server]:
    """Return a server that runs in this process."""
    made = _Server(pair[1], -1, os.open(os.devnull, os.O_RDONLY))
    yield made
    made._selector.close()
    for fd in made._own:
        os.close(fd)


def ask(sock: socket.socket, names: str, num_fds: int) -> int:
    """Send a request whose report is a pipe, and return the pipe's reading end."""
    report, their_report = os.pipe()
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(num_fds)]
    data = LENGTH.pack(len(names)) + names.encode()
    socket.send_fds(sock, [data], [fds[0], their_report, *fds[1:]])
    for fd in (their_report, *fds):
        os.close(fd)
    return report


def read_and_close(fd: int) -> bytes:
    with open(fd, "rb") as stream:
        return stream.read()


def test_a_request_arrives_whole(pair):
    """The names of many modules and all descriptors arrive, and no descriptor is inheritable."""
    names = [f"package.module_{number}" for number in range(5000)]
    report = ask(pair[0], " ".join(names), 8)
    found, fds = _receive(pair[1])
    assert found == names
    assert len(fds) == 9
    assert not any(os.get_inheritable(fd) for fd in fds)
    for fd in (report, *fds):
        os.close(fd)


def test_two_requests_are_two(pair):
    """What lies in the socket together is read one by one."""
    reports = [ask(pair[0], "a b", 2), ask(pair[0], "", 1)]
    first, second = _receive(pair[1]), _receive(pair[1])
    assert (first[0], len(first[1])) == (["a", "b"], 3)
    assert (second[0], len(second[1])) == ([], 2)
    for fd in (*reports, *first[1], *second[1]):
        os.close(fd)


@pytest.mark.parametrize("sent", [b"", b"\x01", LENGTH.pack(10) + b"abc"])
def test_the_end_of_the_application_is_the_end(pair, sent):
    """A socket that closes, also in the middle of a request, asks for nothing."""
    pair[0].sendall(sent)
    pair[0].close()
    assert _receive(pair[1]) == ([], [])


def test_a_system_without_room_is_reported(pair, server, monkeypatch):
    """When it cannot fork, the server says why, closes all, and goes on."""

    def refuse() -> int:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", refuse)
    report = ask(pair[0], "", 5)
    assert server._answer()
    assert read_and_close(report) == NUMBER.pack(-errno.EAGAIN)
    assert server._reports == {}


def test_the_application_may_have_gone(pair, server, monkeypatch):
    """A report that nobody reads is dropped."""
    monkeypatch.setattr(os, "fork", lambda: 12345)
    os.close(ask(pair[0], "", 1))
    assert server._answer()
    assert server._reports == {}


def test_an_exit_is_reported_once(pair, server, monkeypatch):
    """The exit code of each process goes to the pipe of its start, which is closed then."""
    monkeypatch.setattr(os, "fork", lambda: 12345)
    report = ask(pair[0], "", 1)
    assert server._answer()
    ended = [(12345, 3 << 8), (99999, 0), (0, 0)]
    monkeypatch.setattr(process, "reap", lambda pid: ended.pop(0))
    server._reap()
    assert read_and_close(report) == NUMBER.pack(12345) + NUMBER.pack(3)
    assert server._reports == {}


def test_nobody_left_to_reap(server, monkeypatch):
    """A server without children has nothing to tell."""

    def reap(pid: int | None) -> tuple[int, int]:
        raise ChildProcessError

    monkeypatch.setattr(process, "reap", reap)
    server._reap()


def test_what_is_buffered_is_written_before_the_fork(pair, server, monkeypatch):
    """Output of imports would otherwise come once more from each worker."""
    flushed = []
    monkeypatch.setattr(process, "flush", lambda: flushed.append(True))
    monkeypatch.setattr(os, "fork", lambda: flushed.append(False) or -1)
    os.close(ask(pair[0], "", 1))
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
        server._import(["keisei_fails", "keisei_missing", "keisei_exits", "keisei_works"])
    assert log.read_text(encoding="utf-8").split() == ["keisei_fails", "keisei_exits"]
    assert sys.modules.pop("keisei_works")


def test_the_server_forgets_nothing_in_a_worker(server):
    """Everything that is the server's own is known, so that a worker can close it."""
    assert set(server._own) >= {server._woken, server._waker}
    assert forkserver.MAX_FDS >= 8
