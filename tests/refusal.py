"""A kernel that says no: a filter has it refuse calls to this process and all that descend from it.

The tests' configuration puts it in force when ``KEISEI_TEST_REFUSE`` is set: gVisor, containers
with a strict seccomp profile, and old kernels refuse the same calls, which their C libraries have.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import signal
import struct

VARIABLE = "KEISEI_TEST_REFUSE"

# The number of a call differs between machines: AUDIT_ARCH, then the numbers.
_MACHINES = {
    "x86_64": (0xC000003E, {"memfd_create": 319, "fallocate": 285, "fcntl": 72}),
    "aarch64": (0xC00000B7, {"memfd_create": 279, "fallocate": 47, "fcntl": 25}),
}
_EVERYWHERE = {"pidfd_open": 434, "pidfd_send_signal": 424}
_F_ADD_SEALS = 1033

# What seccomp_data holds, where; BPF's instructions; prctl's options.
_NUMBER, _ARCHITECTURE, _SECOND_ARGUMENT = 0, 4, 24
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _PR_SET_NO_NEW_PRIVS = 22, 2, 38


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _filter() -> bytes:
    architecture, numbers = _MACHINES[platform.machine()]
    refused = [*_EVERYWHERE.values(), numbers["memfd_create"], numbers["fallocate"]]
    after = len(refused) + 3  # instructions between the first comparison and the refusal
    lines = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_JUMP_IF_EQUAL, architecture, 0, after + 1),
        _instruction(_LOAD, _NUMBER),
    ]
    lines += [
        _instruction(_JUMP_IF_EQUAL, number, after - place) for place, number in enumerate(refused)
    ]
    lines += [
        _instruction(_JUMP_IF_EQUAL, numbers["fcntl"], 0, 2),
        _instruction(_LOAD, _SECOND_ARGUMENT),
        _instruction(_JUMP_IF_EQUAL, _F_ADD_SEALS, 1, 0),
        _instruction(_RETURN, _ALLOW),
        _instruction(_RETURN, _REFUSE),
    ]
    return b"".join(lines)


def put_in_force() -> None:
    """Have the kernel refuse the calls from now on, to this thread and all that it starts.

    Raises:
        OSError: The kernel takes no filter; or the calls are not refused all the same.
    """
    instructions = _filter()
    program = _Program(len(instructions) // 8, instructions)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    zero = ctypes.c_ulong(0)
    for option, argument, pointer in (
        (_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero),
        (_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(program)),
    ):
        if prctl(option, argument, pointer, zero, zero):
            number = ctypes.get_errno()
            raise OSError(number, f"prctl({option}): {os.strerror(number)}")
    missing = [name for name, is_refused in refused().items() if not is_refused]
    if missing:
        raise OSError(f"the filter lets these calls pass: {', '.join(missing)}")


def refused() -> dict[str, bool]:
    """Return which of the calls the kernel refuses now, by trying them."""
    with contextlib.closing(os.fdopen(os.open("/tmp", os.O_TMPFILE | os.O_RDWR), "rb")) as file:
        calls = {
            "pidfd_open": lambda: os.close(os.pidfd_open(os.getpid())),
            "pidfd_send_signal": lambda: signal.pidfd_send_signal(file.fileno(), 0),
            "memfd_create": lambda: os.close(os.memfd_create("keisei-test")),
            "fallocate": lambda: os.posix_fallocate(file.fileno(), 0, 1),
            "F_ADD_SEALS": lambda: fcntl.fcntl(file.fileno(), _F_ADD_SEALS, 0),
        }
        return {name: _is_refused(call) for name, call in calls.items()}


def _is_refused(call: object) -> bool:
    try:
        call()
    except OSError as error:
        return error.errno == errno.EPERM
    return False
