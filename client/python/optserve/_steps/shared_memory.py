"""The memory that a client shares with a server on the same host, instead of sending tensors."""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from optserve._common import sysv
from optserve.errors import InternalError
from optserve.v1 import steps_pb2

GRADIENT, CURVATURE = steps_pb2.OPERAND_GRADIENT, steps_pb2.OPERAND_CURVATURE
Operand: TypeAlias = "steps_pb2.Operand"
Arrival: TypeAlias = "tuple[Operand, int, np.ndarray]"
"""Something that a step brings: what it is, the index of the parameter, the array."""

NONCE_BYTES = 32
_WORD = np.dtype(np.uint64)


class SharedStaging:
    """The staging area of one optimizer: gradients go in, updates come back in their place.

    Args:
        message: The server's offer.
        sizes: (bytes, bytes of an element) of each parameter.
        curved: Whether there is a place for the curvature of each as well.

    Raises:
        OSError: This process cannot reach the segment.
        InternalError: The places in it overlap, do not lie in it, or are not those of the parameters.
    """

    def __init__(self, message: steps_pb2.SharedMemory, sizes: Sequence[tuple[int, int]], *, curved: bool) -> None:
        number = re.fullmatch(r"sysv:([0-9]{1,10})", message.segment)
        if number is None:
            raise OSError(f"{message.segment[:80]!r} is no segment that this version knows")
        _check_places(message, sizes, curved=curved)
        self._memory = sysv.attach(int(number[1]), message.size_bytes)
        self._offsets = {GRADIENT: message.offsets, CURVATURE: message.curvature_offsets}
        self._places: dict[tuple[Operand, int], np.ndarray] = {}
        self._arrays: dict[tuple[Operand, int], np.ndarray] = {}
        self._dirty = self._word(message.dirty_offset)
        self._replied = self._word(message.replied_offset)
        self.nonce = self._memory[message.nonce_offset : message.nonce_offset + NONCE_BYTES].tobytes()

    def _word(self, offset: int) -> np.ndarray:
        return self._memory[offset : offset + _WORD.itemsize].view(_WORD)

    def array(self, operand: Operand, index: int, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """The place of one parameter, always the same array, unless its user has made another kind of array of it."""
        array, shape = self._arrays.get((operand, index)), tuple(shape)
        if array is None or array.shape != shape or array.dtype != dtype or not array.flags.carray:
            array = self._place(operand, index, math.prod(shape), dtype).reshape(shape)
            self._arrays[operand, index] = array
        return array

    def _is_place(self, operand: Operand, index: int, array: np.ndarray, place: np.ndarray) -> bool:
        """Whether an array is the place itself, and not to be copied."""
        return array is self._arrays.get((operand, index)) or _same(place, array)

    def _place(self, operand: Operand, index: int, size: int, dtype: np.dtype) -> np.ndarray:
        """Likewise, flat; its size and dtype are always the same."""
        place = self._places.get((operand, index))
        if place is None:
            start = self._offsets[operand][index]
            place = self._places[operand, index] = self._memory[start : start + size * dtype.itemsize].view(dtype)
        return place

    def put(self, arrivals: Iterable[Arrival | None]) -> None:
        """Write what a step brings; an array that is the place itself is there already."""
        self.touch()
        for arrival in arrivals:
            if arrival is None:
                continue
            operand, index, array = arrival
            place = self._place(operand, index, array.size, array.dtype)
            if not self._is_place(operand, index, array, place):
                np.copyto(place, array.reshape(-1))

    def get(self, updates: Mapping[int, np.ndarray]) -> None:
        """Read updates by index of their parameters."""
        for index, array in updates.items():
            place = self._place(GRADIENT, index, array.size, array.dtype)
            if self._is_place(GRADIENT, index, array, place):
                # They are the caller's from now on, and no longer a reply to be replayed.
                self.touch()
            else:
                np.copyto(array.reshape(-1), place)

    def touch(self) -> None:
        """Say that what is here may be overwritten from now on."""
        self._dirty[0] = 1

    def release(self) -> None:
        """Let go of the memory, which lives on as long as somebody has an array of it."""
        self._memory = self._dirty = self._replied = np.empty(0, np.uint8)
        self._places.clear()
        self._arrays.clear()

    def has_overwritten(self, step: int, arrays: Iterable[np.ndarray]) -> bool:
        """Whether these gradients of a step lie here, and the server has begun to put its updates in their place."""
        return int(self._replied[0]) == step and any(np.may_share_memory(self._memory, array) for array in arrays)


def _check_places(message: steps_pb2.SharedMemory, sizes: Sequence[tuple[int, int]], *, curved: bool) -> None:
    """Raise InternalError unless everything has a place of its own within the segment."""
    places = [(message.nonce_offset, NONCE_BYTES, 1)]
    places += [(offset, _WORD.itemsize, _WORD.itemsize) for offset in (message.dirty_offset, message.replied_offset)]
    for offsets, wanted in ((message.offsets, sizes), (message.curvature_offsets, sizes if curved else ())):
        if len(offsets) != len(wanted):
            raise InternalError(f"The server's segment has {len(offsets)} places for {len(wanted)} tensors.")
        places += [(offset, *size) for offset, size in zip(offsets, wanted, strict=True)]
    free = 0
    for offset, size_bytes, item_bytes in sorted(places):
        if size_bytes and (offset < free or offset % item_bytes):
            raise InternalError(f"The server's segment has two things at byte {offset}, or one that is not aligned.")
        free = max(free, offset + size_bytes)
    if free > message.size_bytes:
        raise InternalError(f"The server's segment of {message.size_bytes} bytes has a place up to byte {free}.")


class Lent:
    """The places of one staging area's gradients that a user has as arrays.

    It does not keep them, as the memory may be gone before this is.

    Args:
        arrays: Those of each parameter.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = [weakref.ref(array) for array in arrays]
        self._begins = [_address(array) for array in arrays]
        self._begin = min(self._begins, default=0)
        self._end = max((_address(array) + array.nbytes for array in arrays), default=0)

    def are(self, arrays: Sequence[np.ndarray]) -> bool:
        """Whether it is made of these very arrays."""
        return all(known() is array for known, array in zip(self._arrays, arrays, strict=True))

    def is_of_another(self, index: int, array: np.ndarray) -> bool:
        """Whether an array for one parameter lies in the place of another, which would be overwritten or read late."""
        if array is self._arrays[index]():
            return False
        address = _address(array)
        return address != self._begins[index] and self._begin <= address < self._end and array.size > 0


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _same(place: np.ndarray, array: np.ndarray) -> bool:
    return place.__array_interface__["data"] == array.__array_interface__["data"]
