"""The routes of the service."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from mobilevit import __version__
from mobilevit.errors import MobileViTError, with_flags
from mobilevit.files import Json
from mobilevit.results import check_options
from mobilevit.runtime.predictor import Predictor
from mobilevit.serving import openapi
from mobilevit.serving.metrics import metrics_text
from mobilevit.serving.observing import CLIENT_GONE, Observed
from mobilevit.serving.refusal import on_failure, on_http_exception, on_invalid_parameters
from mobilevit.serving.service import Service
from mobilevit.serving.settings import ServeConfig
from mobilevit.serving.uploads import Upload, read_uploads
from mobilevit.webpage import page_files

# No other sites, nothing inline; images that the page has made or received are blobs and data.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "font-src 'self'; media-src 'self' blob:; manifest-src 'self'; worker-src 'self' blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
# Not all systems know these types, and browsers run a module only if its type is JavaScript.
_PAGE_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".jpg": "image/jpeg",
}


def create_app(config: ServeConfig, models: Mapping[str, Path], predictors: Mapping[str, Predictor]) -> Observed:
    """Create the service as an ASGI application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = service = Service(config, models, predictors)
        yield
        service.stop()

    app = FastAPI(
        title="mobilevit",
        version=__version__,
        description=openapi.DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # its scripts come from another site
        redoc_url=None,
        exception_handlers={
            HTTPException: on_http_exception,
            RequestValidationError: on_invalid_parameters,
            Exception: on_failure,
        },
    )
    # Only where there is a key: otherwise the OpenAPI document would ask for one.
    app.include_router(_models, dependencies=[] if config.key() is None else [Depends(_check_key)])
    app.include_router(_probes)
    # Each file has its own route: a route for all paths would also catch wrong methods of other routes.
    for name, data in page_files("server").items():
        app.add_api_route("/" if name == "index.html" else f"/{name}", _page(name, data), include_in_schema=False)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Retry-After"],
            max_age=600,
        )
    return Observed(app)


# Dependencies are async: FastAPI would run others in a thread each.


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


_TheService = Annotated[Service, Depends(_service)]
_ModelName = Annotated[str | None, Query(description="A name from /v1/models; default: the first.")]


async def _check_key(
    service: _TheService,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    header: Annotated[str | None, Depends(APIKeyHeader(name="X-API-Key", auto_error=False))],
) -> None:
    given = header if bearer is None else bearer.credentials
    if given is None or not hmac.compare_digest(given.encode(), (service.config.key() or "").encode()):
        problem = "wrong API key" if given else "this service asks for an API key"
        message = f"{problem}; send it as Authorization: Bearer KEY, or as X-API-Key: KEY"
        raise HTTPException(401, message, {"WWW-Authenticate": "Bearer"})


_models = APIRouter(prefix="/v1", responses=openapi.KEY)
_probes = APIRouter()


@_models.post(
    "/predict",
    summary="Classify, detect or segment",
    response_model=openapi.Predictions,
    responses=openapi.PREDICTED,
    openapi_extra=openapi.IMAGES,
)
async def _predict(
    request: Request,
    service: _TheService,
    model: _ModelName = None,
    top: Annotated[int, Query(ge=1, le=10_000, description="Classification: number of labels.")] = 5,
    min_score: Annotated[float | None, Query(ge=0, le=1, description="Detection: lowest score of an object.")] = None,
) -> Response:
    batcher = service.batcher(model)
    task = batcher.predictor.card.task
    try:
        check_options(task, [] if min_score is None else ["min_score"])
    except MobileViTError as error:
        raise HTTPException(422, with_flags(str(error), ())) from None
    batcher.check_room()

    async def answer(uploads: list[Upload]) -> Json:
        results = await service.predict(batcher, uploads, top=top, min_score=min_score)
        return {"model": batcher.name, "task": task, "results": results}

    return await _in_time(request, service, service.config.max_files, answer)


@_models.post(
    "/explain",
    summary="Explain a prediction",
    response_model=openapi.Explanation,
    responses=openapi.REFUSED,
    openapi_extra=openapi.IMAGES,
)
async def _explain(
    request: Request,
    service: _TheService,
    model: _ModelName = None,
    x: Annotated[int | None, Query(ge=0, description="Column of a pixel of the image.")] = None,
    y: Annotated[int | None, Query(ge=0, description="Row of a pixel of the image.")] = None,
) -> Response:
    if (x is None) != (y is None):
        raise HTTPException(422, "x and y name a pixel together; give both or neither")
    batcher = service.batcher(model)
    service.check_explainable(batcher)

    async def answer(uploads: list[Upload]) -> Json:
        pixel = None if x is None or y is None else (x, y)
        return {"model": batcher.name, **await service.explain(batcher, uploads[0], pixel)}

    return await _in_time(request, service, 1, answer)


async def _in_time(
    request: Request, service: Service, max_files: int, answer: Callable[[list[Upload]], Awaitable[Json]]
) -> Response:
    """Read the images of a request and send what `answer` returns for them as JSON, unless it takes too long."""
    config = service.config
    try:
        async with asyncio.timeout(config.timeout_s):
            with service.uploads.share() as take:
                uploads = await read_uploads(request, take, max_bytes=config.max_body(), max_files=max_files)
                request.state.images = len(uploads)
                return _json(await answer(uploads))
    except TimeoutError:
        limit = f"the limit of {config.timeout_s:g} s"
        if not hasattr(request.state, "images"):
            raise HTTPException(408, f"the upload took longer than {limit}", {"Connection": "close"}) from None
        raise HTTPException(504, f"no answer within {limit}; try again later, or with fewer images") from None
    except ClientDisconnect:
        return Response(status_code=CLIENT_GONE)


@_models.get("/models", summary="List the models", response_model=openapi.Models)
async def _list_models(service: _TheService) -> Response:
    return _json({"models": service.describe()})


@_probes.get("/healthz", summary="Check that the process is alive")
async def _healthz() -> openapi.Status:
    return openapi.Status(status="ok")


@_probes.get("/readyz", summary="Check that requests are accepted")
async def _readyz() -> openapi.Status:
    return openapi.Status(status="ready")


@_probes.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
def _metrics() -> Response:  # not async, as it reads files if there are several workers
    return Response(metrics_text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _page(name: str, data: bytes) -> Callable[[Request], Awaitable[Response]]:
    """Make the endpoint of one file of the web page, which answers 304 if the browser has the file."""
    etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = {
        "ETag": etag, "Cache-Control": "no-cache", "Content-Security-Policy": _PAGE_POLICY,
        "Referrer-Policy": "no-referrer",
    }  # fmt: skip

    async def answer(request: Request) -> Response:
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers, media_type=_PAGE_TYPES[Path(name).suffix])

    return answer


def _json(value: Json) -> Response:
    return Response(json.dumps(value, ensure_ascii=False).encode(errors="replace"), media_type="application/json")
