"""The routes."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from mobilevit import __version__
from mobilevit.runtime.predictor import Predictor
from mobilevit.serving import openapi
from mobilevit.serving.metrics import Metrics
from mobilevit.serving.observing import GONE, Observed
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
    """The whole service as an ASGI application."""
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
        docs_url=None,  # their scripts come from elsewhere
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
    # Only where there is a key: the document for programs must not ask for what is not wanted.
    app.include_router(_models, dependencies=[] if config.key() is None else [Depends(_check_key)])
    app.include_router(_rest)
    # Each file has a route of its own, as one for all would answer for wrong methods of the others.
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


async def _check_key(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    header: Annotated[str | None, Depends(APIKeyHeader(name="X-API-Key", auto_error=False))],
) -> None:
    wanted: str = request.app.state.key
    given = header if bearer is None else bearer.credentials
    if given is None or not hmac.compare_digest(given.encode(), wanted.encode()):
        told = "wrong API key" if given else "this service asks for an API key"
        message = f"{told}; send it as Authorization: Bearer KEY, or as X-API-Key: KEY"
        raise RefusalError(401, message, {"WWW-Authenticate": "Bearer"})


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(_service)]
ModelName = Annotated[str | None, Query(description="A name of /v1/models; the first one, if not given.")]

_models = APIRouter(prefix="/v1")
_rest = APIRouter()


@_models.post(
    "/predict", summary="Classify, detect or segment", responses=openapi.PREDICT, openapi_extra=openapi.IMAGES
)
async def _predict(
    request: Request,
    service: TheService,
    model: ModelName = None,
    top: Annotated[int, Query(ge=1, le=10_000, description="Classification: how many labels.")] = 5,
    min_score: Annotated[float | None, Query(ge=0, le=1, description="Detection: objects from this score on.")] = None,
) -> Response:
    batcher = service.batcher(model)
    task = batcher.predictor.card.task
    if min_score is not None and task != "detection":
        raise RefusalError(422, f"min_score is for detection; {batcher.name} does {task}")
    service.check_room(batcher)

    async def answer(share: Share) -> dict[str, Any]:
        config = service.config
        uploads = await read_uploads(request, share, max_bytes=config.max_body(), max_files=config.max_files)
        request.state.images = len(uploads)
        results = await service.predict(batcher, uploads, top=top, min_score=min_score)
        return {"model": batcher.name, "task": task, "results": results}

    return await _in_time(request, service, answer)


@_models.post("/explain", summary="What the model looks at", responses=openapi.EXPLAIN, openapi_extra=openapi.IMAGES)
async def _explain(
    request: Request,
    service: TheService,
    model: ModelName = None,
    x: Annotated[int | None, Query(ge=0, description="Column of a pixel of the image.")] = None,
    y: Annotated[int | None, Query(ge=0, description="Row of a pixel of the image.")] = None,
) -> Response:
    if (x is None) != (y is None):
        raise RefusalError(422, "x and y name a pixel together; give both or none")
    batcher = service.batcher(model)
    service.check_explainable(batcher)

    async def answer(share: Share) -> dict[str, Any]:
        uploads = await read_uploads(request, share, max_bytes=service.config.max_body(), max_files=1)
        request.state.images = 1
        pixel = None if x is None or y is None else (x, y)
        return {"model": batcher.name, **await service.explain(batcher, uploads[0], pixel)}

    return await _in_time(request, service, answer)


async def _in_time(
    request: Request, service: Service, answer: Callable[[Share], Awaitable[dict[str, Any]]]
) -> Response:
    """What `answer` makes of the request, as JSON, unless it takes too long."""
    try:
        async with asyncio.timeout(service.config.timeout_s), service.uploads.share() as share:
            told = await answer(share)
    except TimeoutError:
        limit = f"the limit of {service.config.timeout_s:g} s"
        if not hasattr(request.state, "images"):
            raise RefusalError(408, f"the upload took longer than {limit}", {"Connection": "close"}) from None
        raise RefusalError(504, f"no answer within {limit}; try again later, or with fewer images") from None
    except ClientDisconnect:
        return Response(status_code=GONE)
    return _json(told)


@_models.get("/models", summary="What is served", responses=openapi.MODELS)
async def _list_models(service: TheService) -> Response:
    return _json({"models": service.describe()})


@_rest.get("/healthz", summary="Whether the process lives", responses=openapi.HEALTH)
async def _healthz() -> Response:
    return _json({"status": "ok"})


@_rest.get("/readyz", summary="Whether it takes requests", responses=openapi.READY)
async def _readyz(service: TheService) -> Response:
    if not service.ready:
        raise RefusalError(503, "not ready", {"Retry-After": "1"})
    return _json({"status": "ready"})


@_rest.get("/metrics", summary="Counts for Prometheus", responses=openapi.METRICS)
def _metrics(service: TheService) -> Response:  # reads files where there are several workers, so in a thread
    return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _page(request: Request) -> Response:
    pages: Pages = request.app.state.pages
    return pages.answer(request, request.url.path.removeprefix("/page/").lstrip("/") or "index.html")


def _json(value: Any) -> Response:
    return Response(json.dumps(value, ensure_ascii=False).encode(errors="replace"), media_type="application/json")
