"""What the fields of a request may hold, as JSON Schema: of every bundle, and of each that is served."""

import itertools
from collections.abc import Sequence
from typing import Any

import msgspec

from elastic_runtime.contract.axis import Axis
from elastic_runtime.contract.schedule import CosineMask
from elastic_runtime.sampling.fitting import offered
from elastic_serve.body import Body, Limits
from elastic_serve.served import Served

Schema = dict[str, Any]
NOTHING: Schema = {"type": "null"}
# What fields say of each other, the same for every bundle.
_HELD = (
    {"required": ["budget"], "properties": {"budget": {"not": NOTHING}}},
    {"required": ["plan"], "properties": {"plan": {"not": NOTHING}}},
    {"required": ["quality"], "properties": {"quality": {"enum": ["low", "medium", "high", "hd"]}}},
)
RULES: list[Schema] = [
    *({"not": {"allOf": [one, other]}} for one, other in itertools.combinations(_HELD, 2)),
    {
        "if": {"required": ["partial_images"], "properties": {"partial_images": {"type": "integer", "minimum": 1}}},
        "then": {"required": ["stream"], "properties": {"stream": {"const": True}}},
    },
    {
        "if": {"required": ["stream"], "properties": {"stream": {"const": True}}},
        "then": {"properties": {"n": {"enum": [1, None]}, "class_labels": {"maxItems": 1}}},
    },
]


def body(limits: Limits) -> Schema:
    """The fields of a request, made from the record that it is read with."""
    _, components = msgspec.json.schema_components([Body], ref_template="#/components/schemas/{name}")
    schema = components["Body"]
    fields = schema["properties"]
    fields["n"]["maximum"] = limits.pictures
    for name, kind, more in (
        ("steps", "integer", {"maximum": limits.steps}),
        ("size", "string", {"pattern": "^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"}),
        ("guidance_interval", "array", {"items": {"type": "number", "minimum": 0, "maximum": 1}}),
    ):
        for each in fields[name].get("anyOf", [fields[name]]):
            each |= more if each.get("type") == kind else {}
    fields["guidance_interval"].pop("prefixItems", None)  # two of a kind
    for name, field in fields.items():  # null is to leave it out
        if not any(each.get("type") == "null" for each in field.get("anyOf", ())):
            fields[name] = {"anyOf": [{key: value for key, value in field.items() if key != "default"}, NOTHING]}
            fields[name] |= {"default": field["default"]} if "default" in field else {}
    return schema | {"allOf": RULES}


def taken(served: Served, limits: Limits, usual: bool) -> Schema:
    """What a bundle takes of these fields; `usual` where it is the one that is meant when none is named."""
    model = served.bundle.manifest.model
    fields: dict[str, Schema] = {"model": {"enum": [served.name, *([None] if usual else [])]}}
    rules: list[Schema] = []
    if served.by_classes:
        label = {"type": "integer", "maximum": model.num_classes - 1}
        fields |= {"class_labels": {"anyOf": [label, {"type": "array", "items": label}, NOTHING]}, "negative_prompt": NOTHING}
        nothing = {"properties": {"prompt": {"enum": ["", None]}}}
        rules.append({"anyOf": [_given("class_labels", {"not": NOTHING}) | nothing, _given("prompt", _number(model.num_classes - 1))]})
        rules[-1]["anyOf"][1]["properties"]["class_labels"] = NOTHING
        rules.append({"anyOf": list(_together(limits.pictures))})
    else:
        fields["class_labels"] = NOTHING
        if model.unconditional:
            fields["prompt"] = {"enum": ["", None]}
        else:
            rules.append(_given("prompt", {"type": "string"}))
    if served.elastic:
        fields |= {"plan": NOTHING, "size": {"enum": ["auto", f"{served.size[1]}x{served.size[0]}", None]}}
    budget: Schema = {"type": ["object", "null"], "additionalProperties": False}
    budget |= {"properties": {axis.name: _values(axis) for axis in served.bundle.manifest.axes}}
    fields |= {"budget": budget, "guidance_budget": budget, "sampler": {"enum": [*offered(model), None]}}
    if served.elastic and model.text is None:
        fields |= {"guidance_scale": {"anyOf": [{"type": "number", "minimum": 1}, NOTHING]}, "true_cfg_scale": NOTHING}
    if not isinstance(model.schedule, CosineMask):
        fields["temperature"] = NOTHING
    if not any(axis.input == "slots" for axis in served.bundle.manifest.axes):
        fields |= {"drop_fraction": {"enum": [0, None]}, "guidance_drop_fraction": NOTHING}
    return {"properties": fields, "allOf": rules}


def _given(name: str, schema: Schema) -> Schema:
    return {"required": [name], "properties": {name: schema}}


def _together(pictures: int) -> list[Schema]:
    """So many classes, and so many pictures of each, as make no more than that."""
    ways = {pictures // many: many for many in range(1, pictures + 1)}  # the largest n for each number of classes
    return [{"properties": {"n": {"maximum": many}, "class_labels": {"maxItems": classes}}} for classes, many in ways.items()]


def _number(most: int) -> Schema:
    """A whole number up to `most`, as a text that may have white space around it and zeros before."""
    digits = str(most)
    ways = [digits, *([f"[0-9]{{1,{len(digits) - 1}}}"] if len(digits) > 1 else [])]
    for place, digit in enumerate(digits):
        if digit != "0":
            ways.append(f"{digits[:place]}[0-{int(digit) - 1}][0-9]{{{len(digits) - place - 1}}}")
    return {"type": "string", "pattern": rf"^\s*0*({'|'.join(ways)})\s*$"}


def _values(axis: Axis) -> Schema:
    if axis.min % axis.step:
        return {"enum": list(axis.values)}
    return {"type": "integer", "minimum": axis.min, "maximum": axis.max, "multipleOf": axis.step}


def request(models: Sequence[Served], limits: Limits) -> Schema:
    """A request to this server: the fields, and what one of its bundles takes of them."""
    every = [taken(served, limits, usual=not place) for place, served in enumerate(models)]
    whole = body(limits)
    return whole | ({"allOf": [*RULES, *every]} if len(every) == 1 else {"anyOf": every})
