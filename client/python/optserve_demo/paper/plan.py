"""The runs for each table and figure, and the paper's results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from optserve.algorithms import Adadelta, Adagrad, Algorithm, DiagonalHessian, Momentum, Sgd, Vsgd
from optserve.settings import Cosine, Schedule
from optserve_demo.paper.curvature import CurvatureKind

STEPS_PER_EPOCH = 600
"""60,000 images in batches of 100."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        label: What it shows, the same for all of its seeds; with the seed, what its result is kept under.
        algorithm: With its hyper-parameters.
        activation: Of the hidden units.
        epochs: Passes over the training images.
        seed: Of the initial weights and the order of the images.
        schedule: Of the learning rate.
        look_every: Steps between two looks at effective rates and updates; 0 for none.
        replicas: How many share the weights, each on its own images, asynchronously; 0 where one client has them.
        scale_by_staleness: Whether the learning rate is divided by how old a replica's gradient is.
        curvature: What is sent as curvature by the methods that take one; see Curvature.
    """

    label: str
    algorithm: Algorithm
    activation: str
    epochs: int
    seed: int
    schedule: Schedule | None = None
    look_every: int = 0
    replicas: int = 0
    scale_by_staleness: bool = False
    curvature: CurvatureKind = "batch"

    @property
    def key(self) -> str:
        """A name for files and optimizers."""
        return f"{self.label}-seed{self.seed}"


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper.

    Attributes:
        name: On the command line.
        title: In words.
        seeds: As many as its results are the median of, unless asked otherwise.
        runs: Those of one seed; shortened, to see that all of it works, if `quick`.
        paper: The paper's test errors in per cent, by label.
    """

    name: str
    title: str
    seeds: int
    runs: Callable[[int, bool], list[Run]]
    paper: dict[str, float]


RATES = ("1e0", "1e-1", "1e-2", "1e-3", "1e-4")
METHODS: dict[str, Callable[[float], Algorithm]] = {
    "sgd": lambda rate: Sgd(learning_rate=rate),
    "momentum": lambda rate: Momentum(learning_rate=rate, rho=0.9),
    "adagrad": lambda rate: Adagrad(learning_rate=rate),
}
EPSILONS, RHOS = ("1e-2", "1e-4", "1e-6", "1e-8"), ("0.9", "0.95", "0.99")

_TABLE_1 = {
    "sgd": (2.26, 2.51, 7.02, 17.01, 58.10),
    "momentum": (89.68, 2.03, 2.68, 6.98, 16.98),
    "adagrad": (43.76, 2.82, 1.79, 5.21, 12.59),
}
_TABLE_2 = {
    "1e-2": (2.59, 2.58, 2.32),
    "1e-4": (2.05, 1.99, 2.28),
    "1e-6": (1.90, 1.83, 2.05),
    "1e-8": (2.29, 2.13, 2.00),
}

BEST: dict[str, Algorithm] = {
    "sgd": Sgd(learning_rate=1.0),
    "momentum": Momentum(learning_rate=0.1, rho=0.9),
    "adagrad": Adagrad(learning_rate=0.01),
    "adadelta": Adadelta(rho=0.95, eps=1e-6),
}
"""Each method at its best setting of the paper's tables."""

UNSCALED = "-unscaled"
"""End of the labels of runs with replicas whose rates are not scaled by staleness."""

SENSITIVE = DiagonalHessian(mu=1e-3, learning_rate=1e-3)
"""Equation 6 where curvature matters: |h| is of the size of μ. With the default of 3, some 30 times the largest |h|, it
is gradient descent."""


def _table1(seed: int, quick: bool) -> list[Run]:
    rates = RATES[1:3] if quick else RATES
    return [
        Run(f"{method}-{rate}", make(float(rate)), "relu", 1 if quick else 6, seed)
        for method, make in METHODS.items()
        for rate in rates
    ]


def _table2(seed: int, quick: bool) -> list[Run]:
    return [
        Run(f"eps{eps}-rho{rho}", Adadelta(rho=float(rho), eps=float(eps)), "relu", 1 if quick else 6, seed)
        for eps in (("1e-2", "1e-6") if quick else EPSILONS)
        for rho in (("0.95",) if quick else RHOS)
    ]


def _figure1(seed: int, quick: bool) -> list[Run]:
    return [Run(method, algorithm, "relu", 2 if quick else 50, seed) for method, algorithm in BEST.items()]


