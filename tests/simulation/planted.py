"""Bugs that are planted in the service, one at a time, for the simulation to find.

The list says what the simulation is worth: whoever changes it sees whether it still finds them. These break the code
from outside, so they patch what is private.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

from optserve_server.domain.errors import OptserveError
from optserve_server.edge.step_stream import StepStream
from optserve_server.engine.optimizer import Optimizer
from optserve_server.engine.step_record import StepRecord
from optserve_server.engine.transaction import Step
from optserve_server.engine.workers.registry import Worker, WorkerRegistry
from optserve_server.persistence.journal.open_segment import OpenSegment


@contextmanager
def ack_before_sync() -> Iterator[None]:
    """A change is acknowledged when it was written, though the disk does not have it yet."""
    with mock.patch.object(OpenSegment, "sync", return_value=None):
        yield


@contextmanager
def half_close_commits() -> Iterator[None]:
    """A stream that ends commits the step that it is in the middle of, if all of its gradients are there."""
    close = StepStream.close

    def commit_and_close(stream: StepStream) -> None:
        if stream._step is not None:
            try:
                stream._step.check_complete()
                stream._step.commit()
            except OptserveError:
                pass
        close(stream)

    with mock.patch.object(StepStream, "close", commit_and_close):
        yield


@contextmanager
def stream_not_fenced() -> Iterator[None]:
    """A worker's earlier streams still make steps after it has opened another one."""
    check = WorkerRegistry.check_current

    def check_life(registry: WorkerRegistry, worker: Worker, _stream: int | None, life: int) -> None:
        check(registry, worker, None, life)

    with mock.patch.object(WorkerRegistry, "check_current", check_life):
        yield


@contextmanager
def replay_applied_again() -> Iterator[None]:
    """A step that comes once more is taken for a new one, if its gradients come with it."""
    make = Step.__init__

    def make_new(step: Step, *arguments: Any, replay: bool, **options: Any) -> None:
        make(step, *arguments, replay=False, **options)

    with mock.patch.object(Step, "__init__", make_new):
        yield


@contextmanager
def lease_never_ends() -> Iterator[None]:
    """A worker that was alive once is waited for until it takes its leave."""

    def alive(worker: Worker) -> bool:
        return worker.lease_until > 0

    with mock.patch.object(Worker, "alive", property(alive)):
        yield


@contextmanager
def recovered_without_settings() -> Iterator[None]:
    """Recovery makes the steps that have settings of their own with those of the optimizer."""
    decode = StepRecord.decode

    def decode_without(*arguments: Any) -> StepRecord:
        return decode(*arguments)._replace(settings=None)

    with mock.patch.object(StepRecord, "decode", decode_without):
        yield


@contextmanager
def addition_not_remembered() -> Iterator[None]:
    """An addition of parameters that comes once more is taken for a new one."""
    with mock.patch.object(Optimizer, "was_replaced_by", return_value=False):
        yield


PLANTED: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "an ack before the sync": ack_before_sync,
    "a half-close that commits": half_close_commits,
    "a worker's stream that is not fenced": stream_not_fenced,
    "a replay that is applied again": replay_applied_again,
    "a lease that never ends": lease_never_ends,
    "a recovery without settings of steps": recovered_without_settings,
    "an addition that is not remembered": addition_not_remembered,
}
