"""What an optimizer is set to: its method with the hyper-parameters. It can change while the state stays."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from optserve_server.rules import RULES, Rule


@dataclass(frozen=True)
class Settings:
    """The settings of one optimizer.

    Attributes:
        rule: The method, whose kind is fixed at creation, with its hyper-parameters.
    """

    rule: Rule

    def to_json(self) -> dict[str, Any]:
        """As it is written down."""
        return {"rule": {"name": self.rule.name, **asdict(self.rule)}}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Settings:
        """The reverse of `to_json`, from content that may hold more."""
        rule = dict(content["rule"])
        return cls(RULES[rule.pop("name")](**rule))
