"""The OpenAPI document, made from the records that requests are read with."""

from collections.abc import Mapping, Sequence
from typing import Any

from elastic_serve import fields
from elastic_serve.body import Limits
from elastic_serve.served import Served


def document(models: Sequence[Served], limits: Limits, keyed: bool = False) -> dict[str, Any]:
    """OpenAPI 3.1 of a server of these bundles; `keyed` tells whether it asks for a key."""
    error = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": "string"},
                    "retry_after_ms": {"type": "integer"},
                    "nearest_deadline_ms": {"type": "integer"},
                },
            }
        },
    }
    picture = {
        "type": "object",
        "required": ["b64_json", "elastic"],
        "properties": {"b64_json": {"type": "string"}, "elastic": {"type": "object"}},
    }
    answer = {
        "type": "object",
        "required": ["created", "data"],
        "properties": {"created": {"type": "integer"}, "data": {"type": "array", "items": {"$ref": "#/components/schemas/Picture"}}},
    }
    model = {
        "type": "object",
        "required": ["id", "object", "created", "owned_by", "elastic"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": "model"},
            "created": {"type": "integer"},
            "owned_by": {"type": "string"},
            "elastic": {"type": "object", "required": ["model", "takes", "size", "axes", "budgets", "where", "takes_turns"]},
        },
    }
    listed = {
        "type": "object",
        "required": ["object", "data"],
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}}},
    }
    health = {
        "type": "object",
        "required": ["status", "models"],
        "properties": {"status": {"type": "string"}, "models": {"type": "array", "items": {"type": "string"}}},
    }
    event = {
        "description": "One of a stream. `data` is JSON: of a picture as in `Picture`, of an error as in `Error`.",
        "type": "object",
        "required": ["event", "data"],
        "properties": {
            "event": {"enum": ["image_generation.partial_image", "image_generation.completed", "error"]},
            "data": {"type": "string", "contentMediaType": "application/json"},
        },
    }
    wrong = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}

    def failing(*codes: int) -> dict[str, Any]:
        words = {
            400: "A field is unknown or wrong, or the deadline cannot be kept even on an idle machine.",
            403: "A page from elsewhere asks, or the name is not this machine's own where the server listens to it alone.",
            401: "The API key is missing or wrong.",
            404: "There is no such model.",
            408: f"The body did not come within {limits.reading:g} s.",
            413: f"The body is larger than {limits.body} bytes.",
            429: "The deadline cannot be kept now, or the queue is full: Retry-After says when to ask again.",
            500: "The picture could not be drawn.",
            503: "The server does not draw.",
        }
        return {str(code): {"description": words[code], "content": wrong} for code in codes}

    def answering(words: str, name: str) -> dict[str, Any]:
        return {"200": {"description": words, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}}

    def open_to_all(codes: Mapping[str, Any]) -> dict[str, Any]:
        return {"security": [], "responses": codes}

    drawn = answering("Pictures; with `stream` server-sent events.", "Pictures")
    unwell = {"503": answering("It does not.", "Health")["200"]}
    drawn["200"]["content"]["text/event-stream"] = {"schema": {"$ref": "#/components/schemas/Event"}}
    answers = answering("Models.", "Models")
    answers["200"]["links"] = {"model": {"operationId": "model", "parameters": {"name": "$response.body#/data/0/id"}}}
    text = {"200": {"description": "Metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}}}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "elastic-export serve", "version": "1"},
        "paths": {
            "/v1/images/generations": {
                "post": {
                    "operationId": "generate",
                    "summary": "Draw pictures.",
                    "requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Body"}}}},
                    "responses": drawn | failing(400, 401, 403, 404, 408, 413, 429, 500, 503),
                }
            },
            "/v1/models": {
                "get": {
                    "operationId": "models",
                    "summary": "The bundles that are served.",
                    "responses": answers | failing(401, 403),
                }
            },
            "/v1/models/{name}": {
                "get": {
                    "operationId": "model",
                    "summary": "One of them.",
                    "parameters": [name],
                    "responses": answering("A model.", "Model") | failing(401, 403, 404),
                }
            },
            "/health": {
                "get": {"operationId": "health", "summary": "Whether it draws."} | open_to_all(answering("It does.", "Health") | unwell)
            },
            "/metrics": {
                "get": {
                    "operationId": "metrics",
                    "summary": "What Prometheus reads.",
                    "responses": text | failing(401, 403),
                }
            },
        },
        "components": {
            "schemas": {
                "Body": fields.request(models, limits),
                "Error": error,
                "Event": event,
                "Picture": picture,
                "Pictures": answer,
                "Model": model,
                "Models": listed,
                "Health": health,
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}] if keyed else [],
    }
