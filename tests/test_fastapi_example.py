"""The example of a service: trains, shows, saves, answers, and ends by Ctrl-C with pages open."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from page_helpers import Application

pytest.importorskip("gymnasium", reason="needs the extra 'gymnasium'")

EXAMPLES = Path(__file__).parent.parent / "examples"
LIMIT = 60.0


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    """Start the example on a free port; yield its process, its address and where it saves."""
    path = tmp_path / "weights.pt"
    process = subprocess.Popen(
        [sys.executable, "fastapi_app.py", "--port", "0", "--path", str(path)],
        cwd=EXAMPLES,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        seen = []
        for line in process.stdout:
            seen.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                yield process, found[1], path
                break
        else:
            pytest.fail("".join(seen))
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=LIMIT)


def test_the_service_answers_with_newer_and_newer_weights_and_ends_by_ctrl_c(service):
    """A page is open when Ctrl-C comes; the pool is ended, the weights are saved and usable."""
    process, url, path = service
    page = Application(process, f"{url}/pool/", url)
    with httpx.Client(base_url=url, timeout=LIMIT) as client:
        versions = set()
        for _ in page.states():
            answer = client.post("/predict", json={"observation": [0, 0, 0.1, 0]}).json()
            assert answer["action"] in (0, 1)
            versions.add(answer["weights_version"])
            if len(versions) == 3:
                break
        assert client.get("/pool/").status_code == 200
        request = client.build_request("GET", "/pool/events")
        stream = client.send(request, stream=True)
        states = stream.iter_lines()
        assert next(states) == "event: state"
        assert client.get("/health").json() == {"healthy": True}
        assert client.post("/predict", json={"observation": [0]}).status_code == 422
        process.send_signal(signal.SIGINT)
        for _ in states:
            pass  # the stream ends, which is what is tested
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode in (0, -signal.SIGINT), output
    assert "saved" in output
    assert "Traceback" not in output
    assert path.stat().st_size > 1000


def test_a_port_in_use_is_told_and_the_pool_ends(tmp_path):
    """The service gives up with the reason, and no worker is left."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "fastapi_app.py", "--port", str(port), "--path", tmp_path / "w.pt"],
            cwd=EXAMPLES,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    assert done.returncode == 3  # uvicorn's for a start that failed
    assert "address already in use" in done.stderr
