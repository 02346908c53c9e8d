"""Errors that more than one place raises: the call does not fit an optimizer's state, mode or step."""

from __future__ import annotations

from optserve_server.domain.errors import OptserveError, Reason


def state_replaced(name: str, lineage: str, step: int) -> OptserveError:
    """The client knows an older state."""
    return OptserveError(
        Reason.STATE_REPLACED,
        f"The state of {name} was replaced by a restore, an import or a new optimizer of that name; it is at step "
        f"{step}. Read the optimizer again, then decide whether to go on with the new state.",
        lineage=lineage,
        current_step=step,
    )


def check_etag(name: str, etag: str, present: str, what_to_do: str = "read it again") -> None:
    """Raise ETAG_MISMATCH unless an etag is empty or the present one."""
    if etag and etag != present:
        raise OptserveError(
            Reason.ETAG_MISMATCH,
            f"Optimizer {name!r} has changed since etag {etag!r} was read; {what_to_do}.",
            field="etag",
            etag=present,
        )


def check_etag_of_step(name: str, etag: str, present: str) -> None:
    """The same for a step whose settings name groups by their positions."""
    check_etag(name, etag, present, "read it again, and send the step's settings for its present groups")


def wrong_step(name: str, step: int, expected: int) -> OptserveError:
    """The client expects another step."""
    return OptserveError(
        Reason.WRONG_STEP, f"{name} is at step {step}, not {expected}.", current_step=step, expected_step=expected
    )


def no_such_step(name: str, step: int, given: int) -> OptserveError:
    """A gradient names an x of a later step than the present one."""
    return OptserveError(
        Reason.INVALID_FIELD,
        f"{name} is at step {step}, so a gradient cannot be from step {given}.",
        field="parameters_step",
    )


def no_other_step(name: str) -> OptserveError:
    """A client that is not a worker names the x of another step."""
    return OptserveError(
        Reason.INVALID_FIELD,
        f"{name} has no workers, so a gradient must be from the present step.",
        field="parameters_step",
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
    """The parameters were not uploaded yet."""
    return OptserveError(
        Reason.PARAMETERS_MISSING,
        f"The parameters of {name} have not been uploaded yet; push them first.",
        optimizer=name,
    )


def parameters_in_place(name: str) -> OptserveError:
    """A client has already uploaded the parameters."""
    return OptserveError(
        Reason.PARAMETERS_IN_PLACE,
        f"The parameters of {name} are already uploaded; pull them, or import a state.",
        optimizer=name,
    )


def workers_attached(name: str, alive: int, what: str, field: str) -> OptserveError:
    """Something has to wait until the live workers have left; `what` says it in the imperative."""
    return OptserveError(
        Reason.WORKERS_ATTACHED,
        f"{alive} workers are alive on {name}; {what} when they have left.",
        field=field,
        live_workers=alive,
    )


def unknown_on_stream(tensor: int, count: int) -> OptserveError:
    """A step names a parameter that was added after its stream was opened."""
    return OptserveError(
        Reason.UNKNOWN_PARAMETER,
        f"This stream knows {count} parameters, so there is no parameter {tensor} on it; others were added since. Open "
        "another stream.",
        field="tensors",
        parameter=tensor,
    )


def only_unknown_parameters(name: str, step: int, count: int) -> OptserveError:
    """The last step is of parameters only that a client does not know."""
    return OptserveError(
        Reason.REPLY_GONE,
        f"Step {step} of {name} was of parameters that were added since; this stream knows the first {count}. Read the "
        "optimizer again.",
        step=step,
    )


def worker_replaced(name: str, worker: str) -> OptserveError:
    """A life of a worker is over."""
    return OptserveError(
        Reason.WORKER_REPLACED,
        f"This life of worker {worker!r} of {name} is over: another life has begun under its name, or the worker has "
        "left. Nothing was changed; to go on under this name, enter it as a new worker.",
        field="worker",
        worker=worker,
    )


def wrong_last_request(name: str, step: int, last_request_id: str) -> OptserveError:
    """The client takes another step for the last one under its name."""
    return OptserveError(
        Reason.WRONG_STEP,
        f"The last step that was applied on {name} under this name is {last_request_id!r}, not the one that this "
        "client knows.",
        field="last_request_id",
        current_step=step,
        last_request_id=last_request_id,
    )


def request_id_reused(request_id: str, made: str, wanted: str) -> OptserveError:
    """A request id was used for another call."""
    return OptserveError(
        Reason.REQUEST_ID_REUSED,
        f"Request id {request_id!r} was used for {made}, not for {wanted}. Nothing was changed; a new call needs a new "
        "request id.",
        field="request_id",
        request_id=request_id,
    )


def optimizer_not_found(optimizer_id: str) -> OptserveError:
    """There is no optimizer of that id."""
    return OptserveError(
        Reason.OPTIMIZER_NOT_FOUND,
        f"There is no optimizer {optimizer_id!r}.",
        field="name",
        optimizer=optimizer_id,
    )


def gradient_late(name: str, step: int, taken_at: int) -> OptserveError:
    """A step was applied without this gradient."""
    return OptserveError(
        Reason.GRADIENT_LATE,
        f"The gradient was taken at step {taken_at}; {name} is at step {step}. Pull the parameters and compute "
        "another.",
        field="parameters_step",
        current_step=step,
    )
