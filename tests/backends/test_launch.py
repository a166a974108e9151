"""Applications that are killed, crash, fork, forget to stop, or were written without a guard."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.application import Application, open_pidfds
from keisei.ipc.kernel import has_pidfd

ACTIVITIES = [
    "forkserver.idle",
    "forkserver.python",
    "forkserver.native",
    "forkserver.starting",
    "forkserver.grandchild",
    "forkserver.session",
    "forkserver.daemon",
    "forkserver.copy",
    "spawn.native",
    "spawn.starting",
    "spawn.grandchild",
]

# Starts a pool for each activity that its arguments name, then obeys its standard input.
OBEDIENT = """
    import asyncio, ctypes, functools, json, os, signal, sys
    from pathlib import Path

    os.environ["KEISEI_TEST_APPLICATION"] = str(os.getpid())
    folder, *activities = sys.argv[1:]
    folder = Path(folder)
    os.environ["KEISEI_TEST_FIFO"] = str(folder / "importing")

    import backend_workers, blocking_import
    from keisei import ParallelManager
    from keisei.backends.forkserver import server as the_server

    async def main():
        managers, tasks = [], []  # a manager that is dropped ends its workers
        for activity in activities:
            method, _, kind = activity.partition(".")
            worker = functools.partial(backend_workers.Busy, str(folder / activity), kind)
            manager = ParallelManager(worker, config={"num_workers": 1, "start_method": method})
            managers.append(manager)
            tasks.append(asyncio.create_task(manager.start()))
            if kind == "idle":
                await tasks[-1]
                await manager.send_command("take hold")
        while True:
            order, _, method = (await asyncio.to_thread(sys.stdin.readline)).strip().partition(": ")
            match order:
                case "server":
                    print(json.dumps(the_server.pid), flush=True)
                case "import":
                    config = {"num_workers": 1, "start_method": method}
                    config["preload"] = ["blocking_import"]  # the fork server itself hangs
                    manager = ParallelManager(blocking_import.Unreachable, config=config)
                    managers.append(manager)
                    tasks.append(asyncio.create_task(manager.start()))
                case "fork":
                    pid = os.fork()
                    if pid == 0:
                        signal.pause()
                    print(json.dumps(pid), flush=True)
                case "fork in C":
                    pid = ctypes.PyDLL(None).fork()
                    if pid == 0:
                        signal.pause()
                    print(json.dumps(pid), flush=True)
                case "exit":
                    os._exit(7)
                case "segfault":
                    ctypes.string_at(0)

    asyncio.run(main())
"""


@contextlib.contextmanager
def busy_application(folder: Path, activities: list[str]) -> Iterator[Application]:
    """Start an application, and go on when its workers are at what they are to do."""
    with Application(folder, OBEDIENT, str(folder), *activities) as application:
        fifos = [application.fifo(activity) for activity in activities]
        for fifo in fifos:
            fifo.wait_held()
        yield application


def test_everything_ends_with_an_application_that_is_killed(tmp_path):
    """Within two seconds: workers that idle, compute, keep the GIL, start or import, and more."""
    with busy_application(tmp_path, ACTIVITIES) as application:
        importing = application.fifo("importing")
        for method in ("spawn", "forkserver"):
            application.say(f"import: {method}")
            importing.wait_held()
        application.say("server")
        servers = open_pidfds([application.hear()])
        application.kill()
        application.wait_all_gone(servers)


def test_everything_ends_with_an_application_that_crashes(tmp_path):
    """A segfault of the application leaves nobody behind."""
    with busy_application(tmp_path, ["forkserver.idle", "forkserver.native"]) as application:
        application.say("server")
        servers = open_pidfds([application.hear()])
        application.say("segfault")
        assert application.wait() == -signal.SIGSEGV
        application.wait_all_gone(servers)


def test_a_forked_copy_of_the_application_keeps_nobody_alive(tmp_path):
    """Workers end when the application leaves by ``os._exit``, though its copy lives on."""
    activities = ["forkserver.idle", "forkserver.native", "spawn.native"]
    with busy_application(tmp_path, activities) as application:
        application.say("fork")
        copy = application.hear()
        application.say("exit")
        assert application.wait() == 7
        application.wait_all_gone([])
        os.kill(copy, signal.SIGKILL)


@pytest.mark.skipif(not has_pidfd(), reason="without pidfds the copy holds all that tells")
def test_a_copy_of_the_application_made_in_c_keeps_no_worker_alive(tmp_path):
    """It holds the application's ends of everything; the fork server sees the end by its pid."""
    activities = ["forkserver.idle", "forkserver.native", "forkserver.session"]
    with busy_application(tmp_path, activities) as application:
        application.say("fork in C")
        copy = application.hear()
        application.say("exit")
        assert application.wait() == 7
        application.wait_all_gone([])
        os.kill(copy, signal.SIGKILL)


