"""How much memory there is to take: the least of what the kernel and the control groups leave."""

from __future__ import annotations

import pytest

from keisei.ipc import room

MEMINFO = "MemTotal: 4000 kB\nMemFree: 1 kB\nMemAvailable: 2000 kB\nSwapFree: 500 kB\nOdd: lines\n"
SYSTEM = 1024 * 2500


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that makes a machine of files."""
    monkeypatch.setattr(room, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(room, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(room, "_V2", tmp_path / "fs")
    monkeypatch.setattr(room, "_V1", tmp_path / "fs/memory")

    def make(**files: str) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="ascii")

    return make


V2 = {
    "memory.max": "1000000\n",
    "memory.current": "900000\n",
    "memory.stat": "inactive_file 50000\n",
}
V1 = {
    "memory.limit_in_bytes": "1000000\n",
    "memory.usage_in_bytes": "900000\n",
    "memory.stat": "cache 7\ntotal_inactive_file 60000\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"meminfo": "MemTotal: 1 kB\n"}, None),
        ({"meminfo": MEMINFO}, SYSTEM),
        ({"meminfo": MEMINFO, "cgroup": "0::/\n"}, SYSTEM),
        ({"meminfo": MEMINFO, "cgroup": "0::/\n", "fs/memory.max": "max\n"}, SYSTEM),
        ({"cgroup": "0::/\n", **{f"fs/{k}": v for k, v in V2.items()}}, 150_000),
        ({"cgroup": "1:cpu:/\n0::/a/b\n", **{f"fs/a/b/{k}": v for k, v in V2.items()}}, 150_000),
        ({"cgroup": "0::/host/path\n", **{f"fs/{k}": v for k, v in V2.items()}}, 150_000),
        ({"cgroup": "4:memory:/a\n", **{f"fs/memory/a/{k}": v for k, v in V1.items()}}, 160_000),
        ({"cgroup": "4:cpu,memory:/a\n", **{f"fs/memory/{k}": v for k, v in V1.items()}}, 160_000),
        (
            {"meminfo": MEMINFO, "cgroup": "0::/\n", **{f"fs/{k}": v for k, v in V2.items()}},
            150_000,
        ),
        (
            {
                "cgroup": "4:memory:/\n",
                "fs/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "fs/memory/memory.usage_in_bytes": "900\n",
            },
            None,
        ),
        (
            {"cgroup": "0::/\n", "fs/memory.max": "10", "fs/memory.current": "900"},
            0,
        ),
    ],
)
def test_the_least_room_counts(machine, files, expected):
    """Limits of either version count, wherever the group's folder is seen; caches are room."""
    machine(**files)
    assert room.available() == expected


def test_this_machine_tells_its_room():
    """Linux tells; it is no more than all its memory and swap."""
    found = room.available()
    assert found is not None
    assert 0 < found < 1 << 60
