"""Federated learning: 20 clients train one network on MNIST, and the server's FedAdam brings their changes together.

    optserve serve &                                    # or leave out --target: a server of its own is started
    python examples/federated.py --target 127.0.0.1:50051

The images are divided as in Hsu et al., arXiv:1909.06335: for each digit, a Dirichlet distribution says how many of
its images each client has. Half of a client's images are of two or three digits. In each round a client pulls the
network, trains it on its own images, and sends what it would change as a gradient: x before minus x after. The server
waits for all 20 (`Sync(20)`), takes the mean, and makes one step of FedAdam. Images never leave their client.

One sees the test error fall to about 3 % in 30 rounds, which take half a minute on 2 cores:

    round  1   test error 41.67 %
    round  2   test error 15.22 %
    …
    round 30   test error  3.03 %

FedAdam is that of Reddi et al., arXiv:2003.00295, Algorithm 2. `--rate flwr` anneals the learning rate as Flower's
strategy FedAdam does; the updates then equal Flower's, up to rounding.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

import optserve
from optserve_demo.mnist import data

CLIENTS, HIDDEN, BATCH, LOCAL_RATE = 20, 100, 32, 0.05
METHOD = optserve.FedAdam(learning_rate=0.01, beta1=0.9, beta2=0.99, eps=1e-3)

Arrays = dict[str, np.ndarray]


def split(labels: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    """The images of each client: of every digit, a share from a Dirichlet distribution (Hsu et al., arXiv:1909.06335).

    Args:
        labels: Integers, of shape (images,).
        clients: How many.
        alpha: Concentration; the smaller, the fewer kinds of digits a client has.
        rng: Source of the shares.

    Returns:
        For each client the indices of its images, none of them twice, at least one batch.

    Raises:
        ValueError: There are too few images for so small an alpha.
    """
    for _ in range(1000):
        shares: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for digit in np.unique(labels):
            images = rng.permutation(np.flatnonzero(labels == digit))
            ends = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(images)
            for share, part in zip(shares, np.split(images, ends.astype(int)), strict=True):
                share.append(part)
        whole = [np.concatenate(share) for share in shares]
        if min(map(len, whole)) >= BATCH:
            return whole
    raise ValueError(f"Of {len(labels)} images not every client gets {BATCH}; pass a larger alpha than {alpha}.")


def new_network(pixels: int, classes: int, rng: np.random.Generator) -> Arrays:
    """Weights and biases of a network with one hidden layer, float32."""
    w1 = rng.normal(0, (2 / pixels) ** 0.5, (pixels, HIDDEN)).astype(np.float32)
    w2 = rng.normal(0, (1 / HIDDEN) ** 0.5, (HIDDEN, classes)).astype(np.float32)
    return {"w1": w1, "b1": np.zeros(HIDDEN, np.float32), "w2": w2, "b2": np.zeros(classes, np.float32)}


def scores_of(x: Arrays, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The outputs of the hidden and of the last layer."""
    hidden = np.maximum(images @ x["w1"] + x["b1"], 0)
    return hidden, hidden @ x["w2"] + x["b2"]


def gradients(x: Arrays, images: np.ndarray, labels: np.ndarray) -> Arrays:
    """The gradient of the mean cross-entropy of a batch."""
    hidden, scores = scores_of(x, images)
    delta = np.exp(scores - scores.max(axis=1, keepdims=True))
    delta /= delta.sum(axis=1, keepdims=True)
    delta[np.arange(len(labels)), labels] -= 1
    delta /= len(labels)
    back = (delta @ x["w2"].T) * (hidden > 0)
    return {"w1": images.T @ back, "b1": back.sum(axis=0), "w2": hidden.T @ delta, "b2": delta.sum(axis=0)}


