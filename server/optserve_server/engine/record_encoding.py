"""The encoding that records share: their kinds, their message, and the bytes of their arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from optserve_server.numerics.layout import Layout, Payload

CREATED, UPDATED, DELETED, STEPPED, REPLACED, PLACED, ADDED = 1, 2, 3, 4, 5, 6, 7
"""Kinds of records in the journal."""

Message = dict[str, Any]
"""All of a record except its arrays, as JSON."""

Encoded = tuple[int, Message, Sequence[np.ndarray]]
"""(kind, message, arrays): the encoding of a record. The bytes of the arrays are the record's payload."""


ADDED_TO = "added_to"
"""The key under which an AdditionRecord has the name of its optimizer. Servers that do not know this kind look for the
key `optimizer` in each record, and refuse a journal where one lacks it; otherwise they would ignore the record."""


def optimizer_of(message: Message) -> str:
    """The name of the optimizer that a record is about; raises KeyError if the message has none."""
    return message[ADDED_TO] if ADDED_TO in message else message["optimizer"]


class ArenaValues(NamedTuple):
    """The values of one arena of one array.

    Attributes:
        dtype: The arena's dtype.
        array: The array's position among `Settings.arrays`.
        values: One-dimensional, with the values of all parameters of that dtype.
    """

    dtype: np.dtype
    array: int
    values: np.ndarray


def operands_in(payload: Payload, data: memoryview) -> Iterator[np.ndarray]:
    """Copies of the operands in a record, one operand after the other, each run by run."""
    for begin in range(0, len(data), max(payload.size_bytes, 1)):
        for run in payload.runs:
            yield np.frombuffer(data[begin + run.begin : begin + run.end], run.dtype).copy()


def arenas_in(layout: Layout, arrays: int, data: memoryview) -> Iterator[ArenaValues]:
    """The arenas of the first `arrays` arrays in a record, as views of its data."""
    begin = 0
    for dtype, array, size in layout.each_arena(arrays):
        end = begin + size * dtype.itemsize
        yield ArenaValues(dtype, array, np.frombuffer(data[begin:end], dtype))
        begin = end
