"""The slots of one optimizer at one step, in one file: what checkpoints are, and what states travel in.

It is a safetensors file; our description and a checksum are in its metadata. Arrays are named PARAMETER.SLOT.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import BinaryIO

import numpy as np

from optserve._common import safetensors
from optserve_server.numerics.layout import Layout
from optserve_server.numerics.parameter_steps import Written, each
from optserve_server.numerics.rules import Rule
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.state import State
from optserve_server.persistence.disk import SYSTEM_DISK, Disk

FORMAT_VERSION = 1
_BLOCK_BYTES = 1 << 20
_NO_CHECKSUM = "00000000"


class StateFileError(Exception):
    """A file that cannot be read as a state. The message says why."""


class Plan:
    """Where each arena of each array is in a file, and the file's head."""

    def __init__(self, layout: Layout, arrays: tuple[str, ...], metadata: dict[str, str] | None = None) -> None:
        parameters = [(parameter.name, parameter.dtype, parameter.shape) for parameter in layout.parameters]
        self.head = safetensors.encode_head(safetensors.lay_out(parameters, arrays), metadata)
        self.arenas: list[tuple[np.dtype, int, int, int]] = []
        """(dtype, array, first byte, elements) of those that are not empty, in the order of the file."""
        offset = len(self.head)
        for dtype, array, size in layout.each_arena(len(arrays)):
            self.arenas.append((dtype, array, offset, size))
            offset += size * dtype.itemsize
        self.size_bytes = offset
        self._begins = {(dtype, array): begin for dtype, array, begin, _ in self.arenas}

    def offset(self, dtype: np.dtype, array: int, start: int) -> int:
        """Byte of an element of an arena's array."""
        return self._begins[dtype, array] + start * dtype.itemsize


@dataclass(frozen=True)
class Description:
    """What a state file says about itself."""

    optimizer: str
    layout: Layout
    settings: Settings
    step: int
    create_time: datetime
    request_id: str = ""
    placed_by: str | None = None
    parameter_steps: Written | None = None
    kept: str = ""

    @property
    def rule(self) -> Rule:
        """The method."""
        return self.settings.rule

    @cached_property
    def text(self) -> str:
        """As the file holds it: what was read, or made of the rest."""
        return self.kept or json.dumps(
            {
                "format": FORMAT_VERSION,
                "optimizer": self.optimizer,
                **self.settings.to_json(),
                "parameters": self.layout.to_json(),
                "slots": self.settings.arrays,
                "step": self.step,
                "create_time": self.create_time.isoformat(),
                "request_id": self.request_id,
                "placed_by": self.placed_by,
                **({} if self.parameter_steps is None else {"parameter_steps": self.parameter_steps}),
            }
        )

    def metadata(self, checksum: str) -> dict[str, str]:
        """The metadata of the file."""
        return {"optserve": self.text, "crc32": checksum}


