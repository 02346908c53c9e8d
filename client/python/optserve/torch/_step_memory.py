"""Where gradients and updates of a RemoteOptimizer lie: in the memory that is shared with the server, or here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from optserve._common.clock import SYSTEM
from optserve._steps.shared_memory import GRADIENT, SharedStaging
from optserve.optimizer import Optimizer


class Region(NamedTuple):
    """The part of the shared memory that belongs to one parameter, as an array and as a tensor."""

    array: np.ndarray
    tensor: torch.Tensor


class StepMemory:
    """The arrays of one RemoteOptimizer. Safe to use from the threads of a backward pass."""

    def __init__(self) -> None:
        self._lock = SYSTEM.lock()
        self._shared: SharedStaging | None = None
        self._regions: dict[str, Region] = {}
        self._outputs: dict[str, np.ndarray] = {}

    def regions(self, remote: Optimizer) -> Mapping[str, Region]:
        """The region of each parameter, for the gradients of the next step, by name.

        There is none if no memory is shared, or if it may hold the reply of an interrupted step, which `recover` needs.
        """
        shared = shared_with(remote)
        if shared is None or remote._outcomes.unsettled or remote._outcomes.overtaken:
            return {}
        with self._lock:
            if shared is not self._shared:
                self._shared, self._regions = shared, _regions_of(shared, remote)
            shared.mark_dirty()
            return self._regions

    def outputs(self, remote: Optimizer) -> dict[str, np.ndarray] | None:
        """Arrays for the updates: the shared memory, or arrays that serve for all steps; None for new arrays."""
        if remote._session.streams.current is None:
            # The step opens a stream, and waits for a server that is being restarted.
            return None
        if shared_with(remote) is not None:
            return {name: region.array for name, region in self.regions(remote).items()} or None
        if len(self._outputs) != len(remote._model):
            self._outputs = {item.name: np.empty(item.shape, item.dtype) for item in remote._model.parameters}
        return self._outputs


def shared_with(remote: Optimizer) -> SharedStaging | None:
    """The memory that the present stream shares with the server."""
    stream = remote._session.streams.current
    return None if stream is None else stream.shared


def _regions_of(shared: SharedStaging, remote: Optimizer) -> dict[str, Region]:
    regions = {}
    for index, item in enumerate(remote._model.parameters):
        array = shared.array(GRADIENT, index, item.shape, item.dtype)
        regions[item.name] = Region(array, torch.from_numpy(array))
    return regions
