"""Schemas and examples of requests and responses, for /openapi.json."""

from __future__ import annotations

from mobilevit.files import Json

DESCRIPTION = """Classification, detection and segmentation of images.

Errors are `{"error": "one line", "request_id": "..."}`. If the service has an API key, send it as
`Authorization: Bearer KEY` or `X-API-Key: KEY`. `X-Request-ID` is returned; if a request has none, it gets one."""

_ERROR = {
    "type": "object",
    "required": ["error", "request_id"],
    "properties": {"error": {"type": "string"}, "request_id": {"type": "string"}},
}

Responses = dict[int | str, Json]


def _error(description: str, example: str) -> Json:
    value = {"error": example, "request_id": "6f1c0f1e9f0c4d0e8a3b5a7d9c2e4f60"}
    return {"description": description, "content": {"application/json": {"schema": _ERROR, "example": value}}}


_KEY: Responses = {401: _error("No API key, or a wrong one", "this service asks for an API key")}
_BUSY = _error("The service is busy; try again after Retry-After", "the service is busy; try again in 2 s")
_BUSY["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
_REFUSED: Responses = _KEY | {
    400: _error("No readable image, or a malformed form", "image 1: the file is empty"),
    404: _error("No such model", "no model 'roses'; there are flowers"),
    408: _error("The upload took too long", "the upload took longer than the limit of 30 s"),
    413: _error("The body, an image, or the number of images is too large", "the body is larger than the limit"),
    415: _error("The body is neither an image nor a form", "content type text/plain; send an image as image/jpeg"),
    422: _error("A parameter is invalid", "top: input should be greater than or equal to 1"),
    503: _BUSY,
    504: _error("The answer took too long", "no answer within the limit of 30 s"),
}

_ITEM = {
    "type": "object",
    "required": ["source"],
    "properties": {
        "source": {"type": "string", "description": "The name of the file in the form, or the number of the image."},
        "error": {"type": "string", "description": "The reason why this image of several cannot be read."},
        "label": {"type": "string", "description": "Classification: the most probable class."},
        "probability": {"type": "number"},
        "top": {"type": "array", "items": {"type": "object"}},
        "width": {"type": "integer", "description": "Width of the upright image in pixels."},
        "height": {"type": "integer"},
        "detections": {"type": "array", "items": {"type": "object"}},
        "shares": {"type": "object", "description": "Segmentation: share of the pixels of each class that occurs."},
        "mask_png": {"type": "string", "description": "Segmentation: base64 of a palette PNG with class indices."},
    },
}
_EXAMPLES = {
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

PREDICT: Responses = _REFUSED | {
    200: {
        "description": "A result for each image, in order",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["model", "task", "results"],
                    "properties": {
                        "model": {"type": "string"},
                        "task": {"type": "string", "enum": list(_EXAMPLES)},
                        "results": {"type": "array", "items": _ITEM},
                    },
                },
                "examples": {
                    task: {"value": {"model": "mine", "task": task, "results": [item]}}
                    for task, item in _EXAMPLES.items()
                },
            }
        },
    }
}

EXPLAIN: Responses = _REFUSED | {
    200: {
        "description": "An image that explains the prediction, and numbers",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["model", "image_png"],
                    "properties": {
                        "model": {"type": "string"},
                        "image_png": {"type": "string", "description": "base64 of a PNG"},
                    },
                }
            }
        },
    }
}

_IMAGE = {"schema": {"type": "string", "format": "binary", "minLength": 1}}
IMAGES: Json = {
    "requestBody": {
        "required": True,
        "description": "One image as the body, or one or more files in a form.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {
                        "files": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}
                    },
                }
            },
            "image/jpeg": _IMAGE,
            "image/png": _IMAGE,
            "application/octet-stream": _IMAGE,
        },
    }
}

MODELS: Responses = _KEY | {
    200: {
        "description": "All models; the first is used if a request names none",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["models"],
                    "properties": {"models": {"type": "array", "items": {"type": "object"}}},
                },
                "example": {
                    "models": [
                        {
                            "name": "flowers", "task": "classification", "architecture": "mobilevit_xxs",
                            "classes": ["daisy", "rose", "tulip"], "input_size": [256, 256], "resize_mode": "crop",
                            "metrics": {"top1": 0.91}, "score_threshold": None, "engine": "onnx fp32",
                            "explain": True,
                        }
                    ]
                },
            }
        },
    }
}  # fmt: skip

HEALTH: Responses = {
    200: {"description": "It is alive", "content": {"application/json": {"example": {"status": "ok"}}}},
}
READY: Responses = {
    200: {"description": "They are", "content": {"application/json": {"example": {"status": "ready"}}}},
    503: _BUSY,
}
METRICS: Responses = {200: {"description": "Text", "content": {"text/plain": {"schema": {"type": "string"}}}}}
