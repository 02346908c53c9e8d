"""Trains one network with many replicas. Each has its own share of the images; the server holds the weights."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from optserve._common.machine import usable_cores
from optserve.client import Client
from optserve.errors import GradientLateError, InvalidArgumentError
from optserve.settings import Async, Bounded, Consistency, Sync
from optserve.worker import Worker
from optserve_demo.mnist.network import Network
from optserve_demo.mnist.train import BATCH, Epoch, Progress, Task, new_network

MIN_IMAGES = BATCH
"""Least number of images of each replica."""


@dataclass(frozen=True)
class Together:
    """How replicas train one network.

    Attributes:
        replicas: How many.
        consistency: How their gradients come together.
        push_every: A replica sends the mean of the gradients of so many batches; DistBelief's n_push.
        fetch_every: It takes new weights after so many batches; DistBelief's n_fetch.

    Raises:
        InvalidArgumentError: In sync, where each step is for all, one of the periods is not 1.
    """

    replicas: int
    consistency: Consistency
    push_every: int = 1
    fetch_every: int = 1

    def __post_init__(self) -> None:
        """Raise InvalidArgumentError if the options exclude each other."""
        if isinstance(self.consistency, Sync) and (self.push_every, self.fetch_every) != (1, 1):
            raise InvalidArgumentError(
                "In sync every batch is a step of all replicas, so push and fetch at every batch."
            )


def consistency_from(text: str, replicas: int, *, scale_by_staleness: bool = False) -> Consistency:
    """`async`, `bounded:S`, `sync` or `sync:B`, where of the replicas B are backup workers.

    Raises:
        InvalidArgumentError: It is none of them.
    """
    kind, _, number = text.partition(":")
    if kind == "async" and not number:
        return Async(scale_by_staleness=scale_by_staleness)
    if kind == "bounded" and number.isdecimal():
        return Bounded(int(number), scale_by_staleness=scale_by_staleness)
    if kind == "sync" and (not number or (number.isdecimal() and int(number) < replicas)):
        backup = int(number or 0)
        return Sync(replicas - backup, backup, scale_by_staleness=scale_by_staleness)
    raise InvalidArgumentError(
        f"{text!r} is no consistency: async, bounded:S, sync or sync:B, with B backup workers of {replicas} replicas."
    )


def train_replicas(
    task: Task, client: Client, name: str, together: Together, on_progress: Callable[[Progress], None]
) -> None:
    """Train for some epochs: passes over all images, of which each replica has a share.

    Args:
        task: What is trained. Its network gives the activation, and takes the weights at the end of each epoch.
        client: Of the server that holds the optimizer.
        name: Of the optimizer, which is hosted and has the consistency.
        together: How many replicas, and how they come together.
        on_progress: Called now and then.

    Raises:
        InvalidArgumentError: There are more replicas than batches.
        OptserveError: What a replica has failed with.
    """
    network, dataset = task.network, task.dataset
    images = len(dataset.train_labels)
    if images < together.replicas * MIN_IMAGES:
        raise InvalidArgumentError(
            f"{together.replicas} replicas need at least {together.replicas * MIN_IMAGES} images; there are {images}."
        )
    training = _Training(task, client, name, together)
    task.report.initial_test_error = network.error(dataset.test_images, dataset.test_labels)
    threads = [
        threading.Thread(target=training.run, args=(number,), daemon=True) for number in range(together.replicas)
    ]
    for thread in threads:
        thread.start()
    try:
        training.watch(network, threads, on_progress)
    finally:
        training.end(threads)


class _Training:
    """What all replicas share, and what they have done together."""

    def __init__(self, task: Task, client: Client, name: str, together: Together) -> None:
        self._client, self._name, self._dataset, self._report = client, name, task.dataset, task.report
        self._together, self._epochs, self._seed = together, task.epochs, task.seed
        order = np.random.default_rng([task.seed, 2]).permutation(len(task.dataset.train_labels))
        self._shares = np.array_split(order, together.replicas)
        # Each replica has as many batches as the smallest, so that in sync no replica is left alone.
        self._batches = max(1, round(len(self._shares[-1]) / BATCH))
        # At most one thread per core computes at a time. More would be slower, and OpenBLAS crashes from 64 threads on.
        self._cores = _FairLimit(usable_cores())
        self._start = time.perf_counter()
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._losses: list[float] = []
        self._staleness_sum = self._stalest = self._late = 0
        self._failure: BaseException | None = None
        self._workers: list[Worker] = []
        # The caller's setting; new threads begin with NumPy's default.
        self._on_overflow = np.geterr()

    def run(self, number: int) -> None:
        """Run one replica, in its own thread."""
        try:
            with np.errstate(**self._on_overflow):
                self._train(number)
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
            with self._changed:
                self._failure = self._failure or error
                self._stop.set()
        finally:
            with self._changed:
                self._changed.notify_all()

    def _train(self, number: int) -> None:
        together, dataset = self._together, self._dataset
        own = new_network(dataset, self._report.settings["activation"], self._seed)
        choices = self._choices(number)
        mean = {name: np.zeros_like(grad) for name, grad in own.grads.items()} if together.push_every > 1 else own.grads
        with self._client.worker(self._name, f"replica-{number}") as worker:
            self._workers.append(worker)
            worker.pull(out=own.params)
            made = 0
            while not self._done(worker, made):
                chosen = next(choices)
                with self._cores.one():
                    loss = own.loss_and_gradients(dataset.train_images[chosen], dataset.train_labels[chosen])
                made += 1
                if together.push_every > 1:
                    for name, grad in own.grads.items():
                        mean[name] += grad / np.float32(together.push_every)
                # The gradients that are left at the end are pushed too.
                pushing = made % together.push_every == 0 or made == self._epochs * self._batches
                fetching = made % together.fetch_every == 0
                if pushing:
                    self._push(worker, mean, own.params if fetching else None)
                elif fetching:
                    worker.pull(out=own.params)
                if pushing and together.push_every > 1:
                    for array in mean.values():
                        array.fill(0)
                with self._changed:
                    self._losses.append(loss)
                    self._changed.notify()

    def _done(self, worker: Worker, made: int) -> bool:
        # In sync all replicas stop at the same step, so that none waits for a replica that has finished.
        sync = isinstance(self._together.consistency, Sync)
        return self._stop.is_set() or ((worker.at_step or 0) if sync else made) >= self._epochs * self._batches

    def _push(self, worker: Worker, grads: dict[str, np.ndarray], params: dict[str, np.ndarray] | None) -> None:
        """Send gradients, and receive the new weights if the replica needs them."""
        late = False
        try:
            worker.step(grads, out=params, reply="nothing" if params is None else "parameters")
        except GradientLateError:
            late = True
            worker.pull(out=params)
        with self._changed:
            self._late += late
            self._staleness_sum += worker.staleness
            self._stalest = max(self._stalest, worker.staleness)

    def _choices(self, number: int) -> Iterator[np.ndarray]:
        """A replica's images in batches, for ever, in a new order for each pass."""
        rng = np.random.default_rng([self._seed, 3, number])
        while True:
            yield from np.array_split(rng.permutation(self._shares[number]), self._batches)

    def watch(self, network: Network, threads: list[threading.Thread], on_progress: Callable[[Progress], None]) -> None:
        """Report the progress, and test the weights after every pass over all images."""
        optimizer, report = self._client.optimizer(self._name), self._report
        batches = self._batches * self._together.replicas
        test_error = report.initial_test_error
        for epoch in range(1, self._epochs + 1):
            last = epoch == self._epochs
            while True:
                with self._changed:
                    self._changed.wait(0.2)
                    done, alive = len(self._losses), any(thread.is_alive() for thread in threads)
                    losses = self._losses[(epoch - 1) * batches : epoch * batches] or [0.0]
                elapsed = time.perf_counter() - self._start
                report.steps, loss = done, sum(losses) / len(losses)
                on_progress(
                    Progress(epoch, self._epochs, done, self._epochs * batches, loss, test_error, done / elapsed)
                )
                if not alive or (done >= epoch * batches and not last):
                    break
            if self._failure is not None:
                raise self._failure
            found = optimizer.pull_parameters(out=network.params)
            applied = found.step if found else 0
            report.seconds = time.perf_counter() - self._start
            test_error = network.error(self._dataset.test_images, self._dataset.test_labels)
            report.epochs.append(Epoch(epoch, loss, test_error, report.seconds, applied))
            report.settings["stalest"], report.settings["late"] = self._stalest, self._late
            report.settings["mean_staleness"] = round(self._staleness_sum / max(applied, 1), 2)

    def end(self, threads: list[threading.Thread]) -> None:
        """Wait for all replicas. None of them waits for others any more."""
        self._stop.set()
        for thread in threads:
            while thread.is_alive():
                for worker in self._workers:
                    worker.cancel()
                thread.join(0.1)


class _FairLimit:
    """Lets `count` threads run at a time, in the order in which they come.

    A semaphore would let a thread that comes back overtake those that wait, whose weights grow stale meanwhile.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()

    @contextmanager
    def one(self) -> Iterator[None]:
        """Wait until this thread may run, for the length of a with-block."""
        with self._lock:
            admitted = threading.Event()
            if self._free:
                self._free -= 1
                admitted.set()
            else:
                self._waiting.append(admitted)
        admitted.wait()
        try:
            yield
        finally:
            with self._lock:
                if self._waiting:
                    self._waiting.popleft().set()
                else:
                    self._free += 1
