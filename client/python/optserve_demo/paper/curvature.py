"""The curvature that a run sends: that of its batches, or a control that shows whether curvature matters."""

from __future__ import annotations

from typing import Literal

import numpy as np

Arrays = dict[str, np.ndarray]
CurvatureKind = Literal["batch", "mean", "zero", "shuffled_within", "shuffled"]

MEAN_DECAY = 0.99
"""Of the running mean of |h| over batches, as LeCun et al., "Efficient BackProp" (1998), keep one."""


class Curvature:
    """Makes the curvature of a step of that of its batch.

    Args:
        kind: `batch`: as it is. `mean`: a running mean of its magnitude. `zero`: none, which makes equation 6 gradient
            descent with a rate of η / μ. `shuffled_within`: the running mean, in another order within each parameter;
            `shuffled`: over all of them, so that it is as large as it was, and of no element in particular.
        seed: Of that order.
    """

    def __init__(self, kind: CurvatureKind, seed: int = 0) -> None:
        self._kind = kind
        self._seed = seed
        self._mean: Arrays = {}
        self._orders: dict[str, np.ndarray] = {}

    def __call__(self, batch: Arrays) -> Arrays:
        """The curvature to be sent, by parameter, given that of a batch; arrays have the same shapes."""
        if self._kind == "batch":
            return batch
        if self._kind == "zero":
            return {name: np.zeros_like(array) for name, array in batch.items()}
        for name, array in batch.items():
            if name not in self._mean:
                self._mean[name] = np.abs(array)
            else:
                self._mean[name] *= np.float32(MEAN_DECAY)
                self._mean[name] += np.float32(1 - MEAN_DECAY) * np.abs(array)
        if self._kind == "mean":
            return self._mean
        if self._kind == "shuffled_within":
            return {name: self._in_another_order(name, array) for name, array in self._mean.items()}
        flat = np.concatenate([array.reshape(-1) for array in self._mean.values()])
        ends = np.cumsum([array.size for array in self._mean.values()])
        parts = np.split(self._in_another_order("", flat), ends[:-1])
        return {name: part.reshape(self._mean[name].shape) for name, part in zip(self._mean, parts, strict=True)}

    def _in_another_order(self, name: str, array: np.ndarray) -> np.ndarray:
        """The elements of an array in a random order that is the same each time."""
        if name not in self._orders:
            self._orders[name] = np.random.default_rng([self._seed, 3, len(self._orders)]).permutation(array.size)
        return array.reshape(-1)[self._orders[name]].reshape(array.shape)
