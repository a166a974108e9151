"""Each worker starts in the application of that moment, also under a fork server from before."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import backend_workers
from backend_workers import Obedient
from backends.application import Application
from keisei.events import ExitCause
from keisei.exceptions import PoolExhausted, WorkerLost, WorkerStartError
from keisei.testing.scenarios import fail_after

LIMIT = 60


async def ask(manager: Any, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Have every worker call a function, and return what they returned."""
    replies = await manager.send_command("call", (function, *args))
    return [replies[worker_id] for worker_id in sorted(replies)]


async def replace(manager: Any, worker_id: int = 0) -> None:
    """Have a worker die, and wait for its successor."""
    with pytest.raises(WorkerLost):
        await manager.send_command("call", (os._exit, 3), worker_ids=[worker_id])
    await manager._pool.supervisor.wait_settled()


# environment, folder, path


async def test_the_environment_is_that_of_each_start(make_manager, start_method, monkeypatch):
    """Variables that were set, changed or deleted reach the next worker, in Python and in C."""
    monkeypatch.setenv("KEISEI_A", "first")
    monkeypatch.setenv("KEISEI_B", "first")
    asked = (backend_workers.surroundings, "KEISEI_A", "KEISEI_B", "KEISEI_C")
    async with (
        fail_after(LIMIT),
        make_manager(Obedient, num_workers=1, start_method=start_method) as manager,
    ):
        (before,) = await ask(manager, *asked)
        assert before["python"] == ["first", "first", None]
        monkeypatch.setenv("KEISEI_A", "second\udcff")
        monkeypatch.delenv("KEISEI_B")
        monkeypatch.setenv("KEISEI_C", "")
        await manager.scale(2)
        old, new = await ask(manager, *asked)
        assert old == before
        assert new["python"] == ["second\udcff", None, ""]
        assert new["c"] == [b"second\xff", None, b""]
        await replace(manager)
        assert (await ask(manager, *asked))[0]["python"] == new["python"]


async def test_a_change_of_the_time_zone_is_heeded(make_manager, start_method, monkeypatch):
    """What C keeps of a variable is renewed too."""
    monkeypatch.setenv("TZ", "KEI-3")
    async with (
        fail_after(LIMIT),
        make_manager(Obedient, num_workers=1, start_method=start_method) as manager,
    ):
        (found,) = await ask(manager, backend_workers.surroundings)
        assert found["zone"] == "KEI"
    assert time.tzname[0] != "KEI"


async def test_the_folder_is_that_of_each_start(make_manager, start_method, monkeypatch, tmp_path):
    """A worker is where the application is, also in a folder that has been deleted."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    monkeypatch.chdir(folders[0])
    async with (
        fail_after(LIMIT),
        make_manager(Obedient, num_workers=1, start_method=start_method) as manager,
    ):
        (found,) = await ask(manager, backend_workers.surroundings)
        assert found["folder"] == str(folders[0])
        monkeypatch.chdir(folders[1])
        inode = folders[1].stat().st_ino
        folders[1].rmdir()
        await manager.scale(2)
        old, new = await ask(manager, backend_workers.surroundings)
        assert old["folder"] == str(folders[0])
        assert (new["folder"], new["inode"]) == ("gone", inode)


async def test_the_import_path_is_that_of_each_start(make_manager, start_method, monkeypatch):
    """Entries that Python passes over do no harm; nor do quotes, and bytes that are no text."""
    async with (
        fail_after(LIMIT),
        make_manager(Obedient, num_workers=1, start_method=start_method) as manager,
    ):
        odd = ['/it\'s "odd"\n\\', "/\udcff", Path("/x"), b"/y", None]
        monkeypatch.setattr(sys, "path", [*sys.path, *odd])
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        monkeypatch.setattr(sys, "pycache_prefix", "/nowhere")
        await manager.scale(2)
        old, new = await ask(manager, backend_workers.surroundings)
    assert old["path"] == sys.path[:-5]
    assert new["path"] == sys.path[:-3]
    assert new["bytecode"] == (True, "/nowhere")


# Its folder is gone, and its path is odd, before there is any fork server.
HOMELESS = """
    import asyncio, json, os, pathlib, sys, tempfile

    import backend_workers
    from keisei import ParallelManager

    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)
    sys.path.insert(0, pathlib.Path("odd"))

    async def main():
        for method in ("forkserver", "spawn"):
            config = {"num_workers": 1, "start_method": method}
            async with ParallelManager(backend_workers.Obedient, config=config) as manager:
                asked = (backend_workers.surroundings,)
                found = (await manager.send_command("call", asked))[0]
                print(json.dumps(found["folder"]), flush=True)

    asyncio.run(main())
