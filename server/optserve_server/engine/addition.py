"""The addition of parameters to a live optimizer: takes x of the new ones, and adds all of them at once, or none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np

from optserve_server.domain import refusals
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine import changes, footprint
from optserve_server.engine.change_queue import WAIT_S
from optserve_server.engine.optimizer import Optimizer
from optserve_server.engine.record_encoding import ArenaValues
from optserve_server.engine.records import AdditionRecord
from optserve_server.engine.registry import Optimizers, new_token
from optserve_server.engine.transaction import NOTHING, Outcome, ReplyChunk, Step, StepRequest, check_request_id
from optserve_server.engine.transition import Room
from optserve_server.numerics.compiling import compile_ahead
from optserve_server.numerics.layout import ALL, Layout, Operand, Payload, Run
from optserve_server.numerics.settings import Group, Settings
from optserve_server.numerics.staging import Staging, Upload
from optserve_server.numerics.weight_decay import DecayKind

logger = logging.getLogger(__name__)

_Used = TypeVar("_Used")
_Made = TypeVar("_Made")

Check = Callable[[Layout, Settings], object]
"""Checks the parameters and the settings after an addition; raises an OptserveError."""

MAX_NAMED = 4
"""Most parameters that the description of an addition names."""


class NewParameters(NamedTuple):
    """What a call asks for.

    Attributes:
        layout: The new parameters, as a layout of their own.
        groups: New groups, whose parameters are indices into `layout`.
        request_id: Identifies the call for retries.
        etag: The etag that the optimizer must have; empty to leave it unchecked.
        lineage: The lineage that the optimizer must have; empty to leave it unchecked.
        decay_kind: The kind of the groups' weight decays.
    """

    layout: Layout
    groups: tuple[Group, ...]
    request_id: str
    etag: str = ""
    lineage: str = ""
    decay_kind: DecayKind = DecayKind.FIXED

    def check_decay_kind(self, present: DecayKind) -> None:
        """Raise ETAG_MISMATCH if groups have weight decays that were meant for another kind than the present one."""
        if present is not self.decay_kind and any(group.weight_decay is not None for group in self.groups):
            raise OptserveError(
                Reason.ETAG_MISMATCH, f"The kind of the weight decay has become {present.value}.", field="groups"
            )

    @property
    def target(self) -> str:
        """What the call asks for, in words."""
        names = [repr(item.name) for item in self.layout.parameters]
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        return f"an addition of {', '.join(names[:MAX_NAMED])}{more}"


@contextmanager
def addition(
    optimizers: Optimizers,
    optimizer: Optimizer,
    new: NewParameters,
    check: Check,
    wire: np.dtype | None = None,
    wait_s: Callable[[], float] = lambda: WAIT_S,
) -> Iterator[Step]:
    """Add parameters, once per request id, for the length of a with-block.

    The block gets a step that steps nothing: it takes x of the new parameters as chunks, in hosted mode, and its commit
    adds the parameters. Without the commit nothing changes.

    Args:
        optimizers: The optimizers of the server.
        optimizer: The optimizer.
        new: The parameters.
        check: Checks what the optimizer would have.
        wire: Dtype of the payload; None for each parameter's own.
        wait_s: Called at the commit: how long it may wait for the end of a step under way.

    Raises:
        OptserveError: INVALID_FIELD, REQUEST_ID_REUSED, WORKERS_ATTACHED, ETAG_MISMATCH, STATE_REPLACED,
            DUPLICATE_PARAMETER, MODEL_TOO_LARGE, SERVER_FULL, HYPERPARAMETER_OUT_OF_RANGE, or what `check` raises. The
            commit also raises MISSING_CHUNK, STEP_IN_PROGRESS if a step has not ended in time, and what
            `changes.add_parameters` raises.
    """
    check_request_id(new.request_id)
    call = _Call(optimizers, optimizer, new, check, wait_s)
    # An upload that cannot succeed is refused before it begins. The commit plans once more.
    plan = call.plan()
    is_made = plan is None
    if plan is not None:
        # Now, so that no step waits for it.
        compile_ahead(plan.settings, plan.layout.dtypes, optimizers.backend)
    is_uploaded = optimizer.settings.hosted and not is_made
    with optimizers.reserving(optimizer.id, new.layout.size_bytes if is_uploaded else 0):
        if is_uploaded:
            call.staging = _memory_for(optimizer.id, lambda: Staging(Upload(new.layout, optimizers.backend)))
        operands = (Operand.PARAMETER,) if optimizer.settings.hosted else ()
        request = StepRequest(new.request_id, reply=NOTHING)
        yield Step(call, request, Payload(new.layout, ALL, wire), operands, replay=is_made)


class _Plan(NamedTuple):
    """What an addition makes of an optimizer, as long as its etag stays.

    Attributes:
        etag: The etag before.
        layout: All parameters after.
        settings: All settings after.
    """

    etag: str
    layout: Layout
    settings: Settings


class _Call:
    """One call. See `transaction.Holder`; it holds its own buffer, and steps go on meanwhile.

    Attributes:
        staging: The buffer with x of the new parameters; None if there is none to be uploaded.
    """

    def __init__(
        self,
        optimizers: Optimizers,
        optimizer: Optimizer,
        new: NewParameters,
        check: Check,
        wait_s: Callable[[], float],
    ) -> None:
        self._optimizers = optimizers
        self._optimizer = optimizer
        self._new = new
        self._check = check
        self._wait_s = wait_s
        self.monotonic = optimizer.steps.main.monotonic
        self.staging: Staging | None = None

    def plan(self) -> _Plan | None:
        """Check what is known before the upload. None if a call with the same request id was made."""
        optimizer, new = self._optimizer, self._new
        with optimizer.steps.locked_state():
            optimizer.steps.check_usable()
            if optimizer.was_replaced_by(new.request_id, new.target):
                self._check_is_what_was_added()
                return None
            optimizer.check_etag(new.etag)
            optimizer.steps.check_lineage(new.lineage)
            if optimizer.settings.hosted:
                optimizer.steps.check_placed()
            changes.check_no_workers(optimizer.steps)
            before, settings = optimizer.layout, optimizer.settings
            for position, item in enumerate(new.layout.parameters):
                if item.name in before.indices:
                    raise OptserveError(
                        Reason.DUPLICATE_PARAMETER,
                        f"{optimizer.id!r} has a parameter {item.name!r} already.",
                        field=f"parameters[{position}].name",
                        parameter=item.name,
                    )
            new.check_decay_kind(settings.decay_kind)
            layout, shift = before.with_added(new.layout), len(before.parameters)
            groups = (
                replace(group, parameters=tuple(index + shift for index in group.parameters)) for group in new.groups
            )
            settings = replace(settings, groups=(*settings.groups, *groups))
            self._optimizers.capacity.check_size(layout)
            self._optimizers.capacity.check_workers(layout, settings)
            self._check(layout, settings)
            return _Plan(optimizer.etag, layout, settings)

    def _check_is_what_was_added(self) -> None:
        """Raise REQUEST_ID_REUSED unless the optimizer has these parameters."""
        layout, target = self._optimizer.layout, self._new.target
        for item in self._new.layout.parameters:
            index = layout.indices.get(item.name)
            if index is None or layout.parameters[index] != item:
                raise refusals.request_id_reused(
                    self._new.request_id, target, "parameters of another shape or data type"
                )

    def stage(self, step: Step, position: int, data: memoryview | bytes, operand: Operand) -> None:
        """See Holder."""
        if self.staging is None:
            raise refusals.not_hosted(self._optimizer.id, "chunk")
        step.coverage[operand].add(position, position + len(data))
        self.staging.stage(step.payload, operand, position, data, step.largest)

    def commit(self, step: Step) -> Outcome:
        """Add the parameters."""
        if not step.replay:
            step.check_complete()
            with self._optimizer.steps.change_queue.between_steps(self._wait_s()):
                while (plan := self.plan()) is not None and not self._carry_out(plan):
                    pass
            step.committed = True
        return Outcome(step.request_id, self._optimizer.steps.step, replayed=step.replay)

    def _carry_out(self, plan: _Plan) -> bool:
        """Add the parameters. Returns False, and changes nothing, if the optimizer has changed since the plan."""
        optimizers, optimizer, new = self._optimizers, self._optimizer, self._new
        required = footprint.permanent_bytes(plan.layout, plan.settings)
        temporary = optimizers.capacity.temporary_bytes(plan.layout, plan.settings)
        with optimizers.reserving(optimizer.id, required, temporary):
            # Without the lock, because allocating takes long.
            room = _memory_for(optimizer.id, lambda: Room.of(plan.layout, plan.settings, optimizers.backend))
            with optimizer.steps.locked_state():
                if optimizer.etag != plan.etag:
                    return False
                record = AdditionRecord(
                    optimizer.id, new.layout, plan.settings, new_token(), new.request_id, new.target,
                    optimizers.clock.now(), self._uploaded(),
                )  # fmt: skip
                changes.add_parameters(optimizer.steps, record, room)
        logger.info("added %d parameters to %s", len(new.layout.parameters), optimizer.id)
        return True

    def _uploaded(self) -> list[ArenaValues]:
        """The values of x that have arrived, by arena."""
        if self.staging is None:
            return []
        arenas = self.staging.updates
        return [ArenaValues(dtype, array, arenas[dtype]) for dtype, array, _ in self._new.layout.each_arena(1)]

    def read(self, step: Step, run: Run, begin: int, end: int, use: Callable[[ReplyChunk], _Used]) -> _Used:
        """See Holder. Never called, because the reply has no bytes."""
        raise RuntimeError(f"{step.request_id} has no reply from byte {begin} to byte {end} of {run} for {use}.")

    def whole(self, step: Step, tensor: int) -> bytes:
        """See Holder. Never called, because the reply has no bytes."""
        raise RuntimeError(f"{step.request_id} has no reply for tensor {tensor}.")

    def close(self, step: Step) -> None:  # noqa: ARG002 - see Holder
        """See Holder."""
        self.staging = None


def _memory_for(optimizer_id: str, make: Callable[[], _Made]) -> _Made:
    """What `make` makes; raises SERVER_FULL if there is no memory for it."""
    try:
        return make()
    except MemoryError as error:
        raise OptserveError(
            Reason.SERVER_FULL, f"There is no memory for the new parameters of {optimizer_id!r}.", limit="memory"
        ) from error
