"""What keeps a server's queue short: places, and the time that one may be held."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

for package in ("fastapi", "httpx2"):
    pytest.importorskip(package, reason=f"the example needs {package}")

import httpx2  # noqa: E402
from bounded import Bounded  # noqa: E402
from checks import Limits  # noqa: E402
from starlette.responses import PlainTextResponse  # noqa: E402

PATH = "/v1/generate"


def test_places_are_given_back_and_time_runs_out() -> None:
    go = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == PATH:
            await go.wait()
        await PlainTextResponse("made")(scope, receive, send)

    async def talk() -> None:
        app = Bounded(slow, PATH, Limits(max_requests=2, seconds=300))
        async with asked_of(app) as client:
            first = [asyncio.create_task(client.post(PATH)) for _ in range(2)]
            while app._inside < 2:
                await asyncio.sleep(0)
            third = await client.post(PATH)
            assert third.status_code == 503
            assert third.json() == {"decision": "block", "error": "too many requests"}
            assert (await client.get("/healthz")).text == "made"
            go.set()
            assert [(await one).text for one in first] == ["made", "made"]
            assert (await client.post(PATH)).text == "made"
        go.clear()
        hasty = Bounded(slow, PATH, Limits(max_requests=1, seconds=0.01))
        async with asked_of(hasty) as client:
            late = await client.post(PATH)
            assert late.status_code == 503
            assert "no image within" in late.json()["error"]
            go.set()
            assert (await client.post(PATH)).text == "made"

    asyncio.run(talk())


def asked_of(app: Any) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://here")