"""


def test_an_application_whose_folder_is_gone(tmp_path):
    """The server and fresh interpreters start all the same, and find what they import."""
    with Application(tmp_path, HOMELESS) as application:
        assert [application.hear(), application.hear()] == ["gone", "gone"]
        assert application.wait() == 0
        assert application.stderr() == ""


# the user's own modules


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., ModuleType]]:
    """Return a writer of modules of the user's; each is imported, or reloaded."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    written: set[str] = set()

    def write(name: str, text: str) -> ModuleType:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")
        importlib.invalidate_caches()
        if name in written:
            return importlib.reload(sys.modules[name])
        written.add(name)
        return importlib.import_module(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)


NUMBERED = """
    import torch
    from keisei import Worker
    class W(Worker):
        def collect(self):
            return {{"x": torch.tensor([{number}])}}
"""


@pytest.mark.parametrize("preload", [None, ("keisei_edited",)], ids=["chosen", "named"])
async def test_the_next_pool_runs_the_edited_module(make_manager, write, preload):
    """So does the next worker; a module that was preloaded by name is imported anew too."""
    async with fail_after(LIMIT):
        for number in (1, 22, 333):
            module = write("keisei_edited", NUMBERED.format(number=number))
            async with make_manager(module.W, num_workers=1, preload=preload) as manager:
                batch, *_ = await manager.collect()
                assert batch.data["x"].tolist() == [number]


async def test_a_module_that_hangs_holds_up_its_own_worker_alone(make_manager, write, monkeypatch):
    """The fork server does not import it: another pool starts meanwhile."""
    monkeypatch.setenv("KEISEI_HANGS", "")
    module = write(
        "keisei_hangs",
        """
        import os, threading
        from backend_workers import Obedient
        if os.environ["KEISEI_HANGS"]:
            threading.Event().wait()
        class W(Obedient):
            pass
        """,
    )
    monkeypatch.setenv("KEISEI_HANGS", "now")
    async with fail_after(LIMIT), make_manager(Obedient, num_workers=1) as other:
        with pytest.raises(PoolExhausted) as caught:
            async with make_manager(
                module.W, num_workers=1, start_timeout=1.0, restart={"max_restarts": 0}
            ):
                pass
        (incident,) = caught.value.incidents
        assert (incident.cause, incident.phase) == (ExitCause.HANG, "start")
        assert 'keisei_hangs.py", line 5 in <module>' in incident.traceback
        await other.scale(2)
        assert len(set(await ask(other, os.getpid))) == 2
        assert other.incidents == ()


PARALLEL = """
    import torch
    torch.set_num_threads(2)
    TABLE = torch.ones(600, 600) @ torch.ones(600, 600)
    from keisei import Worker
    class W(Worker):
        def collect(self):
            return {"x": (TABLE @ TABLE)[0, :1]}
"""


async def test_tensors_may_be_computed_at_import(make_manager, write, start_method):
    """With several threads, before and after: each process makes the threads that it uses."""
    module = write("keisei_parallel", PARALLEL)
    async with (
        fail_after(LIMIT),
        make_manager(
            module.W, num_workers=2, start_method=start_method, threads_per_worker=2
        ) as manager,
    ):
        batches = await manager.collect(min_steps=4)
        assert {batch.data["x"].item() for batch in batches} == {600.0**3}


# random generators that modules hold

