"""How much memory an optimizer takes: always, and for a while during a recovery or a pull."""

from __future__ import annotations

from optserve_server.numerics.layout import Layout
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.state import State, operands_of

OPTIMIZER_BYTES = 16 << 10
PARAMETER_BYTES = 2048
GROUP_BYTES = 2048
ENTRY_BYTES = 128
"""Bytes that Python takes for an optimizer, for each parameter, each group, and each entry of a list of settings."""


def description_bytes(layout: Layout, settings: Settings) -> int:
    """Bytes of names, shapes and settings. An empty tensor takes as many as any other."""
    entries = sum(len(group.parameters) for group in settings.groups)
    if settings.schedule is not None:
        entries += len(getattr(settings.schedule, "milestones", ()))
    parameters = PARAMETER_BYTES * len(layout.parameters)
    return OPTIMIZER_BYTES + parameters + GROUP_BYTES * len(settings.groups) + ENTRY_BYTES * entries


def permanent_bytes(layout: Layout, settings: Settings) -> int:
    """Bytes that an optimizer takes as long as it exists."""
    return State.required_bytes(layout, settings) + description_bytes(layout, settings)


def temporary_bytes(layout: Layout, settings: Settings, max_pull_bytes: int, *, journalled: bool) -> int:
    """Bytes that an optimizer takes for a while: in the recovery of a step from the journal, or for a large pull."""
    recovered = len(operands_of(settings.rule)) * layout.size_bytes if journalled else 0
    pulled = layout.size_bytes - max_pull_bytes if settings.hosted else 0
    return max(recovered, pulled, 0)
