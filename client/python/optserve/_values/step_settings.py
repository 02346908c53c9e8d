"""Turns the hyper-parameters that a user gives for one step into messages of the contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from optserve._values.settings_messages import is_fixed
from optserve.errors import InvalidArgumentError
from optserve.settings import set_hyperparameter
from optserve.v1 import optimizer_pb2, steps_pb2

StepHyperparameters = Mapping[str, Any] | Sequence[Mapping[str, Any] | None]
"""One mapping for all parameters; or a mapping for the parameters in no group, then one for each group."""


class KnownSettings(NamedTuple):
    """What a client knows of the settings of an optimizer, to make those of a step.

    Attributes:
        method: Name of the method in the contract; empty if this client does not know it.
        groups: Names of the parameters of each group.
        fixed: Whether the weight decay is of the fixed kind.
        etag: The optimizer's.
    """

    method: str
    groups: tuple[tuple[str, ...], ...]
    fixed: bool
    etag: str

    @classmethod
    def of(cls, message: optimizer_pb2.Optimizer) -> Self:
        """What the message of an optimizer says."""
        groups = tuple(tuple(group.parameters) for group in message.groups)
        return cls(message.algorithm.WhichOneof("method") or "", groups, is_fixed(message), message.etag)

    def has_groups_of(self, other: KnownSettings) -> bool:
        """Whether settings of a step for the groups of `other` mean the same for these."""
        return (self.groups, self.fixed) == (other.groups, other.fixed)


class StepOptions(NamedTuple):
    """What a step asks for beside its reply.

    Attributes:
        settings: Settings for this step only.
        with_gradient_norm: Whether the server is to compute the norm of the gradient in any case.
        etag: The optimizer's whose groups the settings name; empty if they name none.
    """

    settings: Sequence[steps_pb2.StepSettings]
    with_gradient_norm: bool
    etag: str = ""


def step_options(
    hyperparameters: StepHyperparameters | None, known: KnownSettings, *, with_gradient_norm: bool
) -> StepOptions | None:
    """What a step asks for; None if it asks for nothing.

    Args:
        hyperparameters: See `optserve.Optimizer.step`.
        known: What is known of the optimizer's settings.
        with_gradient_norm: See StepOptions.

    Raises:
        InvalidArgumentError: The method has no such hyper-parameter, a value has the wrong type, or there is another
            number of groups.
    """
    settings = [] if hyperparameters is None else _messages(hyperparameters, known)
    etag = known.etag if any(message.HasField("group") for message in settings) else ""
    return StepOptions(settings, with_gradient_norm, etag) if settings or with_gradient_norm else None


def _messages(hyperparameters: StepHyperparameters, known: KnownSettings) -> list[steps_pb2.StepSettings]:
    if isinstance(hyperparameters, Mapping):
        return [_message(None, hyperparameters, known)] if hyperparameters else []
    if isinstance(hyperparameters, str) or not isinstance(hyperparameters, Sequence):
        raise InvalidArgumentError(
            "hyperparameters must be a mapping, such as {'learning_rate': 0.1}, or a sequence of mappings."
        )
    groups = len(known.groups)
    if len(hyperparameters) != groups + 1:
        raise InvalidArgumentError(
            f"hyperparameters has {len(hyperparameters)} entries; it needs {groups + 1}: one for the parameters in no "
            f"group, then one for each of {groups} groups. If another client has changed the groups, call refresh()."
        )
    for entry in hyperparameters:
        if entry is not None and not isinstance(entry, Mapping):
            raise InvalidArgumentError(f"An entry of hyperparameters is a mapping or None, not {entry!r}.")
    return [_message(group, entry, known) for group, entry in enumerate(hyperparameters) if entry]


def _message(group: int | None, values: Mapping[str, Any], known: KnownSettings) -> steps_pb2.StepSettings:
    message = steps_pb2.StepSettings(group=group)
    for name, value in values.items():
        if name != "weight_decay":
            set_hyperparameter(message.algorithm, known.method, name, value)
            continue
        try:
            setattr(message, "weight_decay" if known.fixed else "weight_decay_factor", value)
        except TypeError as error:
            raise InvalidArgumentError(f"weight_decay cannot be {value!r}: {error}") from error
    return message
