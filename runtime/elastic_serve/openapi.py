"""The OpenAPI document, made from the records that requests are read with."""

from typing import Any

import msgspec

from elastic_serve.body import Body, Limits


def document(limits: Limits) -> dict[str, Any]:
    """OpenAPI 3.1 of this server."""
    (reference,), components = msgspec.json.schema_components([Body], ref_template="#/components/schemas/{name}")
    fields = components["Body"]["properties"]
    fields["n"]["maximum"] = limits.pictures
    fields["steps"]["anyOf"] = [
        each | ({"maximum": limits.steps} if each.get("type") == "integer" else {}) for each in fields["steps"]["anyOf"]
    ]
    for name, field in fields.items():  # which is to leave it out
        if not any(each.get("type") == "null" for each in field.get("anyOf", ())):
            fields[name] = {"anyOf": [{key: value for key, value in field.items() if key != "default"}, {"type": "null"}]}
            fields[name] |= {"default": field["default"]} if "default" in field else {}
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

    def answering(words: str, kind: str = "application/json", schema: Any = None) -> dict[str, Any]:
        return {"200": {"description": words, "content": {kind: {"schema": schema or {"type": "object"}}}}}

    drawn = answering("Pictures; with `stream` server-sent events.", schema={"$ref": "#/components/schemas/Pictures"})
    drawn["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "elastic-export serve", "version": "1"},
        "paths": {
            "/v1/images/generations": {
                "post": {
                    "operationId": "generate",
                    "summary": "Draw pictures.",
                    "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}},
                    "responses": drawn | failing(400, 401, 403, 404, 408, 413, 429, 500, 503),
                }
            },
            "/v1/models": {
                "get": {
                    "operationId": "models",
                    "summary": "The bundles that are served.",
                    "responses": answering("Models.") | failing(401, 403),
                }
            },
            "/v1/models/{name}": {
                "get": {
                    "operationId": "model",
                    "summary": "One of them.",
                    "parameters": [name],
                    "responses": answering("A model.") | failing(401, 403, 404),
                }
            },
            "/health": {
                "get": {"operationId": "health", "summary": "Whether it draws.", "responses": answering("It does.") | failing(503)}
            },
            "/metrics": {
                "get": {
                    "operationId": "metrics",
                    "summary": "What Prometheus reads.",
                    "responses": answering("Metrics.", "text/plain", {"type": "string"}) | failing(401, 403),
                }
            },
        },
        "components": {
            "schemas": components | {"Error": error, "Picture": picture, "Pictures": answer},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }
