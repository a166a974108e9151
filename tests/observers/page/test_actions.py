"""What visitors of the page may do: nothing by default, and nothing for another site."""

from __future__ import annotations

import asyncio
import logging

import httpx
import pytest

from keisei.observers.page import ACTIONS, pool_page
from keisei.testing.scenarios import fail_after
from page_fakes import FakeManager

HOST = "http://pool.test"
OWN = {"origin": HOST}


def client(manager, **arguments):
    page = pool_page(manager, **arguments)
    return httpx.AsyncClient(transport=httpx.ASGITransport(page), base_url=HOST)


def everybody(scope, action):
    return True


@pytest.mark.parametrize("action", ACTIONS)
async def test_nobody_may_do_anything_by_default(action):
    """Without an authorize hook every action is refused, and the page has no button."""
    manager = FakeManager()
    async with client(manager) as browser:
        answer = await browser.post(f"/actions/{action}", headers=OWN)
        page = await browser.get("/")
    assert (answer.status_code, manager.calls) == (403, [])
    assert "<form" not in page.text
    assert "<button" not in page.text


@pytest.mark.parametrize(
    ("action", "fields", "call"),
    [
        ("pause", {}, ("pause",)),
        ("resume", {}, ("resume",)),
        ("scale", {"num_workers": "4"}, ("scale", 4)),
        ("restart", {"worker_id": "1"}, ("restart", 1)),
    ],
)
async def test_what_is_allowed_is_done_once(action, fields, call):
    """The script of the page gets JSON, a plain form goes back to the page."""
    manager = FakeManager()
    async with client(manager, authorize=everybody) as browser:
        asked = {"data": fields, "headers": {**OWN, "accept": "application/json"}}
        answer = await browser.post(f"/actions/{action}", **asked)
        assert (answer.status_code, answer.json()) == (200, {"text": f"{action}: done"})
        assert manager.calls == [call]
        form = await browser.post(f"/actions/{action}", data=fields, headers=OWN)
        assert (form.status_code, form.headers["location"]) == (303, "../")
        assert manager.calls == [call, call]


