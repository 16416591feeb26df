"""The bodies of requests: bounded in bytes and in time, or not kept at all."""

from __future__ import annotations

import asyncio

from checks import Limits, Refused
from starlette.requests import Request


async def receive(request: Request, limits: Limits) -> bytes:
    """The whole body. Raises Refused where it is too large, or too slow."""
    body = bytearray()
    try:
        async with asyncio.timeout(limits.read_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.max_bytes:
                    raise too_large(limits)
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {limits.read_seconds:g} s") from None
    return bytes(body)


async def discard(request: Request, limits: Limits) -> None:
    """Read a body that will not be judged: a client that still sends would not see the answer.
    One that asks before it sends (Expect) is answered at once."""
    if "expect" in request.headers:
        return
    received = 0
    try:
        async with asyncio.timeout(limits.read_seconds):
            async for chunk in request.stream():
                received += len(chunk)
                if received > limits.max_bytes:
                    return
    except TimeoutError:
        return


def check_length(request: Request, limits: Limits) -> None:
    """Raise Refused for a body that says itself that it is too large."""
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced) > limits.max_bytes:
        raise too_large(limits)


def too_large(limits: Limits) -> Refused:
    """The answer to a body over the limit."""
    return Refused(413, f"the body is larger than {limits.max_bytes} bytes")
