"""The methods once more, from the paper's equations, in float64 and without sharing a line with the server.

A method that is added to the service has its function here, and at least one row in the table at the end.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from optserve_server.numerics.rules import (
    Adadelta,
    Adagrad,
    Adam,
    AdamW,
    CenteredRmsprop,
    DiagonalHessian,
    FedAdam,
    Lion,
    Momentum,
    Nadam,
    Rmsprop,
    Rule,
    Sgd,
    SgdMomentum,
    Vsgd,
    WindowedRms,
    Yogi,
)


def adadelta(gradients, rho, eps, learning_rate):
    x = np.zeros_like(gradients[0])
    mean_square_g = np.zeros_like(x)
    mean_square_dx = np.zeros_like(x)
    for g in gradients:
        mean_square_g = rho * mean_square_g + (1 - rho) * g**2
        rms_dx = np.sqrt(mean_square_dx + eps)
        rms_g = np.sqrt(mean_square_g + eps)
        dx = -rms_dx / rms_g * g
        mean_square_dx = rho * mean_square_dx + (1 - rho) * dx**2
        x = x + learning_rate * dx
    return x


def sgd(gradients, learning_rate):
    return -learning_rate * np.sum(gradients, axis=0)


def momentum(gradients, learning_rate, rho):
    x = np.zeros_like(gradients[0])
    dx = np.zeros_like(x)
    for g in gradients:
        dx = rho * dx - learning_rate * g
        x = x + dx
    return x


def adagrad(gradients, learning_rate, eps):
    x = np.zeros_like(gradients[0])
    for t in range(len(gradients)):
        norm = np.sqrt(np.sum(np.square(gradients[: t + 1]), axis=0))
        x = x - learning_rate * gradients[t] / (norm + eps)
    return x


def windowed_rms(gradients, learning_rate, rho, eps, outer_eps):
    x = np.zeros_like(gradients[0])
    for t in range(len(gradients)):
        # The decaying average written out as its sum, equation 8.
        weights = (1 - rho) * rho ** np.arange(t, -1, -1.0)
        mean_square_g = np.tensordot(weights, np.square(gradients[: t + 1]), axes=1)
        x = x - learning_rate * gradients[t] / (np.sqrt(mean_square_g + eps) + outer_eps)
    return x


def adam(gradients, learning_rate, beta1, beta2, eps):
    """The averages written out as their sums, so that their corrections are the sums of the weights."""
    x = np.zeros_like(gradients[0])
    for t in range(len(gradients)):
        ages = np.arange(t, -1, -1.0)
        mean, square = (
            np.tensordot(beta**ages, np.power(gradients[: t + 1], power), axes=1) / np.sum(beta**ages)
            for beta, power in ((beta1, 1), (beta2, 2))
        )
        x = x - learning_rate * mean / (np.sqrt(square) + eps)
    return x


def fed_adam(gradients, learning_rate, beta1, beta2, eps, bias_correction):
    if bias_correction:
        return adam(gradients, learning_rate, beta1, beta2, eps)
    x = np.zeros_like(gradients[0])
    m, v = np.zeros_like(x), np.zeros_like(x)
    for g in gradients:
        m += (1 - beta1) * (g - m)
        v += (1 - beta2) * (g * g - v)
        x = x - learning_rate * m / (np.sqrt(v) + eps)
    return x


def yogi(gradients, learning_rate, beta1, beta2, eps, bias_correction):
    x = np.zeros_like(gradients[0])
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * g
        v = np.where(v > g**2, v - (1 - beta2) * g**2, np.where(v < g**2, v + (1 - beta2) * g**2, v))
        unbias1, unbias2 = (1 - beta1**t, 1 - beta2**t) if bias_correction else (1, 1)
        x = x - learning_rate * (m / unbias1) / (np.sqrt(v / unbias2) + eps)
    return x


def nadam(gradients, learning_rate, beta1, beta2, eps, momentum_decay):
    x = np.zeros_like(gradients[0])
    m, v = np.zeros_like(x), np.zeros_like(x)
    mu = [beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay)) for t in range(1, len(gradients) + 2)]
    for t, g in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        ahead = mu[t] * m / (1 - np.prod(mu[: t + 1])) + (1 - mu[t - 1]) * g / (1 - np.prod(mu[:t]))
        x = x - learning_rate * ahead / (np.sqrt(v / (1 - beta2**t)) + eps)
    return x


def sgd_momentum(gradients, learning_rate, momentum, dampening, nesterov):
    """The buffer written out as its sum, in which the first gradient alone is not dampened."""
    x = np.zeros_like(gradients[0])
    for t, g in enumerate(gradients):
        weights = momentum ** np.arange(t, -1, -1.0) * (1 - dampening)
        weights[0] = momentum**t
        buffer = np.tensordot(weights, gradients[: t + 1], axes=1) if momentum else g
        x = x - learning_rate * (g + momentum * buffer if nesterov else buffer)
    return x


def rmsprop(gradients, learning_rate, rho, eps, momentum, centered=False):
    x = np.zeros_like(gradients[0])
    buffer = np.zeros_like(x)
    for t, g in enumerate(gradients):
        weights = (1 - rho) * rho ** np.arange(t, -1, -1.0)
        spread = np.tensordot(weights, np.square(gradients[: t + 1]), axes=1)
        if centered:
            spread = spread - np.tensordot(weights, gradients[: t + 1], axes=1) ** 2
        buffer = momentum * buffer + g / (np.sqrt(spread) + eps)
        x = x - learning_rate * buffer
    return x


def centered_rmsprop(gradients, **settings):
    return rmsprop(gradients, centered=True, **settings)


def lion(gradients, learning_rate, beta1, beta2):
    x = np.zeros_like(gradients[0])
    m = np.zeros_like(x)
    for g in gradients:
        x = x - learning_rate * np.sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g
    return x


def diagonal_hessian(gradients, curvatures, mu, learning_rate):
    return -learning_rate * sum(g / (np.abs(h) + mu) for g, h in zip(gradients, curvatures, strict=True))


def vsgd(gradients, curvatures, eps, initial_overestimate, initial_steps):
    """Element by element, with the slow start as its own loop: no arithmetic in common with the server's."""
    x = np.zeros_like(gradients[0])
    for i in np.ndindex(x.shape):
        gs, hs = [g[i] for g in gradients], [abs(h[i]) for h in curvatures]
        n = initial_steps
        g_bar = sum(gs[:n]) / n
        v_bar = initial_overestimate * sum(g * g for g in gs[:n]) / n
        h_bar = initial_overestimate * sum(hs[:n]) / n
        tau = float(n)
        for g, h in zip(gs[n:], hs[n:], strict=True):
            g_bar = (1 - 1 / tau) * g_bar + g / tau
            v_bar = (1 - 1 / tau) * v_bar + g * g / tau
            h_bar = (1 - 1 / tau) * h_bar + h / tau
            signal = g_bar**2 / v_bar if v_bar else 0.0
            x[i] -= signal / (h_bar + eps) * g
            tau = (1 - signal) * tau + 1
    return x


