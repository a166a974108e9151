"""Workers for the tests of the pool; child processes import this module."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from keisei.testing.failpoints import Gate, close_queues, failpoint
from keisei.worker import Experience, Worker, WorkerContext


class Counting(Worker):
    """Numbers its experiences 1, 2, 3 … and obeys the commands of the tests.

    Args:
        steps: Rows of each experience.
        gate: Each ``collect`` stands there first, as "worker.incarnation.number".
    """

    context: WorkerContext
    number = 0
    version = 0
    resets = 0

    def __init__(self, steps: int = 1, gate: Gate | None = None) -> None:
        self.steps = steps
        self.gate = gate

    def setup(self, context: WorkerContext) -> None:
        self.context = context

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        self.version = version

    def label(self) -> str:
        return f"{self.context.worker_id}.{self.context.incarnation}.{self.number + 1}"

    def collect(self) -> Experience:
        if self.gate is not None:
            self.gate.hold(self.label())
        return self.experience()

    def experience(self) -> Experience:
        self.number += 1
        number = torch.full((self.steps,), self.number)
        return Experience(
            {"number": number, "worker": torch.full_like(number, self.context.worker_id)},
            {"pid": os.getpid(), "version": self.version},
        )

    def reset(self) -> None:
        self.resets += 1
        self.number = 0

    def on_command(self, command: str, data: Any) -> Any:
        match command:
            case "echo":
                return data
            case "worker_id":
                return self.context.worker_id
            case "number":
                return self.number
            case "resets":
                return self.resets
            case "version":
                return self.version
            case "raise":
                raise data
            case "reach":
                return failpoint(data)
            case "raise unusual":
                raise Unusual("a", second="b")
            case "unpicklable reply":
                return lambda: None
            case _:
                return super().on_command(command, data)


class Unusual(Exception):
    """Cannot be rebuilt from its arguments."""

    def __init__(self, first: str, *, second: str) -> None:
        super().__init__(f"{first} and {second}")


class ExitsOnPickling:
    """Ends the process that pickles it, if nobody is careful."""

    def __reduce__(self) -> Any:
        raise SystemExit(3)


class WhereUnpickled:
    """Becomes the identifier of the thread that unpickles it."""

    def __reduce__(self) -> Any:
        return threading.get_ident, ()


class Verbose(Counting):
    """Answers with so many bytes, or so many values, and where they were unpickled."""

    def on_command(self, command: str, data: Any) -> Any:
        match command:
            case "large":
                return bytes(data), WhereUnpickled()
            case "many":
                return [(number, str(number)) for number in range(data)], WhereUnpickled()
            case _:
                return super().on_command(command, data)


class Laden(Counting):
    """Sends so many bytes of ``info`` with each experience, or of tensors in it."""

    def __init__(self, *, info: int = 0, data: int = 0) -> None:
        super().__init__()
        self.info, self.data = info, data

    def experience(self) -> Experience:
        made = super().experience()
        info = {"large": bytes(self.info), "where": WhereUnpickled()}
        large = torch.zeros(self.data, dtype=torch.uint8)
        return Experience({**made.data, "large": large}, info, num_steps=1)


class Coroutine(Counting):
    """The same, as a coroutine that suspends itself in every ``collect``."""

    async def collect(self) -> Experience:  # type: ignore[override]
        if self.gate is not None:
            await self.gate.wait(self.label())
        await asyncio.to_thread(failpoint, "in a thread")
        return self.experience()


class AsyncHooks(Counting):
    """Every hook is a coroutine and suspends itself."""

    async def setup(self, context: WorkerContext) -> None:  # type: ignore[override]
        await turn()
        super().setup(context)

    async def load_weights(  # type: ignore[override]
        self, weights: Mapping[str, torch.Tensor], version: int
    ) -> None:
        await turn()
        super().load_weights(weights, version)

    async def collect(self) -> Experience:  # type: ignore[override]
        await turn()
        return super().collect()

    async def reset(self) -> None:  # type: ignore[override]
        await turn()
        super().reset()

    async def on_command(self, command: str, data: Any) -> Any:
        await turn()
        return super().on_command(command, data)


def process_state(pid: int) -> str:
    """Return the kernel's letter for the state of a process."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]


def descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def mapped_segments() -> set[str]:
    """Return the shared memory of experiences that this process has mapped."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return {line.split()[4] for line in maps if "keisei-experience" in line}


async def turn() -> None:
    """Let the loop turn twice."""
    turned = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.call_soon(loop.call_soon, turned.set)
    await turned.wait()


async def workers_heard(manager: Any, number: int) -> set[int]:
    """Collect until so many workers have delivered, and return their ids."""
    heard: set[int] = set()
    while len(heard) < number:
        heard |= {batch.worker_id for batch in await manager.collect()}
    return heard


class Modelled(Worker):
    """Delivers the weights that its model has, as the default ``load_weights`` filled it.

    Args:
        make_model: Returns the model.
    """

    def __init__(self, make_model: Callable[[], torch.nn.Module]) -> None:
        self.make_model = make_model

    def setup(self, context: WorkerContext) -> None:
        self.model = self.make_model()

    def collect(self) -> dict[str, torch.Tensor]:
        assert self.model is not None
        return dict(self.model.state_dict())


class Recording(Worker):
    """Delivers samples of the weights that load_weights got; lists the versions it got."""

    def setup(self, context: WorkerContext) -> None:
        self.versions: list[int] = []
        self.weights: dict[str, torch.Tensor] = {"w": torch.zeros(1), "v": torch.zeros(1)}

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        self.versions.append(version)
        self.weights = dict(weights)

    def collect(self) -> Experience:
        samples = {name: w[:: 1 + w.numel() // 1000] for name, w in self.weights.items()}
        return Experience(samples, num_steps=1)

    def on_command(self, command: str, data: Any) -> Any:
        return self.versions


class Growing(Worker):
    """Delivers its sequence number, as often as a list of sizes says."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.number = -1

    def collect(self) -> Experience:
        self.number += 1
        size = self.sizes[self.number % len(self.sizes)]
        return Experience({"x": torch.full((size,), self.number)}, num_steps=1)


class Knowing(Counting):
    """Tells what its context says, and how many threads torch has."""

    def on_command(self, command: str, data: Any) -> Any:
        return torch.get_num_threads() if command == "threads" else getattr(self.context, command)


class Allergic(Counting):
    """Cannot stand weights that are not finite."""

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        if not torch.isfinite(weights["w"]).all():
            raise ArithmeticError(f"version {version} is not finite")
        super().load_weights(weights, version)


class Stubborn(Counting):
    """Does not listen to SIGTERM."""

    def setup(self, context: WorkerContext) -> None:
        super().setup(context)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Lingering(Counting):
    """Leaves a thread behind that keeps its process from ending."""

    def teardown(self) -> None:
        threading.Thread(target=threading.Event().wait).start()


class Reporting(Counting):
    """Says at a gate, in its teardown, how many experiences it has delivered."""

    def __init__(self, report: Gate, large: bool = False) -> None:
        super().__init__()
        self.report = report
        self.large = large

    def experience(self) -> Experience:
        made = super().experience()
        return Experience(made.data, {"text": bytes(2_000_000)}) if self.large else made

    def teardown(self) -> None:
        self.report.hold(f"{self.context.worker_id} {self.number}")


class Hoarding(Worker):
    """Keeps 100 MB more with every experience."""

    def setup(self, context: WorkerContext) -> None:
        self.hoard: list[bytearray] = []

    def collect(self) -> Experience:
        self.hoard.append(bytearray(os.urandom(4096)) * 25_000)
        hoarded = sum(map(len, self.hoard))
        return Experience({"x": torch.zeros(1)}, {"hoarded": hoarded})


class Drawing(Worker):
    """Delivers draws of every global generator, and of one that its seed made."""

    def setup(self, context: WorkerContext) -> None:
        self.own = torch.Generator().manual_seed(context.seed + 1)
        self.first = random.random()

    def collect(self) -> dict[str, torch.Tensor]:
        import numpy as np

        return {
            "first": torch.tensor([self.first], dtype=torch.float64),
            "random": torch.tensor([random.random() for _ in range(3)], dtype=torch.float64),
            "numpy": torch.from_numpy(np.random.rand(3)),  # noqa: NPY002 - the global one is meant
            "torch": torch.randn(3),
            "own": torch.randn(3, generator=self.own),
        }


class DrawingCoroutine(Drawing):
    """The same, with suspensions between the draws."""

    async def collect(self) -> dict[str, torch.Tensor]:  # type: ignore[override]
        await turn()
        head = random.random()
        await turn()
        drawn = super().collect()
        await turn()
        return drawn | {"head": torch.tensor([head], dtype=torch.float64)}


