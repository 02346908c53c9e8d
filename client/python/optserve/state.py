"""An optimizer's state outside the service: arrays in memory, and safetensors files."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from optserve import safetensors
from optserve.algorithms import ALGORITHMS, Algorithm
from optserve.errors import InvalidArgumentError

FORMAT_VERSION = 1
PARAMETER = "parameter"
"""Name of the hosted parameter among the arrays of a state; no method has a slot of that name."""

Progress = Callable[[int, int], None]
"""Told (bytes done, bytes in all)."""


def no_progress(_done: int, _total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a parameter, where there is no array at hand.

    Args:
        shape: Extents; empty for a scalar.
        dtype: float32 or float64, as NumPy understands it.
    """

    shape: tuple[int, ...]
    dtype: Any = "float32"


class HostedParameters(NamedTuple):
    """The parameters that a server holds, all of one step.

    Attributes:
        step: Steps that had been applied to them.
        arrays: x by name.
    """

    step: int
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True)
class Checkpoint:
    """A named copy of an optimizer's state on the server.

    Attributes:
        tag: Its name.
        step: Steps that had been applied when it was taken.
        size_bytes: Of its file.
        create_time: Seconds since 1970, UTC.
    """

    tag: str
    step: int
    size_bytes: int
    create_time: float


@dataclass(frozen=True)
class OptimizerState:
    """All that an optimizer knows at one step.

    Attributes:
        step: Steps applied.
        algorithm: The method with its hyper-parameters.
        parameters: Shape and dtype of each parameter by name, in the optimizer's order.
        slots: The arrays by parameter, then by slot; in the parameter's shape and dtype. Where the server holds the
            parameters, `parameter` is the last of the slots.
    """

    step: int
    algorithm: Algorithm
    parameters: Mapping[str, TensorSpec]
    slots: Mapping[str, Mapping[str, np.ndarray]]

    @property
    def hosted(self) -> bool:
        """Whether the parameters themselves are part of it."""
        return any(PARAMETER in arrays for arrays in self.slots.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(array.nbytes for arrays in self.slots.values() for array in arrays.values())

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; its tensors are named PARAMETER.SLOT.

        The file has its name only once it is whole and on disk.

        Raises:
            InvalidArgumentError: The slots do not fit `parameters`.
        """
        path = Path(path)
        specs = [(name, np.dtype(spec.dtype), tuple(spec.shape)) for name, spec in self.parameters.items()]
        slots = list(next(iter(self.slots.values()), {}))
        entries = safetensors.place(specs, slots)
        arrays = {f"{name}.{slot}": array for name, slots in self.slots.items() for slot, array in slots.items()}
        for name, entry in entries.items():
            if name not in arrays or (arrays[name].dtype, arrays[name].shape) != (entry.dtype, entry.shape):
                raise InvalidArgumentError(f"{name} is not there, or not {list(entry.shape)} {entry.dtype}.")
        description = json.dumps(
            {
                "format": FORMAT_VERSION,
                "rule": {"name": self.algorithm.name, **asdict(self.algorithm)},
                "parameters": [[name, shape, dtype.name] for name, dtype, shape in specs],
                "slots": slots,
                "step": self.step,
            }
        )
        ordered = [arrays[name] for name in entries]
        metadata = {"optserve": description, "crc32": _checksum(description, ordered)}
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(safetensors.encode_head(entries, metadata))
                for array in ordered:
                    file.write(_bytes(array))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> OptimizerState:
        """Read a file that `save` has written, or a checkpoint's from a server's data folder.

        Raises:
            InvalidArgumentError: It is none, of a newer version, or damaged.
        """
        with Path(path).open("rb") as file:
            try:
                return cls._read(file)
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidArgumentError(f"{path} is not an optimizer's state: {error}") from error

    @classmethod
    def _read(cls, file: BinaryIO) -> OptimizerState:
        _, metadata, _ = safetensors.read_head(file)
        if "optserve" not in metadata:
            raise ValueError("its metadata has nothing of optserve")
        content = json.loads(metadata["optserve"])
        if content["format"] > FORMAT_VERSION:
            raise ValueError(f"it has format {content['format']}; this version knows up to {FORMAT_VERSION}")
        specs = [(name, np.dtype(dtype), tuple(shape)) for name, shape, dtype in content["parameters"]]
        entries = safetensors.place(specs, content["slots"])
        head = safetensors.encode_head(entries, metadata)
        file.seek(0)
        if file.read(len(head)) != head:
            raise ValueError("its header does not fit its description")
        arrays = {
            name: np.fromfile(file, entry.dtype, math.prod(entry.shape)).reshape(entry.shape)
            for name, entry in entries.items()
        }
        if _checksum(metadata["optserve"], arrays.values()) != metadata["crc32"]:
            raise ValueError("its content does not fit its checksum")
        settings = dict(content["rule"])
        algorithm = ALGORITHMS[settings.pop("name")](**settings)
        return cls(
            content["step"],
            algorithm,
            {name: TensorSpec(shape, dtype.name) for name, dtype, shape in specs},
            {name: {slot: arrays[f"{name}.{slot}"] for slot in content["slots"]} for name, _, _ in specs},
        )


def _checksum(description: str, arrays: Iterable[np.ndarray]) -> str:
    """CRC-32 of the description and all arrays, in the order of the file."""
    checksum = zlib.crc32(description.encode())
    for array in arrays:
        checksum = zlib.crc32(_bytes(array), checksum)
    return f"{checksum:08x}"


def _bytes(array: np.ndarray) -> memoryview:
    contiguous = np.ascontiguousarray(array)
    return contiguous.data.cast("B") if contiguous.size else memoryview(b"")