# Ends without a stop: its event loop is open or closed, and its workers are of these kinds.
FORGETFUL = """
    import asyncio, functools, os, sys
    from pathlib import Path

    os.environ["KEISEI_TEST_APPLICATION"] = str(os.getpid())
    way, folder = sys.argv[1:]
    folder = Path(folder)
    os.environ["KEISEI_TEST_FIFO"] = str(folder / "importing")

    import backend_workers, blocking_import
    from keisei import ParallelManager

    async def start():
        if way == "open importing":
            config = {"num_workers": 1, "preload": ["blocking_import"]}
            manager = ParallelManager(blocking_import.Unreachable, config=config)
            starting = asyncio.create_task(manager.start())
            await asyncio.to_thread(sys.stdin.readline)
            return manager, starting
        managers = []
        for method in way.split()[1:]:
            worker = functools.partial(backend_workers.Busy, str(folder / method), "idle")
            manager = ParallelManager(worker, config={"num_workers": 1, "start_method": method})
            managers.append(manager)
            await manager.start()
            await manager.send_command("take hold")
        return managers

    if way.startswith("closed"):
        asyncio.run(start())
    else:
        loop = asyncio.new_event_loop()
        kept = loop.run_until_complete(start())
"""


@pytest.mark.parametrize("way", ["open forkserver spawn", "closed forkserver", "open importing"])
def test_an_application_that_forgets_to_stop(tmp_path, way):
    """The interpreter exits without a hang, with status 0, and takes its workers with it."""
    with Application(tmp_path, FORGETFUL, way, str(tmp_path)) as application:
        for fifo in [application.fifo(holder) for holder in way.split()[1:]]:
            fifo.wait_held()
        if way == "open importing":
            application.say("go on")  # the others do by themselves
        assert application.wait() == 0
        application.wait_all_gone([])


# Runs a pool whose fork server preloads a module that forks, and tells the pids of the workers.
PRELOADING = """
    import asyncio, json
    import backend_workers
    from keisei import ParallelManager

    async def main():
        config = {"num_workers": 2, "preload": ["forking_import"]}
        async with ParallelManager(backend_workers.Obedient, config=config) as manager:
            await manager.collect(min_steps=4)
            print(json.dumps([info.pid for info in manager.workers]), flush=True)

    if __name__ == "__main__":
        asyncio.run(main())
"""


def test_a_module_that_forks_at_its_import_may_be_preloaded(tmp_path):
    """The copy of the fork server that stays holds up no start, and goes at the end."""
    with Application(tmp_path, PRELOADING) as application:
        assert len(set(application.hear())) == 2
        assert application.wait() == 0
        application.wait_all_gone([])


# Runs pools under both methods, and tells before, between and after what is its own.
POLITE = """
    import asyncio, json, multiprocessing, os, signal, sys, threading

    with open(os.path.join(sys.argv[1], "imports"), "a") as imports:
        print(os.getpid(), file=imports)

    import torch
    import aiomultiprocess.core
    import backend_workers
    from keisei import ParallelManager, warm_fork_server
    from keisei.backends.forkserver import server as the_server

    def children():
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return sorted(int(pid) for pid in file.read().split())

    def taken():
        return {
            "signals": [id(signal.getsignal(one)) for one in sorted(signal.valid_signals())],
            "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
            "start method": multiprocessing.get_start_method(allow_none=True),
            "threads of torch": torch.get_num_threads(),
            "policy": type(asyncio.get_event_loop_policy()).__name__,
            "threads": [thread.name for thread in threading.enumerate()],
            "children": children(),
            "multiprocessing's children": len(multiprocessing.active_children()),
            "manager of aiomultiprocess": str(aiomultiprocess.core._manager),
            "argv": sys.argv,
            "path": sys.path,
            "folder": os.getcwd(),
            "excepthook": str(sys.excepthook),
        }

    async def run(method):
        config = {"num_workers": 2, "start_method": method}
        async with ParallelManager(backend_workers.Obedient, config=config) as manager:
            await manager.collect(min_steps=4)
            pids = [info.pid for info in manager.workers]
            servers = [the_server.pid] if method == "forkserver" else []
            own = pids if method == "spawn" else []
            return {"others": sorted(set(children()) - {*servers, *own})}

    async def main():
        print(json.dumps(taken()), flush=True)
        for method in ("forkserver", "spawn"):
            print(json.dumps(await run(method)), flush=True)
            print(json.dumps(taken()), flush=True)
        with warm_fork_server(), warm_fork_server():
            await run("forkserver")
            server = the_server.pid
            await run("forkserver")
            print(json.dumps([server, the_server.pid, children()]), flush=True)
        print(json.dumps(children()), flush=True)

    if __name__ == "__main__":
        asyncio.run(main())
"""


