"""Starts the applications of ``page_app.py`` as processes, and asks them for things."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from page_app import Wanted

TESTS = Path(__file__).parent
LIMIT = 60.0


@dataclass
class Application:
    """A process that serves a page.

    Attributes:
        process: The process.
        url: Of the page, with a slash at its end.
        origin: What a browser says where it is.
        output: What it has written, complete when it has ended.
        ending_took: Seconds from the request to end until it was gone.
    """

    process: subprocess.Popen[str]
    url: str
    origin: str
    output: str = ""
    ending_took: float = field(default=-1.0)

    def get(self, path: str = "", **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=LIMIT, **more)

    def act(self, action: str, **fields: Any) -> httpx.Response:
        """Send a POST as the page's script does."""
        headers = {"origin": self.origin, "accept": "application/json"}
        return httpx.post(
            f"{self.url}actions/{action}", data=fields, headers=headers, timeout=LIMIT
        )

    def command(self, what: str = "look", **more: Any) -> dict[str, Any]:
        """Have the application do something to its pool, and return what it tells of that."""
        answer = httpx.get(
            f"{self.origin}/command/", params={"what": what, **more}, timeout=LIMIT
        ).raise_for_status()
        told: dict[str, Any] = answer.json()
        return told

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.get("state.json").json()
        return state

    def wait_for(self, is_reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Follow the stream of states until one is as wanted."""
        for state in self.states():
            if is_reached(state):
                return state
        raise AssertionError("unreachable: states go on for ever")

    def states(self) -> Iterator[dict[str, Any]]:
        """Yield each state of the stream, opened again when it ends."""
        ends = time.monotonic() + LIMIT
        while True:
            with httpx.stream("GET", self.url + "events", timeout=LIMIT) as response:
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        yield json.loads(line.removeprefix("data: "))
                    assert time.monotonic() < ends, "the state that is waited for did not come"

    def wait_running(self) -> dict[str, Any]:
        return self.wait_for(lambda state: state["state"] == "running")

    def end(self, number: signal.Signals = signal.SIGINT) -> None:
        """Ask it to end, and wait until it has."""
        begun = time.monotonic()
        self.process.send_signal(number)
        self.output += self.process.communicate(timeout=LIMIT)[0]
        self.ending_took = time.monotonic() - begun


@contextlib.contextmanager
def serving(wanted: Wanted) -> Iterator[Application]:
    """Run an application; it is asked to end after the body, and killed if that takes too long."""
    paths = [str(TESTS), *sys.path]
    process = subprocess.Popen(
        [sys.executable, str(TESTS / "page_app.py"), wanted.to_json()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    try:
        port = json.loads(_first_line(process))["port"]
        origin = f"http://127.0.0.1:{port}"
        mount = "" if wanted.framework == "alone" else wanted.mount
        application = Application(process, f"{origin}{mount}/", origin)
        yield application
        if process.poll() is None:
            application.end()
        # Uvicorn ends by the signal that ended it.
        ends = {0, -signal.SIGINT, -signal.SIGTERM}
        assert process.returncode in ends, application.output
    finally:
        if process.poll() is None:
            process.kill()
        rest, _ = process.communicate(timeout=LIMIT)
        if rest:
            print(rest)  # noqa: T201 - shown where a test fails


def _first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        assert selector.select(LIMIT), "the application did not say where it serves"
    line = process.stdout.readline()
    assert line.startswith("{"), line + process.stdout.read()
    return line
