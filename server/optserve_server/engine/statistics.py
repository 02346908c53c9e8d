"""Statistics of an optimizer, computed from copies of its state between two steps."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.optimizer import Optimizer
from optserve_server.numerics.state import State

MAX_SAMPLE = 1 << 20
"""Most elements of one tensor that its statistics use; of a larger tensor, evenly spread ones. They are copied while
no step can be applied."""

MAX_SAMPLES = 1 << 22
"""Most elements of all tensors that one call uses. If the tensors have more, each tensor gets an equal share."""

MAX_ELEMENTS = 100_000
"""Most single elements that one call can ask for, over all tensors."""

MAX_QUANTILES = 1000
"""Most quantiles of each tensor that one call can ask for."""

MAX_CALLS = 2
"""Most calls at a time; each holds copies of its samples."""

WAIT_S = 5.0
"""Seconds that a call waits for others before it is refused with TOO_MANY_STREAMS."""

_SMALLER = 2.0**-64
"""A unit in which the sum of all squares of a sample is finite. Its root is a power of two as well."""

# One for the whole process, so it belongs to no clock. Calls wait here for the arithmetic of other calls only.
_running = threading.BoundedSemaphore(MAX_CALLS)  # noqa: TID251

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Query:
    """What a call asks for.

    Attributes:
        tensors: Indices of parameters; empty for all parameters.
        quantiles: Quantiles of the effective learning rate, each in [0, 1].
        indices: Flat indices of elements, for every tensor.
        random_indices: Number of elements to draw per tensor, instead of `indices`.
        seed: Seed of the draw.
    """

    tensors: Sequence[int] = ()
    quantiles: Sequence[float] = QUANTILES
    indices: Sequence[int] = ()
    random_indices: int = 0
    seed: int = 0


@dataclass(frozen=True)
class TensorStatistics:
    """Statistics of one tensor. Arrays are float64; `rates` and `updates` are None if they are not known.

    Attributes:
        rates_count_last_update: Whether the rates are RMS[Δx]_t / RMS[g]_t instead of RMS[Δx]_{t−1} / RMS[g]_t, because
            the server no longer has the last update.
    """

    tensor: int
    rms_gradient: float | None
    rms_update: float | None
    rate_quantiles: list[float]
    indices: np.ndarray
    rates: np.ndarray | None
    updates: np.ndarray | None
    slots: list[np.ndarray] = field(default_factory=list)
    rates_count_last_update: bool = False


def statistics(optimizer: Optimizer, query: Query) -> tuple[int, list[TensorStatistics]]:
    """(number of steps applied, statistics of each tensor), all of one step.

    Raises:
        OptserveError: INVALID_FIELD, UNKNOWN_PARAMETER, DUPLICATE_PARAMETER, TOO_MANY_STREAMS, or see
            `Steps.check_usable`.
    """
    tensors = _tensors(optimizer, query)
    _check_counts(optimizer, query, tensors)
    wanted = {tensor: _indices(optimizer, tensor, query) for tensor in tensors}
    max_sample = _max_sample(optimizer, tensors)
    if not _running.acquire(timeout=WAIT_S):
        raise OptserveError(
            Reason.TOO_MANY_STREAMS,
            f"{MAX_CALLS} calls are computing statistics, and this server allows no more at a time; try again.",
            limit=MAX_CALLS,
        )
    try:
        with optimizer.steps.locked_state() as state:
            optimizer.steps.check_usable()
            step = optimizer.steps.step
            samples = [_Samples(optimizer, state, tensor, wanted[tensor], max_sample) for tensor in tensors]
        # The arithmetic follows here, while steps go on.
        return step, [sample.statistics(query.quantiles) for sample in samples]
    finally:
        _running.release()


def _tensors(optimizer: Optimizer, query: Query) -> list[int]:
    """Indices of the parameters that a call asks for; raises UNKNOWN_PARAMETER or DUPLICATE_PARAMETER."""
    parameters = optimizer.layout.parameters
    seen: set[int] = set()
    for tensor in query.tensors:
        if tensor >= len(parameters):
            raise OptserveError(
                Reason.UNKNOWN_PARAMETER,
                f"There is no parameter {tensor}; {optimizer.id!r} has {len(parameters)}.",
                field="tensors",
                parameter=tensor,
            )
        if tensor in seen:
            name = parameters[tensor].name
            raise OptserveError(
                Reason.DUPLICATE_PARAMETER, f"Parameter {name!r} is listed twice.", field="tensors", parameter=name
            )
        seen.add(tensor)
    return list(query.tensors) or list(range(len(parameters)))


def _check_counts(optimizer: Optimizer, query: Query, tensors: Sequence[int]) -> None:
    """Raise INVALID_FIELD if a call asks for too much, before anything is computed for it."""
    if query.random_indices and query.indices:
        raise OptserveError(
            Reason.INVALID_FIELD, "Give `indices` or `random_indices`, not both.", field="random_indices"
        )
    if query.random_indices > MAX_ELEMENTS:
        raise OptserveError(
            Reason.INVALID_FIELD, f"random_indices must be at most {MAX_ELEMENTS}.", field="random_indices"
        )
    drawn = sum(min(query.random_indices, optimizer.layout.parameters[tensor].size) for tensor in tensors)
    for what, field_name, asked, limit in (
        ("elements", "indices", len(query.indices) * len(tensors) + drawn, MAX_ELEMENTS),
        ("quantiles", "quantiles", len(query.quantiles), MAX_QUANTILES),
    ):
        if asked > limit:
            raise OptserveError(
                Reason.INVALID_FIELD,
                f"One call can ask for at most {limit} {what}, not for {asked}; ask for fewer, or for fewer tensors.",
                field=field_name,
            )
    for quantile in query.quantiles:
        if not 0 <= quantile <= 1:
            raise OptserveError(
                Reason.INVALID_FIELD, f"A quantile must lie in [0, 1], not at {quantile!r}.", field="quantiles"
            )


def _max_sample(optimizer: Optimizer, tensors: Sequence[int]) -> int:
    """Most elements of one tensor, so that all tensors together stay within MAX_SAMPLES."""
    sizes = [min(optimizer.layout.parameters[tensor].size, MAX_SAMPLE) for tensor in tensors]
    return MAX_SAMPLE if sum(sizes) <= MAX_SAMPLES else max(1, MAX_SAMPLES // len(tensors))


def _indices(optimizer: Optimizer, tensor: int, query: Query) -> np.ndarray:
    parameters = optimizer.layout.parameters
    size = parameters[tensor].size
    if query.random_indices:
        rng = np.random.default_rng([query.seed, tensor])
        return np.sort(rng.choice(size, min(query.random_indices, size), replace=False))
    for index in query.indices:
        if index >= size:
            raise OptserveError(
                Reason.INVALID_FIELD,
                f"{parameters[tensor].name!r} has {size} elements, so there is no index {index}.",
                field="indices",
                parameter=parameters[tensor].name,
            )
    return np.array(query.indices, np.int64)


class _Samples:
    """Copies of what the statistics of one tensor need, taken while no step is applied."""

    def __init__(self, optimizer: Optimizer, state: State, tensor: int, indices: np.ndarray, max_sample: int) -> None:
        parameter, start = state.layout.parameters[tensor], state.layout.starts[tensor]
        steps = optimizer.steps
        self.tensor, self.indices = tensor, indices
        self.rule = state.last_rule_of(tensor, steps.step)
        self.stepped = steps.step > 0
        self.counter = state.step_counter_of(tensor)
        stride = max(1, -(-parameter.size // max_sample))
        part = slice(start, start + parameter.size, stride)
        slots = range(len(self.rule.slots))
        self.sample = [state.sample(parameter.dtype, slot, part) for slot in slots]
        self.elements = [state.sample(parameter.dtype, slot, start + indices) for slot in slots]
        self.sample_updates = self.updates = None
        if steps.main.keeps_updates(tensor):
            updates = steps.main.staging.updates[parameter.dtype]
            self.updates = updates[start + indices].astype(np.float64)
            if self.rule.rate_needs_update:
                self.sample_updates = updates[part].astype(np.float64)
            # A client that shares this memory may have begun to overwrite the updates.
            if not steps.main.keeps_updates(tensor):
                self.sample_updates = self.updates = None

    def statistics(self, quantiles: Sequence[float]) -> TensorStatistics:
        rates = self._rates(self.sample, self.sample_updates) if self.stepped else None
        return TensorStatistics(
            self.tensor,
            self._rms(self.rule.gradient_square_slot),
            self._rms(self.rule.update_square_slot),
            np.quantile(rates, quantiles).tolist() if rates is not None and rates.size else [],
            self.indices,
            self._rates(self.elements, self.updates) if self.stepped else None,
            self.updates,
            self.elements,
            self.stepped and self.rule.rate_needs_update and self.updates is None,
        )

    def _rates(self, slots: list[np.ndarray], updates: np.ndarray | None) -> np.ndarray | None:
        with np.errstate(all="ignore"):
            rates = self.rule.effective_rate(dict(zip(self.rule.slots, slots, strict=True)), updates, self.counter)
        size = slots[0].size if slots else max(self.indices.size, 1)
        return None if rates is None else np.broadcast_to(np.asarray(rates, np.float64), (size,))

    def _rms(self, slot: str | None) -> float | None:
        if slot is None:
            return None
        squares = self.sample[self.rule.slots.index(slot)]
        with np.errstate(over="ignore"):
            mean = float(squares.mean()) if squares.size else 0.0
        if math.isinf(mean):
            # The sum of the squares is beyond float64; their mean is not. It is so large that eps changes no digit.
            return math.sqrt(float((squares * _SMALLER).mean())) / math.sqrt(_SMALLER)
        return math.sqrt(mean + getattr(self.rule, "eps", 0.0) * self.rule.eps_in_root)