def trained(x: Arrays, images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Arrays:
    """What a client makes of x: one epoch of gradient descent on its own images."""
    own = {name: array.copy() for name, array in x.items()}
    for batch in np.array_split(rng.permutation(len(labels)), -(-len(labels) // BATCH)):
        for name, gradient in gradients(own, images[batch], labels[batch]).items():
            own[name] -= LOCAL_RATE * gradient
    return own


def flwr_rate(method: optserve.FedAdam, round_: int) -> float:
    """The learning rate of Flower's FedAdam in a round, the first of which is 1.

    Flower corrects the bias of both averages by a factor on the learning rate, as the Adam paper does before section
    2.1, but with the number of the next round.
    """
    return method.learning_rate * (1 - method.beta2 ** (round_ + 1)) ** 0.5 / (1 - method.beta1 ** (round_ + 1))


@dataclass(frozen=True)
class Task:
    """What is trained, and how.

    Attributes:
        dataset: Images and labels; those for training are divided.
        shares: The images of each client.
        rounds: How many.
        seed: Of the order in which clients take their images.
        flwr_rates: Whether the learning rate follows `flwr_rate`.
    """

    dataset: data.Dataset
    shares: list[np.ndarray]
    rounds: int
    seed: int
    flwr_rates: bool

    def trained_by(self, number: int, x: Arrays, round_: int) -> Arrays:
        """What the client with this number makes of x in a round. Only here its images are used."""
        share = self.shares[number]
        rng = np.random.default_rng([self.seed, round_, number])
        return trained(x, self.dataset.train_images[share], self.dataset.train_labels[share], rng)

    def weight_of(self, number: int) -> float:
        """How much a client's change counts in the mean: by its number of images."""
        return len(self.shares[number]) * len(self.shares) / sum(map(len, self.shares))

    def error(self, x: Arrays) -> float:
        """The share of test images that are classified wrongly."""
        return float(np.mean(scores_of(x, self.dataset.test_images)[1].argmax(axis=1) != self.dataset.test_labels))


def train(client: optserve.Client, name: str, x: Arrays, task: Task, report: Callable[[int, Arrays], None]) -> None:
    """Train x with an optimizer on the server; `report` gets the number of each round, and x after it."""
    clients = len(task.shares)
    opt = client.create_optimizer(name, METHOD, x, hosted=True, consistency=optserve.Sync(clients))

    def take_part(number: int, worker: optserve.Worker, round_: int) -> None:
        before = worker.pull().arrays
        after = task.trained_by(number, before, round_)
        weight = task.weight_of(number)
        # Returns when the server has the changes of all clients, and has made the step.
        worker.step({key: weight * (before[key] - after[key]) for key in before}, reply="nothing")

    with ThreadPoolExecutor(clients) as pool, ExitStack() as stack:
        workers = [stack.enter_context(client.worker(name, f"client-{number}")) for number in range(clients)]
        for round_ in range(1, task.rounds + 1):
            if task.flwr_rates:
                opt.update(learning_rate=flwr_rate(METHOD, round_))
            list(pool.map(take_part, range(clients), workers, repeat(round_)))
            report(round_, opt.pull_parameters().arrays)


def prepared(
    dataset: data.Dataset, *, alpha: float = 0.5, rounds: int = 30, seed: int = 0, flwr_rates: bool = False
) -> tuple[Task, Arrays]:
    """The images divided among the clients, and a new network."""
    rng = np.random.default_rng(seed)
    shares = split(dataset.train_labels, CLIENTS, alpha, rng)
    return Task(dataset, shares, rounds, seed, flwr_rates), new_network(
        dataset.train_images.shape[1], dataset.classes, rng
    )


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", help="the server, HOST:PORT; by default one is started")
    parser.add_argument("--name", default="federated", help="of the optimizer on the server")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--alpha", type=float, default=0.5, help="the smaller, the fewer kinds of digits a client has")
    parser.add_argument("--rate", choices=["constant", "flwr"], default="constant", help="the server's learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, help="folder with the IDX files of MNIST; by default it is fetched")
    parser.add_argument("--json", type=Path, help="write settings and test errors to this file")
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    args = options()
    task, x = prepared(
        data.load(args.data_dir), alpha=args.alpha, rounds=args.rounds, seed=args.seed, flwr_rates=args.rate == "flwr"
    )
    errors = []

    def report(round_: int, x: Arrays) -> None:
        errors.append(task.error(x))
        print(f"round {round_:2}   test error {100 * errors[-1]:5.2f} %", flush=True)

    # One thread for each product: these are small, and their threads would only wait for one another.
    with ExitStack() as stack, threadpool_limits(1):
        target = args.target or stack.enter_context(optserve.local_server()).target
        client = stack.enter_context(optserve.connect(target))
        try:
            train(client, args.name, x, task, report)
        finally:
            client.delete_optimizer(args.name)
    if args.json:
        settings = {"algorithm": str(METHOD), "rate": args.rate, "alpha": args.alpha, "seed": args.seed}
        args.json.write_text(json.dumps({"settings": settings, "test_errors": errors}, indent=2))


if __name__ == "__main__":
    main()
