"""An optimizer's state outside the service: arrays in memory, and safetensors files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optserve import safetensors
from optserve.algorithms import ALGORITHMS, Algorithm
from optserve.errors import InvalidArgumentError

FORMAT_VERSION = 1

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
        slots: The arrays by parameter, then by slot; in the parameter's shape and dtype.
    """

    step: int
    algorithm: Algorithm
    parameters: Mapping[str, TensorSpec]
    slots: Mapping[str, Mapping[str, np.ndarray]]

    @property
    def size_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(array.nbytes for arrays in self.slots.values() for array in arrays.values())

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; its tensors are named PARAMETER.SLOT.

        The file has its name only once it is whole.
        """
        path = Path(path)
        arrays = {f"{name}.{slot}": array for name, slots in self.slots.items() for slot, array in slots.items()}
        entries = safetensors.place((name, array.dtype, array.shape) for name, array in arrays.items())
        description = self._description()
        metadata = {"optserve": description, "crc32": _checksum(description, arrays.values())}
        temporary = path.with_name(f"{path.name}.tmp")
        with temporary.open("wb") as file:
            file.write(safetensors.encode_head(entries, metadata))
            for array in arrays.values():
                file.write(_bytes(array))
        temporary.replace(path)

    def _description(self) -> str:
        content = {
            "format": FORMAT_VERSION,
            "rule": {"name": self.algorithm.name, **asdict(self.algorithm)},
            "parameters": [[name, list(spec.shape), str(spec.dtype)] for name, spec in self.parameters.items()],
            "step": self.step,
        }
        return json.dumps(content)

    @classmethod
    def load(cls, path: str | Path) -> OptimizerState:
        """Read a file that `save` has written, or a checkpoint's from a server's data folder.

        Raises:
            InvalidArgumentError: It is none, of a newer version, or damaged.
        """
        with Path(path).open("rb") as file:
            try:
                entries, metadata, begin = safetensors.read_head(file)
                step, algorithm, parameters = _described(metadata)
                by_place = sorted(entries.items(), key=lambda item: item[1].begin)
                arrays = {
                    name: np.fromfile(
                        file, entry.dtype, (entry.end - entry.begin) // entry.dtype.itemsize,
                        offset=begin + entry.begin - file.tell(),
                    ).reshape(entry.shape)
                    for name, entry in by_place
                }  # fmt: skip
                if _checksum(metadata["optserve"], arrays.values()) != metadata["crc32"]:
                    raise ValueError("its content does not fit its checksum")
                slots: dict[str, dict[str, np.ndarray]] = {name: {} for name in parameters}
                for name, array in arrays.items():
                    parameter, _, slot = name.rpartition(".")
                    slots[parameter][slot] = array
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidArgumentError(f"{path} is not an optimizer's state: {error}") from error
        return cls(step, algorithm, parameters, slots)


def _described(metadata: Mapping[str, str]) -> tuple[int, Algorithm, dict[str, TensorSpec]]:
    if "optserve" not in metadata:
        raise ValueError("its metadata has nothing of optserve")
    content = json.loads(metadata["optserve"])
    if content["format"] > FORMAT_VERSION:
        raise ValueError(f"it has format {content['format']}; this version knows up to {FORMAT_VERSION}")
    settings = dict(content["rule"])
    algorithm = ALGORITHMS[settings.pop("name")](**settings)
    parameters = {name: TensorSpec(tuple(shape), dtype) for name, shape, dtype in content["parameters"]}
    return content["step"], algorithm, parameters


def _checksum(description: str, arrays: Iterable[np.ndarray]) -> str:
    """CRC-32 of the description and all arrays, in the order of the file."""
    checksum = zlib.crc32(description.encode())
    for array in arrays:
        checksum = zlib.crc32(_bytes(array), checksum)
    return f"{checksum:08x}"


def _bytes(array: np.ndarray) -> memoryview:
    contiguous = np.ascontiguousarray(array)
    return contiguous.data.cast("B") if contiguous.size else memoryview(b"")
