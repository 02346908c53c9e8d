"""A worker in a process of its own, which goes on where an earlier one of its name has ended.

Usage: doomed_worker.py TARGET OPTIMIZER NAME STEPS VALUE
"""

import sys
from collections.abc import Callable

import numpy as np

import optserve

CONFIG = optserve.ClientConfig(initial_backoff_s=0.02, max_backoff_s=0.2, step_timeout_s=120, connect_timeout_s=60)


def work(
    client: optserve.Client,
    optimizer: str,
    name: str,
    steps: int,
    value: int,
    before: Callable[[int], None] = lambda _step: None,
) -> None:
    """Make the steps that are left of `steps`, each of gradients that are `value` plus the number of the step.

    Every other worker's gradients go over gRPC, those of the rest through shared memory. `before` is called with the
    number of each step.
    """
    with client.worker(optimizer, name, transport="grpc" if value % 2 else "auto") as worker:
        found = worker.pull()
        assert found is not None
        shapes = {key: (x.shape, x.dtype) for key, x in found.arrays.items()}
        while worker.steps_made < steps:
            before(worker.steps_made)
            amount = value + worker.steps_made
            try:
                worker.step({key: np.full(shape, -amount, dtype) for key, (shape, dtype) in shapes.items()})
            except optserve.StepInDoubtError:
                # Made by an earlier life of this worker in its last moment.
                worker.refresh()
                worker.pull()


def total(steps: int, value: int) -> int:
    """What `work` adds to every parameter, by gradient descent with a rate of 1."""
    return sum(value + step for step in range(steps))


if __name__ == "__main__":
    target, optimizer, name, steps, value = sys.argv[1:]
    with optserve.connect(target, CONFIG) as client:
        work(client, optimizer, name, int(steps), int(value))
