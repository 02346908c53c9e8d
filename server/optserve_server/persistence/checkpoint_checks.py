"""Checks of checkpoints: the tag, the size of the header, and whether a checkpoint fits an optimizer."""

from __future__ import annotations

from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.optimizer import Optimizer, is_id
from optserve_server.persistence.state_file import Description, StateFile


def check_tag(tag: str) -> None:
    """Raise INVALID_FIELD if the text cannot be a tag."""
    if not is_id(tag):
        raise OptserveError(
            Reason.INVALID_FIELD,
            f"{tag[:100]!r} is not a tag: use 1 to 64 of a-z, 0-9, '.', '_' and '-', and begin with a letter or digit.",
            field="tag",
        )


def check_readable(optimizer: Optimizer, file: StateFile) -> None:
    """Raise MODEL_TOO_LARGE if the file's header is larger than readers of safetensors files accept."""
    limit = file.max_header_bytes
    if file.header_bytes > limit:
        raise OptserveError(
            Reason.MODEL_TOO_LARGE,
            f"The names, shapes and settings of {optimizer.id!r} take {file.header_bytes} bytes in a checkpoint; "
            f"safetensors allows {limit}. Use shorter names, or fewer parameters or groups.",
            field="parent",
            limit=limit,
            actual=file.header_bytes,
        )


def check_fit(optimizer: Optimizer, tag: str, saved: Description) -> None:
    """Raise CHECKPOINT_MISMATCH unless the checkpoint has the optimizer's method, mode and parameters."""
    difference = ""
    if saved.rule.name != optimizer.rule.name:
        difference = f"of {saved.rule.name}, not of {optimizer.rule.name}"
    elif saved.settings.hosted != optimizer.settings.hosted:
        difference = f"of an optimizer in {'hosted' if saved.settings.hosted else 'delta'} mode, but this one is not"
    elif saved.layout.parameters != optimizer.layout.parameters:
        pairs = zip(saved.layout.parameters, optimizer.layout.parameters, strict=False)
        theirs, own = next((pair for pair in pairs if pair[0] != pair[1]), (None, None))
        difference = f"of {len(saved.layout.parameters)} parameters, not of {len(optimizer.layout.parameters)}"
        if theirs and own:
            difference = (
                f"of other parameters: {theirs.name!r} {list(theirs.shape)} {theirs.dtype.name}, not "
                f"{own.name!r} {list(own.shape)} {own.dtype.name}"
            )
    if difference:
        raise OptserveError(
            Reason.CHECKPOINT_MISMATCH, f"The checkpoint {tag!r} of {optimizer.id!r} is {difference}.", checkpoint=tag
        )


def checkpoint_exists(optimizer_id: str, tag: str) -> OptserveError:
    """The error for a tag that already has a checkpoint."""
    return OptserveError(
        Reason.CHECKPOINT_EXISTS,
        f"There is a checkpoint {tag!r} of {optimizer_id!r} already; overwrite it, delete it or choose another tag.",
        field="tag",
        checkpoint=tag,
    )


def checkpoint_not_found(optimizer_id: str, tag: str) -> OptserveError:
    """The error for a checkpoint that does not exist."""
    return OptserveError(
        Reason.CHECKPOINT_NOT_FOUND,
        f"There is no checkpoint {tag!r} of {optimizer_id!r}.",
        field="name",
        checkpoint=tag,
    )
