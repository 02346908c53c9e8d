"""Saves, lists, restores and deletes checkpoints, which are named copies of an optimizer's state; exports and imports.

A checkpoint is of one step: its optimizer is locked while its slots are written to the system's file cache. It can make
steps while the file is synced. Checkpoints stay when their optimizer is deleted.
"""

from __future__ import annotations

import bisect
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import BinaryIO

from optserve._common.clock import SYSTEM, Clock
from optserve_server.domain.errors import OptserveError, Reason, disk_errors
from optserve_server.engine.optimizer import Optimizer, OtherState
from optserve_server.engine.registry import Optimizers
from optserve_server.engine.transaction import check_request_id
from optserve_server.numerics.layout import Layout
from optserve_server.numerics.parameter_steps import Written
from optserve_server.numerics.settings import Settings
from optserve_server.persistence.checkpoint_checks import (
    check_fit,
    check_readable,
    check_tag,
    checkpoint_exists,
    checkpoint_not_found,
)
from optserve_server.persistence.checkpoint_store import Key, Store
from optserve_server.persistence.state_file import Description, StateFile, StateFileError

logger = logging.getLogger(__name__)

MAX_TRANSFERS = 8
"""Most saves, exports and imports at the same time."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything about a checkpoint except its settings and arrays.

    Attributes:
        optimizer: Name of the optimizer.
        tag: Its tag.
        step: Step counter of the state.
        size_bytes: Size of the file.
        create_time: When it was saved.
        request_id: The request that saved it; empty if there was no request id.
    """

    optimizer: str
    tag: str
    step: int
    size_bytes: int
    create_time: datetime
    request_id: str

    @property
    def sort_key(self) -> str:
        """The key by which lists are sorted: by age, then by tag."""
        return f"{self.create_time.isoformat(timespec='microseconds')} {self.tag}"


