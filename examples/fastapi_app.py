r"""A service that trains, shows, saves and answers: FastAPI, with a pool inside.

``python examples/fastapi_app.py`` serves on port 8000: ``/pool/`` shows the pool live, with buttons
for visitors on this machine; ``/predict`` answers with the newest weights; ``/health`` is for what
balances the load. The weights are saved every half minute and at the end, and loaded at the next
start. Ctrl-C ends it in an orderly way, whatever pages are open::

    curl -H 'content-type: application/json' -d '{"observation": [0, 0, 0.1, 0]}' \
        http://127.0.0.1:8000/predict
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import uvicorn
from cartpole_ppo import Hyperparameters, PPOLearner, make_policy, make_worker
from fastapi import FastAPI, Response
from pydantic import BaseModel, Field

from keisei import ParallelManager
from keisei.observers.page import pool_page


@dataclass(frozen=True)
class Settings:
    """What the service is told."""

    host: str = "127.0.0.1"
    port: int = 8000
    save_every: float = 30.0
    path: Path = Path(__file__).parent / "out" / "fastapi_app.pt"
    max_steps: int | None = None
    parameters: Hyperparameters = field(default_factory=Hyperparameters)


class Question(BaseModel):
    """The state of a cart pole: position, velocity, angle and angular velocity."""

    observation: Annotated[list[float], Field(min_length=4, max_length=4)]


class Answer(BaseModel):
    """What the policy does there: 0 pushes to the left, 1 to the right."""

    action: int
    weights_version: int


class Service:
    """The pool with its learner, and the copy of the policy that answers.

    Attributes:
        manager: Trains, in this event loop.
        policy: Has the weights of ``version``. The learner's own policy changes in a thread while
            it learns, so it is never asked.
        version: The weights version that ``policy`` has.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.learner = PPOLearner(make_policy(settings.parameters), settings.parameters)
        if settings.path.exists():
            self.learner.policy.load_state_dict(torch.load(settings.path, weights_only=True))
        self.policy = make_policy(settings.parameters)
        self.version = 0
        self.manager = ParallelManager(
            make_worker(settings.parameters),
            learner=self.learner,
            config={
                "num_workers": settings.parameters.num_workers,
                "mode": "sync",
                "sync_interval": 1,
                "seed": settings.parameters.seed,
            },
        )

    async def update(self) -> None:
        """Bring ``policy`` up to date, if there are newer weights."""
        newest = self.manager.weights_version
        if newest > self.version and self.manager.state == "running":
            snapshot = await self.manager.snapshot()
            self.manager.synchronizer.restore_model_from_sync(snapshot, self.policy)
            self.version = newest

    async def answer(self, question: Question) -> Answer:
        """Choose an action with the newest weights."""
        await self.update()
        with torch.no_grad():
            observations = torch.tensor([question.observation])
            actions, *_ = self.policy.act(observations, deterministic=True)
        return Answer(action=int(actions[0]), weights_version=self.version)

    def save(self, weights: dict[str, torch.Tensor]) -> None:
        """Write the weights; a reader finds the old file or the new one, whole."""
        self.settings.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.settings.path.with_suffix(".part")
        torch.save(weights, part)
        part.replace(self.settings.path)

    async def save_now_and_then(self) -> None:
        """Save for as long as the service lives."""
        while True:
            await asyncio.sleep(self.settings.save_every)
            await self.update()
            if self.version:
                weights = {name: one.clone() for name, one in self.policy.state_dict().items()}
                await asyncio.to_thread(self.save, weights)

    @contextlib.asynccontextmanager
    async def life(self, _: FastAPI) -> AsyncIterator[None]:
        """Train while the application serves; at its end, end the pool and save."""
        training = asyncio.create_task(self.manager.run(max_steps=self.settings.max_steps))
        saving = asyncio.create_task(self.save_now_and_then())
        try:
            yield
        finally:
            saving.cancel()
            self.manager.request_stop()
            report = await training
            self.save(self.learner.policy.state_dict())
            print(f"{report.num_updates} updates, {report.num_steps} steps; saved", flush=True)


def may_steer(scope: Any, action: str) -> bool:  # noqa: ARG001 - it may do all or nothing
    """Let visitors on this machine use the buttons; put your own log-in in this place."""
    client = scope.get("client")
    return client is not None and client[0] in {"127.0.0.1", "::1"}


def make_app(service: Service) -> FastAPI:
    """Put the routes together."""
    app = FastAPI(title="CartPole, trained while you watch", lifespan=service.life)
    page = pool_page(service.manager, title="CartPole", authorize=may_steer)
    app.mount("/pool", page)

    @app.post("/predict")
    async def predict(question: Question) -> Answer:
        return await service.answer(question)

    @app.get("/health")
    async def health(response: Response) -> dict[str, bool]:
        response.status_code = 200 if service.manager.is_healthy else 503
        return {"healthy": service.manager.is_healthy}

    return app


async def smoke(settings: Settings) -> None:
    """Serve until a visitor has seen the page and has had an answer of trained weights."""
    service = Service(settings)
    config = uvicorn.Config(make_app(service), port=0, log_level="warning")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    async for event in service.manager.events():
        if type(event).__name__ == "UpdateCompleted":
            break
    base = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    page = await asyncio.to_thread(fetch, f"{base}/pool/")
    print(f"the page has {len(page)} characters")
    question = Question(observation=[0.0, 0.0, 0.1, 0.0]).model_dump_json()
    print(await asyncio.to_thread(fetch, f"{base}/predict", question.encode()))
    server.should_exit = True
    await serving


def fetch(url: str, body: bytes | None = None) -> str:
    """Get a page, or post JSON to it."""
    request = urllib.request.Request(url, body, {"content-type": "application/json"})  # noqa: S310 - our own server
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - as above
        text: str = answer.read().decode()
        return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--path", type=Path, default=Settings.path, help="where weights are saved")
    parser.add_argument("--smoke", action="store_true", help="a run of a few seconds")
    asked = parser.parse_args()
    if asked.smoke:
        small = Hyperparameters(rollout_length=32, epochs=1)
        asyncio.run(smoke(Settings(parameters=small, path=asked.path)))
    else:
        settings = Settings(port=asked.port, path=asked.path)
        uvicorn.run(make_app(Service(settings)), host=settings.host, port=settings.port)
