"""Only so many requests at once, each only for so long, where a server's own queue has no end."""

from __future__ import annotations

import asyncio

from checks import Limits
from refusals import refusal
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Bounded:
    """An ASGI application of which one path takes `max_requests` at once, each for `seconds`.

    A further request, and one that has had no answer by then, is answered with 503.
    """

    def __init__(self, app: ASGIApp, path: str, limits: Limits) -> None:
        self._app, self._path, self._limits = app, path, limits
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != self._path:
            await self._app(scope, receive, send)
            return
        if self._inside >= self._limits.max_requests:
            await refusal(503, "too many requests")(scope, receive, send)
            return
        began = False

        async def sending(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        self._inside += 1
        try:
            async with asyncio.timeout(self._limits.seconds):
                await self._app(scope, receive, sending)
        except TimeoutError:
            if began:  # half an answer is none, and the connection breaks
                raise
            reason = f"no image within {self._limits.seconds:g} s"
            await refusal(503, reason)(scope, receive, send)
        finally:
            self._inside -= 1
