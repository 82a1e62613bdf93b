"""Records that are kept in files: strict, and read with their schema's version and with advice where they cannot be read."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import msgspec

from elastic_runtime.errors import ElasticError

R = TypeVar("R")
# The content of an older version's file in today's fields.
Upgrade = Callable[[dict[str, Any]], dict[str, Any]]
# Numbers as a file may hold them: what memory and int64 have room for, and no infinity.
Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Natural = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Large = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Finite = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of everything in the manifest."""


def read_record(
    text: bytes,
    where: str,
    kind: type[R],
    version: int,
    what: str,
    again: str,
    error: type[ElasticError],
    older: Mapping[int, Upgrade] = MappingProxyType({}),
) -> R:
    """Read a record with a schema version strictly; `what` it is and how to make it `again` are for the message of `error`.

    `older` versions are read as what their upgrade makes of them.
    """
    advice = again[0].upper() + again[1:]
    try:
        content = msgspec.json.decode(text)
        stated = content.get("schema_version")
    except (msgspec.DecodeError, AttributeError, UnicodeDecodeError, RecursionError) as reason:
        raise error(f"{where} is not a {what}: {reason}. Copy it again, or {again}.") from None
    known = isinstance(stated, int) and not isinstance(stated, bool)
    if stated != version and not (known and stated in older):
        newer = known and stated > version
        way = "upgrade with: pip install -U elastic-export" if newer else again
        raise error(f"{where} has schema_version {stated!r}; this version reads {version}: {way}")
    try:
        return msgspec.json.decode(text, type=kind) if stated == version else msgspec.convert(older[stated](content), kind)
    except msgspec.ValidationError as reason:
        raise error(f"{where} is not a valid {what}: {reason}. {advice}.") from None