class Returning(Worker):
    """Returns from ``collect`` what it was made with."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def collect(self) -> Any:
        return self.value() if callable(self.value) else self.value


class Taking(Returning):
    """Takes weights and does nothing with them."""

    def load_weights(self, weights: Any, version: int) -> None:
        self.version = version


class FailsOnPickling:
    """Reaches a failpoint when it is pickled: between the memory of an experience and its frame."""

    def __reduce__(self) -> tuple[Any, ...]:
        failpoint("commit")
        return FailsOnPickling, ()


class Committing(Counting):
    """Reaches "commit" when its data is in shared memory and its frame is not sent yet."""

    def experience(self) -> Experience:
        made = super().experience()
        return Experience(made.data, {**(made.info or {}), "commit": FailsOnPickling()})


def assorted(sequence: int) -> dict[str, Any]:
    """Return tensors and arrays whose shapes change with ``sequence``."""
    import numpy as np

    rows = sequence + 1
    return {
        "float": torch.arange(rows * 6, dtype=torch.float32).reshape(rows, 2, 3),
        "bfloat16": torch.full((rows, 2), 1.5, dtype=torch.bfloat16),
        "bool": torch.tensor([sequence % 2 == 0] * rows),
        "strided": torch.arange(rows * 4).reshape(4, rows).t(),
        "expanded": torch.tensor([7]).expand(rows, 3),
        "with grad": torch.ones(rows, requires_grad=True).detach(),
        "scalar": torch.tensor(sequence),
        "empty": torch.empty(0, 3),
        "complex": torch.full((2,), 1 + 2j),
        "numpy": np.arange(rows * 2, dtype=np.uint8).reshape(rows, 2),
        "numpy, not contiguous": np.arange(rows * 4, dtype=np.float64)[::2],
        "numpy scalar": np.array(3, dtype=np.int16),
    }


class Assorted(Worker):
    """Delivers a bit of everything, a row more each time; weights are nothing to it."""

    sequence = -1

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        pass

    def collect(self) -> Experience:
        self.sequence += 1
        info = {"text": "ü", "nested": {"list": [1, 2.5, None]}}
        return Experience(assorted(self.sequence), info, self.sequence + 1)


def close_and_stay() -> None:
    """Close every queue, and live on without noticing."""
    close_queues()
    threading.Event().wait()


def a_model(seed: int = 0) -> torch.nn.Module:
    """Return a model with parameters of two shapes and a buffer."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4),
        torch.nn.BatchNorm1d(4),
        torch.nn.Linear(4, 2, dtype=torch.float64),
    )


def no() -> None:
    """Raise the error of the tests."""
    raise ValueError("no, because of the test")


class Raising(Counting):
    """Raises in one hook."""

    def __init__(self, hook: str, error: type[BaseException]) -> None:
        super().__init__()
        original = getattr(self, hook)

        def fail(*args: Any) -> Any:
            raise error("no")

        setattr(self, hook, fail if callable(original) else original)

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        super().load_weights(weights, version)


def sparse() -> dict[str, torch.Tensor]:
    return {"x": torch.zeros(3).to_sparse()}


def on_meta() -> dict[str, torch.Tensor]:
    return {"x": torch.zeros(3, device="meta")}


def negative_steps() -> Experience:
    return Experience({"x": torch.zeros(1)}, num_steps=-1)


def steps_of_text() -> Experience:
    return Experience({"x": torch.zeros(1)}, num_steps="two")  # type: ignore[arg-type]


def unpicklable_info() -> Experience:
    return Experience({"x": torch.zeros(1)}, {"function": lambda: None})


def info_of_text() -> Experience:
    return Experience({"x": torch.zeros(1)}, "text")  # type: ignore[arg-type]


class Sampling(Worker):
    """Delivers random x and what its model makes of them."""

    def __init__(self, make_model: Callable[[], torch.nn.Module]) -> None:
        self.make_model = make_model

    def setup(self, context: WorkerContext) -> None:
        self.model = self.make_model()

    def collect(self) -> dict[str, torch.Tensor]:
        assert self.model is not None
        x = torch.randn(32, 1)
        with torch.inference_mode():
            return {"x": x, "prediction": self.model(x)}


class Episodic(Worker):
    """Reports the same two episodes with each experience."""

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None: ...

    def collect(self) -> Experience:
        info = {"episode_returns": [1.0, 3.0], "episode_lengths": [2, 4]}
        return Experience({"x": torch.zeros(6)}, info)
