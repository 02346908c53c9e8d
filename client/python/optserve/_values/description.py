"""The settings in a state's file, as JSON. The server's own state files have the same form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import EllipsisType
from typing import Any, TypedDict, TypeVar

from optserve.settings import (
    CONSISTENCIES,
    SCHEDULES,
    WEIGHT_DECAYS,
    Clipping,
    Consistency,
    Group,
    Schedule,
    WeightDecay,
)

_Kind = TypeVar("_Kind")


class GivenSettings(TypedDict, total=False):
    """The settings beside the method; a setting may be left out. `Client.create_optimizer` has the same arguments."""

    schedule: Schedule | None
    clipping: Clipping | None
    groups: tuple[Group, ...]
    weight_decay: float | WeightDecay
    consistency: Consistency | None


SETTINGS = tuple(GivenSettings.__annotations__)
"""Names of all settings beside the method."""


def given_settings(**values: object) -> GivenSettings:
    """The settings whose value is not an Ellipsis."""
    return GivenSettings(**{name: value for name, value in values.items() if not isinstance(value, EllipsisType)})  # pyright: ignore[reportArgumentType]


def settings_to_json(settings: GivenSettings, names: Sequence[str]) -> dict[str, Any]:
    """The form on disk of a state's settings.

    Args:
        settings: The settings that the state has.
        names: Names of all parameters, in their order.

    Raises:
        KeyError: A group has a parameter that is not among them.
    """
    content: dict[str, Any] = {}
    if schedule := settings.get("schedule"):
        content["schedule"] = {"kind": schedule.kind, **schedule._values()}
    if clipping := settings.get("clipping"):
        ((kind, bound),) = ((kind, bound) for kind, bound in asdict(clipping).items() if bound is not None)
        content["clipping"] = {"kind": kind, "bound": bound}
    if groups := settings.get("groups"):
        indices = {name: index for index, name in enumerate(names)}
        content["groups"] = [
            {
                "parameters": [indices[name] for name in group.parameters],
                "overrides": dict(group.overrides),
                "weight_decay": group.weight_decay,
            }
            for group in groups
        ]
    if weight_decay := settings.get("weight_decay"):
        content["weight_decay"] = (
            {"kind": weight_decay.kind, "factor": weight_decay.factor}
            if isinstance(weight_decay, WeightDecay)
            else weight_decay
        )
    if consistency := settings.get("consistency"):
        content["consistency"] = {"kind": consistency.kind, **asdict(consistency)}
    return content


def settings_from_json(content: Mapping[str, Any], names: Sequence[str]) -> GivenSettings:
    """The reverse of `settings_to_json`. The content may have other keys too.

    Raises:
        ValueError, LookupError, TypeError: The content is damaged, or of a version with other settings.
    """
    # A server's own file has all settings; a file of a client from before there were settings has none.
    said = content.get("settings", SETTINGS if "create_time" in content else ())
    all_of_them: dict[str, Any] = {
        "schedule": _schedule(content.get("schedule")),
        "clipping": _clipping(content.get("clipping")),
        "groups": tuple(
            Group([str(names[index]) for index in group["parameters"]], group["overrides"], group.get("weight_decay"))
            for group in content.get("groups", ())
        ),
        "weight_decay": _weight_decay(content.get("weight_decay", 0.0)),
        "consistency": _consistency(content.get("consistency")),
    }
    return GivenSettings(**{name: all_of_them[name] for name in said})


def _weight_decay(content: float | Mapping[str, Any]) -> float | WeightDecay:
    # Of the fixed kind, a server writes a plain number too.
    return _of_kind(WEIGHT_DECAYS, content) if isinstance(content, Mapping) else float(content)


def _schedule(content: Mapping[str, Any] | None) -> Schedule | None:
    return None if content is None else _of_kind(SCHEDULES, content)


def _of_kind(kinds: Mapping[str, type[_Kind]], content: Mapping[str, Any]) -> _Kind:
    values = dict(content)
    return kinds[values.pop("kind")](**values)


def _clipping(content: Mapping[str, Any] | None) -> Clipping | None:
    return None if content is None else Clipping(**{content["kind"]: content["bound"]})


def _consistency(content: Mapping[str, Any] | None) -> Consistency | None:
    if content is None:
        return None
    values = dict(content)
    kind = CONSISTENCIES[values.pop("kind")]
    # The server's form has the fields of all kinds.
    return kind(**{name: value for name, value in values.items() if name in kind.__dataclass_fields__})
