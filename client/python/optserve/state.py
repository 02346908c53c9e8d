"""States of optimizers outside the service: arrays in memory, and safetensors files."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path
from types import EllipsisType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from optserve._common import safetensors
from optserve._values.description import SETTINGS, GivenSettings, given_settings, settings_from_json, settings_to_json
from optserve.algorithms import ALGORITHMS, Algorithm
from optserve.errors import InvalidArgumentError
from optserve.settings import Clipping, Consistency, Group, Schedule, WeightDecay

FORMAT_VERSION = 2
"""Format 2 has the settings beside the method. A file without such settings has format 1."""
MAX_STEP = 1 << 62
"""Largest step counter of a state."""
PARAMETER = "parameter"
"""Name of the hosted parameter among the arrays of a state; no method has a slot of that name."""

Progress = Callable[[int, int], None]
"""A function that is called with (bytes done, all bytes)."""


def no_progress(_done: int, _total: int) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a parameter, instead of an array.

    Args:
        shape: Extents; empty for a scalar.
        dtype: float32 or float64, as NumPy understands it.
    """

    shape: tuple[int, ...]
    dtype: Any = "float32"


class HostedParameters(NamedTuple):
    """The parameters that a server holds, all of one step.

    Attributes:
        step: Steps that had been applied.
        arrays: x by name.
    """

    step: int
    arrays: dict[str, np.ndarray]

    def __repr__(self) -> str:
        size_bytes = sum(array.nbytes for array in self.arrays.values())
        return f"HostedParameters(step={self.step}, {_counted(len(self.arrays))}, {size_bytes:,} bytes)"