def _figure2(seed: int, quick: bool) -> list[Run]:
    epochs, look_every = (2, 40) if quick else (25, 25)
    return [Run("adadelta", BEST["adadelta"], "tanh", epochs, seed, look_every=look_every)]


def _mnist_tanh(seed: int, quick: bool) -> list[Run]:
    return [Run("adadelta", BEST["adadelta"], "tanh", 1 if quick else 6, seed)]


def _curvature(seed: int, quick: bool) -> list[Run]:
    epochs = 1 if quick else 6
    runs = [Run("vsgd", Vsgd(), "tanh", epochs, seed)]
    runs += [Run(f"vsgd-eps{eps}", Vsgd(eps=float(eps)), "tanh", epochs, seed) for eps in ("1e-4", "1e-6", "1e-9")]
    kinds: dict[str, CurvatureKind] = {
        "": "mean",
        "-zero": "zero",
        "-shuffled-within": "shuffled_within",
        "-shuffled": "shuffled",
    }
    runs += [
        Run(f"diagonal-hessian{suffix}", SENSITIVE, "tanh", epochs, seed, curvature=kind)
        for suffix, kind in kinds.items()
    ]
    return runs


def _annealing(seed: int, quick: bool) -> list[Run]:
    epochs = 2 if quick else 50
    schedule = Cosine(period_steps=epochs * STEPS_PER_EPOCH)
    return [
        Run("adadelta", BEST["adadelta"], "relu", epochs, seed),
        Run("adadelta-annealed", BEST["adadelta"], "relu", epochs, seed, schedule),
        Run("momentum", BEST["momentum"], "relu", epochs, seed),
    ]


SLOWER_MOMENTUM: dict[str, Algorithm] = {
    f"momentum-{rate}": Momentum(learning_rate=float(rate), rho=0.9) for rate in ("1e-2", "1e-3")
}
"""Momentum at the next rates of Table 1: at the best one, 200 replicas diverge."""


def _replicas(
    methods: dict[str, Algorithm], slower: dict[str, Algorithm], activation: str, replicas: int
) -> Callable[[int, bool], list[Run]]:
    """Methods as they are, which does not take long to fail, and with rates scaled by staleness; the slower only so."""

    def runs(seed: int, quick: bool) -> list[Run]:
        count = 10 if quick else replicas
        as_it_is = [
            Run(f"{label}{UNSCALED}", method, activation, 1 if quick else 6, seed, replicas=count)
            for label, method in methods.items()
        ]
        epochs = 2 if quick else 40
        return [
            Run(label, method, activation, epochs, seed, replicas=count, scale_by_staleness=True)
            for label, method in (methods | slower).items()
        ] + as_it_is

    return runs


_PAPER_1 = {f"{method}-{rate}": row[number] for method, row in _TABLE_1.items() for number, rate in enumerate(RATES)}
_PAPER_2 = {f"eps{eps}-rho{rho}": row[number] for eps, row in _TABLE_2.items() for number, rho in enumerate(RHOS)}

EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment("table1", "Table 1: test error after 6 epochs against the learning rate", 3, _table1, _PAPER_1),
        Experiment("table2", "Table 2: test error of ADADELTA after 6 epochs against ε and ρ", 3, _table2, _PAPER_2),
        Experiment("figure1", "Figure 1: test error of four methods over 50 epochs", 3, _figure1, {}),
        Experiment("figure2", "Figure 2: effective learning rates and updates of ADADELTA", 1, _figure2, {}),
        Experiment(
            "figure3",
            "Figure 3: 100 asynchronous replicas, logistic units",
            1,
            _replicas({name: BEST[name] for name in ("adadelta", "adagrad")}, {}, "logistic", 100),
            {},
        ),
        Experiment(
            "figure4",
            "Figure 4: 200 asynchronous replicas, rectified linear units",
            1,
            _replicas({name: BEST[name] for name in ("adadelta", "momentum", "adagrad")}, SLOWER_MOMENTUM, "relu", 200),
            {},
        ),
        Experiment("mnist-tanh", "Section 4.1: ADADELTA, tanh, 6 epochs", 5, _mnist_tanh, {"adadelta": 2.0}),
        Experiment("curvature", "Equations 6 and 7: methods with curvature, tanh", 3, _curvature, {"vsgd": 2.1}),
        Experiment("annealing", "Section 5: ADADELTA with annealing, beside Momentum, 50 epochs", 3, _annealing, {}),
    )
}
"""Every experiment by its name."""
