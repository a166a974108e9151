"""Applications that mount the page of a real pool; the tests start this module as a process.

It prints one line of JSON when it serves: its port. What it is comes as JSON in its argument.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from urllib.parse import parse_qs

import uvicorn

from keisei.observers.page import pool_page
from page_fakes import FakeManager, worker


@dataclass(frozen=True)
class Wanted:
    """What the application is to be.

    Attributes:
        framework: "plain", "starlette" or "fastapi"; "alone" is the page and nothing else.
        mount: Where the page is.
        root_path: A prefix that a proxy takes away before requests come here.
        fake: The manager is a fake, which starts faster than a pool.
        num_workers: Of the pool.
        runs: Whether the pool is started.
        authorized: Visitors may do these.
        title: Of the page.
        interval: Of the page.
    """

    framework: str = "fastapi"
    mount: str = "/pool"
    root_path: str = ""
    fake: bool = False
    num_workers: int = 2
    runs: bool = True
    authorized: tuple[str, ...] = ()
    title: str = "keisei"
    interval: float = 0.1

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Learner:
    """Learns nothing, in a moment."""

    def __init__(self) -> None:
        import torch

        self.model = torch.nn.Linear(2, 1, bias=False)
        self.updates = 0

    def learn(self, batches: list[Any]) -> dict[str, float]:
        self.updates += 1
        return {"loss": 1 / self.updates}

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()


def make_manager(wanted: Wanted) -> Any:
    if wanted.fake:
        return FakeManager(workers=tuple(map(worker, range(wanted.num_workers))))
    from keisei import ParallelManager
    from page_workers import Paced

    config = {
        "num_workers": wanted.num_workers,
        "sync_interval": 10,
        "restart": {"max_restarts": 50, "backoff_base": 0.0, "backoff_cap": 0.0},
    }
    return ParallelManager(partial(Paced), learner=Learner(), config=config)


def make_app(wanted: Wanted, manager: Any) -> Any:
    """Return the application, in the framework that is wanted."""

    async def authorize(scope: Any, action: str) -> bool:
        return action in wanted.authorized

    page = pool_page(
        manager,
        authorize=authorize if wanted.authorized else None,
        title=wanted.title,
        interval=wanted.interval,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: Any = None) -> AsyncIterator[None]:
        task = asyncio.create_task(manager.run()) if wanted.runs and not wanted.fake else None
        yield
        if task is not None:
            manager.request_stop()
            report = await task
            print(f"ended by {report.reason}", flush=True)  # noqa: T201

    async def command(scope: Any, receive: Any, send: Any) -> None:
        """Do what the test asks, such as having a worker fail with a text."""
        asked = {
            name: values[0] for name, values in parse_qs(scope["query_string"].decode()).items()
        }
        if asked["what"] == "fail":
            await manager.send_command("fail", asked["text"], worker_ids=[int(asked["worker"])])
        elif asked["what"] == "stop":
            await manager.stop()
        told = {
            "pids": [info.pid for info in manager.workers],
            "incidents": len(manager.incidents),
            "streams": page.num_streams,
            "steps": manager.stats().num_steps if manager.workers else 0,
        }
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(told).encode()})

    match wanted.framework:
        case "alone":
            return page
        case "plain":
            return Plain(wanted.mount, page, command, lifespan)
        case "starlette":
            from starlette.applications import Starlette
            from starlette.routing import Mount

            routes = [Mount("/command", command), Mount(wanted.mount, page)]
            return Starlette(routes=routes, lifespan=lifespan)
        case _:
            from fastapi import FastAPI

            app = FastAPI(lifespan=lifespan)
            app.mount("/command", command)
            app.mount(wanted.mount, page)
            return app


class Plain:
    """Mounts as the ASGI specification says, and nothing more."""

    def __init__(self, mount: str, page: Any, command: Any, lifespan: Any) -> None:
        self.mount, self.page, self.command, self.lifespan = mount, page, command, lifespan

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            async with self.lifespan():
                await send({"type": "lifespan.startup.complete"})
                await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        root = scope.get("root_path", "")
        path = scope["path"].removeprefix(root)
        if path.startswith("/command"):
            await self.command(scope, receive, send)
        else:
            await self.page({**scope, "root_path": root + self.mount}, receive, send)


def main(wanted: Wanted) -> None:
    """Serve until a signal comes."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    manager = make_manager(wanted)
    app = make_app(wanted, manager)
    config = uvicorn.Config(
        app, log_level="warning", root_path=wanted.root_path, timeout_keep_alive=60
    )
    print(json.dumps({"port": listener.getsockname()[1], "pid": os.getpid()}), flush=True)  # noqa: T201
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again when it has ended
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    asked = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    main(Wanted(**{**asked, "authorized": tuple(asked.get("authorized", ()))}))