class Checkpoints:
    """The checkpoints of one server. Safe to use from several threads.

    Args:
        optimizers: The optimizers of the server.
        store: The store of the files.
        max_checkpoints: Most checkpoints of one optimizer.
        clock: The time.
    """

    def __init__(self, optimizers: Optimizers, store: Store, max_checkpoints: int, clock: Clock = SYSTEM) -> None:
        self._clock = clock
        self._optimizers = optimizers
        self._store = store
        self._max_checkpoints = max_checkpoints
        # No thread waits for this semaphore, so it need not come from the clock.
        self._transfers = threading.BoundedSemaphore(MAX_TRANSFERS)  # noqa: TID251
        # The checkpoints that were read, each with the identity of its file.
        self._cached: dict[Key, tuple[tuple[int, ...], Checkpoint]] = {}

    def save(self, optimizer_id: str, tag: str, *, overwrite: bool = False, request_id: str = "") -> Checkpoint:
        """Save a checkpoint, once per request id.

        Raises:
            OptserveError: OPTIMIZER_NOT_FOUND, INVALID_FIELD, CHECKPOINT_EXISTS, SERVER_FULL, STATE_LOST or
                NOT_DURABLE.
        """
        check_tag(tag)
        if request_id:
            check_request_id(request_id)
        optimizer = self._optimizers.get(optimizer_id)
        tags = self._store.tags(optimizer_id)
        if tag in tags:
            if (existing := self._saved_by(request_id, optimizer_id, tag)) is not None:
                return existing
            if not overwrite:
                raise checkpoint_exists(optimizer_id, tag)
        elif len(tags) >= self._max_checkpoints:
            raise OptserveError(
                Reason.SERVER_FULL,
                f"{optimizer_id!r} has {len(tags)} checkpoints, and this server keeps no more; delete one.",
                limit=self._max_checkpoints,
            )
        with disk_errors(), self.exported(optimizer, request_id, to_keep_as=tag) as file:
            try:
                self._store.keep(file.file, optimizer_id, tag, overwrite=overwrite)
            except FileExistsError:
                # Another call was faster. It may be an earlier try of the same call.
                if (existing := self._saved_by(request_id, optimizer_id, tag)) is not None:
                    return existing
                raise checkpoint_exists(optimizer_id, tag) from None
            saved = _checkpoint(tag, file)
        logger.info("saved checkpoint %s of %s: step %d", tag, optimizer_id, saved.step)
        return saved

    def page(self, optimizer_id: str, size: int, after: str) -> tuple[list[Checkpoint], str]:
        """A page of an optimizer's checkpoints, oldest first.

        Args:
            optimizer_id: Name of the optimizer.
            size: Most checkpoints of the page.
            after: The page begins after the checkpoint with this sort key; empty for the first page.

        Returns:
            The checkpoints, and the sort key of the last one if more follow, else an empty text.
        """
        checkpoints = self._describe_all([(optimizer_id, tag) for tag in self._store.tags(optimizer_id)])
        checkpoints.sort(key=lambda checkpoint: checkpoint.sort_key)
        rest = [checkpoint for checkpoint in checkpoints if checkpoint.sort_key > after]
        return rest[:size], rest[size - 1].sort_key if len(rest) > size else ""

    def page_of_all(self, size: int, after: str) -> tuple[list[Checkpoint], str]:
        """A page of all checkpoints, also of deleted optimizers, sorted by optimizer and tag. See `page`."""
        keys = self._store.keys()
        begin = bisect.bisect_right(keys, tuple(after.split(" ", 1))) if after else 0
        page = keys[begin : begin + size]
        return self._describe_all(page), " ".join(page[-1]) if begin + size < len(keys) else ""

    def _describe_all(self, keys: list[Key]) -> list[Checkpoint]:
        """The checkpoints of these keys. One that cannot be read is left out."""
        checkpoints: list[Checkpoint] = []
        for optimizer_id, tag in keys:
            try:
                checkpoints.append(self._describe(optimizer_id, tag))
            except (OptserveError, OSError) as error:
                # It was just deleted, or it is damaged. The others are listed, and a restore reports the damage.
                logger.warning("a checkpoint is not listed: %s", error)
        return checkpoints

    def restore(self, optimizer_id: str, tag: str, *, etag: str = "", request_id: str = "") -> Optimizer:
        """Restore the state and settings of an optimizer from a checkpoint, once per request id.

        Raises:
            OptserveError: OPTIMIZER_NOT_FOUND, REQUEST_ID_REUSED, CHECKPOINT_NOT_FOUND, CHECKPOINT_MISMATCH,
                CHECKPOINT_DAMAGED, ETAG_MISMATCH, STEP_IN_PROGRESS or NOT_DURABLE. Nothing was changed.
        """
        check_tag(tag)
        if request_id:
            check_request_id(request_id)
        optimizer = self._optimizers.get(optimizer_id)
        target = f"a restore of checkpoint {tag!r}"
        if optimizer.was_replaced_by(request_id, target):
            return optimizer
        with self._opened(optimizer_id, tag) as file:
            saved = file.description
            check_fit(optimizer, tag, saved)
            with disk_errors():
                file.verify()

            def change(present: Settings, _: Layout) -> Settings:
                # The consistency is not restored: it belongs to the workers, not to the state.
                return replace(saved.settings, consistency=present.consistency)

            with file.mapped() as arrays:
                state = OtherState(saved.step, saved.layout, arrays, saved.parameter_steps, saved.placed_by, target)
                self._optimizers.replace(optimizer, state, change, etag, request_id)
        logger.info("restored %s from checkpoint %s", optimizer_id, tag)
        return optimizer

    def delete(self, optimizer_id: str, tag: str) -> None:
        """Delete a checkpoint, or raise CHECKPOINT_NOT_FOUND."""
        check_tag(tag)
        with disk_errors():
            try:
                self._store.remove(optimizer_id, tag)
            except FileNotFoundError:
                raise checkpoint_not_found(optimizer_id, tag) from None
        self._cached.pop((optimizer_id, tag), None)
        logger.info("deleted checkpoint %s of %s", tag, optimizer_id)

    @contextmanager
    def exported(self, optimizer: Optimizer, request_id: str = "", to_keep_as: str = "") -> Iterator[StateFile]:
        """Write an optimizer's state to a temporary file, for the length of a with-block.

        Args:
            optimizer: The optimizer.
            request_id: Written to the file; may be empty.
            to_keep_as: The tag, if the file becomes a checkpoint; then the limits on checkpoints are checked first.

        Raises:
            OptserveError: NOT_DURABLE, STATE_LOST or OPTIMIZER_NOT_FOUND; SERVER_FULL or MODEL_TOO_LARGE for a
                checkpoint that cannot be kept.
        """
        with self._transfer(), closing(self._temporary()) as file:
            with disk_errors(), optimizer.steps.locked_state() as state:
                optimizer.steps.check_usable()
                description = Description(
                    optimizer.id,
                    optimizer.layout,
                    optimizer.settings,
                    optimizer.steps.step,
                    self._clock.now(),
                    request_id,
                    optimizer.steps.placed_by,
                    state.written_parameter_steps,
                )
                exported = StateFile(file, description, disk=self._store.disk)
                if to_keep_as:
                    check_readable(optimizer, exported)
                    self._store.check_capacity(optimizer.id, to_keep_as, exported.size_bytes)
                exported.allocate()
                exported.fill(state)
            yield exported

    @contextmanager
    def staging(self, optimizer: Optimizer) -> Iterator[StateFile]:
        """A temporary file for an import of the optimizer's state, for the length of a with-block.

        Raises:
            OptserveError: NOT_DURABLE.
        """
        description = Description(optimizer.id, optimizer.layout, optimizer.settings, 0, self._clock.now())
        with self._transfer(), closing(self._temporary()) as file:
            with disk_errors():
                staged = StateFile.create(file, description, self._store.disk)
            yield staged

    def _temporary(self) -> BinaryIO:
        with disk_errors():
            return self._store.temporary()

    @contextmanager
    def _transfer(self) -> Iterator[None]:
        """Count a transfer. Their number is limited, because each takes as much disk space as the state."""
        if not self._transfers.acquire(blocking=False):
            raise OptserveError(
                Reason.TOO_MANY_STREAMS,
                f"{MAX_TRANSFERS} states are being saved, exported or imported, and this server does no more at the "
                "same time; try again later.",
                limit=MAX_TRANSFERS,
            )
        try:
            yield
        finally:
            self._transfers.release()

    def put(
        self,
        optimizer: Optimizer,
        step: int,
        file: StateFile,
        change: Callable[[Settings, Layout], Settings],
        etag: str = "",
        request_id: str = "",
        parameter_steps: Written | None = None,
    ) -> None:
        """Replace an optimizer's state by that of a file. See `Optimizers.replace`.

        Args:
            optimizer: The optimizer.
            step: The new step counter.
            file: The new arrays.
            change: See `Optimizers.replace`.
            etag: See `Optimizers.replace`.
            request_id: See `Optimizers.replace`.
            parameter_steps: The new step counters of the parameters; None if they are unknown.
        """
        with file.mapped() as arrays:
            # The client has sent all arrays, with x if the server hosts it.
            placed_by = (request_id or "import") if optimizer.settings.hosted else None
            state = OtherState(step, file.description.layout, arrays, parameter_steps, placed_by, import_target(step))
            self._optimizers.replace(optimizer, state, change, etag, request_id)

    def _saved_by(self, request_id: str, optimizer_id: str, tag: str) -> Checkpoint | None:
        """The checkpoint, if that request has saved it; else None."""
        try:
            existing = self._read(optimizer_id, tag)
        except OptserveError as error:
            logger.warning("a checkpoint is not compared with a request: %s", error)
            return None
        if not request_id or existing.request_id != request_id:
            return None
        with disk_errors():
            # The first call may have ended before its sync.
            self._store.make_durable(optimizer_id)
        return existing

    def _describe(self, optimizer_id: str, tag: str) -> Checkpoint:
        """A checkpoint. It is read again only if its file has changed, because a large header takes long to read."""
        with closing(self._open_file(optimizer_id, tag)) as file:
            status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
        cached_identity, checkpoint = self._cached.get((optimizer_id, tag), (None, None))
        if checkpoint is None or cached_identity != identity:
            checkpoint = self._read(optimizer_id, tag)
            self._cached[optimizer_id, tag] = identity, checkpoint
        return checkpoint

    def _read(self, optimizer_id: str, tag: str) -> Checkpoint:
        with self._opened(optimizer_id, tag) as file:
            return _checkpoint(tag, file)

    @contextmanager
    def _opened(self, optimizer_id: str, tag: str) -> Iterator[StateFile]:
        with closing(self._open_file(optimizer_id, tag)) as file:
            try:
                yield StateFile.open(file)
            except StateFileError as error:
                raise OptserveError(
                    Reason.CHECKPOINT_DAMAGED,
                    f"The checkpoint {tag!r} of {optimizer_id!r} cannot be read: {error}.",
                    checkpoint=tag,
                ) from error

    def _open_file(self, optimizer_id: str, tag: str) -> BinaryIO:
        with disk_errors():
            try:
                return self._store.open(optimizer_id, tag)
            except FileNotFoundError:
                raise checkpoint_not_found(optimizer_id, tag) from None


def import_target(step: int) -> str:
    """The target of an import, in words. It does not include the values of the arrays."""
    return f"an import of a state of step {step}"


def _checkpoint(tag: str, file: StateFile) -> Checkpoint:
    description = file.description
    return Checkpoint(
        description.optimizer, tag, description.step, file.size_bytes, description.create_time, description.request_id
    )
