"""Answers that are errors: a status and one line that gives the reason."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request

_MAX_CHARACTERS = 500


def busy(retry_after: int) -> HTTPException:
    """Create a 503 with the time in seconds after which to try again."""
    message = f"the service is busy; try again in {retry_after} s"
    return HTTPException(503, message, {"Retry-After": str(retry_after)})


async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Answer requests that this service refuses, and those that Starlette does: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    by_starlette = {
        "Not Found": f"no such path: {path}",
        "Method Not Allowed": f"{path} does not take {request.method}",
    }
    return _answer(request, error.status_code, by_starlette.get(error.detail, error.detail), error.headers)


async def on_invalid_parameters(request: Request, error: Exception) -> JSONResponse:
    """Answer query parameters of a wrong type or out of range."""
    assert isinstance(error, RequestValidationError)
    message = "; ".join(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg'].lower()}" for e in error.errors())
    return _answer(request, 422, message)


async def on_failure(request: Request, _: Exception) -> JSONResponse:
    """Answer after a bug, whose traceback is in the log."""
    return _answer(request, 500, "internal error; see the log of the service")


def _answer(request: Request, status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    line = " ".join(message.split())[:_MAX_CHARACTERS]
    return JSONResponse({"error": line, "request_id": request.state.request_id}, status, headers)
