"""Moderation over HTTP: latents in, verdicts out. An example to start from; ONNX Runtime, no torch.

    pip install 'latentguard[onnx,serve]'
    python examples/serve/app.py guard.onnx

    curl --data-binary @latents.npy 'localhost:8000/v1/verdicts?space=flux2&scaled=true'

`POST /v1/moderations` answers clients of a moderation endpoint in the shape that they know.

It fails closed: 200 is the only answer that can allow an image. Every other one says
`"decision": "block"`; so must a client that gets no answer.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from typing import Annotated, Any

import numpy as np
import uvicorn
from bodies import check_length, discard, receive
from checks import Given, Limits, Refused, check_form, read_latents
from connections import connections, may_be_open
from fastapi import Depends, FastAPI, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from measures import Measures
from moderations import PATH, answer, check_mapped, error_body, read_inputs
from refusals import add_refusals, refusal, retry_after

from latentguard.runtime import Batching, Guard, LatentsError, ModelError, Overloaded, Verdict

logger = logging.getLogger("latentguard.serve")

Read = Callable[[bytes], list[Given]]
"""What makes latents of a body, an item for each array. Raises Refused."""


class Service:
    """A guard, its limits and what was counted; everything but `_judge` runs in the event loop."""

    def __init__(self, guard: Guard, limits: Limits) -> None:
        self.guard, self.limits = guard, limits
        self.measures = Measures.of(guard)
        self.ready = False
        self._inside = 0
        self._threads = ThreadPoolExecutor(limits.max_requests, thread_name_prefix="judge")

    async def verdicts(self, request: Request, read: Read, noise_level: float) -> list[Verdict]:
        """The answer to one request, whose body `read` reads. Raises Refused."""
        if not self.ready or self._inside >= self.limits.max_requests:
            await discard(request, self.limits)
            raise Refused(503, "not ready yet" if not self.ready else "too many requests")
        self._inside += 1
        self.measures.inside.set(self._inside)
        job = None
        try:
            data = await receive(request, self.limits)
            job = asyncio.get_running_loop().run_in_executor(
                self._threads, self._judge, data, read, noise_level
            )
            # A job that is late still occupies its thread: its place is free when it ends.
            job.add_done_callback(self._leave)
            return await asyncio.wait_for(asyncio.shield(job), self.limits.seconds)
        except TimeoutError:
            raise Refused(503, f"no verdict within {self.limits.seconds:g} s") from None
        finally:
            if job is None:
                self._leave(None)

    def warm_up(self) -> None:
        """Run once with one image and once with a full batch; then the service is ready."""
        known = self.guard.metadata
        shape = known["channels"], known["height"] or 64, known["width"] or 64
        for images in (1, self.limits.max_images):
            for verdict in self.guard.scan(np.zeros((images, *shape), np.float32)):
                if verdict.error is not None:
                    raise ModelError(f"warm-up failed: {verdict.error}")
        self.ready = True

    def close(self) -> None:
        """Answer what waits."""
        self.ready = False
        self._threads.shutdown()
        self.guard.close()

    def _judge(self, data: bytes, read: Read, noise_level: float) -> list[Verdict]:
        found: list[Verdict] = []
        for latents, height, width in read(data):
            try:
                found += self.guard.scan(latents, noise_level, height=height, width=width)
            except LatentsError as error:
                raise Refused(422, str(error)) from error
            except Overloaded as error:
                raise Refused(503, str(error)) from error
        return found

    def _leave(self, job: asyncio.Future[Any] | None) -> None:
        if job is not None and not job.cancelled():
            job.exception()  # of a job that nobody waits for any more
        self._inside -= 1
        self.measures.inside.set(self._inside)


@dataclass
class AskedOf:
    """What the query of a request says of its latents."""

    space: Annotated[str | None, Query(max_length=100)] = None
    scaled: bool | None = None
    layout: Annotated[str | None, Query(max_length=100)] = None
    noise_level: Annotated[float, Query(ge=0)] = 0.0
    height: Annotated[int | None, Query(ge=1, le=1 << 20)] = None
    width: Annotated[int | None, Query(ge=1, le=1 << 20)] = None

    def said(self) -> dict[str, Any]:
        """As `read_latents` takes it."""
        return {key: value for key, value in vars(self).items() if key != "noise_level"}


def create_app(guard: Guard, limits: Limits | None = None) -> FastAPI:
    """The application around a guard, which it closes in the end."""
    service = Service(guard, limits or Limits())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Health is answered meanwhile. A guard that cannot be warmed up is never ready.
        warming = asyncio.create_task(asyncio.to_thread(service.warm_up))
        warming.add_done_callback(_report)
        yield
        await asyncio.wait([warming])
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="latentguard",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect has no decision, and goes where the Host header says
    )
    app.state.service = service

    async def judged(
        request: Request,
        asked: AskedOf,
        read: Read,
        check: Callable[[Guard], None] = lambda _: None,
    ) -> list[Verdict]:
        """The verdicts on a body that may be read at all; counted."""
        began = time.perf_counter()
        check_length(request, service.limits)
        try:
            check_form(request.headers)
            check(guard)
        except Refused:
            await discard(request, service.limits)
            raise
        found = await service.verdicts(request, read, asked.noise_level)
        service.measures.judged(found, time.perf_counter() - began)
        return found

    @app.post("/v1/verdicts")
    async def verdicts(request: Request, asked: Annotated[AskedOf, Depends()]) -> Response:
        found = await judged(
            request, asked, lambda data: [read_latents(data, asked.said(), guard, service.limits)]
        )
        return JSONResponse(
            {"verdicts": [verdict.to_dict() for verdict in found], "sha256": guard.sha256}
        )

    @app.post(PATH)
    async def moderations(request: Request, asked: Annotated[AskedOf, Depends()]) -> Response:
        found = await judged(
            request,
            asked,
            lambda data: read_inputs(data, asked.said(), guard, service.limits),
            check_mapped,
        )
        return JSONResponse(answer(found, guard))

    @app.get("/v1/guard")
    async def about() -> dict[str, Any]:
        name, digest = guard.model
        policy = {key: guard.policy[key] for key in ("name", "version")}
        return {
            "sha256": guard.sha256,
            "policy": policy,
            "model": {"name": name, "sha256": digest},
            "space": guard.space,
            "scaled": guard.scaled,
        }

    @app.get("/healthz")
    async def healthz() -> PlainTextResponse:
        return PlainTextResponse("alive\n")

    @app.get("/readyz")
    async def readyz() -> PlainTextResponse:
        return PlainTextResponse(
            "ready\n" if service.ready else "not ready\n", 200 if service.ready else 503
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        text, kind = service.measures.text()
        return Response(text, media_type=kind)

    def refuse(request: Request, status: int, reason: str) -> JSONResponse:
        service.measures.answers.labels(status).inc()
        if request.url.path == PATH:
            return JSONResponse(error_body(status, reason), status, retry_after(status))
        return refusal(status, reason)

    add_refusals(app, refuse)
    return app


def serving(limits: Limits) -> dict[str, Any]:
    """How uvicorn serves the application."""
    return {
        "log_level": "warning",
        # Not uvicorn's limit_concurrency: it counts idle connections, too, and answers everybody,
        # /healthz included, with 503 and no decision.
        "http": connections(may_be_open(16 * limits.max_requests), limits.read_seconds),
        "timeout_graceful_shutdown": round(limits.read_seconds + limits.seconds) + 1,
    }


def _report(warming: asyncio.Task[None]) -> None:
    error = None if warming.cancelled() else warming.exception()
    if error is not None:
        logger.error("the guard will not be ready: %s", error)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("guard", help="a file that `latentguard export onnx` wrote")
    parser.add_argument("--sha256", help="refuse the file unless its SHA-256 is this one")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, help="of ONNX Runtime on the CPU")
    parser.add_argument("--provider", help="of ONNX Runtime; CUDA where it can be used, else CPU")
    parser.add_argument("--max-delay-ms", type=float, default=2.0, help="to gather a batch")
    for field in fields(Limits):
        kind, flag = type(field.default), f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=field.default)
    given = parser.parse_args()
    names = [field.name for field in fields(Limits)]
    limits = Limits(**{name: getattr(given, name) for name in names})
    # The queue holds every request that is let in, so it is this service that says no.
    batching = Batching(
        limits.max_images, given.max_delay_ms, limits.max_requests, timeout=limits.seconds + 60
    )
    try:
        guard = Guard(
            given.guard,
            given.sha256,
            providers=None if given.provider is None else [given.provider],
            threads=given.threads,
            batching=batching,
            warm_up=False,
        )
    except ModelError as error:
        print(f"app.py: {error}", file=sys.stderr)
        return 2
    app = create_app(guard, limits)
    uvicorn.run(app, host=given.host, port=given.port, **serving(limits))
    return 0


class _Raw(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description."""


if __name__ == "__main__":
    sys.exit(main())