@pytest.mark.parametrize(
    ("headers", "is_own"),
    [
        ({}, False),
        ({"origin": "http://evil.test"}, False),
        ({"origin": "null"}, False),
        ({"origin": "http://pool.test.evil.test"}, False),
        ({"origin": "http://evil.test/pool.test"}, False),
        ({"origin": "http://pool.test:8000"}, False),
        ({"origin": HOST}, True),
        ({"origin": "https://pool.test"}, True),  # a proxy may take the encryption away
        ({"sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "same-origin", "origin": "https://outside.test"}, True),
        ({"sec-fetch-site": "same-site", "origin": HOST}, False),
        ({"sec-fetch-site": "cross-site", "origin": HOST}, False),
        ({"sec-fetch-site": "none"}, False),
        ({"referer": f"{HOST}/"}, False),
    ],
)
async def test_a_request_of_another_site_is_refused(headers, is_own):
    """Even where the visitor may do everything: the browser says whose request it is."""
    manager = FakeManager()
    async with client(manager, authorize=everybody) as browser:
        answer = await browser.post("/actions/pause", headers=headers)
    assert answer.status_code == (303 if is_own else 403)
    assert manager.calls == ([("pause",)] if is_own else [])


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"])
async def test_actions_are_posted(method):
    """A link, an image or a prefetch does nothing."""
    manager = FakeManager()
    async with client(manager, authorize=everybody) as browser:
        answer = await browser.request(method, "/actions/pause", headers=OWN)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert manager.calls == []


async def test_the_hook_decides_for_each_action_and_visitor():
    """It is given the request's scope, may be a coroutine, and decides what buttons there are."""

    async def authorize(scope, action):
        return dict(scope["headers"]).get(b"x-user") == b"ada" and action in ("pause", "restart")

    manager = FakeManager()
    async with client(manager, authorize=authorize) as browser:
        ada = {**OWN, "x-user": "ada"}
        assert (await browser.post("/actions/pause", headers=ada)).status_code == 303
        assert (await browser.post("/actions/pause", headers=OWN)).status_code == 403
        assert (await browser.post("/actions/resume", headers=ada)).status_code == 403
        assert 'data-actions="pause restart"' in (await browser.get("/", headers=ada)).text
        assert 'data-actions=""' in (await browser.get("/", headers=OWN)).text
    assert manager.calls == [("pause",)]


@pytest.mark.parametrize("answer", ["yes", 1, None, False])
async def test_only_true_is_a_yes(answer):
    """A hook that returns something else by mistake allows nothing."""
    manager = FakeManager()
    async with client(manager, authorize=lambda scope, action: answer) as browser:
        assert (await browser.post("/actions/pause", headers=OWN)).status_code == 403
    assert manager.calls == []


async def test_a_hook_that_raises_refuses_and_is_logged(caplog):
    """The page goes on without buttons."""

    def authorize(scope, action):
        raise KeyError("no session")

    manager = FakeManager()
    with caplog.at_level(logging.ERROR, "keisei.observers.page"):
        async with client(manager, authorize=authorize) as browser:
            assert (await browser.post("/actions/pause", headers=OWN)).status_code == 403
            assert (await browser.get("/")).status_code == 200
    assert manager.calls == []
    assert "authorize failed for 'pause'; it is refused" in caplog.text


@pytest.mark.parametrize(
    ("action", "fields", "status", "text"),
    [
        ("scale", {}, 400, "num_workers must be a number from 1 to 8"),
        ("scale", {"num_workers": "0"}, 400, "num_workers must be a number from 1 to 8"),
        ("scale", {"num_workers": "9"}, 400, "num_workers must be a number from 1 to 8"),
        ("scale", {"num_workers": "9" * 4000}, 400, "num_workers must be a number from 1 to 8"),
        ("scale", {"num_workers": "-1"}, 400, "num_workers must be a number from 1 to 8"),
        ("scale", {"num_workers": "٣"}, 400, "num_workers must be a number from 1 to 8"),
        ("restart", {"worker_id": "x"}, 400, "worker_id must be a number from 0 to 1000000000"),
        ("scale", {"num_workers": "9" * 5000}, 413, "the request is too long"),
        ("stop", {}, 400, "there is no action 'stop'"),
        ("../pause", {}, 404, "there is nothing here; the page is at its root"),
    ],
)
async def test_what_makes_no_sense_is_refused_with_the_reason(action, fields, status, text):
    """Nothing is done, and the visitor reads why."""
    manager = FakeManager()
    async with client(manager, authorize=everybody, max_workers=8) as browser:
        path = "/nowhere" if action.startswith("..") else f"/actions/{action}"
        method = "GET" if action.startswith("..") else "POST"
        answer = await browser.request(method, path, data=fields, headers=OWN)
    assert (answer.status_code, answer.text) == (status, f"{text}\n")
    assert manager.calls == []


async def test_too_many_fields_are_refused():
    """A body of a thousand fields is not taken apart."""
    async with client(FakeManager(), authorize=everybody) as browser:
        answer = await browser.post("/actions/scale", content="a=1&" * 900, headers=OWN)
    assert answer.status_code == 400


async def test_what_fails_is_told():
    """The error's text comes back, and is shown as text."""
    manager = FakeManager(error=ValueError("worker_id is 9; this pool has the workers 0 to 1"))
    async with client(manager, authorize=everybody) as browser:
        answer = await browser.post("/actions/restart", data={"worker_id": "9"}, headers=OWN)
    assert answer.status_code == 409
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    expected = "restart failed: worker_id is 9; this pool has the workers 0 to 1\n"
    assert answer.text == expected


async def test_what_takes_long_goes_on_and_its_failure_is_shown_on_the_page():
    """The request is answered after a second; the error comes with the next state."""
    async with fail_after(30):
        manager = FakeManager(held=asyncio.Event(), error=RuntimeError("no room"))
        async with client(manager, authorize=everybody, interval=1e-6) as browser:
            fields = {"num_workers": "3"}
            headers = {**OWN, "accept": "application/json"}
            answer = await browser.post("/actions/scale", data=fields, headers=headers)
            assert (answer.status_code, answer.json()) == (202, {"text": "scale goes on"})
            assert (await browser.get("/state.json")).json()["notice"] == [0, ""]
            manager.held.set()
            (task,) = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.wait([task])
            notice = (await browser.get("/state.json")).json()["notice"]
            assert notice == [1, "scale failed: no room"]
