"""The optimizers of this server by id: creates, finds, lists, changes and deletes them within the server's limits."""

from __future__ import annotations

import bisect
import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from optserve._common.clock import SYSTEM, Clock
from optserve_server.domain import refusals
from optserve_server.domain.config import ServerConfig
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine import changes, footprint, transition
from optserve_server.engine.capacity import Capacity
from optserve_server.engine.durability import Durability
from optserve_server.engine.optimizer import Optimizer, OtherState, is_id
from optserve_server.engine.records import CreationRecord, ReplacementRecord, UpdateRecord
from optserve_server.engine.steps import Steps
from optserve_server.engine.transaction import check_request_id
from optserve_server.engine.workers.buffer_budget import BufferBudget
from optserve_server.numerics.backends import Backend
from optserve_server.numerics.compiling import compile_ahead
from optserve_server.numerics.layout import Layout
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.shared_segment import Segment
from optserve_server.numerics.state import State

logger = logging.getLogger(__name__)

CREATION_WAIT_S = 60.0
"""Seconds that a retried creation waits for the first call, which may still compile or allocate."""

REPLACEMENT_WAIT_S = 2.0
"""Seconds that a restore or an import waits for the end of a step under way."""


def new_token() -> str:
    """A new etag or lineage."""
    return uuid.uuid4().hex[:16]


