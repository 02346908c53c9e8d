"""The segment that a client shares with a server on the same host. Tensors travel through it, not in messages."""

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
"""One array of a step: gradient or curvature, index of the parameter, values."""

NONCE_BYTES = 32
_WORD = np.dtype(np.uint64)


class SharedStaging:
    """The segment of one stream. The client writes gradients into it; the server overwrites them by updates.

    Each tensor has a region of its own.

    Args:
        message: The server's offer: the segment's name and the offset of each region, in bytes.
        sizes: (bytes, bytes of an element) of each parameter.
        curved: Whether there is a region for the curvature of each parameter as well.

    Raises:
        OSError: This process cannot reach the segment.
        InternalError: Regions overlap, lie outside the segment, or do not fit the parameters.
    """

    def __init__(self, message: steps_pb2.SharedMemory, sizes: Sequence[tuple[int, int]], *, curved: bool) -> None:
        number = re.fullmatch(r"sysv:([0-9]{1,10})", message.segment)
        if number is None:
            raise OSError(f"{message.segment[:80]!r} is no segment that this version knows")
        _check_regions(message, sizes, curved=curved)
        self._memory = sysv.attach(int(number[1]), message.size_bytes)
        self._offsets = {GRADIENT: message.offsets, CURVATURE: message.curvature_offsets}
        self._regions: dict[tuple[Operand, int], np.ndarray] = {}
        self._arrays: dict[tuple[Operand, int], np.ndarray] = {}
        self._dirty = self._word(message.dirty_offset)
        self._replied = self._word(message.replied_offset)
        self.nonce = self._memory[message.nonce_offset : message.nonce_offset + NONCE_BYTES].tobytes()

    def _word(self, offset: int) -> np.ndarray:
        return self._memory[offset : offset + _WORD.itemsize].view(_WORD)

    def array(self, operand: Operand, index: int, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """The region of one parameter as an array; the same object each time, unless the caller has reshaped it."""
        array, shape = self._arrays.get((operand, index)), tuple(shape)
        if array is None or array.shape != shape or array.dtype != dtype or not array.flags.carray:
            array = self._region(operand, index, math.prod(shape), dtype).reshape(shape)
            self._arrays[operand, index] = array
        return array

    def _is_region(self, operand: Operand, index: int, array: np.ndarray, region: np.ndarray) -> bool:
        """Whether an array is the region itself, so that it needs no copy."""
        return array is self._arrays.get((operand, index)) or _same_address(region, array)

    def _region(self, operand: Operand, index: int, size: int, dtype: np.dtype) -> np.ndarray:
        """The region of one parameter as a flat array; `size` and `dtype` are the same at each call."""
        region = self._regions.get((operand, index))
        if region is None:
            start = self._offsets[operand][index]
            region = self._regions[operand, index] = self._memory[start : start + size * dtype.itemsize].view(dtype)
        return region

    def put(self, arrivals: Iterable[Arrival | None]) -> None:
        """Copy the arrays of a step into their regions; an array that is the region itself needs no copy."""
        self.mark_dirty()
        for arrival in arrivals:
            if arrival is None:
                continue
            operand, index, array = arrival
            region = self._region(operand, index, array.size, array.dtype)
            if not self._is_region(operand, index, array, region):
                np.copyto(region, array.reshape(-1))

    def get(self, updates: Mapping[int, np.ndarray]) -> None:
        """Copy updates out of their regions, by index of their parameters."""
        for index, array in updates.items():
            region = self._region(GRADIENT, index, array.size, array.dtype)
            if self._is_region(GRADIENT, index, array, region):
                # The caller may change them from now on, so the server must not replay them.
                self.mark_dirty()
            else:
                np.copyto(array.reshape(-1), region)

    def mark_dirty(self) -> None:
        """Set the dirty word: the segment's gradients are new, or its updates may have been changed."""
        self._dirty[0] = 1

    def release(self) -> None:
        """Drop all references to the segment; it stays mapped as long as a caller has an array of it."""
        self._memory = self._dirty = self._replied = np.empty(0, np.uint8)
        self._regions.clear()
        self._arrays.clear()

    def has_overwritten(self, step: int, arrays: Iterable[np.ndarray]) -> bool:
        """Whether these gradients lie in the segment, and the server overwrites them by updates of `step`."""
        return int(self._replied[0]) == step and any(np.may_share_memory(self._memory, array) for array in arrays)


def _check_regions(message: steps_pb2.SharedMemory, sizes: Sequence[tuple[int, int]], *, curved: bool) -> None:
    """Raise InternalError unless each thing has a region of its own within the segment."""
    regions = [(message.nonce_offset, NONCE_BYTES, 1)]
    regions += [(offset, _WORD.itemsize, _WORD.itemsize) for offset in (message.dirty_offset, message.replied_offset)]
    for offsets, wanted in ((message.offsets, sizes), (message.curvature_offsets, sizes if curved else ())):
        if len(offsets) != len(wanted):
            raise InternalError(f"The server's segment has {len(offsets)} regions for {len(wanted)} tensors.")
        regions += [(offset, *size) for offset, size in zip(offsets, wanted, strict=True)]
    free = 0
    for offset, size_bytes, item_bytes in sorted(regions):
        if size_bytes and (offset < free or offset % item_bytes):
            raise InternalError(f"The server's segment has regions that overlap or are not aligned at byte {offset}.")
        free = max(free, offset + size_bytes)
    if free > message.size_bytes:
        raise InternalError(f"The server's segment has {message.size_bytes} bytes, but a region ends at byte {free}.")


class SharedBuffers:
    """The arrays that `Optimizer.buffers` has returned. It refers to them weakly: the segment may end earlier.

    Args:
        arrays: The region of each parameter, in the order of the parameters.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = [weakref.ref(array) for array in arrays]
        self._begins = [_address(array) for array in arrays]
        self._begin = min(self._begins, default=0)
        self._end = max((_address(array) + array.nbytes for array in arrays), default=0)

    def consist_of(self, arrays: Sequence[np.ndarray]) -> bool:
        """Whether these are the same array objects."""
        return all(known() is array for known, array in zip(self._arrays, arrays, strict=True))

    def belongs_to_another(self, index: int, array: np.ndarray) -> bool:
        """Whether an array for one parameter lies in the region of another one, and would be overwritten."""
        if array is self._arrays[index]():
            return False
        address = _address(array)
        return address != self._begins[index] and self._begin <= address < self._end and array.size > 0


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _same_address(region: np.ndarray, array: np.ndarray) -> bool:
    # An array without a base owns its memory. To ask for addresses takes a microsecond.
    if array.base is None:
        return False
    return region.__array_interface__["data"] == array.__array_interface__["data"]
