"""What a user of a RemoteOptimizer can do about an error, beside what the client says to all of its users."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from optserve.errors import NotFoundError, OptserveError, StepInDoubtError, StepsLostError, WrongStepError
from optserve.state import TensorSpec

_LOST = (
    "Load model and optimizer from one checkpoint, into a new RemoteOptimizer. A server keeps its states over a "
    "restart with `optserve serve --data-dir`."
)


class Named(Protocol):
    """A parameter."""

    name: str
    spec: TensorSpec
    has_name: bool


@contextmanager
def advice(parameters: Mapping[str, Named]) -> Iterator[None]:
    """Add to the errors of a with-block what to do about them.

    Args:
        parameters: The parameters by name.

    Raises:
        StepsLostError: In place of a NotFoundError, if there is no such optimizer any more.
    """
    try:
        yield
    except StepInDoubtError as error:
        error.add_note("RemoteOptimizer.recover() adds the updates of the interrupted step, if it was applied.")
        raise
    except WrongStepError as error:
        error.add_note(
            "Another RemoteOptimizer or client has made a step of this optimizer: each model needs one of its own, "
            "under a name of its own."
        )
        raise
    except StepsLostError as error:
        error.add_note(_LOST)
        raise
    except NotFoundError as error:
        lost = StepsLostError(
            f"{error.message} The server was restarted and has lost its state, or somebody has deleted the optimizer.",
            reason=error.reason,
            metadata=error.metadata,
        )
        lost.add_note(_LOST)
        raise lost from error
    except OptserveError as error:
        parameter = parameters.get(error.metadata.get("parameter", ""))
        if parameter is not None and not parameter.has_name:
            error.add_note(whereabouts(parameter.name, parameter.spec.shape))
        raise


def whereabouts(name: str, shape: tuple[int, ...]) -> str:
    """How to find a parameter that has a number for a name."""
    return (
        f"Parameter {name!r} is number {name} of all parameters of all groups, counted from 0; its shape is "
        f"{list(shape)}. With model.named_parameters() errors have names."
    )
