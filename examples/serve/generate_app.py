"""A diffusers pipeline as a service: images, each with the guard's verdict on it.

    pip install 'latentguard[diffusers,serve]'
    python examples/serve/generate_app.py --pipeline PATH --policy family

    curl localhost:8000/v1/generate -H 'content-type: application/json' \\
        -d '{"prompt": "a lighthouse at dawn", "seed": 1}'

`--generator exact` needs no weights: it makes the pictures of examples/latents.pt, which a prompt
names ("a cat", "a revolver").

A blocked image is replaced as the policy's `on_block` says, and the answer says so. Every answer
but 200 says `"decision": "block"`; so must a client that gets none.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from app import serving
from bodies import check_length, receive
from checks import Limits, Refused
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from generation import Asked, Generation, verdicts_of
from measures import Measures
from painters import add_choice, chosen, painter
from pydantic import ValidationError
from refusals import add_refusals, refusal

from latentguard.errors import LatentGuardError

LIMITS = Limits(max_bytes=64 << 10, max_requests=8, seconds=120.0)
_SECONDS = (0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120)


class Queue:
    """One thread that generates, and a bounded number of requests that wait for it.

    All but the generating runs in the event loop.
    """

    def __init__(self, limits: Limits, told: Callable[[int], object]) -> None:
        self._limits, self._told = limits, told
        self._inside = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate")

    async def run(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `work` gives in its turn. Raises Refused where too many wait, or for too long."""
        if self._inside >= self._limits.max_requests:
            raise Refused(503, "too many requests")
        self._count(1)
        loop = asyncio.get_running_loop()
        job = self._thread.submit(work)
        # A job that is late still occupies the pipeline: its place is free when it ends.
        job.add_done_callback(lambda done: _in(loop, self._leave, done))
        try:
            async with asyncio.timeout(self._limits.seconds):
                return await asyncio.shield(asyncio.wrap_future(job))
        except TimeoutError:
            job.cancel()  # one that has not begun need not
            raise Refused(503, f"no image within {self._limits.seconds:g} s") from None

    def close(self) -> None:
        """Answer what waits."""
        self._thread.shutdown()

    def _leave(self, job: Future[Any]) -> None:
        if not job.cancelled():
            job.exception()  # of a job that nobody waits for any more
        self._count(-1)

    def _count(self, change: int) -> None:
        self._inside += change
        self._told(self._inside)


def create_app(generation: Generation, limits: Limits = LIMITS) -> FastAPI:
    """The application around a guarded pipeline."""
    policy = generation.policy
    model = generation.model
    measures = Measures(f"{policy.name} {policy.version}", model.name, model.sha256, _SECONDS)
    queue = Queue(limits, measures.inside.set)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(queue.close)

    app = FastAPI(
        title="latentguard",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )

    @app.post("/v1/generate")
    async def generate(request: Request) -> JSONResponse:
        began = time.perf_counter()
        check_length(request, limits)
        asked = read(await receive(request, limits))
        generation.arguments(asked)  # before it waits for its turn
        request_id = uuid.uuid4().hex
        answer = await queue.run(lambda: generation.generate(asked, request_id))
        measures.judged(verdicts_of(answer), time.perf_counter() - began)
        return JSONResponse(answer, headers={"X-Request-Id": request_id})

    @app.get("/v1/guard")
    async def about() -> dict[str, Any]:
        return {"policy": policy.to_dict(), "model": model.to_dict(), "space": generation.space}

    @app.get("/healthz")
    async def healthz() -> PlainTextResponse:
        return PlainTextResponse("alive\n")

    @app.get("/metrics")
    async def metrics() -> Response:
        text, kind = measures.text()
        return Response(text, media_type=kind)

    def refuse(request: Request, status: int, reason: str) -> JSONResponse:
        measures.answers.labels(status).inc()
        return refusal(status, reason)

    add_refusals(app, refuse)
    return app


def read(body: bytes) -> Asked:
    """A request from its body. Raises RequestValidationError, which is answered with 422."""
    try:
        return Asked.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError(
            [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False)]
        ) from error


def _in(loop: asyncio.AbstractEventLoop, call: Callable[[Any], None], value: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(call, value)


def options(description: str | None) -> argparse.ArgumentParser:
    """What every generating service is told on its command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_choice(parser)
    parser.add_argument("--policy", default="default")
    parser.add_argument("--model", default="auto", help="what judges")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-requests", type=int, default=LIMITS.max_requests)
    parser.add_argument("--seconds", type=float, default=LIMITS.seconds, help="until an answer")
    return parser


def limits_of(given: argparse.Namespace) -> Limits:
    """What the options say of how much a service takes."""
    return Limits(LIMITS.max_bytes, max_requests=given.max_requests, seconds=given.seconds)


def main() -> int:
    """The command line."""
    parser = options(__doc__)
    parser.add_argument("--audit", help="a file: one JSON line for each image and scored step")
    given = parser.parse_args()
    limits = limits_of(given)
    try:
        generation = Generation(
            painter(chosen(given)),
            given.policy,
            given.model,
            audit=given.audit,
            seconds=given.seconds,
        )
    except LatentGuardError as error:
        print(f"generate_app.py: {error}", file=sys.stderr)
        return 2
    uvicorn.run(create_app(generation, limits), host=given.host, port=given.port, **serving(limits))
    return 0


if __name__ == "__main__":
    sys.exit(main())
