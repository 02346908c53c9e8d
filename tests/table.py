"""Every algorithm, one row each: adding one to the service is adding one here."""

from dataclasses import dataclass
from typing import Any

import torch

import oracle
from optserve_server.numerics.rules import Adadelta, Adagrad, DiagonalHessian, Momentum, Rule, Sgd, Vsgd, WindowedRms


@dataclass(frozen=True)
class Row:
    """A rule with hyper-parameters, its oracle, and torch's optimizer where the formulas agree.

    `torch_difference` says where they do not, word for word.
    """

    rule: Rule
    oracle: Any
    torch_optimizer: Any
    torch_difference: str = ""


ROWS = {
    "adadelta": Row(Adadelta(), oracle.adadelta, lambda p: torch.optim.Adadelta(p, lr=1.0, rho=0.95, eps=1e-6)),
    "adadelta-rate": Row(
        Adadelta(rho=0.9, eps=1e-4, learning_rate=0.3),
        oracle.adadelta,
        lambda p: torch.optim.Adadelta(p, lr=0.3, rho=0.9, eps=1e-4),
    ),
    "sgd": Row(Sgd(learning_rate=0.05), oracle.sgd, lambda p: torch.optim.SGD(p, lr=0.05)),
    "momentum": Row(
        Momentum(learning_rate=0.05, rho=0.9),
        oracle.momentum,
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        "torch's buffer is dx / -learning_rate; the same while the learning rate is constant.",
    ),
    "adagrad": Row(Adagrad(learning_rate=0.1), oracle.adagrad, lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-10)),
    "windowed-rms": Row(
        WindowedRms(learning_rate=0.01, rho=0.9, eps=0.0, outer_eps=1e-3),
        oracle.windowed_rms,
        lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9, eps=1e-3),
    ),
    "windowed-rms-default": Row(
        WindowedRms(), oracle.windowed_rms, None, "eps is inside the root, equation 9; torch has it outside."
    ),
    "diagonal-hessian": Row(
        DiagonalHessian(mu=0.5, learning_rate=0.1), oracle.diagonal_hessian, None, "torch has none."
    ),
    "vsgd": Row(Vsgd(), oracle.vsgd, None, "torch has none."),
    "vsgd-slow": Row(Vsgd(eps=1e-6, initial_overestimate=1.0, initial_steps=37), oracle.vsgd, None, "torch has none."),
}
