"""Every answer that is not a verdict says so: `{"decision": "block", "error": "..."}`."""

from __future__ import annotations

from collections.abc import Callable

from checks import Refused
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

Refuse = Callable[[Request, int, str], JSONResponse]
"""Makes the answer of a request, a status and one sentence."""


def refusal(status: int, reason: str) -> JSONResponse:
    """The answer without verdicts."""
    return JSONResponse({"decision": "block", "error": reason}, status, retry_after(status))


def retry_after(status: int) -> dict[str, str] | None:
    """The headers of an answer with this status."""
    return {"Retry-After": "1"} if status == 503 else None


def add_refusals(app: FastAPI, refuse: Refuse) -> None:
    """Give every error of an application an answer that blocks."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return refuse(request, error.status, error.reason)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        return refuse(request, error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return refuse(request, 422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> JSONResponse:
        return refuse(request, 400, "the client went away")

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return refuse(request, 500, "an error of the service; these images were not judged")
