"""Weight decay between protobuf and the domain: the fixed kind has a field of its own, and so have the others.

A client from before there were kinds reads and writes only the field of the fixed kind.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from optserve.v1 import optimizer_pb2, steps_pb2
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.weight_decay import DecayKind

PATHS = ("weight_decay", "weight_decay_factor", "weight_decay_kind")
"""Its paths in an update mask."""


def kind_of(message: optimizer_pb2.Optimizer) -> DecayKind:
    """The kind of weight decay that a message names, or raise INVALID_FIELD."""
    number = message.weight_decay_kind
    if not number:
        return DecayKind.FIXED
    kinds = {_number_of(kind): kind for kind in DecayKind}
    if number not in kinds:
        raise OptserveError(
            Reason.INVALID_FIELD,
            f"This server does not know the kind {number}; it has {', '.join(kind.value for kind in DecayKind)}.",
            field="optimizer.weight_decay_kind",
        )
    return kinds[number]


def decay_of(message: optimizer_pb2.Optimizer, kind: DecayKind) -> float:
    """The weight decay of an optimizer; raises INVALID_FIELD if it is in the field of another kind."""
    own, other = _fields(kind)
    if getattr(message, other):
        raise _misplaced(kind, f"optimizer.{other}", own)
    return getattr(message, own)


def own_decay_of(
    message: optimizer_pb2.ParameterGroup | steps_pb2.StepSettings, kind: DecayKind, path: str
) -> float | None:
    """The weight decay of a group, or of a step; None if it has none of its own.

    Args:
        message: The message.
        kind: The optimizer's.
        path: Path of the message, for the error.

    Raises:
        OptserveError: INVALID_FIELD, if it is in the field of another kind.
    """
    own, other = _fields(kind)
    if message.HasField(other):
        raise _misplaced(kind, f"{path}.{other}", own)
    return getattr(message, own) if message.HasField(own) else None


def set_decay(message: optimizer_pb2.Optimizer, present: Settings) -> None:
    """Make a message say the weight decay of an optimizer, but not that of its groups."""
    message.weight_decay_kind = _number_of(present.decay_kind)
    setattr(message, _fields(present.decay_kind)[0], present.weight_decay)


def set_own_decay(message: optimizer_pb2.ParameterGroup, kind: DecayKind, decay: float | None) -> None:
    """Make a message say the weight decay of a group; `kind` is the optimizer's."""
    if decay is not None:
        setattr(message, _fields(kind)[0], decay)


def updated_decay(
    present: Settings, message: optimizer_pb2.Optimizer, paths: Collection[str]
) -> tuple[float, DecayKind]:
    """The weight decay and its kind after an update with that mask.

    Raises:
        OptserveError: INVALID_FIELD, if a number would be left that was meant for another kind.
    """
    kind = present.decay_kind
    if "weight_decay_kind" in paths:
        kind = kind_of(message)
    elif "weight_decay" in paths:
        # A client from before there were kinds means the fixed one.
        kind = DecayKind.FIXED
    own, other = _fields(kind)
    _check_groups(present, kind, paths)
    if own in paths:
        decay = getattr(message, own)
    elif kind is present.decay_kind or not present.weight_decay:
        decay = present.weight_decay
    else:
        raise OptserveError(
            Reason.INVALID_FIELD,
            f"The kind of the weight decay becomes {kind.value}, and {present.weight_decay!r} was meant for "
            f"{present.decay_kind.value}: name {own} in the update mask too.",
            field="update_mask",
        )
    if other in paths and getattr(message, other):
        raise _misplaced(kind, f"optimizer.{other}", own)
    return decay, kind


def _check_groups(present: Settings, kind: DecayKind, paths: Collection[str]) -> None:
    """Refuse an update of a client that may not know what weight decay the groups have."""
    if all(group.weight_decay is None for group in present.groups):
        return
    if kind is not present.decay_kind and "groups" not in paths:
        raise OptserveError(
            Reason.INVALID_FIELD,
            f"Groups have weight decays of the kind {present.decay_kind.value}, and the kind becomes {kind.value}: "
            "name groups in the update mask too, with their new weight decays.",
            field="update_mask",
        )
    fixed = present.decay_kind is DecayKind.FIXED
    if "groups" in paths and not fixed and "weight_decay_kind" not in paths:
        raise OptserveError(
            Reason.INVALID_FIELD,
            f"Groups have weight decays of the kind {present.decay_kind.value}, which a client that knows only the "
            "fixed kind does not see: name weight_decay_kind in the update mask too.",
            field="update_mask",
        )


def _fields(kind: DecayKind) -> tuple[str, str]:
    """The field with the number of that kind, and the field that must be absent."""
    fields = ("weight_decay", "weight_decay_factor")
    return fields if kind is DecayKind.FIXED else (fields[1], fields[0])


def _misplaced(kind: DecayKind, field: str, own: str) -> OptserveError:
    return OptserveError(
        Reason.INVALID_FIELD,
        f"The optimizer's weight decay is of the kind {kind.value}, whose number belongs into {own}.",
        field=field,
    )


def _number_of(kind: DecayKind) -> Any:
    return optimizer_pb2.WeightDecayKind.Value(f"WEIGHT_DECAY_KIND_{kind.name}")
