"""What the server answers, in the OpenAI API's form: pictures, events, models, errors."""

import base64
import io
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from elastic_runtime.contract.budget import key
from elastic_runtime.errors import BudgetError, BundleError, ElasticError, InferenceError, MissingError, UnreachableError, UsageError
from elastic_serve.body import Body, BodyError, NoModelError
from elastic_serve.engine import ClosingError, Drawn
from elastic_serve.scheduler import RefusedError
from elastic_serve.served import Served


def json(status: int, content: Any, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(msgspec.json.encode(content), status, dict(headers or {}), "application/json")


def error_of(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers that tell of an error."""
    if isinstance(error, RefusedError):
        if error.wait is None:
            ours = {"nearest_deadline_ms": math.ceil(1e3 * error.nearest)} if error.nearest else {}
            code, param = ("deadline_unreachable", "deadline_ms") if ours else ("too_many", "n")
            return 400, _error(str(error), "invalid_request_error", code, param, ours), {}
        ours = {"retry_after_ms": math.ceil(1e3 * error.wait)}
        ours |= {"nearest_deadline_ms": math.ceil(1e3 * error.nearest)} if error.nearest is not None else {}
        headers = {"retry-after": str(max(math.ceil(error.wait), 1)), "retry-after-ms": str(max(ours["retry_after_ms"], 1))}
        code = "deadline_unreachable" if error.nearest is not None else "queue_full"
        return 429, _error(str(error), "rate_limit_error", code, "deadline_ms" if error.nearest is not None else None, ours), headers
    if isinstance(error, NoModelError):
        return 404, _error(str(error), "invalid_request_error", "model_not_found", error.param), {}
    if isinstance(error, BodyError):
        return 400, _error(str(error), "invalid_request_error", error.code, error.param), {}
    if isinstance(error, BundleError):  # no fault of what was asked, and its message names files of this machine
        return (
            500,
            _error("a file of the model could not be opened here; the server's log says which", "server_error", "bundle_unreadable"),
            {},
        )
    if isinstance(error, UsageError | UnreachableError):
        code = "budget_not_offered" if isinstance(error, BudgetError) else "invalid_value"
        return 400, _error(str(error), "invalid_request_error", code), {}
    if isinstance(error, ClosingError):
        return 503, _error(str(error), "server_error", "closing"), {"retry-after": "1"}
    if isinstance(error, MissingError):
        return 503, _error(str(error), "server_error", "missing"), {}
    if isinstance(error, InferenceError | ElasticError):
        return 500, _error(str(error), "server_error", "inference_failed"), {}
    return 500, _error("something went wrong here; the server's log says what", "server_error", "internal_error"), {}


def failure(
    status: int, message: str, code: str, kind: str = "invalid_request_error", headers: Mapping[str, str] | None = None
) -> Response:
    """An error that is none of the product's own: of HTTP."""
    return json(status, _error(message, kind, code), headers)


def _error(message: str, kind: str, code: str, param: str | None = None, ours: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code} | dict(ours or {})}


def encoded(picture: Any, body: Body) -> str:
    """A PIL picture in the format that was asked for, as base64."""
    stream, options = io.BytesIO(), {}
    if body.output_format != "png" and body.output_compression is not None:
        options["quality"] = body.output_compression
    picture.save(stream, body.output_format.upper(), **options)
    return base64.b64encode(stream.getvalue()).decode()


def picture(drawn: Drawn, body: Body) -> dict[str, Any]:
    """One picture of an answer; `elastic` holds what the API has no words for."""
    return {"b64_json": encoded(drawn.result.images[0], body), "elastic": facts(drawn)}


def facts(drawn: Drawn) -> dict[str, Any]:
    steps = drawn.result.steps
    runs = [(budget, len(list(group))) for budget, group in itertools.groupby(key(record.budget) for record in steps)]
    return {
        "seed": drawn.result.request.seeds[0] if isinstance(drawn.result.request.seeds, tuple) else drawn.result.request.seeds,
        "seconds": round(drawn.seconds, 4),
        "late_ms": round(1e3 * drawn.late, 1),
        "budgets": [{"budget": budget, "steps": count} for budget, count in runs],
        "plan": drawn.result.facts.get("plan"),
    }


def generation(drawn: Sequence[Drawn], body: Body) -> dict[str, Any]:
    """The answer to a request."""
    return {"created": int(time.time()), "data": [picture(each, body) for each in drawn], **_form(drawn[0].result.images[0], body)}


def partial(preview: Any, index: int, step: int, steps: int, body: Body) -> bytes:
    """The event of a preview."""
    content = {"b64_json": encoded(preview, body), "partial_image_index": index, "created_at": int(time.time())}
    return event("image_generation.partial_image", content | _form(preview, body) | {"elastic": {"step": step + 1, "steps": steps}})


def completed(drawn: Drawn, body: Body) -> bytes:
    """The event of a picture that is done."""
    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}}
    content = picture(drawn, body) | {"created_at": int(time.time()), "usage": usage}
    return event("image_generation.completed", content | _form(drawn.result.images[0], body))


def event(name: str, content: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode({"type": name} | dict(content)) + b"\n\n"


def _form(picture: Any, body: Body) -> dict[str, Any]:
    return {
        "size": f"{picture.width}x{picture.height}",
        "quality": body.quality,
        "background": "opaque",
        "output_format": body.output_format,
    }


def model(served: Served, created: int) -> dict[str, Any]:
    """A model of the list, with what may be asked of it."""
    manifest = served.bundle.manifest
    height, width = served.size
    return {
        "id": served.name,
        "object": "model",
        "created": created,
        "owned_by": "elastic-export",
        "elastic": {
            "model": manifest.model.name,
            "takes": "class_labels" if served.by_classes else "nothing" if manifest.model.unconditional else "prompt",
            "num_classes": manifest.model.num_classes or None,
            "size": f"{width}x{height}",
            "axes": {axis.name: str(axis.span) for axis in manifest.axes},
            "budgets": [
                {"budget": key(row.budget), "point": dict(row.budget), "step_ms": round(1e3 * row.seconds, 2), "quality": row.quality}
                for row in served.rows
            ],
            "held": served.elastic,
            "chosen": "before each step" if served.elastic else "a plan, before the first step",
            "where": served.session.where,
            "rows": served.most,
            "takes_turns": served.batching(),
        },
    }
