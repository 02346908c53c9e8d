"""One step under way, as those see it who carry its bytes: stage, commit, reply, close."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.byte_coverage import MAX_FRAGMENTS, Coverage, Overlap, TooManyFragments
from optserve_server.numerics.headroom import NATIVE, ReplyWires
from optserve_server.numerics.layout import ALL, Arenas, Largest, Operand, Payload, Run, Selection
from optserve_server.numerics.shared_segment import Segment
from optserve_server.numerics.step_settings import PLAIN, StepOptions

_Used = TypeVar("_Used")


class Reply(Enum):
    """What the reply of a step carries."""

    UPDATES = "updates"
    PARAMETERS = "parameters"
    NOTHING = "nothing"


# Python finds a member in its Enum in 80 ns, and a small step has a dozen to look at.
UPDATES, PARAMETERS, NOTHING = Reply


class StepRequest(NamedTuple):
    """A step that a client asks for.

    Attributes:
        request_id: Identifies the step for retries.
        expected_step: The step that the client believes is next; None to leave it unchecked.
        selection: The parameters that take part.
        wire: Dtype of the payload; None for each parameter's own.
        lineage: The state that the client knows; empty to leave it unchecked.
        reply: What the reply carries.
        segment: The segment with the gradients and for the reply; None if they travel by `Step.stage` and `reply`.
        worker: Name of the worker; empty for a client that is no worker.
        parameters_step: The step of the x at which the gradient was taken; None for the last x that was sent.
        stream: Number of the stream; later streams have higher numbers. None for a unary call.
        life: Number of the worker's life; 0 where its client sends none.
        last_request_id: The last step under this name, as the client knows it; None to leave it unchecked.
        options: What the step asks for beside its reply.
        parameter_count: The client knows so many parameters, the first, and ALL means these; 0: all there are.
    """

    request_id: str
    expected_step: int | None = None
    selection: Selection = ALL
    wire: np.dtype | None = None
    lineage: str = ""
    reply: Reply = UPDATES
    segment: Segment | None = None
    worker: str = ""
    parameters_step: int | None = None
    stream: int | None = None
    life: int = 0
    last_request_id: str | None = None
    options: StepOptions = PLAIN
    parameter_count: int = 0


class Effect(NamedTuple):
    """What is told of a step that was applied.

    Attributes:
        gradient_norm: Norm over all tensors before clipping; None unless clipping or the step needs it.
        learning_rates: Of the parameters in no group, then of each group; empty if the method has none.
        clipped: Whether clipping has changed the gradient; None without clipping.
    """

    gradient_norm: float | None = None
    learning_rates: tuple[float, ...] = ()
    clipped: bool | None = None


NOT_KNOWN = Effect()
"""For the replay of a step that was applied before this server started."""


class Outcome(NamedTuple):
    """The result of a commit.

    Attributes:
        effect: What is told of the step.
        staleness: Steps that were applied between the x of the gradient and this step.
    """

    request_id: str
    step: int
    replayed: bool
    effect: Effect = NOT_KNOWN
    staleness: int = 0


@dataclass
class Retained:
    """The last applied step.

    Attributes:
        selection: The parameters that took part in it.
        intact: Whether the staging buffer still holds the reply; False once a new gradient has arrived.
        holds: The kind of that reply.
        effect: See Outcome. It is not on disk, and so not part of what recovery has to restore.
        staleness: As `effect`.
    """

    request_id: str
    step: int
    selection: Selection
    intact: bool = True
    holds: Reply = UPDATES
    effect: Effect = field(default=NOT_KNOWN, compare=False)
    staleness: int = field(default=0, compare=False)

    def replayed(self) -> Outcome:
        """The outcome of a replay."""
        return Outcome(self.request_id, self.step, True, self.effect, self.staleness)


class LastStep(NamedTuple):
    """The last applied step of a client or a worker.

    Attributes:
        step: Steps that were applied, by all clients.
        request_id: Request id of the last one; empty if there is none.
        selection: The parameters that took part in it.
        lineage: The present lineage.
    """

    step: int
    request_id: str
    selection: Selection
    lineage: str


class ReplyChunk(NamedTuple):
    """A piece of the reply: a view of the staging buffer that begins at byte `offset` of a tensor."""

    tensor: int
    offset: int
    data: memoryview
    last: bool


class Holder(Protocol):
    """The slot whose buffer a step holds. Each method raises STEP_TAKEN_OVER if the step no longer holds it."""

    monotonic: Callable[[], float]

    def stage(self, step: Step, position: int, data: memoryview | bytes, operand: Operand) -> None:
        """Take a chunk, whose position in the payload was checked."""
        ...

    @property
    def commit(self) -> Callable[[Step], Outcome]:
        """Apply what was staged."""
        ...

    def read(self, step: Step, run: Run, begin: int, end: int, use: Callable[[ReplyChunk], _Used]) -> _Used:
        """Call `use` with a piece of the reply, with the lock held."""
        ...

    def whole(self, step: Step, tensor: int) -> bytes:
        """The reply for a whole tensor."""
        ...

    def close(self, step: Step) -> None:
        """Give the staging buffer back."""
        ...


class Step:
    """One step under way. `Steps.begin` makes it; call `close` at its end in any case.

    Attributes:
        reply_bytes: Bytes that the reply carries.
        reply_wires: The wire dtypes of the reply that are narrower than the state's.
    """

    def __init__(
        self,
        holder: Holder,
        request: StepRequest,
        payload: Payload,
        operands: Iterable[Operand],
        *,
        replay: bool,
        parameters_step: int = 0,
        lineage: str = "",
    ) -> None:
        self._holder = holder
        self.request_id = request.request_id
        self.payload = payload
        self.replay = replay
        self.replies = request.reply
        self.reply_bytes = 0 if request.reply is NOTHING else payload.size_bytes
        self.reply_wires = NATIVE if payload.narrow_wire is None else _reply_wires(payload.narrow_wire, request.reply)
        self.segment = request.segment
        self.options = request.options
        self.committed = False
        # For a worker's step: its worker, the lineage and the x at which its gradient was taken, and its result.
        self.worker = request.worker
        self.life = request.life
        self.lineage = lineage
        # Streams are numbered as they are opened; None for a step by unary call.
        self.stream = request.stream
        self.parameters_step = parameters_step
        self.outcome: Outcome | None = None
        self.refused: OptserveError | None = None
        self.abandoned = False
        self.reply_source: Arenas = {}
        self.last_progress_at = holder.monotonic()
        self.coverage: dict[Operand, Coverage] = {}
        for operand in operands:
            self.coverage[operand] = Coverage()
        # Whether all gradients were taken out of the client's segment.
        self.gradients_taken = False
        self.largest: Largest = {}

    def stage(self, tensor: int, offset: int, data: memoryview | bytes, operand: Operand = Operand.GRADIENT) -> None:
        """Take a chunk of the gradients, or of another operand. In a replay it is ignored.

        Args:
            tensor: Index of the parameter in which it begins.
            offset: First byte within that parameter's wire bytes.
            data: Elements; those beyond the end of the parameter belong to the next one of the step.
            operand: What they are.

        Raises:
            OptserveError: INVALID_FIELD, UNKNOWN_PARAMETER, CHUNK_OUT_OF_BOUNDS, OVERLAPPING_CHUNK,
                TOO_MANY_FRAGMENTS, NON_FINITE_VALUE, GRADIENT_OVERFLOW or STEP_TAKEN_OVER. The step is then of no
                further use.
        """
        if self.replay:
            return
        if operand not in self.coverage:
            raise OptserveError(
                Reason.INVALID_FIELD, f"The method of this optimizer takes no {operand.value}.", field="operand"
            )
        place = self.payload.byte_ranges.get(tensor)
        if place is None:
            raise OptserveError(
                Reason.UNKNOWN_PARAMETER,
                f"Parameter {tensor} takes no part in this step.",
                field="tensor",
                parameter=tensor,
            )
        position = place[0] + offset
        if position > place[1]:
            raise self.payload.out_of_bounds(tensor, offset, "begins beyond the end of its tensor")
        if position + len(data) > self.payload.size_bytes:
            raise self.payload.out_of_bounds(
                tensor, offset, f"reaches {len(data)} bytes, beyond the last tensor of the step"
            )
        try:
            self._holder.stage(self, position, data, operand)
        except Overlap as overlap:
            tensor, offset = self.payload.locate(overlap.position)
            name = self.payload.layout.parameters[tensor].name
            raise OptserveError(
                Reason.OVERLAPPING_CHUNK,
                f"Byte {offset} of the {operand.value} of {name!r} has arrived twice.",
                field="offset",
                parameter=name,
                offset=offset,
            ) from None
        except TooManyFragments as error:
            raise OptserveError(
                Reason.TOO_MANY_FRAGMENTS,
                f"The {operand.value} arrives in {error}; send neighbouring chunks one after the other.",
                field="offset",
                limit=MAX_FRAGMENTS,
            ) from None

    def check_complete(self) -> None:
        """Raise MISSING_CHUNK unless every byte of every operand has arrived."""
        if self.gradients_taken:
            return
        for operand, coverage in self.coverage.items():
            gap = coverage.first_gap(self.payload.size_bytes)
            if gap is not None:
                tensor, offset = self.payload.locate(gap)
                name = self.payload.layout.parameters[tensor].name
                raise OptserveError(
                    Reason.MISSING_CHUNK,
                    f"The {operand.value} of {name!r} is incomplete: byte {offset} has not arrived.",
                    field="chunk",
                    parameter=name,
                    offset=offset,
                )

    def commit(self) -> Outcome:
        """Apply the step to all of its tensors, or change nothing.

        Raises:
            OptserveError: MISSING_CHUNK, STEP_TAKEN_OVER or STATE_LOST.
        """
        return self._holder.commit(self)

    def reply(self, max_chunk_bytes: int, use: Callable[[ReplyChunk], _Used]) -> Iterator[_Used]:
        """What `use` makes of the reply of the committed step, in pieces of at most `max_chunk_bytes` bytes.

        Raises:
            OptserveError: STEP_TAKEN_OVER.
        """
        for run in self.payload.runs if self.replies is not NOTHING else ():
            stride = max_chunk_bytes // run.wire.itemsize * run.wire.itemsize
            for begin in range(run.begin, run.end, stride):
                yield self._holder.read(self, run, begin, min(begin + stride, run.end), use)

    def whole(self, tensor: int) -> bytes:
        """The reply of the committed step for one whole tensor, in the parameter's own dtype.

        Raises:
            OptserveError: STEP_TAKEN_OVER.
        """
        return self._holder.whole(self, tensor)

    def close(self) -> None:
        """Give the staging buffer back. What was not committed is gone; a reply stays for replays."""
        self._holder.close(self)


def _reply_wires(narrow: np.dtype, reply: Reply) -> ReplyWires:
    """The wire dtypes of a reply that are narrower than the state's."""
    if reply is NOTHING:
        return NATIVE
    return ReplyWires(updates=(narrow,)) if reply is UPDATES else ReplyWires(parameters=(narrow,))


def check_request_id(request_id: str) -> None:
    """Raise INVALID_FIELD unless it is 1 to 64 printable ASCII characters."""
    if not (1 <= len(request_id) <= 64 and request_id.isascii() and request_id.isprintable()):
        raise OptserveError(
            Reason.INVALID_FIELD,
            "request_id must be 1 to 64 printable ASCII characters; a UUID is a good one.",
            field="request_id",
        )