NOISE = """
    import random, types
    import numpy as np, torch
    from keisei import Worker

    FRESH = np.random.default_rng()
    SEEDED = np.random.default_rng(0)
    LEGACY = np.random.RandomState(0)
    PLAIN = random.Random(0)
    TORCH = torch.Generator().manual_seed(0)
    BOX = {"rng": [np.random.Generator(np.random.Philox(0))]}
    HOLDER = types.SimpleNamespace(rng=random.Random(1))

    def drawn(rng=np.random.default_rng(0)):
        return rng.random()

    class W(Worker):
        rng = np.random.default_rng(0)
        def collect(self):
            draws = [
                FRESH.random(), SEEDED.random(), LEGACY.standard_normal(), PLAIN.random(),
                torch.rand(1, generator=TORCH).item(), BOX["rng"][0].random(),
                HOLDER.rng.random(), drawn(), self.rng.random(), SEEDED.spawn(1)[0].random(),
            ]
            return {"x": torch.tensor([draws], dtype=torch.float64)}
"""
KINDS = 10


async def noise_of(manager: Any) -> dict[tuple[int, int], list[float]]:
    """Return the first draws of each of three processes: two workers, and a replacement."""
    found: dict[tuple[int, int], list[float]] = {}
    pid = manager.workers[0].pid
    async for batch in manager.experiences():
        if batch.sequence == 0:
            found[batch.worker_id, batch.incarnation] = batch.data["x"].flatten().tolist()
        if len(found) == 2 and pid is not None:
            os.kill(pid, signal.SIGKILL)
            pid = None
        if len(found) == 3:
            return found
    raise AssertionError("the stream has ended")


async def test_generators_of_modules_differ_and_repeat(make_manager, write):
    """Per worker and incarnation, and with the seed of the pool, however they are imported."""
    module = write("keisei_noise", NOISE)
    ways = [{}, {}, {"preload": ("keisei_noise",)}, {"start_method": "spawn"}]
    found = []
    async with fail_after(LIMIT):
        for way in ways:
            async with make_manager(module.W, num_workers=2, seed=3, **way) as manager:
                found.append(await noise_of(manager))
        async with make_manager(module.W, num_workers=2, seed=4) as manager:
            other = await noise_of(manager)
    assert found == [found[0]] * len(ways)
    draws = [draw for one in (found[0], other) for process in one.values() for draw in process]
    assert len(draws) == len(set(draws)) == 2 * 3 * KINDS


async def test_a_generator_that_cannot_be_seeded_is_named(make_manager, write, start_method):
    """The start fails, for good, with the place of what would draw the same in every worker."""
    module = write(
        "keisei_stubborn",
        """
        import random
        from backend_workers import Obedient
        class Stubborn(random.Random):
            def seed(self, *args):
                if hasattr(self, "is_made"):
                    raise NotImplementedError("it is seeded once")
                super().seed(*args)
                self.is_made = True
        RNG = Stubborn()
        class W(Obedient):
            pass
        """,
    )
    with pytest.raises(WorkerStartError) as caught:
        async with (
            fail_after(LIMIT),
            make_manager(module.W, num_workers=1, start_method=start_method),
        ):
            pass
    assert "the random generator keisei_stubborn.RNG, a Stubborn, cannot be seeded" in str(
        caught.value
    )
    assert "make it in setup(), from context.seed" in str(caught.value)


async def test_numpys_own_generator_differs_while_a_module_is_imported(make_manager, write):
    """A worker that is forked draws like a fresh interpreter before it is seeded."""
    module = write(
        "keisei_drawn",
        """
        import numpy as np, torch
        from keisei import Worker
        DRAWN = np.random.rand(3)
        class W(Worker):
            def collect(self):
                return {"x": torch.from_numpy(DRAWN)[None]}
        """,
    )
    found = {}
    async with fail_after(LIMIT), make_manager(module.W, num_workers=2) as manager:
        async for batch in manager.experiences():
            found[batch.worker_id] = batch.data["x"].tolist()
            if len(found) == 2:
                break
    assert found[0] != found[1]
