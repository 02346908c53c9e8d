"""Named copies of an optimizer's state: taken, listed, restored and deleted; and its state on the way in or out.

A checkpoint is of one step: its optimizer is held still while its slots are written to the system's file cache, and
steps again while the disk takes them. Checkpoints outlive their optimizer.
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
"""States that are saved, exported or imported at a time."""


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a checkpoint without reading its arrays."""

    optimizer: str
    tag: str
    step: int
    size_bytes: int
    create_time: datetime
    request_id: str

    @property
    def sort_key(self) -> str:
        """Its place in lists: by age, then by tag."""
        return f"{self.create_time.isoformat(timespec='microseconds')} {self.tag}"


class Checkpoints:
    """The checkpoints of one server. Safe to use from several threads.

    Args:
        optimizers: Whose states they are.
        store: Where the files are.
        max_checkpoints: Most of one optimizer.
        clock: The time.
    """

    def __init__(self, optimizers: Optimizers, store: Store, max_checkpoints: int, clock: Clock = SYSTEM) -> None:
        self._clock = clock
        self._optimizers = optimizers
        self._store = store
        self._max_checkpoints = max_checkpoints
        # Nobody waits for it.
        self._transfers = threading.BoundedSemaphore(MAX_TRANSFERS)  # noqa: TID251
        self._seen: dict[tuple[str, str], tuple[tuple[int, ...], Checkpoint]] = {}

    def save(self, optimizer_id: str, tag: str, *, overwrite: bool = False, request_id: str = "") -> Checkpoint:
        """Take a checkpoint, once per request id.

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
            if (existing := self._made_by(request_id, optimizer_id, tag)) is not None:
                return existing
            if not overwrite:
                raise checkpoint_exists(optimizer_id, tag)
        elif len(tags) >= self._max_checkpoints:
            raise OptserveError(
                Reason.SERVER_FULL,
                f"{optimizer_id!r} has {len(tags)} checkpoints, which is all that this server keeps; delete one.",
                limit=self._max_checkpoints,
            )
        with disk_errors(), self.exported(optimizer, request_id, to_keep_as=tag) as file:
            try:
                self._store.keep(file.file, optimizer_id, tag, overwrite=overwrite)
            except FileExistsError:
                # Another call was quicker; it may have been the same one.
                if (existing := self._made_by(request_id, optimizer_id, tag)) is not None:
                    return existing
                raise checkpoint_exists(optimizer_id, tag) from None
            saved = _checkpoint(tag, file)
        logger.info("saved checkpoint %s of %s: step %d", tag, optimizer_id, saved.step)
        return saved

    def page(self, optimizer_id: str, size: int, after: str) -> tuple[list[Checkpoint], str]:
        """Up to `size` checkpoints, oldest first, from the place after `after` on.

        Returns:
            The checkpoints, and the place of the last one if more follow, else an empty text.
        """
        found = self._all_known([(optimizer_id, tag) for tag in self._store.tags(optimizer_id)])
        found.sort(key=lambda item: item.sort_key)
        rest = [item for item in found if item.sort_key > after]
        return rest[:size], rest[size - 1].sort_key if len(rest) > size else ""

    def page_of_all(self, size: int, after: str) -> tuple[list[Checkpoint], str]:
        """Likewise the checkpoints of all optimizers, deleted ones included, by optimizer and tag."""
        keys = self._store.keys()
        begin = bisect.bisect_right(keys, tuple(after.split(" ", 1))) if after else 0
        chosen = keys[begin : begin + size]
        return self._all_known(chosen), " ".join(chosen[-1]) if begin + size < len(keys) else ""

    def _all_known(self, keys: list[Key]) -> list[Checkpoint]:
        found: list[Checkpoint] = []
        for optimizer_id, tag in keys:
            try:
                found.append(self._known(optimizer_id, tag))
            except (OptserveError, OSError) as error:
                # Deleted just now, or damaged, which a restore would say; the others are to be had.
                logger.warning("not listed: %s", error)
        return found

    def restore(self, optimizer_id: str, tag: str, *, etag: str = "", request_id: str = "") -> Optimizer:
        """Roll an optimizer back to a checkpoint, hyper-parameters included, once per request id.

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
            description = file.description
            check_fit(optimizer, tag, description)
            with disk_errors():
                file.verify()

            def change(present: Settings, _: Layout) -> Settings:
                # Who shares the optimizer is no part of its state.
                return replace(description.settings, consistency=present.consistency)

            with file.mapped() as arrays:
                state = OtherState(description.step, arrays, description.parameter_steps, description.placed_by, target)
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
        self._seen.pop((optimizer_id, tag), None)
        logger.info("deleted checkpoint %s of %s", tag, optimizer_id)

    @contextmanager
    def exported(self, optimizer: Optimizer, request_id: str = "", to_keep_as: str = "") -> Iterator[StateFile]:
        """An optimizer's state of this moment, in a temporary file, for the length of a with-block.

        Args:
            optimizer: Whose state.
            request_id: To be written down with it.
            to_keep_as: A tag, if it is to become a checkpoint, for which there must be room.

        Raises:
            OptserveError: NOT_DURABLE, STATE_LOST or OPTIMIZER_NOT_FOUND; SERVER_FULL or MODEL_TOO_LARGE for a
                checkpoint that cannot be kept.
        """
        with self._place(), closing(self._temporary()) as file:
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
        """A temporary file for a state of the optimizer that is on its way in, for the length of a with-block.

        Raises:
            OptserveError: NOT_DURABLE.
        """
        description = Description(optimizer.id, optimizer.layout, optimizer.settings, 0, self._clock.now())
        with self._place(), closing(self._temporary()) as file:
            with disk_errors():
                staged = StateFile.create(file, description, self._store.disk)
            yield staged

    def _temporary(self) -> BinaryIO:
        with disk_errors():
            return self._store.temporary()

    @contextmanager
    def _place(self) -> Iterator[None]:
        """One of a few places, because each takes as much room on the disk as the state."""
        if not self._transfers.acquire(blocking=False):
            raise OptserveError(
                Reason.TOO_MANY_STREAMS,
                f"{MAX_TRANSFERS} states are being saved, exported or imported, which is all that this server does at "
                "a time; try again later.",
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
        """Put a state in the place of an optimizer's own. See `Optimizers.replace`."""
        with file.mapped() as arrays:
            # All arrays were sent, x as well where it is hosted.
            placed_by = (request_id or "import") if optimizer.settings.hosted else None
            state = OtherState(step, arrays, parameter_steps, placed_by, import_target(step))
            self._optimizers.replace(optimizer, state, change, etag, request_id)

    def _made_by(self, request_id: str, optimizer_id: str, tag: str) -> Checkpoint | None:
        """The checkpoint, if that request has made it."""
        try:
            existing = self._read(optimizer_id, tag)
        except OptserveError as error:
            logger.warning("not looked at: %s", error)
            return None
        if not request_id or existing.request_id != request_id:
            return None
        with disk_errors():
            # The first call may have ended before that.
            self._store.make_durable(optimizer_id)
        return existing

    def _known(self, optimizer_id: str, tag: str) -> Checkpoint:
        """A checkpoint, which is read once as long as its file is the same; a head of many parameters takes long."""
        with closing(self._open_file(optimizer_id, tag)) as file:
            status = os.fstat(file.fileno())
        same = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
        seen, known = self._seen.get((optimizer_id, tag), (None, None))
        if known is None or seen != same:
            known = self._read(optimizer_id, tag)
            self._seen[optimizer_id, tag] = same, known
        return known

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
    """What an import puts in place, in words. What its arrays hold is not compared."""
    return f"an import of a state of step {step}"


def _checkpoint(tag: str, file: StateFile) -> Checkpoint:
    of = file.description
    return Checkpoint(of.optimizer, tag, of.step, file.size_bytes, of.create_time, of.request_id)
