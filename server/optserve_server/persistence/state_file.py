"""State files: the slots of one optimizer at one step, in one file. Checkpoints, exports and imports use them.

A state file is a safetensors file. Its metadata has the description of the state and a checksum. Its arrays are named
PARAMETER.SLOT.
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
from typing import BinaryIO, NamedTuple

import numpy as np

from optserve._common import safetensors
from optserve_server.engine.records import ArenaValues
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


class FileArena(NamedTuple):
    """Where one arena of one array is in a file.

    Attributes:
        dtype: Its dtype.
        array: Position of the array among the arrays of the file.
        offset: Its first byte in the file.
        size: Its number of elements.
    """

    dtype: np.dtype
    array: int
    offset: int
    size: int


class FileLayout:
    """Where the arenas of all arrays are in a safetensors file.

    Args:
        layout: The parameters.
        arrays: Name of each array. Each parameter has all of them.
        metadata: The metadata of the file.

    Attributes:
        head: The bytes before the arrays: names, dtypes, shapes and metadata.
        arenas: The arenas that are not empty, in the order of the file.
        size_bytes: Size of the file.
    """

    def __init__(self, layout: Layout, arrays: tuple[str, ...], metadata: dict[str, str] | None = None) -> None:
        parameters = [(parameter.name, parameter.dtype, parameter.shape) for parameter in layout.parameters]
        self.head = safetensors.encode_head(safetensors.lay_out(parameters, arrays), metadata)
        self.arenas: list[FileArena] = []
        offset = len(self.head)
        for dtype, array, size in layout.each_arena(len(arrays)):
            self.arenas.append(FileArena(dtype, array, offset, size))
            offset += size * dtype.itemsize
        self.size_bytes = offset
        self._offsets = {(arena.dtype, arena.array): arena.offset for arena in self.arenas}

    def offset(self, dtype: np.dtype, array: int, start: int) -> int:
        """The byte of the file where element `start` of an arena of an array begins."""
        return self._offsets[dtype, array] + start * dtype.itemsize


@dataclass(frozen=True)
class Description:
    """Everything about a state except its arrays.

    Attributes:
        optimizer: Name of the optimizer.
        layout: Its parameters.
        settings: Its method and settings.
        step: Number of steps applied.
        create_time: When the state was taken.
        request_id: The request that took it; empty if there was no request id.
        placed_by: See `Steps.placed_by`.
        parameter_steps: The step counters of the parameters; None if the method does not use them.
        text_read: The text that was read from a file; empty if the state was not read from a file.
    """

    optimizer: str
    layout: Layout
    settings: Settings
    step: int
    create_time: datetime
    request_id: str = ""
    placed_by: str | None = None
    parameter_steps: Written | None = None
    text_read: str = ""

    @property
    def rule(self) -> Rule:
        """The method."""
        return self.settings.rule

    @cached_property
    def text(self) -> str:
        """The description as JSON, as it is in the metadata of the file."""
        return self.text_read or json.dumps(
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


def _read_description(metadata: dict[str, str]) -> Description:
    """Read the description from the metadata of a file, or raise StateFileError."""
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
        file: The file, open for reading, and for writing if `allocate`, `fill` or `write` is called.
        description: The description of the state.
        checksum: CRC-32 of the description and all arrays, as eight hexadecimal digits; zeros while it is unknown.
        disk: The disk of the file.
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
        self._layout = FileLayout(description.layout, description.settings.arrays, description.metadata(checksum))

    @classmethod
    def create(cls, file: BinaryIO, description: Description, disk: Disk = SYSTEM_DISK) -> StateFile:
        """Allocate an empty file as a state file. Write its arrays with `write`.

        Raises:
            OSError: The disk is full, or refuses for another reason.
        """
        state_file = cls(file, description, disk=disk)
        state_file.allocate()
        return state_file

    def allocate(self) -> None:
        """Reserve the disk space of all arrays, or raise OSError."""
        self._disk.allocate(self.file.fileno(), self.size_bytes)

    @classmethod
    def open(cls, file: BinaryIO) -> StateFile:
        """Read the description of a state file. `verify` checks its arrays.

        Raises:
            StateFileError: It is not a state file, or it is damaged, or it has a newer format.
        """
        if not os.fstat(file.fileno()).st_size:
            raise StateFileError("it is empty")
        # Read by a mapping: duplicated descriptors of one file share their position, and mappings have none.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                _, metadata, _ = safetensors.read_head(content)  # pyright: ignore[reportArgumentType]
            except safetensors.SafetensorsError as error:
                raise StateFileError(str(error)) from error
            opened = cls(file, _read_description(metadata), metadata.get("crc32", _NO_CHECKSUM))
            if content[: len(opened._layout.head)] != opened._layout.head:
                raise StateFileError("its header does not match its description")
        return opened

    @property
    def header_bytes(self) -> int:
        """Bytes of the names, shapes and settings before the arrays."""
        return len(self._layout.head) - safetensors.LENGTH_BYTES

    @property
    def max_header_bytes(self) -> int:
        """Most `header_bytes` that a file may have so that it can be read."""
        return safetensors.MAX_HEADER_BYTES

    @property
    def size_bytes(self) -> int:
        """Size of the whole file."""
        return self._layout.size_bytes

    def fill(self, state: State) -> None:
        """Write all arrays of a state. The caller holds the optimizer's lock.

        Raises:
            OSError: The disk refuses.
        """
        checksum = zlib.crc32(self.description.text.encode())
        for dtype, array, offset, size in self._layout.arenas:
            stride = _BLOCK_BYTES // dtype.itemsize
            for start in range(0, size, stride):
                block = state.read(dtype, array, start, min(start + stride, size)).data.cast("B")
                checksum = zlib.crc32(block, checksum)
                self._write_all(block, offset + start * dtype.itemsize)
        # The checksum always has eight digits, so the head keeps its length.
        self._checksum = f"{checksum:08x}"
        self._layout = FileLayout(
            self.description.layout, self.description.settings.arrays, self.description.metadata(self._checksum)
        )
        self._write_all(self._layout.head, 0)

    def write(self, dtype: np.dtype, array: int, start: int, values: np.ndarray) -> None:
        """Write a stretch of one arena.

        Args:
            dtype: The arena's dtype.
            array: The arena's position among `Settings.arrays`.
            start: First element of the stretch.
            values: Its values.

        Raises:
            OSError: The disk refuses.
        """
        if values.size:
            self._write_all(values.data.cast("B"), self._layout.offset(dtype, array, start))

    def _write_all(self, data: bytes | memoryview, position: int) -> None:
        """Write all bytes at a position, however few bytes the disk takes per call."""
        view = memoryview(data)
        while view:
            written = self._disk.write_one(self.file.fileno(), view, position)
            if not written:
                raise OSError("the disk took no bytes")
            view, position = view[written:], position + written

    def verify(self) -> None:
        """Read the arrays and compare the checksum.

        Raises:
            StateFileError: The file is damaged.
            OSError: The file cannot be read.
        """
        # Read by system calls: a bad sector under a mapping would end the process by a signal.
        checksum = zlib.crc32(self.description.text.encode())
        position = len(self._layout.head)
        while position < self.size_bytes:
            block = os.pread(self.file.fileno(), min(_BLOCK_BYTES, self.size_bytes - position), position)
            if not block:
                raise StateFileError("it is truncated")
            checksum = zlib.crc32(block, checksum)
            position += len(block)
        if f"{checksum:08x}" != self._checksum:
            raise StateFileError("its content does not match its checksum")

    @contextmanager
    def mapped(self) -> Iterator[list[ArenaValues]]:
        """The arenas that are not empty, in the order of the file, as a mapping of the file, for a with-block.

        Raises:
            StateFileError: The file is truncated.
        """
        if os.fstat(self.file.fileno()).st_size < self.size_bytes:
            raise StateFileError("it is truncated")
        mapping = mmap.mmap(self.file.fileno(), self.size_bytes, access=mmap.ACCESS_READ)
        # The mapping is freed with the last array that refers to it.
        yield [
            ArenaValues(dtype, array, np.frombuffer(mapping, dtype, size, offset))
            for dtype, array, offset, size in self._layout.arenas
        ]

    def close(self) -> None:
        """Close the file."""
        self.file.close()
