"""Checks the arguments of `Client.create_optimizer`, and makes the message of the contract from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from optserve import algorithms, settings
from optserve._common.wire import DATA_TYPES
from optserve._values.arrays import check_mapping, has_values, host_array, known_dtype
from optserve._values.settings_messages import check_kinds, group_messages, set_weight_decay
from optserve.errors import InvalidArgumentError
from optserve.state import TensorSpec
from optserve.v1 import optimizer_pb2


class ArrayLike(Protocol):
    """Anything with a shape and a dtype, such as arrays of NumPy and tensors of other libraries."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...


@dataclass(frozen=True)
class NewSettings:
    """The settings of a new optimizer, beside its method; see `optserve.Client.create_optimizer`."""

    schedule: settings.Schedule | None = None
    clipping: settings.Clipping | None = None
    groups: Sequence[settings.Group] = ()
    hosted: bool = False
    weight_decay: float | settings.WeightDecay = 0.0
    consistency: settings.Consistency | None = None


def new_optimizer(
    name: str, algorithm: algorithms.Algorithm, params: Mapping[str, ArrayLike | TensorSpec], new_settings: NewSettings
) -> optimizer_pb2.Optimizer:
    """The message of an optimizer to be created.

    Raises:
        InvalidArgumentError: An argument has the wrong type.
    """
    check_mapping(params, "params", "dict(model.named_parameters())")
    check_kinds(algorithm, new_settings.schedule, new_settings.clipping, new_settings.groups, new_settings.consistency)
    try:
        message = optimizer_pb2.Optimizer(
            algorithm=algorithm.to_message(),
            schedule=new_settings.schedule.to_message() if new_settings.schedule else None,
            clipping=new_settings.clipping.to_message() if new_settings.clipping else None,
            groups=group_messages(
                new_settings.groups,
                algorithm.name,
                fixed=not isinstance(new_settings.weight_decay, settings.WeightDecay),
            ),
            mode=optimizer_pb2.MODE_HOSTED if new_settings.hosted else optimizer_pb2.MODE_DELTA,
            consistency=new_settings.consistency.to_message() if new_settings.consistency else None,
        )
        set_weight_decay(message, new_settings.weight_decay)
        message.parameters.extend(parameter_messages(params))
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{name!r} cannot be created from these arguments: {error}") from error
    return message


def parameter_messages(
    params: Mapping[str, ArrayLike | TensorSpec],
) -> Sequence[optimizer_pb2.Parameter]:
    """The messages of parameters.

    Raises:
        InvalidArgumentError: One is no array and no TensorSpec, or its state can be of no such dtype.
        TypeError or ValueError: A name or a shape is impossible.
    """
    messages = optimizer_pb2.Optimizer().parameters
    for name, spec in params.items():
        if not (hasattr(spec, "shape") and hasattr(spec, "dtype")):
            raise InvalidArgumentError(
                f"{name!r} is of type {type(spec).__name__}, which has no shape and dtype; pass an array, a "
                "tensor or a TensorSpec."
            )
        messages.add(name=name, shape=spec.shape, data_type=_data_type(name, spec.dtype))
    return messages


def values_of(params: Mapping[str, ArrayLike | TensorSpec]) -> dict[str, np.ndarray]:
    """The values of the parameters, for an upload; empty if no parameter has values.

    Raises:
        InvalidArgumentError: Only some parameters have values, or values cannot be read.
    """
    arrays = {name: param for name, param in params.items() if has_values(param)}
    if arrays and len(arrays) < len(params):
        name = next(name for name in params if name not in arrays)
        raise InvalidArgumentError(
            f"{name!r} has no values, but other parameters have. Pass arrays for all parameters, "
            "to upload them at once, or for none.",
            metadata={"parameter": name},
        )
    return {name: host_array(array, f"Parameter {name!r}") for name, array in arrays.items()}


def _data_type(name: str, dtype: Any) -> int:
    known = known_dtype(dtype)
    if known is None or known not in DATA_TYPES:
        raise InvalidArgumentError(
            f"{name!r} is {dtype}; a parameter's state is float32 or float64.", metadata={"parameter": name}
        )
    return DATA_TYPES[known]
