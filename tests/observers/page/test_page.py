"""The page as HTML: whole without JavaScript, safe whatever a worker writes, right at any path."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib import resources

import httpx
import pytest

from keisei.events import ExitCause, Incident
from keisei.observers.page import ACTIONS, pool_page
from page_fakes import Client, FakeManager, worker

HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></details><img src=x onerror=alert(1)>",
    "\"' onmouseover='alert(1)' x=\"",
    "<!-- --><style>body{display:none}</style>",
    "javascript:alert(1)",
    "&lt;script&gt;",
    "]]></script><svg onload=alert(1)>",
    "\ud800 a lone surrogate",
    "\u202eright to left",
    "</title><base href=//evil.test>",
    "data: x\n\nevent: state\ndata: {}\n\n",
]


class Parsed(HTMLParser):
    """The elements of a page, with their attributes and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def tags(self):
        return [tag for tag, _ in self.elements]


def client(manager, base="http://pool.test", **arguments):
    page = pool_page(manager, **arguments)
    return httpx.AsyncClient(transport=httpx.ASGITransport(page), base_url=base)


def manager_with(text):
    """Return a manager all of whose texts are this one."""
    incident = Incident(
        1, 0, ExitCause.USER_ERROR, detail=text, phase=text, traceback=text, stderr=text
    )
    info = worker(0, state=text, phase=text, device=text)
    return FakeManager(incidents=(incident,), workers=(info,))


@pytest.mark.parametrize("text", HOSTILE)
async def test_no_text_becomes_html(text):
    """The elements are those of a harmless page, and the text is there to be read."""

    async def parsed(text):
        arguments = {"title": text, "authorize": lambda scope, action: True}
        async with client(manager_with(text), **arguments) as browser:
            return Parsed((await browser.get("/")).text)

    found, harmless = await parsed(text), await parsed("harmless")
    assert found.tags() == harmless.tags()
    names = [sorted(attributes) for _, attributes in found.elements]
    assert names == [sorted(attributes) for _, attributes in harmless.elements]
    shown = text.encode(errors="replace").decode()
    assert "".join(found.texts).count(shown) >= 6


@pytest.mark.parametrize("text", HOSTILE)
async def test_no_text_ends_a_message_of_the_stream(text):
    """Each state is one line of JSON, whatever is in it."""
    page = pool_page(manager_with(text), interval=0.01)
    stream = Client(page)
    states = await stream.frames(3)
    assert [state["workers"][0][1] for state in states[:3]] == [text] * 3
    stream.leave()
    await stream.task


async def test_everything_comes_from_the_page_itself():
    """No script or style is inline, nothing has another host, and the policy forbids both."""
    async with client(FakeManager(), authorize=lambda scope, action: True) as browser:
        answer = await browser.get("/")
        found = Parsed(answer.text)
        for tag, attributes in found.elements:
            assert not {name for name in attributes if name.startswith("on") or name == "style"}
            assert tag not in {"style", "base", "iframe", "object"}
            for name in {"src", "href", "action"} & attributes.keys():
                assert re.fullmatch(r"#?[a-z][\w./?]*", attributes[name] or "")
        (script,) = [attributes for tag, attributes in found.elements if tag == "script"]
        assert script["src"].startswith("page.js?")
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        for name in ("page.css", "page.js", "icon.svg"):
            text = (await browser.get(name)).text.replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?://|url\(|@import|innerHTML|eval\(", text), name


async def test_every_answer_has_the_policy():
    """Files, JSON, errors and redirections too."""
    paths = ["/", "/page.js", "/page.css", "/icon.svg", "/state.json", "/curves.json"]
    async with client(FakeManager()) as browser:
        for path in [*paths, "/incidents.json", "/nothing", "/actions/pause"]:
            answer = await browser.get(path)
            assert "default-src 'none'" in answer.headers["content-security-policy"], path
            assert answer.headers["x-content-type-options"] == "nosniff", path
            assert answer.headers["x-frame-options"] == "SAMEORIGIN", path


