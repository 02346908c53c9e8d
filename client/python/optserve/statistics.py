"""Statistics of an optimizer on the server: root mean squares, effective learning rates, single elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from optserve.errors import InternalError
from optserve.v1 import statistics_pb2

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_MAX_INDEX = (1 << 63) - 1


@dataclass(frozen=True)
class ElementStatistics:
    """Single elements of one parameter, in the order of the request; arrays are float64.

    Attributes:
        indices: Flat indices of the elements.
        rates: Effective learning rates: the factor on −g that the last step used. None before the first step, and for
            methods whose factor does not follow from the state.
        updates: The last Δx; None if the server no longer has it.
        slots: The values of each slot.
    """

    indices: np.ndarray
    rates: np.ndarray | None
    updates: np.ndarray | None
    slots: dict[str, np.ndarray]


@dataclass(frozen=True)
class TensorStatistics:
    """Statistics of one parameter, computed from at most 2^20 of its elements, evenly spread.

    Attributes:
        rms_gradient: √(mean(E[g²]) + ε); None if the method has no such average.
        rms_update: √(mean(E[Δx²]) + ε); None if the method has no such average.
        rates: Quantiles of the effective learning rate of the last step, for ADADELTA RMS[Δx]_{t−1} / RMS[g]_t; empty
            before the first step.
        elements: The single elements of the request.
        rates_count_last_update: Whether all rates are RMS[Δx]_t / RMS[g]_t instead, because the server no longer has
            the last update. That is so if workers share the optimizer.
    """

    rms_gradient: float | None
    rms_update: float | None
    rates: dict[float, float]
    elements: ElementStatistics
    rates_count_last_update: bool = False


@dataclass(frozen=True)
class Statistics:
    """Statistics of one step.

    Attributes:
        step: Steps applied.
        parameters: Statistics of each parameter, by name.
    """

    step: int
    parameters: dict[str, TensorStatistics]


@dataclass(frozen=True)
class StatisticsRequest:
    """A request for statistics.

    Attributes:
        tensors: Indices of the parameters.
        quantiles: Quantiles of the effective learning rate.
        indices: Flat indices of elements; None if the server draws them.
        random_indices: Number of elements to draw.
    """

    tensors: Sequence[int]
    quantiles: Sequence[float]
    indices: Sequence[int] | None
    random_indices: int


def statistics_from(
    message: statistics_pb2.GetStatisticsResponse, names: Sequence[str], slots: Sequence[str], asked: StatisticsRequest
) -> Statistics:
    """The statistics that a message holds.

    Args:
        message: The server's answer.
        names: Names of all parameters of the optimizer.
        slots: Names of the method's slots.
        asked: The request.

    Raises:
        InternalError: The answer does not fit the request.
    """
    _check(message, slots, asked)
    parameters = {
        names[tensor.tensor]: TensorStatistics(
            tensor.rms_gradient if tensor.HasField("rms_gradient") else None,
            tensor.rms_update if tensor.HasField("rms_update") else None,
            # Without rates there are no quantiles of them.
            dict(zip(asked.quantiles, tensor.effective_rate_quantiles, strict=False)),
            _elements(tensor.elements, slots),
            tensor.rates_count_last_update,
        )
        for tensor in message.tensors
    }
    return Statistics(message.step, parameters)


def _check(message: statistics_pb2.GetStatisticsResponse, slots: Sequence[str], asked: StatisticsRequest) -> None:
    """Raise InternalError unless a message has exactly what the request asks for."""
    if [tensor.tensor for tensor in message.tensors] != list(asked.tensors):
        raise InternalError("The server's statistics are of other parameters than those of the request.")
    for tensor in message.tensors:
        if len(tensor.effective_rate_quantiles) not in (0, len(asked.quantiles)):
            raise InternalError(f"The server's statistics lack quantiles of the rates of parameter {tensor.tensor}.")
        indices = [element.index for element in tensor.elements]
        right = indices == list(asked.indices) if asked.indices is not None else len(indices) <= asked.random_indices
        if not right or any(index > _MAX_INDEX for index in indices):
            raise InternalError(
                f"The server's statistics have other elements of parameter {tensor.tensor} than the request."
            )
        if any(len(element.slots) != len(slots) for element in tensor.elements):
            raise InternalError(f"The server's statistics have too few or too many slots; there are {len(slots)}.")


def _elements(messages: Sequence[statistics_pb2.ElementStatistics], slots: Sequence[str]) -> ElementStatistics:
    def values(field: str) -> np.ndarray | None:
        is_in_all = all(message.HasField(field) for message in messages)
        return np.array([getattr(message, field) for message in messages]) if is_in_all else None

    return ElementStatistics(
        np.array([message.index for message in messages], np.int64),
        values("effective_rate"),
        values("update"),
        {slot: np.array([message.slots[position] for message in messages]) for position, slot in enumerate(slots)},
    )
