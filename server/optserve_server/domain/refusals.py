"""The errors with which an optimizer refuses what would be of the wrong state, mode or moment."""

from __future__ import annotations

from optserve_server.domain.errors import OptserveError, Reason


def state_replaced(name: str, lineage: str, step: int) -> OptserveError:
    """The client knew another state."""
    return OptserveError(
        Reason.STATE_REPLACED,
        f"The state of {name} has been replaced, by a restore, an import or a new optimizer of that name, since this "
        f"client last looked; it is at step {step}.",
        lineage=lineage,
        current_step=step,
    )


def wrong_step(name: str, step: int, expected: int) -> OptserveError:
    """The client believes in another step."""
    return OptserveError(
        Reason.WRONG_STEP, f"{name} is at step {step}, not {expected}.", current_step=step, expected_step=expected
    )


def no_such_step(name: str, step: int, given: int) -> OptserveError:
    """A gradient was taken at an x that is still to come."""
    return OptserveError(
        Reason.INVALID_FIELD, f"{name} is at step {step}; there has been no step {given}.", field="parameters_step"
    )


def no_other_step(name: str) -> OptserveError:
    """Only workers have gradients of earlier steps."""
    return OptserveError(
        Reason.INVALID_FIELD, f"{name} has no workers, so x is of no other step.", field="parameters_step"
    )


def not_hosted(name: str, field: str) -> OptserveError:
    """The server does not hold the parameters."""
    return OptserveError(
        Reason.NOT_HOSTED,
        f"{name} is in delta mode: the server does not hold its parameters, and answers with updates.",
        field=field,
        optimizer=name,
    )


def parameters_missing(name: str) -> OptserveError:
    """Nobody has uploaded the parameters."""
    return OptserveError(
        Reason.PARAMETERS_MISSING,
        f"The parameters of {name} have not been uploaded yet; push them first.",
        optimizer=name,
    )


def parameters_in_place(name: str) -> OptserveError:
    """Somebody has uploaded the parameters."""
    return OptserveError(
        Reason.PARAMETERS_IN_PLACE,
        f"The parameters of {name} have been uploaded before; pull them, or import a state.",
        optimizer=name,
    )


def workers_attached(name: str, alive: int) -> OptserveError:
    """Workers rely on the consistency."""
    return OptserveError(
        Reason.WORKERS_ATTACHED,
        f"{alive} workers are alive on {name}; its consistency can be changed when they have left.",
        field="optimizer.consistency",
        live_workers=alive,
    )


def worker_replaced(name: str, worker: str) -> OptserveError:
    """A life of a worker is over."""
    return OptserveError(
        Reason.WORKER_REPLACED,
        f"This life of worker {worker!r} of {name} is over: another one has begun under its name since, or it has "
        "taken its leave. Nothing was changed; to go on under this name, enter it as a new worker.",
        field="worker",
        worker=worker,
    )


def wrong_last_request(name: str, step: int, last_request_id: str) -> OptserveError:
    """The client believes that another step was the last one under its name."""
    return OptserveError(
        Reason.WRONG_STEP,
        f"The last step that was applied on {name} under this name is {last_request_id!r}, not the one that this "
        "client knows.",
        field="last_request_id",
        current_step=step,
        last_request_id=last_request_id,
    )


def request_id_reused(request_id: str, made: str, wanted: str) -> OptserveError:
    """A request id stands for something else."""
    return OptserveError(
        Reason.REQUEST_ID_REUSED,
        f"Request id {request_id!r} is that of {made}, not of {wanted}, so nothing was changed; a new call needs a new "
        "request id.",
        field="request_id",
        request_id=request_id,
    )


def optimizer_not_found(optimizer_id: str) -> OptserveError:
    """Nothing has that name."""
    return OptserveError(
        Reason.OPTIMIZER_NOT_FOUND,
        f"There is no optimizer {optimizer_id!r}.",
        field="name",
        optimizer=optimizer_id,
    )


def gradient_late(name: str, step: int, taken_at: int) -> OptserveError:
    """A step has gone on without this gradient."""
    return OptserveError(
        Reason.GRADIENT_LATE,
        f"The gradient was taken at step {taken_at}; {name} is at step {step}. Pull the parameters and compute "
        "another.",
        field="parameters_step",
        current_step=step,
    )
