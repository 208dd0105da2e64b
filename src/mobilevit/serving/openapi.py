"""Schemas and examples of requests and responses, for /openapi.json."""

from __future__ import annotations

from pydantic import BaseModel, Field

from mobilevit.card import TaskName
from mobilevit.files import Json

DESCRIPTION = """Classification, detection and segmentation of images.

Errors are `{"error": "one line", "request_id": "..."}`. If the service has an API key, send it as
`Authorization: Bearer KEY` or `X-API-Key: KEY`. `X-Request-ID` is returned; if a request has none, it gets one."""

Responses = dict[int | str, Json]


class Error(BaseModel):
    """The reason of a refusal, in one line."""

    error: str = Field(examples=["image 1: the file is empty"])
    request_id: str = Field(examples=["6f1c0f1e9f0c4d0e8a3b5a7d9c2e4f60"])


class Item(BaseModel):
    """The result for one image; which fields there are depends on the task."""

    source: str = Field(description="The name of the file in the form, or the number of the image.")
    error: str = Field("", description="The reason why this image of several cannot be read.")
    label: str = Field("", description="Classification: the most probable class.")
    probability: float = 0.0
    top: list[Json] = []
    width: int = Field(0, description="Width of the upright image in pixels.")
    height: int = 0
    detections: list[Json] = []
    shares: dict[str, float] = Field({}, description="Segmentation: share of the pixels of each class that occurs.")
    mask_png: str = Field("", description="Segmentation: base64 of a palette PNG with class indices.")


class Predictions(BaseModel):
    """A result for each image, in order."""

    model: str
    task: TaskName
    results: list[Item]


class Explanation(BaseModel):
    """An image that explains the prediction, and numbers."""

    model: str
    image_png: str = Field(description="base64 of a PNG")


class Models(BaseModel):
    """All models; the first is used if a request names none."""

    models: list[Json]


class Status(BaseModel):
    """The state of the process."""

    status: str


def _errors(descriptions: dict[int, str]) -> Responses:
    return {status: {"model": Error, "description": description} for status, description in descriptions.items()}


KEY = _errors({401: "No API key, or a wrong one"})
REFUSED = _errors(
    {
        400: "No readable image, or a malformed form",
        404: "No such model",
        408: "The upload took too long",
        413: "The body, an image, or the number of images is too large",
        415: "The body is neither an image nor a form",
        422: "A parameter is invalid",
        503: "The service is busy; try again after Retry-After",
        504: "The answer took too long",
    }
)
REFUSED[503]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}

_ITEMS: dict[TaskName, Json] = {
    "classification": {
        "source": "a.jpg", "label": "rose", "probability": 0.91,
        "top": [{"label": "rose", "probability": 0.91}, {"label": "tulip", "probability": 0.07}],
    },
    "detection": {
        "source": "image 1", "width": 640, "height": 480,
        "detections": [{"label": "cell", "score": 0.88, "box_xyxy": [12.5, 40.0, 96.25, 130.0]}],
    },
    "segmentation": {
        "source": "image 1", "width": 480, "height": 360, "shares": {"road": 0.6, "sky": 0.4},
        "mask_png": "iVBORw0KGgo...",
    },
}  # fmt: skip
_EXAMPLES = {task: {"value": {"model": "mine", "task": task, "results": [item]}} for task, item in _ITEMS.items()}
PREDICTED: Responses = REFUSED | {200: {"content": {"application/json": {"examples": _EXAMPLES}}}}

_IMAGE = {"schema": {"type": "string", "format": "binary", "minLength": 1}}
_FILES = {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}
_FORM = {"schema": {"type": "object", "required": ["files"], "properties": {"files": _FILES}}}
IMAGES: Json = {
    "requestBody": {
        "required": True,
        "description": "One image as the body, or one or more files in a form.",
        "content": {
            "multipart/form-data": _FORM,
            "image/jpeg": _IMAGE,
            "image/png": _IMAGE,
            "application/octet-stream": _IMAGE,
        },
    }
}
