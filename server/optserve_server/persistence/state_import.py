"""The import of a state: checked as it arrives, kept in a temporary file, and applied whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from optserve_server.domain.errors import OptserveError, Reason, disk_errors
from optserve_server.engine.byte_coverage import MAX_FRAGMENTS, Coverage, Overlap, TooManyFragments
from optserve_server.engine.optimizer import Optimizer
from optserve_server.numerics.layout import ALL, Layout, Parameter, Payload
from optserve_server.numerics.parameter_steps import MAX_STEP, each
from optserve_server.numerics.settings import PARAMETER, Settings
from optserve_server.persistence.checkpoints import Checkpoints
from optserve_server.persistence.state_file import StateFile


class StateImport:
    """The import of all arrays of one optimizer, in chunks of any order.

    Args:
        checkpoints: The checkpoints of the server, which replace the state.
        optimizer: The optimizer.
        staged: The file to which the chunks are written.
        change: Makes the new settings of the present ones.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        optimizer: Optimizer,
        staged: StateFile,
        change: Callable[[Settings, Layout], Settings],
    ) -> None:
        self._change = change
        self._checkpoints = checkpoints
        self._optimizer = optimizer
        self._slots = optimizer.settings.arrays
        # The optimizer may get more parameters during the import; then the commit refuses the state.
        self._layout = optimizer.layout
        self._payload = Payload(self._layout, ALL)
        self._coverage = Coverage()
        self._staged = staged

    def stage(self, tensor: int, slot: int, offset: int, data: bytes | memoryview) -> None:
        """Check a chunk of one array of one parameter, and write it to the file.

        Args:
            tensor: Index of the parameter.
            slot: Position of the array among `Settings.arrays`.
            offset: First byte of the chunk in the array of the parameter.
            data: The chunk: elements of the parameter's dtype, little-endian.

        Raises:
            OptserveError: UNKNOWN_PARAMETER, CHUNK_OUT_OF_BOUNDS, OVERLAPPING_CHUNK,
                TOO_MANY_FRAGMENTS, NON_FINITE_VALUE or NOT_DURABLE.
        """
        parameters = self._layout.parameters
        if tensor >= len(parameters):
            raise OptserveError(
                Reason.UNKNOWN_PARAMETER,
                f"There is no parameter {tensor}; {self._optimizer.id!r} has {len(parameters)}.",
                field="tensor",
                parameter=tensor,
            )
        parameter = parameters[tensor]
        size = parameter.dtype.itemsize
        if offset % size or len(data) % size or offset + len(data) > parameter.size * size:
            raise OptserveError(
                Reason.CHUNK_OUT_OF_BOUNDS,
                f"{len(data)} bytes at byte {offset} of {parameter.name!r} do not fit into its {parameter.size * size} "
                "bytes, or do not begin and end at an element.",
                field="offset",
                parameter=parameter.name,
                offset=offset,
            )
        self._record_coverage(tensor, slot, offset, len(data))
        values = np.frombuffer(data, parameter.dtype)
        self._check_values(parameter, slot, offset // size, values)
        start = self._layout.starts[tensor] + offset // size
        with disk_errors():
            self._staged.write(parameter.dtype, slot, start, values)

    def check_parameter_steps(self, given: Sequence[int]) -> None:
        """Raise INVALID_FIELD unless `given` is empty or has the step counter of each parameter."""
        if not given:
            return
        if not self._optimizer.rule.counts_steps:
            raise OptserveError(
                Reason.INVALID_FIELD,
                f"{self._optimizer.rule.name} does not use the step counters of parameters, so send none.",
                field="parameter_steps",
            )
        try:
            each(given, len(self._layout.parameters), MAX_STEP)
        except ValueError as error:
            raise OptserveError(
                Reason.INVALID_FIELD, f"parameter_steps does not fit this model: {error}.", field="parameter_steps"
            ) from error

    def commit(self, step: int, etag: str = "", request_id: str = "", parameter_steps: Sequence[int] = ()) -> None:
        """Replace the optimizer's state by the imported one, once per request id.

        Args:
            step: The new step counter.
            etag: See `Optimizers.replace`.
            request_id: See `Optimizers.replace`.
            parameter_steps: Number of steps that each parameter has taken part in; empty if it is unknown.

        Raises:
            OptserveError: INVALID_FIELD, MISSING_CHUNK, ETAG_MISMATCH, STEP_IN_PROGRESS, NOT_DURABLE,
                OPTIMIZER_NOT_FOUND or HYPERPARAMETER_OUT_OF_RANGE.
        """
        self.check_parameter_steps(parameter_steps)
        if step > MAX_STEP:
            raise OptserveError(Reason.INVALID_FIELD, f"step must be at most {MAX_STEP}, not {step}.", field="step")
        gap = self._coverage.first_gap(len(self._slots) * self._payload.size_bytes)
        if gap is not None:
            slot, position = divmod(gap, self._payload.size_bytes)
            tensor, offset = self._payload.locate(position)
            name = self._layout.parameters[tensor].name
            raise OptserveError(
                Reason.MISSING_CHUNK,
                f"{self._slots[slot]} of {name!r} is incomplete: byte {offset} has not arrived.",
                field="chunk",
                parameter=name,
                offset=offset,
            )
        counters = list(parameter_steps) or None
        self._checkpoints.put(self._optimizer, step, self._staged, self._change, etag, request_id, counters)

    def _record_coverage(self, tensor: int, slot: int, offset: int, size: int) -> None:
        begin = slot * self._payload.size_bytes + self._payload.byte_ranges[tensor][0] + offset
        name = self._layout.parameters[tensor].name
        try:
            self._coverage.add(begin, begin + size)
        except Overlap:
            raise OptserveError(
                Reason.OVERLAPPING_CHUNK,
                f"A byte of {self._slots[slot]} of {name!r} has arrived twice.",
                field="offset",
                parameter=name,
                offset=offset,
            ) from None
        except TooManyFragments as error:
            raise OptserveError(
                Reason.TOO_MANY_FRAGMENTS,
                f"The state arrives in {error}; send neighbouring chunks one after the other.",
                field="offset",
                limit=MAX_FRAGMENTS,
            ) from None

    def _check_values(self, parameter: Parameter, slot: int, start: int, values: np.ndarray) -> None:
        """Raise NON_FINITE_VALUE for NaN and infinity, INVALID_FIELD for other values that no step can produce."""
        good = np.isfinite(values)
        name = self._slots[slot]
        rule, negative = self._optimizer.rule, False
        if name != PARAMETER:
            if name not in rule.signed_slots:
                good &= values >= 0
                negative = True
            unreachable_values = rule.unreachable_values(name, values)
            if unreachable_values is not None:
                good &= ~unreachable_values
        if good.all():
            return
        index = start + int(np.argmin(good))
        value = values[index - start]
        raise OptserveError(
            Reason.INVALID_FIELD if np.isfinite(value) else Reason.NON_FINITE_VALUE,
            f"{name} of {parameter.name!r} is {value} at flat index {index}"
            + (f", which {'is negative' if negative else 'no step leaves behind'}." if np.isfinite(value) else "."),
            field="data",
            parameter=parameter.name,
            index=index,
        )
