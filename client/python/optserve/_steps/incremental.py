"""A step whose gradients are sent while others are still being computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial

import numpy as np

from optserve._rpc.deadline import Patience
from optserve._steps.gradients import Gradients
from optserve._steps.shared_memory import CURVATURE, GRADIENT, Arrival
from optserve.errors import InvalidArgumentError, StepCancelledError


class GrowingGradients(Gradients):
    """Gradients that arrive one by one, and are sent as soon as they are there.

    Args:
        indices: The parameters that take part, ascending.
        whole: Whether these are all parameters of the optimizer.
        wire: Dtype of the payload; None for each array's own.
        patience: How long they may take.
        with_curvature: Whether each gradient comes with a diagonal of the Hessian.
    """

    grow = True

    def __init__(
        self,
        indices: Sequence[int],
        *,
        whole: bool,
        wire: np.dtype | None,
        patience: Patience,
        with_curvature: bool = False,
    ) -> None:
        # Only appended to, while other threads read it.
        self._gradients: list[np.ndarray] = []
        super().__init__(indices, self._gradients, whole=whole, wire=wire, curvature=[] if with_curvature else None)
        self._patience = patience
        self._grown = patience.clock.condition()
        self._arrived: list[tuple[int, np.ndarray, np.ndarray | None]] = []
        self._added: set[int] = set()
        self._complete = self._aborted = False

    def add(self, index: int, gradient: np.ndarray, curvature: np.ndarray | None) -> None:
        """Let a gradient be sent, and its curvature."""
        with self._grown:
            self._added.add(index)
            self._gradients.append(gradient)
            self._arrived.append((index, gradient, curvature))
            self._grown.notify_all()

    def complete(self) -> None:
        """All are there, and the step is to be made of them."""
        with self._grown:
            self._complete = True
            self._grown.notify_all()

    def abort(self) -> None:
        """There will be no more."""
        with self._grown:
            self._aborted = True
            self._grown.notify_all()

    def __contains__(self, index: int) -> bool:
        """Whether that parameter's gradient has been added."""
        return index in self._added

    def arrivals(self) -> Iterator[Arrival | None]:
        """In the order in which they were added, waiting for the next; from the first one on at every call.

        It ends when the caller says that the step is to be made, so that a step which is given up is never committed.
        """
        for position in range(len(self.indices)):
            if len(self._arrived) <= position:
                yield None
            self._wait(lambda position=position: len(self._arrived) > position)
            index, gradient, curvature = self._arrived[position]
            yield GRADIENT, index, gradient
            if curvature is not None:
                yield CURVATURE, index, curvature
        if not self._complete:
            yield None
            self._wait(lambda: self._complete)

    def _wait(self, there: Callable[[], bool]) -> None:
        with self._grown:
            self._grown.wait_for(lambda: self._aborted or there(), self._patience.left_s)
            if self._aborted:
                raise StepCancelledError("The step was given up before all of its gradients were there.")
            if not there():
                self._patience.check()


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
        run: Callable[[], tuple[str, dict[str, np.ndarray]]],
        patience: Patience,
    ) -> None:
        self.updates: dict[str, np.ndarray] = {}
        self._gradients = gradients
        self._check = check
        self._names = names
        self._patience = patience
        self._failure: BaseException | None = None
        # Of the step, once its reply was received.
        self._request_id = ""
        # Done when nothing of the step goes on any more. Nobody joins the thread: a join that Ctrl-C has interrupted
        # takes it for ended (CPython 3.11).
        self._ended: Future[None] = Future()
        self._thread = patience.clock.thread(partial(self._run, run), "optserve-step")
        self._thread.start()

    def __repr__(self) -> str:
        sent = sum(index in self._gradients for index in self._names)
        return f"StepUnderWay({sent} of {len(self._names)} gradients sent)"

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

    def _finish(self) -> None:
        """Wait for the updates, or raise what the step has failed with."""
        self._complete()
        self._ended.result()
        self._raise_failure()

    def _complete(self) -> None:
        """All gradients have been sent, and the step is to be made of them.

        Raises:
            InvalidArgumentError: One is missing.
        """
        missing = [name for index, name in self._names.items() if index not in self._gradients]
        if missing and self._failure is None:
            raise InvalidArgumentError(
                f"There is no gradient for {missing[0]!r}; name the parameters that take part when the step is begun.",
                metadata={"parameter": missing[0]},
            )
        self._gradients.complete()

    def _raise_failure(self) -> None:
        """Raise what the step has failed with, if it has."""
        if self._failure is not None:
            raise self._failure

    def _abort(self) -> str:
        """Give the step up; the server discards it. Gives its request id if it was applied all the same, or nothing."""
        self._cancel()
        self._ended.result()
        return self._request_id

    def _cancel(self) -> None:
        """What `_abort` does, without waiting until the step has ended."""
        self._gradients.abort()
        self._patience.cancel()

    def _run(self, run: Callable[[], tuple[str, dict[str, np.ndarray]]]) -> None:
        try:
            self._request_id, self.updates = run()
        # Raised where the caller is.
        except BaseException as error:  # noqa: BLE001
            self._failure = error
            # What sends may still wait for gradients.
            self._gradients.abort()
        finally:
            self._ended.set_result(None)
