"""The methods once more, from the paper's equations, in float64 and without sharing a line with the server."""

import numpy as np


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
