"""The passes over a staging buffer on its way in and out, compiled by Numba: copy, convert and check at once.

A magnitude is compared as the integer that its bits are without the sign: in that order infinity and NaN come last, and
integers are compared without branches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np

_BITS = {np.dtype("<f4"): np.dtype("<u4"), np.dtype("<f8"): np.dtype("<u8")}


def take(staged: np.ndarray, elements: np.ndarray, limit: np.floating) -> bool:
    """Copy elements of the staging buffer's own dtype; whether all are numbers of at most `limit`."""
    bits = _BITS[staged.dtype]
    return _checked(_take, staged, elements.view(bits), limit)


def take_bfloat16(staged: np.ndarray, elements: np.ndarray, limit: np.floating) -> bool:
    """Likewise from bfloat16 to float32."""
    return _checked(_take_bfloat16, staged, elements, limit)


def within(staged: np.ndarray, limit: np.floating) -> bool:
    """Whether all elements are numbers of at most `limit`."""
    bits = _BITS[staged.dtype]
    loop = _compiled(_largest, bits.type, (bits,), True)
    return loop(staged.view(bits), _magnitude(bits)) <= _bits_of(limit)


def give_bfloat16(staged: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16."""
    elements = np.empty(staged.size, np.uint16)
    loop = _compiled(_narrow, None, (np.dtype("<u4"), np.dtype("<u2")), True)
    loop(staged.view(np.uint32), elements, np.uint32(0x7FFFFFFF))
    return elements


def _take(staged: Any, elements: Any, magnitude: Any) -> Any:
    largest = magnitude ^ magnitude
    for i in range(staged.size):
        staged[i] = elements[i]
        largest = max(largest, elements[i] & magnitude)
    return largest


def _take_bfloat16(staged: Any, elements: Any, magnitude: Any) -> Any:
    largest = magnitude ^ magnitude
    for i in range(staged.size):
        bits = np.uint32(elements[i]) << np.uint32(16)
        staged[i] = bits
        largest = max(largest, bits & magnitude)
    return largest


def _largest(staged: Any, magnitude: Any) -> Any:
    largest = magnitude ^ magnitude
    for i in range(staged.size):
        largest = max(largest, staged[i] & magnitude)
    return largest


def _narrow(staged: Any, elements: Any, magnitude: Any) -> None:
    # To nearest, ties to even; see optserve.halves.
    for i in range(staged.size):
        bits = staged[i]
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        elements[i] = np.uint32(0x7FC0) if bits & magnitude > np.uint32(0x7F800000) else rounded


def _checked(loop: Callable[..., Any], staged: np.ndarray, elements: np.ndarray, limit: np.floating) -> bool:
    bits = _BITS[staged.dtype]
    compiled = _compiled(loop, bits.type, (bits, elements.dtype), elements.flags.aligned)
    return compiled(staged.view(bits), elements, _magnitude(bits)) <= _bits_of(limit)


def _magnitude(bits: np.dtype) -> np.generic:
    """All bits but the sign."""
    return bits.type((1 << (8 * bits.itemsize - 1)) - 1)


def _bits_of(limit: np.floating) -> int:
    return int(np.array([limit]).view(_BITS[limit.dtype])[0])


@cache
def _compiled(
    loop: Callable[..., Any], result: type | None, dtypes: tuple[np.dtype, ...], aligned: bool
) -> Callable[..., Any]:
    """The loop for a staging buffer and what else, then the magnitude."""
    staged, *others = (numba.from_dtype(dtype) for dtype in dtypes)
    # What has come over the wire is read-only and lies anywhere; what is given out is ours.
    arrays = [numba.types.Array(other, 1, "C", readonly=result is not None, aligned=aligned) for other in others]
    kind = numba.void if result is None else staged
    return numba.njit(kind(staged[::1], *arrays, staged), nogil=True)(loop)
