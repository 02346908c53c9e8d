"""The head of a safetensors file. It says where each array is in the file.

length of the header (8 bytes, little-endian) | header (JSON) | raw little-endian arrays
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
LENGTH_BYTES = _LENGTH.size
MAX_HEADER_BYTES = 100_000_000
"""Largest header, the same as for safetensors' own reader."""

_NAMES = {np.dtype("<f4"): "F32", np.dtype("<f8"): "F64"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class SafetensorsError(ValueError):
    """A file is not safetensors, or has arrays of other dtypes than float32 and float64."""


@dataclass(frozen=True)
class Entry:
    """One array. `begin` is its first byte, counted from the end of the head."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.begin + math.prod(self.shape) * self.dtype.itemsize


def lay_out(parameters: Sequence[tuple[str, np.dtype, tuple[int, ...]]], arrays: Sequence[str]) -> dict[str, Entry]:
    """The entries PARAMETER.ARRAY of a model's state, one after the other.

    They are sorted by array, then float64 before float32, then in the order of the parameters.

    Args:
        parameters: (name, dtype, shape) of each parameter.
        arrays: Names of the arrays that each parameter has, such as its slots.
    """
    entries: dict[str, Entry] = {}
    begin = 0
    for array in arrays:
        for dtype in (np.dtype("<f8"), np.dtype("<f4")):
            for name, own_dtype, shape in parameters:
                if own_dtype == dtype:
                    entries[f"{name}.{array}"] = Entry(dtype, shape, begin)
                    begin = entries[f"{name}.{array}"].end
    return entries


def encode_head(entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes before the arrays."""
    header: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    for name, entry in entries.items():
        header[name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def read_head(file: BinaryIO) -> tuple[dict[str, Entry], dict[str, str], int]:
    """Read a file's head: (entries, metadata, where the arrays begin).

    Raises:
        SafetensorsError: The file is not safetensors.
    """
    length = file.read(_LENGTH.size)
    if len(length) < _LENGTH.size:
        raise SafetensorsError("The file is too short to be safetensors.")
    (size,) = _LENGTH.unpack(length)
    if size > MAX_HEADER_BYTES:
        raise SafetensorsError(f"The file is not safetensors: its header would have {size} bytes.")
    text = file.read(size)
    try:
        header = json.loads(text)
        metadata = {str(key): str(value) for key, value in header.pop(_METADATA, {}).items()}
        entries = {name: _entry(name, item) for name, item in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SafetensorsError(f"The file's header is not that of safetensors: {error}") from error
    begin = _LENGTH.size + size
    file.seek(0, 2)
    available = file.tell() - begin
    for name, entry in entries.items():
        if entry.end > available:
            raise SafetensorsError(f"The file ends before {name!r} ends, so it is truncated.")
    return entries, metadata, begin


def _entry(name: str, item: dict[str, object]) -> Entry:
    if item["dtype"] not in _DTYPES:
        raise SafetensorsError(f"{name!r} is {item['dtype']}; optimizers' state is F32 or F64.")
    begin, end = item["data_offsets"]  # pyright: ignore[reportGeneralTypeIssues]
    entry = Entry(_DTYPES[str(item["dtype"])], tuple(int(n) for n in item["shape"]), int(begin))  # pyright: ignore
    if entry.end != end or entry.begin < 0 or any(n < 0 for n in entry.shape):
        raise SafetensorsError(f"The number of bytes of {name!r} does not fit its shape.")
    return entry
