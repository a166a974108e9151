"""Windows: shared memory that is looked at without a descriptor, as its access allows."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from pathlib import Path

import pytest
import torch

from ipc_helpers import open_fds
from keisei.ipc import kernel, memory, window
from keisei.ipc.memory import PAGE, NotShared
from keisei.ipc.window import Access


def tensor_on(one: window.Window) -> torch.Tensor:
    return torch.frombuffer(one.buffer(), dtype=torch.uint8)


def is_mapped(name: str) -> bool:
    return name in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_a_window_takes_one_descriptor_less_than_a_mapping_did():
    """Its maker keeps the descriptor that it hands on, a reader none, and torch does not warn."""
    before = open_fds()
    fd, mine = window.create(PAGE, "keisei-test")
    assert open_fds() == before + 1
    theirs = window.attach(os.dup(fd), PAGE, Access.READ)
    assert open_fds() == before + 1
    tensor_on(mine)[10] = 77
    assert tensor_on(theirs)[10] == 77
    assert len(tensor_on(theirs)) == PAGE
    os.close(fd)


def test_a_window_lives_as_long_as_what_is_built_on_it():
    """The last tensor or word to go unmaps it."""
    name = "keisei-lasting"
    fd, mine = window.create(1 << 16, name)
    os.close(fd)
    tensor, words = tensor_on(mine), mine.words(2)
    words[1] = 5
    del mine
    gc.collect()
    assert tensor[8] == 5
    del words
    gc.collect()
    assert is_mapped(name)
    tensor[0] = 1
    del tensor
    gc.collect()
    assert not is_mapped(name)


def test_what_is_written_to_a_copy_is_the_writers_own():
    """Nobody else sees it, and pages that were not written show what their maker writes."""
    fd, mine = window.create(3 * PAGE, "keisei-test")
    first, second = (window.attach(os.dup(fd), 3 * PAGE, Access.COPY) for _ in range(2))
    os.close(fd)
    tensor_on(first)[0] = 9
    tensor_on(mine)[2 * PAGE] = 4
    assert (tensor_on(mine)[0], tensor_on(second)[0]) == (0, 0)
    assert (tensor_on(first)[2 * PAGE], tensor_on(second)[2 * PAGE]) == (4, 4)


@pytest.mark.skipif(not kernel.can_seal_writes(), reason="needs F_SEAL_FUTURE_WRITE")
def test_memory_of_a_window_cannot_be_written_by_others():
    """A window for writing on what another process made is refused."""
    fd, _ = window.create(PAGE, "keisei-test")
    with pytest.raises(NotShared, match="cannot be mapped"):
        window.attach(fd, PAGE, Access.WRITE)


def test_memory_that_is_no_such_memory_is_refused():
    """The size is checked as that of any other memory is, and nothing stays open."""
    before = open_fds()
    fd, _ = window.create(PAGE, "keisei-test")
    with pytest.raises(NotShared, match=re.escape(f"of {PAGE} bytes is said to have {2 * PAGE}")):
        window.attach(os.dup(fd), 2 * PAGE, Access.READ)
    os.close(fd)
    assert open_fds() == before


def test_words_are_read_and_written_whole():
    """They are 64 bits wide, at the beginning of the memory."""
    fd, mine = window.create(PAGE, "keisei-test")
    theirs = memory.attach(fd, PAGE, writable=False)
    words = mine.words(3)
    words[2] = (1 << 64) - 1
    assert ctypes.sizeof(words) == 24
    assert theirs[:32] == bytes(16) + b"\xff" * 8 + bytes(8)
