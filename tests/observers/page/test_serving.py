"""The page behind a real web server with a real pool: mounts, prefixes, kills and the end."""

from __future__ import annotations

import json
import os
import signal
import socket
import time

import httpx
import pytest

from page_app import Wanted
from page_helpers import LIMIT, serving

FRAMEWORKS = pytest.mark.parametrize("framework", ["plain", "starlette", "fastapi"])
AT_ONCE = 1.0
"""Seconds in which streams end: uvicorn looks ten times a second, and so does the page."""


@FRAMEWORKS
def test_it_shows_the_pool_of_an_application(framework):
    """Mounted with one line, it shows what the pool does, a kill included, and ends with it."""
    with serving(Wanted(framework, authorized=("scale", "restart"))) as application:
        state = application.wait_running()
        assert state["numbers"]["ready"] == 2
        moving = application.wait_for(lambda state: (state["rates"]["steps/s"] or 0) > 0)
        assert moving["numbers"]["steps"] > 0
        os.kill(moving["workers"][1][9], signal.SIGKILL)
        killed = application.wait_for(
            lambda state: state["numbers"]["ready"] == 2 and state["workers"][1][6] == 1
        )
        assert killed["numbers"]["incidents"] == 1
        (incident,) = application.get("incidents.json").json()
        assert (incident["worker"], incident["cause"]) == (1, "signal")
        assert application.act("scale", num_workers=3).status_code == 200
        assert len(application.state()["workers"]) == 3
        assert application.act("restart", worker_id=0).status_code == 200
        assert application.act("pause").status_code == 403
        assert application.state()["workers"][0][6] == 1
        application.get("").raise_for_status()
        names = application.get("curves.json").json()["names"]
        assert {"steps/s", "queued", "return", "learner: loss"} <= set(names)
        application.end()
        assert "ended by request_stop" in application.output


@FRAMEWORKS
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_open_streams_end_at_once_with_the_server(framework, number):
    """Ctrl-C is not held up by pages that are open, and each has its stream completed."""
    with serving(Wanted(framework, fake=True)) as application:
        streams = []
        with httpx.Client(timeout=LIMIT) as client:
            for _ in range(3):
                request = client.build_request("GET", application.url + "events")
                streams.append(client.send(request, stream=True))
            lines = [stream.iter_lines() for stream in streams]
            for line in lines:
                assert next(line) == "event: state"
            application.process.send_signal(number)
            begun = time.monotonic()
            for line in lines:
                assert all(text.partition(":")[0] in {"event", "data", ""} for text in line)
            assert time.monotonic() - begun < AT_ONCE
        application.output += application.process.communicate(timeout=LIMIT)[0]
        assert "rror" not in application.output


def test_a_browser_that_reads_nothing_does_not_hold_the_server_up():
    """Its connection is cut when the server ends, however much waits to be sent to it."""
    with serving(Wanted(num_workers=100_000, fake=True)) as application:
        port = int(application.origin.rpartition(":")[2])
        with socket.socket() as stalled:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            stalled.connect(("127.0.0.1", port))
            stalled.sendall(b"GET /pool/events HTTP/1.1\r\nHost: x\r\n\r\n")
            while application.command()["streams"] == 0:
                pass  # each look is an answer of the server
            application.end()
            assert application.ending_took < 10.0
            assert "rror" not in application.output


def test_a_page_of_a_pool_that_is_not_started_says_so():
    """It is no error, and a stop from elsewhere is shown too."""
    with serving(Wanted(runs=False)) as application:
        assert application.state()["state"] == "not started"
        assert "The pool is not started yet." in application.get().text
        application.command("stop")
        assert application.wait_for(lambda state: state["state"] == "stopped")["numbers"] is None
        assert application.get().status_code == 200


def test_a_page_of_a_pool_that_was_stopped_keeps_its_numbers():
    """Its curves and counts stay to be read."""
    with serving(Wanted()) as application:
        application.wait_for(lambda state: (state["numbers"] or {}).get("steps", 0) > 0)
        application.command("stop")
        state = application.wait_for(lambda state: state["state"] == "stopped")
        assert state["numbers"]["steps"] > 0
        assert application.get("curves.json").json()["names"]


@FRAMEWORKS
@pytest.mark.parametrize("mount", ["/a/b"])
def test_it_is_right_behind_a_proxy_that_takes_a_prefix_away(framework, mount):
    """Requests come with or without the prefix; every address in the page is relative."""
    wanted = Wanted(framework, mount, root_path="/team", fake=True)
    with serving(wanted) as application:
        paths = [f"{mount}/", f"{mount}/page.js", f"{mount}/state.json"]
        for path in paths:
            assert httpx.get(application.origin + path, timeout=LIMIT).status_code == 200, path
        assert "/team" not in httpx.get(f"{application.origin}{mount}/", timeout=LIMIT).text


def test_it_may_be_all_that_a_server_serves():
    """The page is an application of its own, at the root."""
    with serving(Wanted("alone", fake=True)) as application:
        assert application.get().status_code == 200
        first = next(application.states())
        assert first["state"] == "running"


def test_text_of_a_worker_is_text_on_the_page():
    """An exception and its output arrive escaped, from a real process."""
    text = "<img src=x onerror=alert(1)>"
    with serving(Wanted()) as application:
        application.wait_running()
        application.command("fail", text=text, worker=0)
        application.wait_for(lambda state: state["numbers"]["incidents"] >= 1)
        (incident, *_) = application.get("incidents.json").json()
        assert text in incident["summary"]
        assert f"{text} on standard error" in incident["stderr"]
        page = application.get().text
        assert text not in page
        assert "&lt;img src=x onerror=alert(1)&gt; on standard error" in page
        assert json.dumps(text)[1:-1] in incident["traceback"]
