"""What the kernel, its limits and the hardware offer, and what is used in place of what they lack.

Nothing is changed: every call that is tried has no effect of its own.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from keisei.doctor.findings import Finding, Verdict
from keisei.ipc import kernel

DESCRIPTORS_PER_WORKER = 12
"""Descriptors of the application that one worker takes: two queues, status, memory, pidfd …"""
DESCRIPTORS_OF_A_POOL = 64
"""Descriptors that a pool and the application around it take in any case."""
_FEW_WORKERS = 64
_PR_GET_CHILD_SUBREAPER = 37

_IN_ITS_PLACE = {
    "memfd_create": "unlinked files in the temporary folder take its place",
    "seals": "memory is shared unsealed: a worker that shrinks it could end the application",
    "write_seal": "weights are shared writable: a worker could change them for the others",
    "posix_fallocate": "memory is sized and not reserved: a lack of it ends a process by SIGBUS",
    "pidfd_open": "a pipe to each process, and the fork server, tell of its end",
}


def findings() -> Iterator[Finding]:
    """Look at the kernel, the limits, memory, processors and GPUs."""
    for name, works in kernel.capabilities().items():
        if works:
            yield Finding("kernel", name, True, Verdict.OK)
        else:
            note = _IN_ITS_PLACE[name]
            yield Finding("kernel", name, False, Verdict.SUBSTITUTE, note)
    yield _subreaper()
    yield _lifeline()
    yield _signals()
    yield from _limits()
    yield from _memory()
    yield from _processors()
    yield from _gpus()


def _subreaper() -> Finding:
    note = "what a worker leaves running in sessions of its own is not found"
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        answer = ctypes.c_int(-1)
        libc = ctypes.CDLL(None)
        if libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(answer), 0, 0, 0) == 0:
            return Finding("kernel", "subreaper", True, Verdict.OK)
    return Finding("kernel", "subreaper", False, Verdict.SUBSTITUTE, note)


def _lifeline() -> Finding:
    """Whether the kernel itself kills workers when the application is gone."""
    import fcntl

    reading, writing = os.pipe()
    try:
        own = os.open(f"/proc/self/fd/{reading}", os.O_RDONLY | os.O_NONBLOCK)
        try:
            fcntl.fcntl(own, fcntl.F_GETFL)
            works = hasattr(fcntl, "F_SETOWN") and hasattr(os, "O_ASYNC")
        finally:
            os.close(own)
    except OSError:
        works = False
    finally:
        os.close(reading)
        os.close(writing)
    if works:
        return Finding("kernel", "proc_and_sigio", True, Verdict.OK)
    note = "a thread in each worker watches for the end of the application"
    return Finding("kernel", "proc_and_sigio", False, Verdict.SUBSTITUTE, note)


def _signals() -> Finding:
    if hasattr(signal, "SIGRTMAX"):
        return Finding("kernel", "realtime_signals", True, Verdict.OK)
    note = "SIGUSR2 asks a worker for its stacks"
    return Finding("kernel", "realtime_signals", False, Verdict.SUBSTITUTE, note)


def workers_that_fit(limit: int) -> int:
    """Return how many workers an application may have with ``limit`` descriptors."""
    return max(0, (limit - DESCRIPTORS_OF_A_POOL) // DESCRIPTORS_PER_WORKER)


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        yield Finding("limits", "open files (ulimit -n)", "unlimited", Verdict.OK)
    else:
        carries = workers_that_fit(soft)
        most = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,}"
        verdict = Verdict.OK if carries >= _FEW_WORKERS else Verdict.WARNING
        if carries < 1:
            verdict = Verdict.PROBLEM
        note = f"carries about {carries:,} workers"
        if verdict is not Verdict.OK:
            note += f"; 'ulimit -n {4096 if hard < 0 else min(hard, 4096)}' raises it"
        yield Finding("limits", "open files (ulimit -n)", f"{soft:,} of {most}", verdict, note)
    named = {
        "processes (ulimit -u)": resource.RLIMIT_NPROC,
        "address space (ulimit -v)": resource.RLIMIT_AS,
        "file size (ulimit -f)": resource.RLIMIT_FSIZE,
    }
    for name, which in named.items():
        soft, _ = resource.getrlimit(which)
        yield Finding("limits", name, "unlimited" if soft < 0 else f"{soft:,}")
    for name in ("pids.max", "memory.max", "cpu.max"):
        if (text := _cgroup(name)) is not None:
            yield Finding("limits", f"container {name}", text)
    if (text := _read("/proc/sys/kernel/yama/ptrace_scope")) is not None:
        yield Finding("limits", "ptrace_scope", text)


def _memory() -> Iterator[Finding]:
    with contextlib.suppress(OSError, ValueError):
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        yield Finding("memory", "memory", _bytes(pages * size))
    if (text := _read("/proc/meminfo")) is not None:
        for line in text.splitlines():
            if line.startswith("MemAvailable:"):
                yield Finding("memory", "available", _bytes(1024 * int(line.split()[1])))
    folders = {"temporary folder": tempfile.gettempdir(), "/dev/shm": "/dev/shm"}  # noqa: S108
    for name, folder in folders.items():
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder).free
            used = name != "/dev/shm" and not kernel.has_memfd()  # noqa: S108 - its name in a report
            note = (
                "experiences and weights lie there" if used else "not used for batches or weights"
            )
            where = folder if name != folder else name
            yield Finding("memory", name, f"{where}, {_bytes(free)} free", Verdict.FACT, note)


def _processors() -> Iterator[Finding]:
    yield Finding("processors", "processors", os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        usable = len(os.sched_getaffinity(0))
        note = "as many workers as this keep the machine busy; the learner takes one more"
        yield Finding("processors", "usable by this process", usable, Verdict.FACT, note)
    with contextlib.suppress(OSError):
        yield Finding("processors", "load", " ".join(f"{one:.2f}" for one in os.getloadavg()))


def _gpus() -> Iterator[Finding]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            import torch

            count = torch.cuda.device_count()
            yield Finding("gpus", "torch built for", torch.version.cuda or "the CPU alone")
            for number in range(count):
                name = torch.cuda.get_device_name(number)
                yield Finding("gpus", f"cuda:{number}", name, Verdict.OK)
            if not count:
                yield Finding("gpus", "GPUs", "none", Verdict.FACT, "workers use the CPU")
        except Exception as error:  # noqa: BLE001 - a driver of any kind; the report tells
            text = f"{type(error).__name__}: {error}"
            note = "torch cannot be imported, or its driver does not answer"
            yield Finding("gpus", "torch", text.splitlines()[0], Verdict.WARNING, note)
    for warning in caught:
        text = str(warning.message).strip().splitlines()[0]
        yield Finding("gpus", "warning", text, Verdict.WARNING)


def _bytes(number: int) -> str:
    return f"{number / 2**30:,.1f} GiB"


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None


def _cgroup(name: str) -> str | None:
    """Return a limit of this process's control group, ``None`` without one."""
    own = (_read("/proc/self/cgroup") or "").rpartition("::")[2].strip()
    for folder in (f"/sys/fs/cgroup{own}", "/sys/fs/cgroup"):
        text = _read(f"{folder}/{name}")
        if text is not None and not text.startswith("max"):
            return text
    return None
