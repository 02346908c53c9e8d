"""The option --json, which prints the output of a command for programs. Keys are never renamed; new keys may come."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import typer
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

Json = Annotated[bool, typer.Option("--json", help="Print JSON, with keys that stay as they are.")]


def print_json(value: Any) -> None:
    """Print a value of dicts, lists, strings and numbers; numbers that JSON does not have are strings."""
    # Only ASCII, so that no character controls a terminal.
    typer.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def plain(message: Message) -> dict[str, Any]:
    """A message of the contract as a dict, by field name, with its defaults.

    Times are in ISO 8601, durations in seconds, enumerations by name. Fields of a oneof that are not set are left out.
    """
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            values[field.name] = [_value(field, item) for item in value]
        elif not field.has_presence or message.HasField(field.name):
            values[field.name] = _value(field, value)
        # An optional field is a oneof of its own.
        elif field.containing_oneof is None or len(field.containing_oneof.fields) == 1:
            values[field.name] = None
    return values


def _value(field: Any, value: Any) -> Any:
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if isinstance(value, Duration):
        return value.ToNanoseconds() / 1e9
    if isinstance(value, Message):
        return plain(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known else value
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
