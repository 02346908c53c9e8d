"""Many replicas train one network: each on its own share of the images, with the weights that the server holds."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from optserve.client import Client
from optserve.errors import GradientLateError, InvalidArgumentError
from optserve.examples.mnist.data import Dataset
from optserve.examples.mnist.network import Network
from optserve.examples.mnist.train import BATCH, Epoch, Progress, Report, new_network
from optserve.settings import Async, Bounded, Consistency, Sync
from optserve.worker import Worker

MIN_IMAGES = BATCH
"""Images that each replica must have at least."""


def consistency_from(text: str, replicas: int) -> Consistency:
    """`async`, `bounded:S`, `sync` or `sync:B`, where of the replicas B are backup workers.

    Raises:
        InvalidArgumentError: It is none of them.
    """
    kind, _, number = text.partition(":")
    if kind == "async" and not number:
        return Async()
    if kind == "bounded" and number.isdecimal():
        return Bounded(int(number))
    if kind == "sync" and (not number or (number.isdecimal() and int(number) < replicas)):
        backup = int(number or 0)
        return Sync(replicas - backup, backup)
    raise InvalidArgumentError(
        f"{text!r} is no consistency: async, bounded:S, sync or sync:B, with B backup workers of {replicas} replicas."
    )


@dataclass
class _Count:
    """What all replicas have done together."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    # As many compute at a time as there are cores; more would be slower, and OpenBLAS crashes from 64 threads on.
    computing: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(os.cpu_count() or 1))
    losses: list[float] = field(default_factory=list)
    stalest: int = 0
    late: int = 0
    failure: BaseException | None = None
    workers: list[Worker] = field(default_factory=list)


def train_replicas(
    client: Client,
    name: str,
    network: Network,
    dataset: Dataset,
    report: Report,
    *,
    replicas: int,
    epochs: int,
    seed: int,
    on_progress: Callable[[Progress], None],
    small: bool = False,
) -> None:
    """Train for some epochs: passes over all images, of which each replica has a share.

    Args:
        client: Of the server that holds the optimizer.
        name: Of the optimizer, which is hosted and has a consistency.
        network: Gives the activation, and takes the weights at the end of each epoch.
        dataset: To train and test on.
        report: Filled as the run goes on.
        replicas: How many.
        epochs: How many.
        seed: Of the shares and of the order within each.
        on_progress: Called now and then.
        small: See Network.

    Raises:
        InvalidArgumentError: There are more replicas than batches.
        OptserveError: What a replica has failed with.
    """
    if len(dataset.train_labels) < replicas * MIN_IMAGES:
        raise InvalidArgumentError(
            f"{replicas} replicas need at least {replicas * MIN_IMAGES} images; there are {len(dataset.train_labels)}."
        )
    order = np.random.default_rng([seed, 2]).permutation(len(dataset.train_labels))
    shares = np.array_split(order, replicas)
    # As many batches for each as for the smallest, so that in sync nobody is left alone.
    batches = max(1, round(len(shares[-1]) / BATCH))
    count, stop = _Count(), threading.Event()

    def run(number: int) -> None:
        try:
            _replica(client, name, dataset, shares[number], number, report, count, stop, epochs, batches, seed, small)
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
            with count.changed:
                count.failure = count.failure or error
                stop.set()
        finally:
            with count.changed:
                count.changed.notify_all()

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(replicas)]
    report.initial_test_error = network.error(dataset.test_images, dataset.test_labels)
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    try:
        _watch(client, name, network, dataset, report, count, threads, epochs, batches * replicas, start, on_progress)
    finally:
        stop.set()
        _end(threads, count)
    report.settings["stalest"], report.settings["late"] = count.stalest, count.late


def _replica(
    client: Client,
    name: str,
    dataset: Dataset,
    share: np.ndarray,
    number: int,
    report: Report,
    count: _Count,
    stop: threading.Event,
    epochs: int,
    batches: int,
    seed: int,
    small: bool,
) -> None:
    own = new_network(dataset, report.settings["activation"], seed, small=small)
    choices = _batches(np.random.default_rng([seed, 3, number]), share, batches)
    total = epochs * batches
    sync = isinstance(client.optimizer(name).consistency, Sync)
    with client.worker(name, f"replica-{number}") as worker:
        count.workers.append(worker)
        worker.pull(out=own.params)
        made = 0
        # In sync all stop at the same step, so that nobody waits for who has done its share.
        while not stop.is_set() and ((worker.at_step or 0) if sync else made) < total:
            chosen = next(choices)
            with count.computing:
                loss = own.loss_and_gradients(dataset.train_images[chosen], dataset.train_labels[chosen])
            late = False
            try:
                worker.step(own.grads, out=own.params)
            except GradientLateError:
                late = True
                worker.pull(out=own.params)
            made += 1
            with count.changed:
                count.late += late
                count.losses.append(loss)
                count.stalest = max(count.stalest, worker.staleness)
                count.changed.notify()


def _batches(rng: np.random.Generator, share: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """The share's images in so many batches, again and again, in another order each time."""
    while True:
        yield from np.array_split(rng.permutation(share), count)


def _end(threads: list[threading.Thread], count: _Count) -> None:
    """Wait for all replicas, none of which has to wait for the others any more."""
    for thread in threads:
        while thread.is_alive():
            for worker in count.workers:
                worker.cancel()
            thread.join(0.1)


def _watch(
    client: Client,
    name: str,
    network: Network,
    dataset: Dataset,
    report: Report,
    count: _Count,
    threads: list[threading.Thread],
    epochs: int,
    batches: int,
    start: float,
    on_progress: Callable[[Progress], None],
) -> None:
    """Tell of the progress, and look at the weights whenever all images have been gone through once more."""
    optimizer = client.optimizer(name)
    test_error = report.initial_test_error
    for epoch in range(1, epochs + 1):
        last = epoch == epochs
        while True:
            with count.changed:
                count.changed.wait(0.2)
                done, alive = len(count.losses), any(thread.is_alive() for thread in threads)
                losses = count.losses[(epoch - 1) * batches : epoch * batches] or [0.0]
            elapsed = time.perf_counter() - start
            report.steps = done
            on_progress(
                Progress(epoch, epochs, done, epochs * batches, sum(losses) / len(losses), test_error, done / elapsed)
            )
            if not alive or (done >= epoch * batches and not last):
                break
        if count.failure is not None:
            raise count.failure
        optimizer.pull_parameters(out=network.params)
        test_error = network.error(dataset.test_images, dataset.test_labels)
        report.seconds = time.perf_counter() - start
        report.epochs.append(Epoch(epoch, sum(losses) / len(losses), test_error, report.seconds))
