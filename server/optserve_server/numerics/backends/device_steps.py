"""Makes steps on a device.

Kernels read and write host memory that the device can reach (pinned memory) where it is, so that a step of all
stretches is one launch, and nothing is copied. Other host memory goes through the device in windows, and so do arenas
that do not begin at a multiple of 16 bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from optserve_server.numerics.backends.base import Decay, Stretch
from optserve_server.numerics.backends.cuda_source import PLACE, THREADS, VECTOR_BYTES, KernelSource
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
        in_host_memory = [*operands, *([] if parameters is None else [parameters])]
        slot_addresses = [self._device.address(slot) for slot in slots]
        addresses = [self._device.host_address(array) for array in in_host_memory]
        # Elements one by one would take many times as long over PCIe.
        reached = [address for address in addresses if address is not None and address % VECTOR_BYTES == 0]
        if len(reached) < len(addresses):
            with self._windows_lock:
                self._run_in_windows(program, in_host_memory, len(operands), slot_addresses, stretches)
            return
        stream = self._take_stream()
        try:
            arenas = Arenas(reached[: len(operands)], slot_addresses, reached[len(operands) :])
            self.launch(program, arenas, stretches, stream)
            self._device.wait(stream)
        finally:
            self._streams.put(stream)

    def _take_stream(self) -> Any:
        """A stream that no other thread uses now."""
        try:
            return self._streams.get_nowait()
        except Empty:
            return self._device.new_stream()

    def launch(self, program: Program, arenas: Arenas, stretches: Sequence[Stretch], stream: Any) -> None:
        """Launch the kernel for all stretches; several times if they do not fit into one argument."""
        for blocks, argument in _arguments(program.source, arenas.in_order, stretches):
            self._device.launch(program.function, blocks, argument, stream)

    def _run_in_windows(
        self,
        program: Program,
        in_host_memory: Sequence[np.ndarray],
        operands: int,
        slots: Sequence[int],
        stretches: Sequence[Stretch],
    ) -> None:
        """Copy what is in host memory to the device and back, window by window, on streams that overlap."""
        size = in_host_memory[0].itemsize
        length = WINDOW_BYTES // size
        hosts = [array.ctypes.data for array in in_host_memory]
        # The curvature does not change.
        changing = [0, *range(operands, len(hosts))]
        first = min((stretch.where.start for stretch in stretches), default=0) // length * length
        last = max((stretch.where.stop for stretch in stretches), default=0)
        try:
            for number, low in enumerate(range(first, last, length)):
                parts = _clipped(stretches, low, low + length)
                if not parts:
                    continue
                stream, buffers = self._windows[number % WINDOWS]
                given = [self._device.address(buffer) for buffer in buffers[: len(hosts)]]
                ranges = _joined(parts)
                for start, stop in ranges:
                    for host, buffer in zip(hosts, given, strict=True):
                        source = host + (low + start) * size
                        self._device.copy_bytes(buffer + start * size, source, (stop - start) * size, stream)
                slots_here = [slot + low * size for slot in slots]
                self.launch(program, Arenas(given[:operands], slots_here, given[operands:]), parts, stream)
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


def _arguments(
    source: KernelSource, addresses: Sequence[int], stretches: Sequence[Stretch]
) -> Iterator[tuple[int, bytes]]:
    """(blocks of threads, argument) of each launch that the stretches need."""
    is_aligned = not any(address % VECTOR_BYTES for address in addresses)
    constants: dict[tuple[int, Decay | None], bytes] = {}
    filled = [stretch for stretch in stretches if stretch.where.stop > stretch.where.start]
    for begin in range(0, len(filled), source.capacity):
        rows, blocks = filled[begin : begin + source.capacity], 0
        parts = [source.header.pack(*addresses, len(rows), is_aligned)]
        for where, scalars, decay in rows:
            # Many stretches have the same constants.
            key = (id(scalars), decay)
            packed = constants.get(key)
            if packed is None:
                factor = decay.factor if decay else 0
                packed = source.constants.pack(factor, *scalars).ljust(source.stretch_bytes - PLACE.size, b"\0")
                constants[key] = packed
            start, stop = where.start, where.stop
            parts += PLACE.pack(start, stop, blocks, decay.place.value if decay else 0), packed
            vectors = -(-stop // source.width) - start // source.width
            blocks += -(-vectors // THREADS)
        yield blocks, b"".join(parts).ljust(source.argument_bytes, b"\0")


def _clipped(stretches: Sequence[Stretch], low: int, high: int) -> list[Stretch]:
    """The parts of stretches between two elements, counted from the first of these."""
    parts = [(max(item.where.start, low), min(item.where.stop, high), item) for item in stretches]
    return [item._replace(where=slice(start - low, stop - low)) for start, stop, item in parts if start < stop]


def _joined(stretches: Sequence[Stretch]) -> list[tuple[int, int]]:
    """The ranges of elements that stretches cover, neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for stretch in stretches:
        start = stretch.where.start
        first = ranges.pop()[0] if ranges and ranges[-1][1] == start else start
        ranges.append((first, stretch.where.stop))
    return ranges
