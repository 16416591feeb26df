"""Moderation as a Ray Serve application: latents in, verdicts out, batches gathered by Ray.

    pip install 'ray[serve]' 'latentguard[onnx]'
    python examples/serve/ray_app.py guard.onnx

    curl --data-binary @latents.npy 'localhost:8000/?space=flux2&scaled=true'

It fails closed: 200 is the only answer that can allow an image; the others say so, or come from Ray
(408 after --seconds, 503 when more than --max-requests wait), or do not come at all.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from checks import Given, Limits, Refused, check_form, read_latents
from numpy.typing import NDArray
from ray import serve
from ray.serve.config import HTTPOptions
from starlette.requests import Request
from starlette.responses import JSONResponse

from latentguard.runtime import Guard, LatentsError, ModelError, Verdict


@dataclass(frozen=True)
class Item:
    """One request on its way through a batch."""

    given: Given
    noise_level: float

    @property
    def kind(self) -> tuple[Any, ...]:
        """Items of one kind share a run."""
        latents, height, width = self.given
        return latents.shape[1:], latents.dtype, height, width, self.noise_level


@serve.deployment(name="latentguard", health_check_period_s=10, graceful_shutdown_timeout_s=20)
class Moderator:
    """A replica: one guard, warmed up before Ray sends it anything."""

    def __init__(
        self, path: str, sha256: str | None, threads: int | None, limits: Limits | None = None
    ) -> None:
        self._limits = limits or Limits()
        self._guard = Guard(path, sha256, threads=threads)

    async def __call__(self, request: Request) -> JSONResponse:
        """The verdicts on one request, or why there are none."""
        try:
            verdicts = await self._answer(request)
        except Refused as error:
            return JSONResponse({"decision": "block", "error": error.reason}, error.status)
        return JSONResponse(
            {"verdicts": [verdict.to_dict() for verdict in verdicts], "sha256": self._guard.sha256}
        )

    def check_health(self) -> None:
        """A replica that cannot judge any more is replaced."""
        known = self._guard.metadata
        shape = 1, known["channels"], known["height"] or 32, known["width"] or 32
        (verdict,) = self._guard.scan(np.zeros(shape, np.float32))
        if verdict.error is not None:
            raise RuntimeError(verdict.error)

    async def _answer(self, request: Request) -> list[Verdict]:
        if request.method != "POST":
            raise Refused(405, "latents come by POST")
        asked, noise_level = _asked(request)
        body = await request.body()
        check_form(request.headers)
        if len(body) > self._limits.max_bytes:
            raise Refused(413, f"the body is larger than {self._limits.max_bytes} bytes")
        given = read_latents(body, asked, self._guard, self._limits)
        found: list[Verdict] | Refused = await self._judge(Item(given, noise_level))
        if isinstance(found, Refused):
            raise found
        return found

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.002)
    async def _judge(self, items: list[Item]) -> list[list[Verdict] | Refused]:
        """An answer for each item."""
        alike: defaultdict[Any, list[int]] = defaultdict(list)
        for index, item in enumerate(items):
            alike[item.kind].append(index)
        answers: list[list[Verdict] | Refused] = [Refused(500, "not judged")] * len(items)
        for group in alike.values():
            latents = np.concatenate([items[index].given.latents for index in group])
            found = await asyncio.to_thread(self._scan, latents, items[group[0]])
            if isinstance(found, Refused) and len(group) > 1:
                # One of them is at fault: each is told of its own.
                for index in group:
                    one = items[index]
                    answers[index] = await asyncio.to_thread(self._scan, one.given.latents, one)
                continue
            begin = 0
            for index in group:
                end = begin + len(items[index].given.latents)
                answers[index] = found if isinstance(found, Refused) else found[begin:end]
                begin = end
        return answers

    def _scan(self, latents: NDArray[Any], first: Item) -> list[Verdict] | Refused:
        _, height, width = first.given
        try:
            return self._guard.scan(latents, first.noise_level, height=height, width=width)
        except LatentsError as error:
            return Refused(422, str(error))


def _asked(request: Request) -> tuple[dict[str, Any], float]:
    """The query of a request, and its noise level. Raises Refused."""
    query = request.query_params
    asked: dict[str, Any] = {key: query.get(key) for key in ("space", "layout")}
    try:
        if "scaled" in query:
            asked["scaled"] = {"true": True, "false": False}[query["scaled"]]
        asked |= {key: int(query[key]) for key in ("height", "width") if key in query}
        noise_level = float(query.get("noise_level", 0.0))
        if not noise_level >= 0:
            raise ValueError(noise_level)
    except (KeyError, ValueError) as error:
        raise Refused(
            422,
            "scaled must be true or false, height and width whole numbers, noise_level at least 0",
        ) from error
    return asked, noise_level


def application(
    path: str,
    sha256: str | None = None,
    *,
    threads: int | None = None,
    replicas: int = 1,
    limits: Limits | None = None,
) -> serve.Application:
    """The application, for `serve.run` or a config file of `serve deploy`."""
    limits = limits or Limits()
    return Moderator.options(
        num_replicas=replicas,
        # Half of them are judged, or wait for a batch; half wait before a replica. A further one
        # is Ray's 503.
        max_ongoing_requests=max(1, limits.max_requests // 2),
        max_queued_requests=max(1, limits.max_requests // 2),
        ray_actor_options={"num_cpus": threads or 1},
    ).bind(path, sha256, threads, limits)


def main() -> int:
    """The command line: a local Ray, until a signal ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("guard", help="a file that `latentguard export onnx` wrote")
    parser.add_argument("--sha256", help="refuse the file unless its SHA-256 is this one")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of a replica")
    parser.add_argument("--max-requests", type=int, default=Limits.max_requests)
    parser.add_argument("--seconds", type=float, default=Limits.seconds)
    given = parser.parse_args()
    try:
        checked = Guard(given.guard, given.sha256, warm_up=False)
    except ModelError as error:
        print(f"ray_app.py: {error}", file=sys.stderr)
        return 2
    serve.start(
        http_options=HTTPOptions(host=given.host, port=given.port, request_timeout_s=given.seconds)
    )
    serve.run(
        application(
            given.guard,
            checked.sha256,  # each replica reads the file itself, and runs what was checked here
            threads=given.threads,
            replicas=given.replicas,
            limits=Limits(max_requests=given.max_requests, seconds=given.seconds),
        )
    )
    print(f"ready on {given.host}:{given.port}", flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    serve.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