def test_a_pool_takes_nothing_global_and_leaves_nothing(tmp_path):
    """Signals, start method, threads and policy stay; no child is left, no other was started."""
    with Application(tmp_path, POLITE, str(tmp_path)) as application:
        before = application.hear()
        assert before["start method"] is None
        assert before["manager of aiomultiprocess"] == "None"
        for _ in ("forkserver", "spawn"):
            assert application.hear() == {"others": []}
            assert application.hear() == before
        server, same_server, children = application.hear()
        assert server == same_server
        assert children == [server]
        assert application.hear() == []
        assert application.wait() == 0
        assert application.stderr() == ""
        application.wait_all_gone([])
    assert imported_by(tmp_path) == [application.pid], "a child has imported the main script"


def imported_by(folder: Path) -> list[int]:
    """Return the pids of all processes that have run or imported the script."""
    return [int(pid) for pid in (folder / "imports").read_text(encoding="utf-8").split()]


# Defines its worker itself.
OF_ONE_FILE = """
    import asyncio, json, os, sys

    with open(os.path.join(sys.argv[1], "imports"), "a") as imports:
        print(os.getpid(), file=imports)

    import torch
    from keisei import ParallelManager, Worker, WorkerStartError

    class Own(Worker):
        def collect(self):
            return {"x": torch.ones(3)}

    async def main():
        for method in ("forkserver", "spawn"):
            config = {"num_workers": 1, "start_method": method}
            try:
                async with ParallelManager(Own, config=config) as manager:
                    batches = await manager.collect(min_steps=6)
                print(json.dumps(sum(batch.num_steps for batch in batches)), flush=True)
            except WorkerStartError as error:
                print(json.dumps(str(error)), flush=True)

    if __name__ == "__main__":
        asyncio.run(main())
"""


def test_a_worker_of_the_main_script_works(tmp_path):
    """Each child imports the script once, under both start methods, and finds its class there."""
    with Application(tmp_path, OF_ONE_FILE, str(tmp_path)) as application:
        assert application.hear() >= 6
        assert application.hear() >= 6
        assert application.wait() == 0
        assert application.stderr() == ""
    assert len(imported_by(tmp_path)) == len(set(imported_by(tmp_path))) == 1 + 1 + 1


def test_a_missing_guard_is_a_clear_error(tmp_path):
    """The start fails at once and says what is missing; nobody forks without end."""
    program = OF_ONE_FILE.replace('if __name__ == "__main__":', "if True:")
    with Application(tmp_path, program, str(tmp_path)) as application:
        for _ in ("forkserver", "spawn"):
            told = application.hear()
            assert told.startswith(
                "worker 0 could not start: keisei.ManagerStateError: a worker process "
                "has imported the main script, which started a pool again; put what the script "
                "does under 'if __name__ == \"__main__\":'\n"
            )
        assert application.wait() == 0
        assert application.stderr() == ""
    assert len(imported_by(tmp_path)) == 1 + 1 + 1


def test_a_main_script_that_exits_when_it_is_imported(tmp_path):
    """What the import raised in the child is told at once, ``SystemExit`` too."""
    exits = 'import torch\n    if __name__ != "__main__": sys.exit("only once")\n'
    program = OF_ONE_FILE.replace("import torch\n", exits).replace(', "spawn")', ",)")
    with Application(tmp_path, program, str(tmp_path)) as application:
        told = application.hear()
        assert told.startswith("worker 0 could not start: SystemExit: only once\n")
        assert 'if __name__ != "__main__": sys.exit("only once")' in told
        assert application.wait() == 0
