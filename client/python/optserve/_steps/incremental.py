"""A step whose gradients are sent while others are still being computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from operator import itemgetter

import numpy as np

from optserve._rpc.deadline import Patience
from optserve._steps.gradients import Gradients
from optserve._steps.shared_memory import CURVATURE, GRADIENT, Arrival
from optserve.errors import InvalidArgumentError, StepCancelledError


class IncrementalGradients(Gradients):
    """Gradients that the caller adds one by one. Each is sent as soon as it is added.

    Args:
        indices: The parameters that take part, ascending.
        whole: Whether these are all parameters of the optimizer.
        wire: Dtype of the payload; None for each array's own.
        patience: How long the caller may take to add all of them.
        with_curvature: Whether each gradient comes with a diagonal of the Hessian.
    """

    incremental = True

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
        self._changed = patience.clock.condition()
        self._arrived: list[tuple[int, np.ndarray, np.ndarray | None]] = []
        self._added: set[int] = set()
        self._complete = self._aborted = False

    def add(self, arrived: Sequence[tuple[int, np.ndarray, np.ndarray | None]], *, complete: bool = False) -> None:
        """Add gradients, each with its index and its curvature; the sending thread takes them.

        With `complete` they are the last ones: the step is committed with them.
        """
        with self._changed:
            for index, gradient, _ in arrived:
                self._added.add(index)
                self._gradients.append(gradient)
            self._arrived.extend(arrived)
            self._complete |= complete
            self._changed.notify_all()

    def abort(self) -> None:
        """Abandon the step; no more gradients come."""
        with self._changed:
            self._aborted = True
            self._changed.notify_all()

    def __contains__(self, index: int) -> bool:
        """Whether that parameter's gradient has been added."""
        return index in self._added

    def arrivals(self) -> Iterator[Arrival | None]:
        """All gradients in the order in which they were added; waits for the next one. Each call begins with the first.

        The iterator ends only after `complete`, so that an abandoned step is never committed.
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

    def _wait(self, holds: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._aborted or holds(), self._patience.left_s)
            if self._aborted:
                raise StepCancelledError("The step was abandoned before all of its gradients were sent.")
            if not holds():
                self._patience.check()


class StepUnderWay:
    """A step that `Optimizer.begin_step` has begun; `send` takes its gradients one by one.

    Attributes:
        updates: The updates Δx by name, once the with-block has been left.
    """

    def __init__(
        self,
        gradients: IncrementalGradients,
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
        # The step's, once its reply was received; empty before.
        self._request_id = ""
        # Is done when the step's thread has ended. The thread is not joined: in CPython 3.11 a join that Ctrl-C has
        # interrupted takes it for ended.
        self._ended: Future[None] = Future()
        self._thread = patience.clock.thread(partial(self._run, run), "optserve-step")
        self._thread.start()

    def __repr__(self) -> str:
        sent = sum(index in self._gradients for index in self._names)
        return f"StepUnderWay({sent} of {len(self._names)} gradients sent)"

    def send(self, name: str, gradient: np.ndarray, curvature: np.ndarray | None = None) -> None:
        """Send the gradient of one parameter. The array must not be changed before the step has ended.

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
        self._gradients.add([(index, array, diagonal)])

    def _send_all(self, gradients: Mapping[str, np.ndarray], *, last: bool = False) -> None:
        """Send the gradients of several parameters, which take part and were not sent before, in as few messages.

        The last ones share a message with the commit.
        """
        arrived = sorted((self._check(name, gradient, None) for name, gradient in gradients.items()), key=itemgetter(0))
        self._gradients.add(arrived, complete=last)

    @property
    def _has_ended(self) -> bool:
        """Whether the step has failed, or was applied."""
        return self._ended.done()

    def _finish(self) -> None:
        """Wait for the updates, or raise the step's failure."""
        self._complete()
        self._ended.result()
        self._raise_failure()

    def _complete(self) -> None:
        """All gradients have been sent: commit the step.

        Raises:
            InvalidArgumentError: One is missing.
        """
        missing = [name for index, name in self._names.items() if index not in self._gradients]
        if missing and self._failure is None:
            raise InvalidArgumentError(
                f"There is no gradient for {missing[0]!r}; name the parameters that take part when the step is begun.",
                metadata={"parameter": missing[0]},
            )
        self._gradients.add([], complete=True)

    def _raise_failure(self) -> None:
        """Raise the step's failure, if it has failed."""
        if self._failure is not None:
            raise self._failure

    def _abort(self) -> str:
        """Abandon the step, and wait until its thread has ended. Returns its request id if it was applied, else ""."""
        self._cancel()
        self._ended.result()
        return self._request_id

    def _cancel(self) -> None:
        """Abandon the step without waiting."""
        self._gradients.abort()
        self._patience.cancel()

    def _run(self, run: Callable[[], tuple[str, dict[str, np.ndarray]]]) -> None:
        try:
            self._request_id, self.updates = run()
        # Kept, and raised in the caller's thread.
        except BaseException as error:  # noqa: BLE001
            self._failure = error
            # The sending thread may still wait for gradients.
            self._gradients.abort()
        finally:
            self._ended.set_result(None)