@dataclass(frozen=True)
class Checkpoint:
    """A named copy of an optimizer's state on the server.

    Attributes:
        tag: The name of the copy.
        step: Steps that had been applied when the copy was taken.
        size_bytes: Size of the file.
        create_time: Time of the copy, in seconds since 1970, UTC.
        optimizer: Name of the optimizer, which may be deleted.
    """

    tag: str
    step: int
    size_bytes: int
    create_time: float
    optimizer: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class OptimizerState:
    """The whole state of an optimizer at one step, with its settings.

    A setting beside the method may be an Ellipsis: then the state leaves it out, as a state from `torch.optim` does,
    which has no such setting. An optimizer that imports the state keeps its own setting then.

    Attributes:
        step: Steps applied.
        algorithm: The method with its hyper-parameters.
        parameters: Shape and dtype of each parameter by name, in the optimizer's order.
        slots: The arrays by parameter, then by slot; in the parameter's shape and dtype. In hosted mode `parameter` is
            the last of the slots.
        schedule: Schedule of the learning rate; None for a constant rate.
        clipping: Clipping of the gradient; None for no clipping.
        groups: Groups of parameters whose hyper-parameters differ.
        weight_decay: Weight decay of the parameters that the server holds; a number for the fixed kind.
        consistency: Consistency of the workers; None for one client at a time.
        parameter_steps: Steps that each parameter has taken part in, by name. None if the method does not use them, or
            if the state comes from a version that has not written them. Then an import counts all steps for all
            parameters.

    Example:
        >>> arrays = {"w": {"momentum": np.zeros(2, np.float32)}}
        >>> OptimizerState(3, ALGORITHMS["momentum"](), {"w": TensorSpec((2,))}, arrays)
        OptimizerState(step=3, algorithm=Momentum(learning_rate=0.01, rho=0.9), 1 parameter, 8 bytes)
    """

    step: int
    algorithm: Algorithm
    parameters: Mapping[str, TensorSpec]
    slots: Mapping[str, Mapping[str, np.ndarray]]
    _: KW_ONLY
    schedule: Schedule | EllipsisType | None = ...
    clipping: Clipping | EllipsisType | None = ...
    groups: Sequence[Group] | EllipsisType = ...
    weight_decay: float | WeightDecay | EllipsisType = ...
    consistency: Consistency | EllipsisType | None = ...
    parameter_steps: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        """Take any sequence of groups."""
        if not isinstance(self.groups, EllipsisType):
            object.__setattr__(self, "groups", tuple(self.groups))

    @property
    def hosted(self) -> bool:
        """Whether the parameters themselves are part of the state."""
        return any(PARAMETER in arrays for arrays in self.slots.values())

    @property
    def hosted_parameters(self) -> dict[str, np.ndarray]:
        """The parameters x by name, in hosted mode; empty otherwise."""
        return {name: arrays[PARAMETER] for name, arrays in self.slots.items() if PARAMETER in arrays}

    @property
    def settings(self) -> GivenSettings:
        """The settings beside the method that the state has, as arguments of `Client.create_optimizer`."""
        return given_settings(**{name: getattr(self, name) for name in SETTINGS})

    @property
    def size_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(array.nbytes for arrays in self.slots.values() for array in arrays.values())

    def without(self, *names: str) -> OptimizerState:
        """The same state without some settings. An import leaves these settings of the optimizer as they are.

        Args:
            names: Any of `schedule`, `clipping`, `groups`, `weight_decay`, `consistency`, and `parameters` for the
                parameters x that a server holds.

        Raises:
            InvalidArgumentError: There is no such setting.

        Example:
            >>> saved = optserve.torch.to_state_dict(state.without("schedule"))       # doctest: +SKIP
        """
        for name in names:
            if name not in (*SETTINGS, "parameters"):
                raise InvalidArgumentError(
                    f"A state can leave out {', '.join(SETTINGS)} and parameters; it has no {name!r}."
                )
        unsaid: dict[str, Any] = dict.fromkeys((name for name in names if name != "parameters"), ...)
        if "parameters" in names:
            unsaid["slots"] = {
                name: {slot: array for slot, array in arrays.items() if slot != PARAMETER}
                for name, arrays in self.slots.items()
            }
        return replace(self, **unsaid)

    def __eq__(self, other: object) -> bool:
        """Whether both states have the same bits and settings; the order of parameters does not matter."""
        if not isinstance(other, OptimizerState):
            return NotImplemented
        return (
            (self.step, self.algorithm, self.settings, _specs(self), self.parameter_steps)
            == (other.step, other.algorithm, other.settings, _specs(other), other.parameter_steps)
            and self.slots.keys() == other.slots.keys()
            and all(_same_bits(arrays, other.slots[name]) for name, arrays in self.slots.items())
        )

    # Not hashable, because the arrays can change.
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        said = {"step": self.step, "algorithm": self.algorithm} | {
            name: value for name, value in self.settings.items() if value not in (None, (), 0.0)
        }
        return (
            f"OptimizerState({', '.join(f'{name}={value!r}' for name, value in said.items())}, "
            f"{_counted(len(self.parameters))}, {self.size_bytes:,} bytes)"
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; its tensors are named PARAMETER.SLOT.

        The file gets its name only when it is complete and on disk.

        Raises:
            InvalidArgumentError: The slots, or the groups, do not fit `parameters`.
        """
        path = Path(path)
        specs = [(name, np.dtype(spec.dtype), tuple(spec.shape)) for name, spec in self.parameters.items()]
        slots = list(next(iter(self.slots.values()), {}))
        entries = safetensors.lay_out(specs, slots)
        arrays = {f"{name}.{slot}": array for name, slots in self.slots.items() for slot, array in slots.items()}
        for name, entry in entries.items():
            if name not in arrays or (arrays[name].dtype, arrays[name].shape) != (entry.dtype, entry.shape):
                raise InvalidArgumentError(f"{name} is missing, or is not {list(entry.shape)} {entry.dtype}.")
        description = self._description(specs, slots)
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

    def _description(self, specs: Sequence[tuple[str, np.dtype, tuple[int, ...]]], slots: Sequence[str]) -> str:
        """The metadata of the file."""
        try:
            settings = settings_to_json(self.settings, list(self.parameters))
        except KeyError as error:
            raise InvalidArgumentError(f"A group has the parameter {error}, which the state does not have.") from None
        content = {
            # Versions that do not read settings must refuse a state with settings.
            "format": FORMAT_VERSION if settings else 1,
            "rule": {"name": self.algorithm.name, **asdict(self.algorithm)},
            **settings,
            "hosted": self.hosted,
            "settings": list(self.settings),
            "parameters": [[name, shape, dtype.name] for name, dtype, shape in specs],
            "slots": slots,
            "step": self.step,
        }
        if self.parameter_steps is not None:
            content["parameter_steps"] = steps_in_order(self.parameter_steps, list(self.parameters))
        return json.dumps(content)

    @classmethod
    def load(cls, path: str | Path) -> OptimizerState:
        """Read a file that `save` has written, or a checkpoint's from a server's data folder.

        A file of a version that did not write schedule, clipping, groups, weight decay and consistency gives a state
        that leaves them out.

        Raises:
            InvalidArgumentError: The file is not a state, is of a newer version, or is damaged.
        """
        with Path(path).open("rb") as file:
            try:
                return cls._read(file)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise InvalidArgumentError(f"{path} is not an optimizer's state: {error}") from error

    @classmethod
    def _read(cls, file: BinaryIO) -> OptimizerState:
        _, metadata, _ = safetensors.read_head(file)
        if "optserve" not in metadata:
            raise ValueError("its metadata has no entry of optserve")
        content = json.loads(metadata["optserve"])
        if content["format"] > FORMAT_VERSION:
            raise ValueError(f"it has format {content['format']}; this version reads formats up to {FORMAT_VERSION}")
        specs = [(name, np.dtype(dtype), tuple(shape)) for name, shape, dtype in content["parameters"]]
        entries = safetensors.lay_out(specs, content["slots"])
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
            **settings_from_json(content, [name for name, _, _ in specs]),
            parameter_steps=_steps_from_json(content.get("parameter_steps"), [name for name, _, _ in specs]),
        )


def steps_in_order(parameter_steps: Mapping[str, int], names: Sequence[str]) -> list[int]:
    """The step counters in the order of `names`; raises InvalidArgumentError."""
    if parameter_steps.keys() != set(names):
        other = next(iter(parameter_steps.keys() ^ set(names)))
        raise InvalidArgumentError(f"parameter_steps and the parameters differ in {other!r}.")
    for name, count in parameter_steps.items():
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or not 0 <= count <= MAX_STEP:
            raise InvalidArgumentError(f"parameter_steps of {name!r} is {count!r}, not a whole number from 0 to 2^62.")
    return [int(parameter_steps[name]) for name in names]


def _steps_from_json(content: int | list[int] | None, names: Sequence[str]) -> dict[str, int] | None:
    """The reverse of `steps_in_order`. The server's form is one number if all counters are the same."""
    if content is None:
        return None
    steps = [content] * len(names) if isinstance(content, int) else content
    return dict(zip(names, map(int, steps), strict=True))


def _counted(count: int) -> str:
    return f"{count:,} parameter{'' if count == 1 else 's'}"


def _specs(state: OptimizerState) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    return {name: (np.dtype(spec.dtype), tuple(spec.shape)) for name, spec in state.parameters.items()}


def _same_bits(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        (array.dtype, array.shape) == (other[slot].dtype, other[slot].shape)
        and np.array_equal(_flat_bytes(array), _flat_bytes(other[slot]))
        for slot, array in one.items()
    )


def _checksum(description: str, arrays: Iterable[np.ndarray]) -> str:
    """CRC-32 of the description and all arrays, in the order of the file."""
    checksum = zlib.crc32(description.encode())
    for array in arrays:
        checksum = zlib.crc32(_bytes(array), checksum)
    return f"{checksum:08x}"


def _flat_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _bytes(array: np.ndarray) -> memoryview:
    contiguous = np.ascontiguousarray(array)
    return contiguous.data.cast("B") if contiguous.size else memoryview(b"")
