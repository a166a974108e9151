"""Finding out that the web server is to end, however the application runs it."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import httpx
import pytest
import uvicorn

from keisei.observers.page import pool_page
from keisei.observers.page.servers import are_ending, running_servers
from keisei.testing.scenarios import fail_after
from page_fakes import FakeManager


async def in_a_task(server, listener):
    await server.serve(sockets=[listener])


async def in_a_coroutine_of_its_own(server, listener):
    async def serve():
        async with contextlib.AsyncExitStack():
            await in_a_task(server, listener)

    await serve()


async def in_a_task_group(server, listener):
    async with asyncio.TaskGroup() as group:
        group.create_task(in_a_task(server, listener))


@pytest.mark.parametrize("run", [in_a_task, in_a_coroutine_of_its_own, in_a_task_group])
async def test_an_open_stream_ends_with_the_server_that_an_application_runs_itself(run):
    """Nobody presses Ctrl-C: the application sets ``should_exit``, and the stream is completed."""
    async with fail_after(30):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/events"
            page = pool_page(FakeManager(), interval=0.01)
            server = uvicorn.Server(uvicorn.Config(page, log_level="error"))
            serving = asyncio.create_task(run(server, listener))
            async with httpx.AsyncClient() as client, client.stream("GET", url) as stream:
                lines = stream.aiter_lines()
                assert await anext(lines) == "event: state"
                assert running_servers() == [server]
                assert not are_ending([server])
                server.should_exit = True
                assert are_ending([server])
                async for _ in lines:
                    pass  # until the stream ends, which is what is tested
            await serving
            assert running_servers() == []
            assert page.num_streams == 0