async def test_the_table_is_complete_without_javascript():
    """Numbers, every slot and the incidents with traceback and output are in the HTML."""
    incident = Incident(
        1,
        0,
        ExitCause.USER_ERROR,
        traceback="Traceback: here",
        stderr="last words",
        phase="collect",
    )
    workers = tuple(worker(number, weights_version=1) for number in range(250))
    async with client(FakeManager(workers=workers, incidents=(incident,))) as browser:
        text = (await browser.get("/")).text
    found = Parsed(text)
    assert found.tags().count("tr") == 1 + 250
    rows = re.findall(r'<tr data-state="running"><th scope="row">(\d+)</th>', text)
    assert rows == [str(number) for number in range(250)]
    assert '<td class="number">2</td>' in text
    shown = "".join(found.texts)
    for expected in (
        "2 of 2",
        "Traceback: here",
        "last words",
        "worker 1 (incarnation 0) ended by",
    ):
        assert expected in shown
    assert ("meta", {"http-equiv": "refresh", "content": "5"}) in found.elements


@pytest.mark.parametrize(
    ("state", "text"),
    [("not started", "The pool is not started yet."), ("stopped", "The pool has stopped.")],
)
async def test_a_pool_without_workers_is_told_as_what_it_is(state, text):
    """Before the start and after the end there is a sentence in the place of the rows."""
    manager = FakeManager(state=state, numbers=None, workers=())
    async with client(manager) as browser:
        answer = await browser.get("/")
        assert (answer.status_code, text in answer.text) == (200, True)
        assert (await browser.get("/state.json")).json()["state"] == state


@pytest.mark.parametrize(
    ("path", "root_path", "status", "location"),
    [
        ("/", "", 200, None),
        ("/pool/", "/pool", 200, None),
        ("/pool", "/pool", 303, "./pool/"),
        ("/", "/pool", 200, None),  # where a framework takes the mount out of the path
        ("", "/pool", 303, "./pool/"),
        ("/a/pool", "/a/pool", 303, "./pool/"),
        ("/a/pool/", "/a/pool", 200, None),
        ("/poolside/", "/pool", 404, None),
        ("/pool/x", "/pool", 404, None),
    ],
)
async def test_it_finds_itself_under_any_root_path(path, root_path, status, location):
    """With and without the mount in the path; its redirection is relative and right at each."""
    answer = Client(pool_page(FakeManager()), path, root_path=root_path)
    await answer.task
    headers = dict(answer.sent[0]["headers"])
    assert answer.sent[0]["status"] == status
    assert headers.get(b"location", b"").decode() == (location or "")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
async def test_reading_is_by_get_or_head(method):
    """Any other method is refused with those that there are."""
    async with client(FakeManager()) as browser:
        answer = await browser.request(method, "/")
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


async def test_head_has_the_headers_alone():
    """As for GET, without a body."""
    page = pool_page(FakeManager())
    answer = Client(page, "/", method="HEAD")
    await answer.task
    assert answer.sent[0]["status"] == 200
    assert b"".join(message["body"] for message in answer.sent[1:]) == b""


async def test_files_are_kept_by_browsers_and_the_page_is_not():
    """A new version of a file has a new address; what is live is never stored."""
    async with client(FakeManager()) as browser:
        assert "immutable" in (await browser.get("page.js")).headers["cache-control"]
        for path in ("/", "/state.json", "/curves.json", "/incidents.json"):
            assert (await browser.get(path)).headers["cache-control"] == "no-store"


async def test_many_readers_cost_one_look_per_interval():
    """Pages that are loaded again and again, as without JavaScript, share the state."""
    manager = FakeManager()
    async with client(manager, interval=60.0) as browser:
        for _ in range(20):
            assert (await browser.get("/")).status_code == 200
            assert (await browser.get("/state.json")).status_code == 200
    assert manager.looks == 1


async def test_other_kinds_of_connections_are_answered_as_asgi_says():
    """The lifespan of a page that is served alone, and a websocket, which it refuses."""
    page = pool_page(FakeManager())
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message["type"])

    await page({"type": "lifespan"}, receive, send)
    await page({"type": "websocket"}, receive, send)
    expected = ["lifespan.startup.complete", "lifespan.shutdown.complete", "websocket.close"]
    assert sent == expected


@pytest.mark.parametrize("interval", [0, -1.0])
def test_an_interval_that_is_no_time_is_refused(interval):
    """The error says what it must be."""
    with pytest.raises(ValueError, match=f"^interval is {interval}; it must be a positive number"):
        pool_page(FakeManager(), interval=interval)


def test_the_actions_that_a_hook_is_asked_about_are_these():
    """They are public: applications name them."""
    assert ACTIONS == ("pause", "resume", "scale", "restart")


def test_its_files_are_in_the_package():
    """They are found where the package is installed."""
    folder = resources.files("keisei.observers.page") / "static"
    names = sorted(one.name for one in folder.iterdir())
    assert names == ["icon.svg", "page.css", "page.js"]
