"""Answers that are errors: a status and one line that gives the reason."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request

_MAX_CHARACTERS = 500


class RefusalError(Exception):
    """A request that is refused."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


def busy(retry_after: int) -> RefusalError:
    """Create a 503 with the time in seconds after which to try again."""
    message = f"the service is busy; try again in {retry_after} s"
    return RefusalError(503, message, {"Retry-After": str(retry_after)})


def error_response(
    request_id: str, status: int, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Create an error as JSON: one line, and the id of the request."""
    line = " ".join(message.split())[:_MAX_CHARACTERS]
    return JSONResponse({"error": line, "request_id": request_id}, status, dict(headers or {}))


async def on_refusal(request: Request, error: Exception) -> JSONResponse:
    """Answer a `RefusalError`."""
    assert isinstance(error, RefusalError)
    return error_response(request.state.request_id, error.status, str(error), error.headers)


async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Answer requests that Starlette refuses itself: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"no such path: {request.url.path}"
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}"
    return error_response(request.state.request_id, error.status_code, message, error.headers)


async def on_invalid_parameters(request: Request, error: Exception) -> JSONResponse:
    """Answer query parameters of a wrong type or out of range."""
    assert isinstance(error, RequestValidationError)
    message = "; ".join(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg'].lower()}" for e in error.errors())
    return error_response(request.state.request_id, 422, message)


async def on_failure(request: Request, _: Exception) -> JSONResponse:
    """Answer after a bug, whose traceback is in the log."""
    return error_response(request.state.request_id, 500, "internal error; see the log of the service")
