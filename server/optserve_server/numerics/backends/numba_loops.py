"""The passes over a staging buffer on its way in and out, compiled by Numba: copy, convert and check at once.

A magnitude is compared as the integer that its bits are without the sign: in that order infinity and NaN come last, and
integers are compared without branches. Arrays are seen as those integers within the loops, where it costs nothing.
Numba makes 64 bits of what an operation on 32 gives, which fill half as many step slots, so it is made 32 again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from functools import cache
from typing import TypeVar

import numba
import numpy as np

_FLOAT32, _FLOAT64 = np.dtype("<f4"), np.dtype("<f8")
_BITS = {_FLOAT32: np.uint32, _FLOAT64: np.uint64}
_MAGNITUDE = {_FLOAT32: np.uint32(0x7FFF_FFFF), _FLOAT64: np.uint64(0x7FFF_FFFF_FFFF_FFFF)}
"""All bits but the sign."""

_Loop = TypeVar("_Loop", bound=Callable[..., float | None])


def receive(staged: np.ndarray, elements: np.ndarray) -> float:
    """Copy elements of the staging buffer's own dtype; gives the largest magnitude, NaN if one is NaN."""
    return _receive(staged.dtype, elements.flags.aligned)(staged, elements)


def receive_bfloat16(staged: np.ndarray, elements: np.ndarray) -> float:
    """Likewise from bfloat16 to float32."""
    return _receive_bfloat16(elements.flags.aligned)(staged, elements)


def largest(staged: np.ndarray) -> float:
    """The largest magnitude, NaN if one is NaN."""
    return _largest(staged.dtype)(staged)


def to_bfloat16(staged: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16."""
    elements = np.empty(staged.size, np.uint16)
    _narrow()(staged, elements)
    return elements


def _compile_once(make: Callable[..., _Loop]) -> Callable[..., _Loop]:
    """`functools.cache`, which lets every thread make what is not there yet, and here it takes half a second.

    The first step of each of many streams would wait for as many compilations. What is there is found without the lock.
    """
    lock, made = threading.Lock(), cache(make)

    @cache
    def find(*key: Hashable) -> _Loop:
        with lock:
            return made(*key)

    return find


def _compiled(loop: Callable[..., float], staged: np.dtype, *elements: numba.types.Array) -> Callable[..., float]:
    """A loop that copies elements, if any, into a staging buffer, and gives the largest magnitude that is there."""
    element = numba.from_dtype(staged)
    return numba.njit(element(element[::1], *elements), nogil=True)(loop)


def _wire_array(dtype: np.dtype, *, aligned: bool) -> numba.types.Array:
    """What has come over the wire is read-only and lies anywhere."""
    return numba.types.Array(numba.from_dtype(dtype), 1, "C", readonly=True, aligned=aligned)


@_compile_once
def _receive(dtype: np.dtype, aligned: bool) -> Callable[..., float]:
    number, bits, magnitude = dtype.type, _BITS[dtype], _MAGNITUDE[dtype]

    def loop(staged: np.ndarray, elements: np.ndarray) -> float:
        target, source = staged.view(bits), elements.view(bits)
        largest = bits(0)
        for i in range(target.size):
            word = source[i]
            target[i] = word
            largest = max(largest, bits(word & magnitude))
        return np.full(1, bits(largest)).view(number)[0]

    return _compiled(loop, dtype, _wire_array(dtype, aligned=aligned))


@_compile_once
def _receive_bfloat16(aligned: bool) -> Callable[..., float]:
    magnitude = _MAGNITUDE[_FLOAT32]

    def loop(staged: np.ndarray, elements: np.ndarray) -> float:
        target = staged.view(np.uint32)
        largest = np.uint32(0)
        for i in range(target.size):
            wide = np.uint32(np.uint32(elements[i]) << np.uint32(16))
            target[i] = wide
            largest = max(largest, np.uint32(wide & magnitude))
        return np.full(1, np.uint32(largest)).view(np.float32)[0]

    return _compiled(loop, _FLOAT32, _wire_array(np.dtype("<u2"), aligned=aligned))


@_compile_once
def _largest(dtype: np.dtype) -> Callable[..., float]:
    number, bits, magnitude = dtype.type, _BITS[dtype], _MAGNITUDE[dtype]

    def loop(staged: np.ndarray) -> float:
        words = staged.view(bits)
        largest = bits(0)
        for i in range(words.size):
            largest = max(largest, bits(words[i] & magnitude))
        return np.full(1, bits(largest)).view(number)[0]

    return _compiled(loop, dtype)


@_compile_once
def _narrow() -> Callable[..., None]:
    magnitude = _MAGNITUDE[_FLOAT32]

    def loop(staged: np.ndarray, elements: np.ndarray) -> None:
        # To nearest, ties to even; see optserve._common.half_floats.
        source = staged.view(np.uint32)
        for i in range(source.size):
            bits = source[i]
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            elements[i] = np.uint32(0x7FC0) if bits & magnitude > np.uint32(0x7F800000) else rounded

    return numba.njit(numba.void(numba.float32[::1], numba.uint16[::1]), nogil=True)(loop)
