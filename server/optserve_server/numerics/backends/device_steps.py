"""Makes steps on a device.

Kernels read and write host memory that the device can reach (pinned memory) where it is, so that a step of all
stretches is one launch, and nothing is copied. Other host memory goes through the device in windows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from optserve_server.numerics.backends.base import Stretch
from optserve_server.numerics.backends.cuda_source import THREADS, KernelSource
from optserve_server.numerics.backends.device import Device

WINDOW_BYTES = 8 << 20
"""Bytes of each array in a window."""

WINDOWS = 3
"""Windows that are under way at a time: one arrives, one is computed, one leaves."""

_ARRAYS = 3
"""Arrays of a step that may be in host memory: the gradient, the curvature, x."""


class Program(NamedTuple):
    """A kernel on the device.

    Attributes:
        source: Its source.
        function: What `Device.load` has made of it.
    """

    source: KernelSource
    function: Any


class DeviceSteps:
    """Launches kernels. Safe to use from several threads.

    Args:
        device: The device.

    Raises:
        MemoryError: The device has no memory for the windows.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._streams: SimpleQueue[Any] = SimpleQueue()
        # Made at once, so that no step that is written down fails for want of memory.
        self._windows = [
            (device.new_stream(), [device.zeros(WINDOW_BYTES, np.dtype(np.uint8)) for _ in range(_ARRAYS)])
            for _ in range(WINDOWS)
        ]
        self._windows_lock = threading.Lock()

    def make(
        self,
        program: Program,
        operands: Sequence[np.ndarray],
        slots: Sequence[Any],
        parameters: np.ndarray | None,
        stretches: Sequence[Stretch],
    ) -> None:
        """Change stretches of the arenas of one dtype by one step, and return when it is done.

        Args:
            program: The kernel.
            operands: The arenas of the gradient, which becomes the update, and of the other operands.
            slots: The arenas of the slots, on the device.
            parameters: The arena of x, if the kernel changes it.
            stretches: Do not overlap.
        """
        table = table_of(program.source, stretches)
        if not table.size:
            return
        in_host_memory = [*operands, *([] if parameters is None else [parameters])]
        slot_addresses = [self._device.address(slot) for slot in slots]
        addresses = [self._device.host_address(array) for array in in_host_memory]
        reached = [address for address in addresses if address is not None]
        if len(reached) == len(addresses):
            arenas = Arenas(reached[: len(operands)], slot_addresses, reached[len(operands) :])
            with self._stream() as stream:
                self.launch(program, arenas, table, stream)
        else:
            with self._windows_lock:
                self._run_in_windows(program, in_host_memory, len(operands), slot_addresses, table)

    @contextmanager
    def _stream(self) -> Iterator[Any]:
        """A stream that no other thread uses now, and which is done afterwards."""
        try:
            stream = self._streams.get_nowait()
        except Empty:
            stream = self._device.new_stream()
        try:
            yield stream
            self._device.wait(stream)
        finally:
            self._streams.put(stream)

    def launch(self, program: Program, arenas: Arenas, table: np.ndarray, stream: Any) -> None:
        """Launch the kernel for all rows of a table; several times if they do not fit into one argument."""
        source, addresses = program.source, arenas.in_order
        is_aligned = not any(address % 16 for address in addresses)
        for begin in range(0, table.size, source.capacity):
            rows = table[begin : begin + source.capacity]
            vectors = -(-rows["stop"] // source.width) - rows["start"] // source.width
            ends = np.cumsum(-(-vectors // THREADS))
            argument = np.zeros((), source.argument)
            for name, address in zip(source.arrays, addresses, strict=True):
                argument[name] = address
            argument["stretches"], argument["is_aligned"] = rows.size, is_aligned
            stretch = argument["stretch"][: rows.size]
            stretch[...] = rows
            stretch["first_block"][1:] = ends[:-1]
            self._device.launch(program.function, int(ends[-1]), argument, stream)

    def _run_in_windows(
        self,
        program: Program,
        in_host_memory: Sequence[np.ndarray],
        operands: int,
        slots: Sequence[int],
        table: np.ndarray,
    ) -> None:
        """Copy what is in host memory to the device and back, window by window, on streams that overlap."""
        size = in_host_memory[0].itemsize
        length = WINDOW_BYTES // size
        hosts = [array.ctypes.data for array in in_host_memory]
        # The curvature does not change.
        changing = [0, *range(operands, len(hosts))]
        first, last = int(table["start"].min()) // length * length, int(table["stop"].max())
        try:
            for number, low in enumerate(range(first, last, length)):
                rows = _clipped(table, low, low + length)
                if not rows.size:
                    continue
                stream, buffers = self._windows[number % WINDOWS]
                given = [self._device.address(buffer) for buffer in buffers[: len(hosts)]]
                ranges = _joined(rows)
                for start, stop in ranges:
                    for host, buffer in zip(hosts, given, strict=True):
                        source = host + (low + start) * size
                        self._device.copy_bytes(buffer + start * size, source, (stop - start) * size, stream)
                slots_here = [slot + low * size for slot in slots]
                self.launch(program, Arenas(given[:operands], slots_here, given[operands:]), rows, stream)
                for start, stop in ranges:
                    for index in changing:
                        target = hosts[index] + (low + start) * size
                        self._device.copy_bytes(target, given[index] + start * size, (stop - start) * size, stream)
        finally:
            for stream, _ in self._windows:
                self._device.wait(stream)


class Arenas(NamedTuple):
    """Addresses of the first elements of arenas."""

    operands: list[int]
    slots: list[int]
    parameters: list[int]

    @property
    def in_order(self) -> list[int]:
        """As a kernel takes them."""
        return [*self.operands, *self.slots, *self.parameters]


def table_of(source: KernelSource, stretches: Sequence[Stretch]) -> np.ndarray:
    """The stretches that are not empty, as a kernel takes them."""
    filled = [stretch for stretch in stretches if stretch.where.stop > stretch.where.start]
    table = np.zeros(len(filled), source.argument["stretch"].base)
    if filled:
        table["start"] = [stretch.where.start for stretch in filled]
        table["stop"] = [stretch.where.stop for stretch in filled]
        table["scalars"] = [stretch.scalars for stretch in filled]
        table["place"] = [stretch.decay.place.value if stretch.decay else 0 for stretch in filled]
        table["factor"] = [stretch.decay.factor if stretch.decay else 0 for stretch in filled]
    return table


def _clipped(table: np.ndarray, low: int, high: int) -> np.ndarray:
    """The parts of stretches between two elements, counted from the first of these."""
    rows = table[(table["start"] < high) & (table["stop"] > low)]
    rows["start"] = np.maximum(rows["start"], low) - low
    rows["stop"] = np.minimum(rows["stop"], high) - low
    return rows


def _joined(rows: np.ndarray) -> list[tuple[int, int]]:
    """The ranges of elements that stretches cover, neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for start, stop in zip(rows["start"].tolist(), rows["stop"].tolist(), strict=True):
        first = ranges.pop()[0] if ranges and ranges[-1][1] == start else start
        ranges.append((first, stop))
    return ranges
