"""The routes of the service."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
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
from mobilevit.serving.metrics import Metrics
from mobilevit.serving.observing import CLIENT_GONE, Observed
from mobilevit.serving.pages import Pages
from mobilevit.serving.refusal import (
    RefusalError,
    on_failure,
    on_http_exception,
    on_invalid_parameters,
    on_refusal,
)
from mobilevit.serving.service import Service
from mobilevit.serving.settings import ServeConfig, ServedModel
from mobilevit.serving.uploads import Share, read_uploads

_PROBES = frozenset({"/healthz", "/readyz", "/metrics"})


def create_app(
    config: ServeConfig,
    models: Sequence[ServedModel],
    predictors: Mapping[str, Predictor],
    pages: Mapping[str, bytes],
) -> Observed:
    """Create the service as an ASGI application."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = service = Service(config, models, predictors, metrics)
        service.start()
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
            RefusalError: on_refusal,
            HTTPException: on_http_exception,
            RequestValidationError: on_invalid_parameters,
            Exception: on_failure,
        },
    )
    app.state.key = config.key()
    app.state.pages = Pages(pages)
    # Only where there is a key: otherwise the OpenAPI document would ask for one.
    app.include_router(_models, dependencies=[] if config.key() is None else [Depends(_check_key)])
    app.include_router(_rest)
    # Each file has its own route: a route for all paths would also catch wrong methods of other routes.
    for path in ("", *pages):
        app.add_api_route(f"/{path}", _page, include_in_schema=False)
    app.add_api_route("/page/{name:path}", _page, include_in_schema=False)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Retry-After"],
            max_age=600,
        )
    return Observed(app, metrics, quiet=_PROBES)


# Dependencies are async: FastAPI would run others in a thread each.


async def _check_key(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    header: Annotated[str | None, Depends(APIKeyHeader(name="X-API-Key", auto_error=False))],
) -> None:
    wanted: str = request.app.state.key
    given = header if bearer is None else bearer.credentials
    if given is None or not hmac.compare_digest(given.encode(), wanted.encode()):
        problem = "wrong API key" if given else "this service asks for an API key"
        message = f"{problem}; send it as Authorization: Bearer KEY, or as X-API-Key: KEY"
        raise RefusalError(401, message, {"WWW-Authenticate": "Bearer"})


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


_TheService = Annotated[Service, Depends(_service)]
_ModelName = Annotated[str | None, Query(description="A name from /v1/models; default: the first.")]

_models = APIRouter(prefix="/v1")
_rest = APIRouter()


@_models.post(
    "/predict", summary="Classify, detect or segment", responses=openapi.PREDICT, openapi_extra=openapi.IMAGES
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
        raise RefusalError(422, with_flags(str(error), ())) from None
    service.check_room(batcher)

    async def answer(share: Share) -> Json:
        config = service.config
        uploads = await read_uploads(request, share, max_bytes=config.max_body(), max_files=config.max_files)
        request.state.images = len(uploads)
        results = await service.predict(batcher, uploads, top=top, min_score=min_score)
        return {"model": batcher.name, "task": task, "results": results}

    return await _in_time(request, service, answer)


@_models.post("/explain", summary="Explain a prediction", responses=openapi.EXPLAIN, openapi_extra=openapi.IMAGES)
async def _explain(
    request: Request,
    service: _TheService,
    model: _ModelName = None,
    x: Annotated[int | None, Query(ge=0, description="Column of a pixel of the image.")] = None,
    y: Annotated[int | None, Query(ge=0, description="Row of a pixel of the image.")] = None,
) -> Response:
    if (x is None) != (y is None):
        raise RefusalError(422, "x and y name a pixel together; give both or neither")
    batcher = service.batcher(model)
    service.check_explainable(batcher)

    async def answer(share: Share) -> Json:
        uploads = await read_uploads(request, share, max_bytes=service.config.max_body(), max_files=1)
        request.state.images = 1
        pixel = None if x is None or y is None else (x, y)
        return {"model": batcher.name, **await service.explain(batcher, uploads[0], pixel)}

    return await _in_time(request, service, answer)


async def _in_time(request: Request, service: Service, answer: Callable[[Share], Awaitable[Json]]) -> Response:
    """Send what `answer` returns as JSON, unless it takes too long."""
    try:
        async with asyncio.timeout(service.config.timeout_s), service.uploads.share() as share:
            value = await answer(share)
    except TimeoutError:
        limit = f"the limit of {service.config.timeout_s:g} s"
        if not hasattr(request.state, "images"):
            raise RefusalError(408, f"the upload took longer than {limit}", {"Connection": "close"}) from None
        raise RefusalError(504, f"no answer within {limit}; try again later, or with fewer images") from None
    except ClientDisconnect:
        return Response(status_code=CLIENT_GONE)
    return _json(value)


@_models.get("/models", summary="List the models", responses=openapi.MODELS)
async def _list_models(service: _TheService) -> Response:
    return _json({"models": service.describe()})


@_rest.get("/healthz", summary="Check that the process is alive", responses=openapi.HEALTH)
async def _healthz() -> Response:
    return _json({"status": "ok"})


@_rest.get("/readyz", summary="Check that requests are accepted", responses=openapi.READY)
async def _readyz(service: _TheService) -> Response:
    if not service.ready:
        raise RefusalError(503, "not ready", {"Retry-After": "1"})
    return _json({"status": "ready"})


@_rest.get("/metrics", summary="Metrics for Prometheus", responses=openapi.METRICS)
def _metrics(service: _TheService) -> Response:  # not async, as it reads files if there are several workers
    return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _page(request: Request) -> Response:
    pages: Pages = request.app.state.pages
    return pages.answer(request, request.url.path.removeprefix("/page/").lstrip("/") or "index.html")


def _json(value: Json) -> Response:
    return Response(json.dumps(value, ensure_ascii=False).encode(errors="replace"), media_type="application/json")