class Optimizers:
    """All optimizers of one server. Safe to use from several threads.

    Attributes:
        capacity: The limits of number and memory.
        clock: The time.
    """

    def __init__(self, backend: Backend, durability: Durability, config: ServerConfig, clock: Clock = SYSTEM) -> None:
        self.backend = backend
        self.clock = clock
        self._durability = durability
        self._config = config
        self.capacity = Capacity(config)
        self._buffer_budget = BufferBudget(config.max_staged_bytes, config.max_optimizer_staged_bytes, clock=clock)
        self._lock = clock.condition()
        self._by_id: dict[str, Optimizer] = {}
        # (request id, bytes) of each optimizer that is being created, by its id.
        self._reserved: dict[str, tuple[str, int]] = {}
        # Bytes of parameters that are being added.
        self._growing_bytes = 0

    def __len__(self) -> int:
        """The number of optimizers."""
        return len(self._by_id)

    @property
    def durability_problem(self) -> str:
        """Why changes cannot be made durable at the moment, in words; empty if they can."""
        return self._durability.problem

    def certain(self, error: OptserveError) -> OptserveError:
        """The error for a refused step: `error`, or an error that says that the step may still be applied.

        The record of a refused step may still be on a disk that refuses to remove it. As long as the record is there,
        no error may say that the step is not applied. The same holds for the record of several workers' gradients.
        """
        try:
            self._durability.remove_refused()
        except OptserveError as doubt:
            return doubt
        return error

    @property
    def memory_bytes(self) -> int:
        """Bytes that all optimizers occupy."""
        return sum(optimizer.memory_bytes for optimizer in list(self._by_id.values()))

    def share(self, optimizer: Optimizer) -> Segment | None:
        """A segment to share with a client of an optimizer; None if there is no memory for it. See `Steps.share`."""
        wanted = len(optimizer.state.operand_kinds) * optimizer.layout.size_bytes
        try:
            self._check_room(optimizer.id, wanted)
        except OptserveError:
            logger.warning("%s is not shared: there is no room within max_state_bytes", optimizer.id)
            return None
        return optimizer.steps.share()

    def drain(self) -> None:
        """The server is about to stop: refuse the steps that wait for other workers."""
        for optimizer in list(self._by_id.values()):
            optimizer.steps.workers.drain()

    def discard_idle_steps(self) -> None:
        """Discard the steps that have made no progress for `idle_step_s`."""
        for optimizer in list(self._by_id.values()):
            optimizer.steps.discard_idle()

    def create(self, optimizer_id: str, layout: Layout, settings: Settings, request_id: str = "") -> Optimizer:
        """Create an optimizer; its state is 0 everywhere.

        Raises:
            OptserveError: INVALID_FIELD, OPTIMIZER_EXISTS, MODEL_TOO_LARGE, SERVER_FULL or
                HYPERPARAMETER_OUT_OF_RANGE.
        """
        if not is_id(optimizer_id):
            raise OptserveError(
                Reason.INVALID_FIELD,
                f"{optimizer_id!r} is not an optimizer id: 1 to 64 of a-z, 0-9, '.', '_' and '-', beginning with a "
                "letter or digit.",
                field="optimizer_id",
            )
        if request_id:
            check_request_id(request_id)
        self.capacity.check_size(layout)
        self.capacity.check_workers(layout, settings)
        with self._lock:
            # A retry waits for the first call, which may still be at work.
            self._lock.wait_for(
                lambda: self._reserved_by(optimizer_id) != request_id or not request_id, CREATION_WAIT_S
            )
            existing = self._by_id.get(optimizer_id)
            if existing and request_id and existing.creation_request_id == request_id:
                existing.check_is_what_is_made(layout, settings)
                return existing
            if existing or optimizer_id in self._reserved:
                raise OptserveError(
                    Reason.OPTIMIZER_EXISTS,
                    f"There is an optimizer {optimizer_id!r} already; delete it or choose another id.",
                    field="optimizer_id",
                    optimizer=optimizer_id,
                )
            self._reserve(optimizer_id, request_id, layout, settings)
        # Without the lock, because compiling and allocating take long.
        try:
            optimizer = self._make(optimizer_id, layout, settings, request_id)
        except MemoryError as error:
            raise OptserveError(
                Reason.SERVER_FULL, f"There is no memory for the state of {optimizer_id!r}.", limit="memory"
            ) from error
        finally:
            with self._lock:
                del self._reserved[optimizer_id]
                self._lock.notify_all()
        logger.info(
            "created %s: %s; %d parameters, %d bytes",
            optimizer_id,
            settings.summary,
            len(layout.parameters),
            layout.size_bytes,
        )
        return optimizer

    def _make(self, optimizer_id: str, layout: Layout, settings: Settings, request_id: str) -> Optimizer:
        record = CreationRecord(optimizer_id, layout, settings, new_token(), new_token(), request_id, self.clock.now())
        # Allocates first, which may fail: once the record is written down, the optimizer exists.
        optimizer = self._build(record)
        return self._enter(optimizer, record, self._durability.write(record))

    def _build(self, record: CreationRecord) -> Optimizer:
        state = State(record.layout, record.settings, self.backend)
        steps = Steps(
            record.optimizer, state, self._durability, self._config.idle_step_s, self._buffer_budget, self.clock
        )
        return Optimizer(record.optimizer, state, steps, record.request_id, record.create_time)

    def _enter(self, optimizer: Optimizer, record: CreationRecord, lsn: int) -> Optimizer:
        """Add an optimizer; `lsn` is the number of its creation in the journal."""
        transition.note_creation(optimizer.steps, record, lsn)
        optimizer.created_lsn = lsn
        with self._lock:
            self._by_id[optimizer.id] = optimizer
        return optimizer

    def adopt(self, record: CreationRecord, created_lsn: int) -> Optimizer:
        """Add an optimizer that recovery has found, without a record and without a line in the log."""
        return self._enter(self._build(record), record, created_lsn)

    def forget(self, optimizer_id: str) -> None:
        """The reverse of `adopt`."""
        with self._lock:
            self._by_id.pop(optimizer_id, None)

    def renew_lineages(self) -> None:
        """Give every state a new lineage, because it may not be the state that clients knew."""
        for optimizer in list(self._by_id.values()):
            optimizer.steps.lineage = new_token()

    def find(self, optimizer_id: str) -> Optimizer | None:
        """An optimizer, or None."""
        return self._by_id.get(optimizer_id)

    def settled(self) -> list[Optimizer]:
        """All optimizers, once the optimizers that are being created now exist too."""
        with self._lock:
            pending = set(self._reserved)
            self._lock.wait_for(lambda: not pending & set(self._reserved))
            return list(self._by_id.values())

    def get(self, optimizer_id: str) -> Optimizer:
        """Find an optimizer, or raise OPTIMIZER_NOT_FOUND."""
        optimizer = self._by_id.get(optimizer_id)
        if optimizer is None:
            raise refusals.optimizer_not_found(optimizer_id)
        return optimizer

    def check_is_same(self, optimizer: Optimizer) -> None:
        """Raise STATE_REPLACED if another optimizer has taken the id of this one."""
        found = self._by_id.get(optimizer.id)
        if found is not None and found is not optimizer:
            raise refusals.state_replaced(optimizer.id, found.steps.lineage, found.steps.step)

    def page(self, size: int, after: str) -> tuple[list[Optimizer], bool]:
        """Up to `size` optimizers in the order of their ids, from the one after `after` on; and whether more follow."""
        with self._lock:
            ids = sorted(self._by_id)
            start = bisect.bisect_right(ids, after)
            return [self._by_id[name] for name in ids[start : start + size]], start + size < len(ids)

    def update(self, optimizer_id: str, change: Callable[[Settings, Layout], Settings], etag: str = "") -> Optimizer:
        """Change settings: `change` makes the new settings from the present ones.

        Raises:
            OptserveError: OPTIMIZER_NOT_FOUND, ETAG_MISMATCH, HYPERPARAMETER_OUT_OF_RANGE, or what `change` raises.
        """
        optimizer = self.get(optimizer_id)
        self._compile_ahead(optimizer, change)
        with optimizer.steps.locked_state():
            optimizer.check_etag(etag)
            settings = change(optimizer.settings, optimizer.layout)
            self.capacity.check_workers(optimizer.layout, settings)
            growth = footprint.description_bytes(optimizer.layout, settings)
            growth -= footprint.description_bytes(optimizer.layout, optimizer.settings)
            if growth > 0:
                self._check_room(optimizer_id, growth)
            optimizer.steps.update(UpdateRecord(optimizer_id, settings, new_token(), self.clock.now()))
        logger.info("updated %s: %s", optimizer_id, optimizer.settings.summary)
        return optimizer

    def _compile_ahead(self, optimizer: Optimizer, change: Callable[[Settings, Layout], Settings]) -> None:
        """Compile what steps will call, without the lock of the optimizer. An impossible change is refused later."""
        try:
            with optimizer.steps.locked_state() as state:
                settings = change(state.settings, state.layout)
                state.check(settings)
        except OptserveError:
            return
        compile_ahead(settings, state.layout.dtypes, self.backend)

    def replace(
        self,
        optimizer: Optimizer,
        state: OtherState,
        change: Callable[[Settings, Layout], Settings],
        etag: str = "",
        request_id: str = "",
    ) -> None:
        """Replace the state of an optimizer, once per request id.

        Args:
            optimizer: The optimizer.
            state: The new state.
            change: Makes the new settings from the present ones; the method stays the same.
            etag: The etag that the optimizer must have; empty to leave it unchecked.
            request_id: Identifies the call for retries; may be empty.

        Raises:
            OptserveError: REQUEST_ID_REUSED, ETAG_MISMATCH (also if parameters were added since the state was read),
                STEP_IN_PROGRESS, NOT_DURABLE, OPTIMIZER_NOT_FOUND, or what `change` raises.
        """
        self._compile_ahead(optimizer, change)
        with optimizer.steps.change_queue.between_steps(REPLACEMENT_WAIT_S), optimizer.steps.locked_state():
            if optimizer.was_replaced_by(request_id, state.target):
                return
            optimizer.check_etag(etag)
            optimizer.check_layout(state.layout)
            settings = change(optimizer.settings, optimizer.layout)
            self.capacity.check_workers(optimizer.layout, settings)
            record = ReplacementRecord(
                optimizer.id, state.step, settings, new_token(), new_token(), request_id,
                self.clock.now(), state.arrays, state.placed_by, state.target, state.parameter_steps,
            )  # fmt: skip
            changes.replace(optimizer.steps, record)
        logger.info("replaced the state of %s: step %d", optimizer.id, state.step)

    @contextmanager
    def reserving(self, optimizer_id: str, required_bytes: int, temporary_bytes: int = 0) -> Iterator[None]:
        """Count memory as used for the length of a with-block, or raise SERVER_FULL; see `Capacity.check_room`."""
        with self._lock:
            self._check_room(optimizer_id, required_bytes, temporary_bytes)
            self._growing_bytes += required_bytes
        try:
            yield
        finally:
            with self._lock:
                self._growing_bytes -= required_bytes

    def delete(self, optimizer_id: str, etag: str = "") -> None:
        """Delete an optimizer, or raise OPTIMIZER_NOT_FOUND, ETAG_MISMATCH or STEP_IN_PROGRESS."""
        optimizer = self.get(optimizer_id)
        with optimizer.steps.locked_state():
            optimizer.check_etag(etag)
            optimizer.steps.delete(refusals.optimizer_not_found(optimizer_id))
            with self._lock:
                del self._by_id[optimizer_id]
        logger.info("deleted %s", optimizer_id)

    def _reserved_by(self, optimizer_id: str) -> str:
        """The request id of the call that is creating an optimizer of that id; empty if no call is."""
        return self._reserved.get(optimizer_id, ("", 0))[0]

    def _reserve(self, optimizer_id: str, request_id: str, layout: Layout, settings: Settings) -> None:
        """Count the memory of an optimizer that is about to be created; called under the lock."""
        required = footprint.permanent_bytes(layout, settings)
        self._check_room(optimizer_id, required, self.capacity.temporary_bytes(layout, settings))
        self.capacity.check_number(len(self._by_id) + len(self._reserved))
        self._reserved[optimizer_id] = (request_id, required)

    def _check_room(self, optimizer_id: str, required_bytes: int, temporary_bytes: int = 0) -> None:
        """Raise SERVER_FULL unless there is room for `required_bytes` more; see `Capacity.check_room`."""
        reserved_bytes = self._growing_bytes + sum(size for _, size in self._reserved.values())
        self.capacity.check_room(
            optimizer_id, required_bytes, list(self._by_id.values()), reserved_bytes, temporary_bytes
        )