@dataclass(frozen=True)
class Row:
    """A rule with hyper-parameters, its oracle, and torch's optimizer where the formulas agree.

    `torch_difference` says where they do not, word for word. `torch_names` are torch's names of slots that have others;
    empty where torch has no such slot.
    """

    rule: Rule
    oracle: Any
    torch_optimizer: Any
    torch_difference: str = ""
    torch_names: Mapping[str, str] = field(default_factory=dict)


MOMENTS = {"grad_avg": "exp_avg", "square_avg": "exp_avg_sq"}

ROWS = {
    "adadelta": Row(Adadelta(), adadelta, lambda p: torch.optim.Adadelta(p, lr=1.0, rho=0.95, eps=1e-6)),
    "adadelta-rate": Row(
        Adadelta(rho=0.9, eps=1e-4, learning_rate=0.3),
        adadelta,
        lambda p: torch.optim.Adadelta(p, lr=0.3, rho=0.9, eps=1e-4),
    ),
    "sgd": Row(Sgd(learning_rate=0.05), sgd, lambda p: torch.optim.SGD(p, lr=0.05)),
    "momentum": Row(
        Momentum(learning_rate=0.05, rho=0.9),
        momentum,
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        "torch's buffer is dx / -learning_rate; the same while the learning rate is constant.",
    ),
    "adagrad": Row(Adagrad(learning_rate=0.1), adagrad, lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-10)),
    "windowed-rms": Row(
        WindowedRms(learning_rate=0.01, rho=0.9, eps=0.0, outer_eps=1e-3),
        windowed_rms,
        lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9, eps=1e-3),
    ),
    "windowed-rms-default": Row(
        WindowedRms(), windowed_rms, None, "eps is inside the root, equation 9; torch has it outside."
    ),
    "adam": Row(Adam(), adam, torch.optim.Adam, torch_names=MOMENTS),
    "adam-other": Row(
        Adam(learning_rate=0.05, beta1=0.5, beta2=0.9, eps=1e-3),
        adam,
        lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.5, 0.9), eps=1e-3),
        torch_names=MOMENTS,
    ),
    "adamw": Row(
        AdamW(learning_rate=0.01),
        adam,
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
        "torch decays x as well, by the learning rate times weight_decay.",
        MOMENTS,
    ),
    "sgd-momentum": Row(SgdMomentum(), sgd_momentum, lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)),
    "sgd-dampened": Row(
        SgdMomentum(learning_rate=0.05, momentum=0.8, dampening=0.3),
        sgd_momentum,
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, dampening=0.3),
    ),
    "sgd-nesterov": Row(
        SgdMomentum(learning_rate=0.05, nesterov=True),
        sgd_momentum,
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    ),
    "sgd-without-momentum": Row(
        SgdMomentum(momentum=0.0, dampening=0.5),
        sgd_momentum,
        lambda p: torch.optim.SGD(p, lr=0.01, dampening=0.5),
        "torch has no buffer then.",
        {"momentum_buffer": ""},
    ),
    "rmsprop": Row(
        Rmsprop(), rmsprop, torch.optim.RMSprop, "torch has no buffer without momentum.", {"momentum_buffer": ""}
    ),
    "rmsprop-momentum": Row(
        Rmsprop(learning_rate=0.003, rho=0.9, eps=1e-6, momentum=0.8),
        rmsprop,
        lambda p: torch.optim.RMSprop(p, lr=0.003, alpha=0.9, eps=1e-6, momentum=0.8),
    ),
    "centered-rmsprop": Row(
        CenteredRmsprop(momentum=0.5),
        centered_rmsprop,
        lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
    ),
    "lion": Row(Lion(), lion, None, "torch has none."),
    "lion-other": Row(Lion(learning_rate=0.1, beta1=0.5, beta2=0.8), lion, None, "torch has none."),
    "yogi": Row(Yogi(), yogi, None, "torch has none."),
    "yogi-corrected": Row(
        Yogi(learning_rate=0.1, beta1=0.5, beta2=0.9, eps=1e-6, bias_correction=True), yogi, None, "torch has none."
    ),
    "fed-adam": Row(FedAdam(), fed_adam, None, "torch always corrects."),
    "fed-adam-corrected": Row(
        FedAdam(bias_correction=True),
        fed_adam,
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.99), eps=1e-3),
        torch_names=MOMENTS,
    ),
    "nadam": Row(Nadam(), nadam, torch.optim.NAdam, torch_names=MOMENTS),
    "nadam-other": Row(
        Nadam(learning_rate=0.05, beta1=0.99, beta2=0.9, eps=1e-4, momentum_decay=3.0),
        nadam,
        lambda p: torch.optim.NAdam(p, lr=0.05, betas=(0.99, 0.9), eps=1e-4, momentum_decay=3.0),
        torch_names=MOMENTS,
    ),
    "diagonal-hessian": Row(DiagonalHessian(mu=0.5, learning_rate=0.1), diagonal_hessian, None, "torch has none."),
    "vsgd": Row(Vsgd(), vsgd, None, "torch has none."),
    "vsgd-slow": Row(Vsgd(eps=1e-6, initial_overestimate=1.0, initial_steps=37), vsgd, None, "torch has none."),
}