def _described_by(metadata: dict[str, str]) -> Description:
    try:
        content = json.loads(metadata["optserve"])
        version = content["format"]
        if version > FORMAT_VERSION:
            raise StateFileError(f"it has format {version}; this server knows up to {FORMAT_VERSION}")
        layout, parameter_steps = Layout.from_json(content["parameters"]), content.get("parameter_steps")
        if parameter_steps is not None:
            each(parameter_steps, len(layout.parameters))
        return Description(
            content["optimizer"], layout, Settings.from_json(content), content["step"],
            datetime.fromisoformat(content["create_time"]), content["request_id"],
            content.get("placed_by"), parameter_steps, metadata["optserve"],
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise StateFileError(f"its description is not readable ({error!r})") from error


class StateFile:
    """An open state file.

    Args:
        file: Open for reading, and for writing where something is written.
        description: What it holds.
        checksum: CRC-32 of the description and all arrays, eight hexadecimal digits, as far as it is known.
    """

    def __init__(
        self,
        file: BinaryIO,
        description: Description,
        checksum: str = _NO_CHECKSUM,
        disk: Disk = SYSTEM_DISK,
    ) -> None:
        self._disk = disk
        self.description = description
        self.file = file
        self._checksum = checksum
        self._plan = Plan(description.layout, description.settings.arrays, description.metadata(checksum))

    @classmethod
    def create(cls, file: BinaryIO, description: Description, disk: Disk = SYSTEM_DISK) -> StateFile:
        """Make an empty file into a state file whose arrays are still to be written.

        Raises:
            OSError: The disk has no room.
        """
        made = cls(file, description, disk=disk)
        made.allocate()
        return made

    def allocate(self) -> None:
        """Take room for all arrays, or raise OSError."""
        self._disk.allocate(self.file.fileno(), self.size_bytes)

    @classmethod
    def open(cls, file: BinaryIO) -> StateFile:
        """Read what a file says about itself; its arrays are not looked at.

        Raises:
            StateFileError: It is not a state file, damaged, or of a newer format.
        """
        if not os.fstat(file.fileno()).st_size:
            raise StateFileError("it is empty")
        # A mapping has a position of its own, which the descriptors of one file have not.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                _, metadata, _ = safetensors.read_head(content)  # pyright: ignore[reportArgumentType]
            except safetensors.SafetensorsError as error:
                raise StateFileError(str(error)) from error
            opened = cls(file, _described_by(metadata), metadata.get("crc32", _NO_CHECKSUM))
            if content[: len(opened._plan.head)] != opened._plan.head:
                raise StateFileError("its header does not fit its description")
        return opened

    @property
    def header_bytes(self) -> int:
        """Of the names, shapes and settings before the arrays."""
        return len(self._plan.head) - safetensors.LENGTH_BYTES

    @property
    def max_header_bytes(self) -> int:
        """How many of these a file may have that is to be read again."""
        return safetensors.MAX_HEADER_BYTES

    @property
    def size_bytes(self) -> int:
        """Of the whole file."""
        return self._plan.size_bytes

    def fill(self, state: State) -> None:
        """Write all arrays from a state that is held still.

        Raises:
            OSError: The disk does not take it.
        """
        checksum = zlib.crc32(self.description.text.encode())
        for dtype, slot, begin, size in self._plan.arenas:
            stride = _BLOCK_BYTES // dtype.itemsize
            for start in range(0, size, stride):
                block = state.read(dtype, slot, start, min(start + stride, size)).data.cast("B")
                checksum = zlib.crc32(block, checksum)
                self._write_all(block, begin + start * dtype.itemsize)
        # The digits have a fixed place, so the head keeps its length.
        self._checksum = f"{checksum:08x}"
        self._plan = Plan(
            self.description.layout, self.description.settings.arrays, self.description.metadata(self._checksum)
        )
        self._write_all(self._plan.head, 0)

    def write(self, dtype: np.dtype, slot: int, start: int, values: np.ndarray) -> None:
        """Write a stretch of one arena of one slot."""
        if values.size:
            self._write_all(values.data.cast("B"), self._plan.offset(dtype, slot, start))

    def _write_all(self, data: bytes | memoryview, position: int) -> None:
        """Write all bytes at a position, however few the disk takes at a time."""
        view = memoryview(data)
        while view:
            written = self._disk.write_one(self.file.fileno(), view, position)
            if not written:
                raise OSError("the disk took no bytes")
            view, position = view[written:], position + written

    def verify(self) -> None:
        """Compare the content with the checksum, or raise StateFileError."""
        # Read, not mapped: a bad sector is an error then, and not the end of the process.
        checksum = zlib.crc32(self.description.text.encode())
        position = len(self._plan.head)
        while position < self.size_bytes:
            block = os.pread(self.file.fileno(), min(_BLOCK_BYTES, self.size_bytes - position), position)
            if not block:
                raise StateFileError("it is truncated")
            checksum = zlib.crc32(block, checksum)
            position += len(block)
        if f"{checksum:08x}" != self._checksum:
            raise StateFileError("its content does not fit its checksum")

    @contextmanager
    def mapped(self) -> Iterator[list[tuple[np.dtype, int, np.ndarray]]]:
        """(dtype, slot, arena) for each arena of each slot, in the order of the file and in the file's own memory.

        Raises:
            StateFileError: The file is truncated.
        """
        if os.fstat(self.file.fileno()).st_size < self.size_bytes:
            raise StateFileError("it is truncated")
        mapping = mmap.mmap(self.file.fileno(), self.size_bytes, access=mmap.ACCESS_READ)
        # The mapping lives as long as an array of it.
        yield [
            (dtype, slot, np.frombuffer(mapping, dtype, size, begin)) for dtype, slot, begin, size in self._plan.arenas
        ]

    def close(self) -> None:
        """Close the file."""
        self.file.close()
