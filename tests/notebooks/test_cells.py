"""Real notebooks: cells run by a real kernel, and what they show."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("nbclient", reason="the tests' group installs it")
pytest.importorskip("nbformat", reason="the tests' group installs it")
pytest.importorskip("ipykernel", reason="the tests' group installs it")
pytest.importorskip("cloudpickle", reason="needs the extra 'notebook'")

WORKER = """
import torch
from keisei import ParallelManager, Worker

class Cell(Worker):
    value = VALUE
    def collect(self):
        return {"x": torch.full((2,), float(self.value))}
"""


RUN = """
import json, sys, nbclient, nbformat
cells = [nbformat.v4.new_code_cell(one) for one in json.load(sys.stdin)]
book = nbformat.v4.new_notebook(cells=cells)
book.metadata.kernelspec = {"name": "python3", "display_name": "x", "language": "python"}
nbclient.NotebookClient(book, timeout=100, resources={"metadata": {"path": "."}}).execute()
json.dump([cell.outputs for cell in book.cells], sys.stdout)
"""


def executed(tmp_path, *cells):
    """Run cells in a kernel of their own, by a client of its own; an error of a cell is raised."""
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps([textwrap.dedent(cell).strip() for cell in cells]),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def printed(outputs):
    return "".join(one["text"] for one in outputs if one["output_type"] == "stream")


def html_of(outputs):
    return "".join(one["data"].get("text/html", "") for one in outputs if "data" in one)


def test_a_worker_of_a_cell_and_what_is_shown_of_it(tmp_path):
    """A class of a cell works; edited and run again it is the new code; the pool of before ends."""
    cell = """
        manager = ParallelManager(Cell, config={"num_workers": 1})
        kept.append(manager)
        await manager.start()
        print((await manager.collect())[0].data["x"].tolist())
    """
    outputs = executed(
        tmp_path,
        WORKER.replace("VALUE", "1") + "\nkept = []",
        cell,
        WORKER.replace("VALUE", "2"),
        cell,
        "print([one.state for one in kept])",
        "manager",
        "manager.stats()",
        "await manager.stop()\nprint(manager.state)",
        """
        from keisei.observers.progress import RichProgress
        from keisei.events import PoolStarted, PoolStopped, WorkerReady
        shown = RichProgress(total_steps=10)
        for event in (WorkerReady(0, 0, 1), PoolStarted(1), PoolStopped(0)):
            shown.on_event(event)
        """,
    )
    assert printed(outputs[1]) == "[1.0, 1.0]\n"
    assert printed(outputs[3]) == "[2.0, 2.0]\n"
    assert printed(outputs[4]) == "['stopped', 'running']\n"
    assert "<b>ParallelManager</b>: running · 1 of 1 workers" in html_of(outputs[5])
    assert "<td>num_ready</td><td>1</td>" in html_of(outputs[6])
    assert printed(outputs[7]) == "stopped\n"
    assert html_of(outputs[8]).count("<pre") == 1
    assert "workers 1/1  0 ready" in html_of(outputs[8])
