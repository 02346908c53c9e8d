"""A multilayer perceptron with softmax and cross-entropy, in plain NumPy: the paper's network and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np


class Activation(NamedTuple):
    """A hidden unit: its function, in place; its derivative, from its output; and its initial weights' variance."""

    apply: Callable[[np.ndarray], np.ndarray]
    derivative: Callable[[np.ndarray], np.ndarray]
    variance: Callable[[int, int], float]


def _glorot(fan_in: int, fan_out: int) -> float:
    return 2.0 / (fan_in + fan_out)


def _he(fan_in: int, _fan_out: int) -> float:
    return 2.0 / fan_in


ACTIVATIONS: dict[str, Activation] = {
    "tanh": Activation(lambda z: np.tanh(z, out=z), lambda a: 1 - a * a, _glorot),
    "relu": Activation(lambda z: np.maximum(z, 0, out=z), lambda a: (a > 0).astype(a.dtype), _he),
}

HIDDEN = (500, 300)
"""The paper's hidden layers."""


class Network:
    """Weights and biases by name (`w1`, `b1`, …), float32.

    The paper does not state its initialisation. Ours: biases at 0, weights uniform around 0 with Glorot's variance
    2 / (fan_in + fan_out), and with He's, 2 / fan_in, in front of rectified linear units.

    Args:
        sizes: Units of each layer, input and output included.
        activation: Of the hidden layers, a key of ACTIVATIONS.
        rng: Source of the initial weights.
    """

    def __init__(self, sizes: Sequence[int], activation: str, rng: np.random.Generator) -> None:
        self._activation = ACTIVATIONS[activation]
        self._layers = len(sizes) - 1
        self.params: dict[str, np.ndarray] = {}
        for layer, (fan_in, fan_out) in enumerate(pairwise(sizes), 1):
            variance = self._activation.variance if layer < self._layers else _glorot
            bound = (3.0 * variance(fan_in, fan_out)) ** 0.5
            self.params[f"w{layer}"] = rng.uniform(-bound, bound, (fan_in, fan_out)).astype(np.float32)
            self.params[f"b{layer}"] = np.zeros(fan_out, np.float32)
        self.grads = {name: np.zeros_like(param) for name, param in self.params.items()}

    def loss_and_gradients(self, images: np.ndarray, labels: np.ndarray) -> float:
        """The mean cross-entropy of a batch; its gradients go to `grads`, which is overwritten.

        Args:
            images: float32, of shape (batch, pixels).
            labels: Integers, of shape (batch,).
        """
        outputs = self._forward(images)
        rows = np.arange(len(labels))
        probabilities = _softmax(outputs.pop())
        loss = float(-np.log(np.maximum(probabilities[rows, labels], np.float32(1e-30))).mean())
        delta = probabilities
        delta[rows, labels] -= 1
        delta /= len(labels)
        for layer in range(self._layers, 0, -1):
            below = outputs.pop()
            np.matmul(below.T, delta, out=self.grads[f"w{layer}"])
            np.sum(delta, axis=0, out=self.grads[f"b{layer}"])
            if layer > 1:
                delta = (delta @ self.params[f"w{layer}"].T) * self._activation.derivative(below)
        return loss

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
