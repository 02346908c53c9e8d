"""Trains `examples/federated.py`'s network with Flower's own FedAdam. Runs in an environment of its own, with flwr."""

# pyright: reportMissingImports=false

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam
from flwr.supercore.task_identity import TaskIdentity
from threadpoolctl import threadpool_limits

import federated
from optserve_demo.mnist import data


class LocalGrid(Grid):
    """Flower's network of clients, within this process. The strategy uses two of its methods."""

    def __init__(self, task: federated.Task, dtype: str) -> None:
        self._task, self._dtype = task, dtype

    def get_node_ids(self) -> Iterable[int]:
        return range(1, len(self._task.shares) + 1)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return [self._reply(message) for message in messages]

    def _reply(self, message: Message) -> Message:
        number = message.metadata.dst_node_id - 1
        round_ = message.content["config"]["server-round"]
        # Flower's parameters are float64 from the first round on, whatever they were before.
        x = {name: array.numpy().astype(self._dtype) for name, array in message.content["arrays"].items()}
        own = self._task.trained_by(number, x, round_)
        arrays = ArrayRecord({name: Array(array) for name, array in own.items()})
        count = MetricRecord({"num-examples": len(self._task.shares[number])})
        return Message(RecordDict({"arrays": arrays, "metrics": count}), reply_to=message)

    def _unused(self, *_arguments: object, **_named: object) -> None:
        raise NotImplementedError

    run = property(_unused)
    set_run = create_message = push_messages = pull_messages = _unused


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--dtype", default="float64")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    # Which Flower's own processes have by themselves; messages carry it.
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 100
    task, x = federated.prepared(data.load(), rounds=args.rounds)
    method = federated.METHOD
    strategy = FedAdam(
        fraction_evaluate=0, min_available_nodes=len(task.shares), eta=method.learning_rate, beta_1=method.beta1,
        beta_2=method.beta2, tau=method.eps,
    )  # fmt: skip
    parameters = {}

    def keep(round_: int, arrays: ArrayRecord) -> MetricRecord:
        after = {name: array.numpy() for name, array in arrays.items()}
        parameters.update({f"{round_} {name}": array for name, array in after.items()})
        return MetricRecord({"error": task.error(after)})

    initial = ArrayRecord({name: Array(array.astype(args.dtype)) for name, array in x.items()})
    with threadpool_limits(1):
        strategy.start(LocalGrid(task, args.dtype), initial, args.rounds, train_config=ConfigRecord(), evaluate_fn=keep)
    np.savez(args.out, **parameters)


if __name__ == "__main__":
    main()
