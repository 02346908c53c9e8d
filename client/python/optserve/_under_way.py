"""A step whose gradients are sent while others are still being computed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from optserve._patience import Patience
from optserve._shared import CURVATURE, GRADIENT, Arrival
from optserve._stream import Gradients
from optserve.errors import InvalidArgumentError, StepCancelledError


class GrowingGradients(Gradients):
    """Gradients that arrive one by one, and are sent as soon as they are there.

    Args:
        indices: The parameters that take part, ascending.
        whole: Whether these are all parameters of the optimizer.
        wire: Dtype of the payload; None for each array's own.
        with_curvature: Whether each gradient comes with a diagonal of the Hessian.
    """

    grow = True

    def __init__(
        self, indices: Sequence[int], *, whole: bool, wire: np.dtype | None, with_curvature: bool = False
    ) -> None:
        super().__init__(indices, [], whole=whole, wire=wire, curvature=[] if with_curvature else None)
        self._grown = threading.Condition()
        self._arrived: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
        self._aborted = False

    def add(self, index: int, gradient: np.ndarray, curvature: np.ndarray | None) -> None:
        """Let a gradient be sent, and its curvature."""
        with self._grown:
            self._arrived[index] = gradient, curvature
            self.arrays = [array for array, _ in self._arrived.values()]
            self._grown.notify_all()

    def abort(self) -> None:
        """There will be no more."""
        with self._grown:
            self._aborted = True
            self._grown.notify_all()

    def __contains__(self, index: int) -> bool:
        """Whether that parameter's gradient has been added."""
        return index in self._arrived

    def arrivals(self) -> Iterator[Arrival | None]:
        """In the order in which they were added, waiting for the next; from the first one on at every call."""
        for position in range(len(self.indices)):
            if len(self._arrived) <= position:
                yield None
            with self._grown:
                self._grown.wait_for(lambda position=position: self._aborted or len(self._arrived) > position)
                if self._aborted:
                    raise StepCancelledError("The step was given up before all of its gradients were there.")
                index, (gradient, curvature) = list(self._arrived.items())[position]
            yield GRADIENT, index, gradient
            if curvature is not None:
                yield CURVATURE, index, curvature


class StepUnderWay:
    """What `Optimizer.begin_step` gives: takes the gradients one by one.

    Attributes:
        updates: The updates Δx by name, once the with-block has been left.
    """

    def __init__(
        self,
        gradients: GrowingGradients,
        check: Callable[[str, np.ndarray, np.ndarray | None], tuple[int, np.ndarray, np.ndarray | None]],
        names: dict[int, str],
        run: Callable[[], dict[str, np.ndarray]],
        patience: Patience,
    ) -> None:
        self.updates: dict[str, np.ndarray] = {}
        self._gradients = gradients
        self._check = check
        self._names = names
        self._patience = patience
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(run,), name="optserve-step", daemon=True)
        self._thread.start()

    def send(self, name: str, gradient: np.ndarray, curvature: np.ndarray | None = None) -> None:
        """Send what a step needs of one parameter, which must not be changed before the step has ended.

        Args:
            name: The parameter.
            gradient: In the parameter's shape and dtype.
            curvature: The diagonal of the Hessian, likewise, for the methods that take it.

        Raises:
            InvalidArgumentError: The name, shape or dtype cannot be used, or it was sent before.
            OptserveError: The step has failed meanwhile.
        """
        if self._failure is not None:
            raise self._failure
        index, array, diagonal = self._check(name, gradient, curvature)
        if index not in self._names:
            raise InvalidArgumentError(f"{name!r} takes no part in this step.", metadata={"parameter": name})
        if index in self._gradients:
            raise InvalidArgumentError(f"The gradient of {name!r} has been sent already.", metadata={"parameter": name})
        self._gradients.add(index, array, diagonal)

    def finish(self) -> None:
        """Wait for the updates, or raise what the step has failed with."""
        missing = [name for index, name in self._names.items() if index not in self._gradients]
        if missing and self._failure is None:
            self.abort()
            raise InvalidArgumentError(
                f"There is no gradient for {missing[0]!r}; name the parameters that take part when the step is begun.",
                metadata={"parameter": missing[0]},
            )
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def abort(self) -> None:
        """Give the step up; the server discards it."""
        self._gradients.abort()
        self._patience.cancel()
        self._thread.join()

    def _run(self, run: Callable[[], dict[str, np.ndarray]]) -> None:
        try:
            self.updates = run()
        # Raised where the caller is.
        except BaseException as error:  # noqa: BLE001
            self._failure = error
