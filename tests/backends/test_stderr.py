"""The relay of standard error: everything is passed on in order, and the end is remembered."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from keisei.backends.stderr import TAIL, StderrRelay

PATIENCE = 20.0


def open_fds():
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


@pytest.fixture
def relay():
    relay = StderrRelay()
    yield relay
    relay.join(PATIENCE)
    assert "keisei-stderr" not in {thread.name for thread in threading.enumerate()}


def test_what_is_written_is_passed_on_and_remembered(relay, capfd):
    """Each pipe's own end is remembered; what was not read before it is closed is passed on too."""
    first, first_end = relay.pipe()
    second, second_end = relay.pipe()
    os.write(first_end, b"one\n")
    os.write(second_end, b"two\nthree")
    assert (first.read(), second.read()) == ("one\n", "two\nthree")
    os.write(first_end, b"four\n")
    for tail, end in ((first, first_end), (second, second_end)):
        tail.close()
        tail.close()
        os.close(end)
    relay.join(PATIENCE)
    assert sorted(capfd.readouterr().err) == sorted("one\ntwo\nthreefour\n")


def test_of_much_text_the_last_whole_lines_are_remembered(relay, capfd):
    """Up to 4096 bytes, and of one line without an end its end."""
    tail, end = relay.pipe()
    os.write(end, b"".join(b"line %d\n" % number for number in range(1000)))
    lines = tail.read().splitlines()
    assert lines == [f"line {number}" for number in range(1000 - len(lines), 1000)]
    assert TAIL - 10 < len(tail.read()) <= TAIL
    os.write(end, b"z" * 3 * TAIL)
    assert tail.read() == "z" * TAIL
    os.write(end, b"\xff\n")
    assert tail.read() == "z" * (TAIL - 2) + "\N{REPLACEMENT CHARACTER}\n"
    tail.close()
    os.close(end)


def test_the_order_is_kept(relay, capfd):
    """However much is written, and however often somebody looks at the end meanwhile."""
    tail, end = relay.pipe()
    lines = [f"{number:07}\n" for number in range(200_000)]
    with os.fdopen(end, "w") as stream:
        for number, line in enumerate(lines):
            stream.write(line)
            if number % 1000 == 0:
                tail.read()
    tail.close()
    relay.join(PATIENCE)
    assert capfd.readouterr().err == "".join(lines)


def test_a_pipe_that_has_ended_is_no_work(relay, capfd):
    """The thread waits for the pipes that are left."""
    ended, end = relay.pipe()
    other, other_end = relay.pipe()
    os.close(end)
    while not ended.has_ended:
        other.read()
    os.write(other_end, b"on")
    assert other.read() == "on"
    ended.close()
    other.close()
    os.close(other_end)


def test_a_standard_error_that_does_not_block_gets_everything(relay):
    """Others may have set it so; a full one is waited for."""
    terminal, write_end = os.pipe()
    os.set_blocking(write_end, False)
    saved = os.dup(2)
    os.dup2(write_end, 2)
    try:
        tail, end = relay.pipe()
        with os.fdopen(end, "wb") as stream:
            writing = threading.Thread(target=stream.write, args=(b"w" * (1 << 20),))
            writing.start()
            got = 0
            while got < 1 << 20:
                got += len(os.read(terminal, 1 << 16))
            writing.join()
        tail.close()
        relay.join(PATIENCE)
    finally:
        os.dup2(saved, 2)
        for fd in (saved, terminal, write_end):
            os.close(fd)


def test_without_a_standard_error_it_is_remembered_all_the_same(relay):
    """An application may have closed its own."""
    saved = os.dup(2)
    os.close(2)
    try:
        tail, end = relay.pipe()
        try:
            os.write(end, b"unheard\n")
            assert tail.read() == "unheard\n"
        finally:
            tail.close()
            os.close(end)
            relay.join(PATIENCE)
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def test_a_thread_that_is_about_to_end_is_waited_for(relay, monkeypatch):
    """It has found nothing left to do, and is there for a moment longer."""
    has_found, joined = threading.Event(), []
    end, join = relay._end, threading.Thread.join

    def end_and_tell():
        end()
        has_found.set()

    def note_and_join(thread, timeout=None):
        joined.append(thread.name)
        join(thread, timeout)

    tail, write_end = relay.pipe()
    monkeypatch.setattr(relay, "_end", end_and_tell)
    monkeypatch.setattr(threading.Thread, "join", note_and_join)
    tail.close()
    os.close(write_end)
    assert has_found.wait(PATIENCE)
    relay.join(PATIENCE)
    assert joined == ["keisei-stderr"]


def test_without_room_for_a_thread_nothing_is_left_open(monkeypatch):
    """The error is the system's; the next try may succeed."""
    relay = StderrRelay()
    before = open_fds()

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(OSError, match="can't start new thread"):
            relay.pipe()
    assert open_fds() == before
    tail, end = relay.pipe()
    os.write(end, b"now\n")
    assert tail.read() == "now\n"
    tail.close()
    os.close(end)
    relay.join(PATIENCE)
