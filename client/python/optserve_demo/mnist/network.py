"""A multilayer perceptron with softmax and cross-entropy, in plain NumPy: the paper's network and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np


class Activation(NamedTuple):
    """A hidden unit: its function, in place; two derivatives, from its output; and its initial weights' variance."""

    apply: Callable[[np.ndarray], np.ndarray]
    derivative: Callable[[np.ndarray], np.ndarray]
    second_derivative: Callable[[np.ndarray], np.ndarray | float]
    variance: Callable[[int, int], float]


def _glorot(fan_in: int, fan_out: int) -> float:
    return 2.0 / (fan_in + fan_out)


def _he(fan_in: int, _fan_out: int) -> float:
    return 2.0 / fan_in


def _logistic(z: np.ndarray) -> np.ndarray:
    # Computed from tanh, which does not overflow.
    z *= 0.5
    np.tanh(z, out=z)
    z += 1
    z *= 0.5
    return z


ACTIVATIONS: dict[str, Activation] = {
    "tanh": Activation(lambda z: np.tanh(z, out=z), lambda a: 1 - a * a, lambda a: -2 * a * (1 - a * a), _glorot),
    "relu": Activation(lambda z: np.maximum(z, 0, out=z), lambda a: (a > 0).astype(a.dtype), lambda _: 0.0, _he),
    "logistic": Activation(_logistic, lambda a: a * (1 - a), lambda a: a * (1 - a) * (1 - 2 * a), _glorot),
}

HIDDEN = (500, 300)
"""The paper's hidden layers."""


class Network:
    """Weights and biases by name (`w1`, `b1`, …), float32.

    The paper does not state its initialisation. Here biases are 0, and weights are uniform around 0, with Glorot's
    variance 2 / (fan_in + fan_out), or with He's variance 2 / fan_in before rectified linear units.

    Args:
        sizes: Units of each layer, input and output included.
        activation: The activation of the hidden layers, a key of ACTIVATIONS.
        rng: Source of the initial weights.
        small: Draw weights within 1 / √fan_in instead, with variance 1 / (3 fan_in).
    """

    def __init__(self, sizes: Sequence[int], activation: str, rng: np.random.Generator, *, small: bool = False) -> None:
        self._activation = ACTIVATIONS[activation]
        self._layers = len(sizes) - 1
        self.params: dict[str, np.ndarray] = {}
        for layer, (fan_in, fan_out) in enumerate(pairwise(sizes), 1):
            variance = self._activation.variance if layer < self._layers else _glorot
            bound = fan_in**-0.5 if small else (3.0 * variance(fan_in, fan_out)) ** 0.5
            self.params[f"w{layer}"] = rng.uniform(-bound, bound, (fan_in, fan_out)).astype(np.float32)
            self.params[f"b{layer}"] = np.zeros(fan_out, np.float32)
        self.grads = {name: np.zeros_like(param) for name, param in self.params.items()}

    def loss_and_gradients(self, images: np.ndarray, labels: np.ndarray, *, with_curvature: bool = False) -> float:
        """Compute the mean cross-entropy of a batch, and write its gradients into `grads`.

        With curvature, the diagonal of its Hessian goes to `curvature` as well, by the propagation of Becker and LeCun,
        "Improving the convergence of back-propagation learning with second order methods", 1988: second derivatives
        with respect to different units of one layer are neglected.

        Args:
            images: float32, of shape (batch, pixels).
            labels: Integers, of shape (batch,).
            with_curvature: Compute the curvature too, for methods that need it. Takes about twice the time.
        """
        outputs = self._forward(images)
        rows = np.arange(len(labels))
        probabilities = _softmax(outputs.pop())
        loss = float(-np.log(np.maximum(probabilities[rows, labels], np.float32(1e-30))).mean())
        # Derivatives of the loss with respect to the sums that go into a layer's units.
        second = probabilities * (1 - probabilities) / len(labels) if with_curvature else None
        delta = probabilities
        delta[rows, labels] -= 1
        delta /= len(labels)
        for layer in range(self._layers, 0, -1):
            below = outputs.pop()
            np.matmul(below.T, delta, out=self.grads[f"w{layer}"])
            np.sum(delta, axis=0, out=self.grads[f"b{layer}"])
            if second is not None:
                np.matmul((below * below).T, second, out=self.curvature[f"w{layer}"])
                np.sum(second, axis=0, out=self.curvature[f"b{layer}"])
            if layer > 1:
                delta, second = self._propagate(layer, below, delta, second)
        return loss

    def _propagate(
        self, layer: int, below: np.ndarray, delta: np.ndarray, second: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """First and second derivatives with respect to the layer before, whose output is `below`."""
        weights, slope = self.params[f"w{layer}"], self._activation.derivative(below)
        back = delta @ weights.T
        if second is not None:
            second = (second @ (weights * weights).T) * slope * slope
            second += back * self._activation.second_derivative(below)
        return back * slope, second

    @cached_property
    def curvature(self) -> dict[str, np.ndarray]:
        """The diagonal of the Hessian, in the form of `grads`; made at the first use."""
        return {name: np.zeros_like(param) for name, param in self.params.items()}

    def error(self, images: np.ndarray, labels: np.ndarray, batch: int = 1000) -> float:
        """The share of images that are classified wrongly, in [0, 1]."""
        wrong = 0
        for start in range(0, len(labels), batch):
            scores = self._forward(images[start : start + batch])[-1]
            wrong += int(np.count_nonzero(scores.argmax(axis=1) != labels[start : start + batch]))
        return wrong / len(labels)

    def _forward(self, images: np.ndarray) -> list[np.ndarray]:
        """The output of every layer, the images first, the scores of the classes last."""
        outputs = [images]
        for layer in range(1, self._layers + 1):
            z = outputs[-1] @ self.params[f"w{layer}"]
            z += self.params[f"b{layer}"]
            outputs.append(self._activation.apply(z) if layer < self._layers else z)
        return outputs


def _softmax(scores: np.ndarray) -> np.ndarray:
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    return scores
