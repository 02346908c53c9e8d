"""How much memory an optimizer takes: what is always there, and what a recovery or a pull takes beside it."""

from __future__ import annotations

from optserve_server.numerics.layout import Layout
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.state import State, operands_of

OPTIMIZER_BYTES = 16 << 10
PARAMETER_BYTES = 2048
GROUP_BYTES = 2048
ENTRY_BYTES = 128
"""What Python keeps for an optimizer, for each parameter, each group, and each entry of a list of settings."""


def description_bytes(layout: Layout, settings: Settings) -> int:
    """What names, shapes and settings take, of which tensors without elements have as much as others."""
    entries = sum(len(group.parameters) for group in settings.groups)
    if settings.schedule is not None:
        entries += len(getattr(settings.schedule, "milestones", ()))
    parameters = PARAMETER_BYTES * len(layout.parameters)
    return OPTIMIZER_BYTES + parameters + GROUP_BYTES * len(settings.groups) + ENTRY_BYTES * entries


def standing_bytes(layout: Layout, settings: Settings) -> int:
    """What an optimizer takes as long as it is there."""
    return State.required_bytes(layout, settings) + description_bytes(layout, settings)


def beside_bytes(layout: Layout, settings: Settings, max_pull_bytes: int, *, journalled: bool) -> int:
    """What is taken beside that for a while: by a step that is recovered from the journal, or a large pull."""
    recovered = len(operands_of(settings.rule)) * layout.size_bytes if journalled else 0
    pulled = layout.size_bytes - max_pull_bytes if settings.hosted else 0
    return max(recovered, pulled, 0)
