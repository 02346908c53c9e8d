"""What a seed draws for a run, before anything happens."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import optserve

KINDS = ("client", "delta", "async", "bounded", "sync")


@dataclass(frozen=True)
class Scenario:
    """What a seed draws.

    Attributes:
        kind: How the optimizer is used: by one client, which has the server hold x or not, or by workers.
        actors: How many use it.
        needed: Workers of which a step is the mean.
        staleness: Of `bounded`.
        lease_s: Of workers.
        thinking_s: Longest pause between two steps.
        storm_s: How long things go wrong.
        gentle: Nobody is killed and no lease ends, so that more is known of what has to be.
    """

    kind: str
    actors: int
    needed: int
    staleness: int
    lease_s: float
    thinking_s: float
    storm_s: float
    gentle: bool

    @classmethod
    def drawn(cls, rng: random.Random) -> Scenario:
        """One of many."""
        kind = rng.choice(KINDS)
        actors = 1 if kind in ("client", "delta") else rng.randint(2, 3)
        gentle = rng.random() < 0.25
        return cls(
            kind=kind,
            actors=actors,
            needed=2 if kind == "sync" else 1,
            staleness=rng.randint(0, 2),
            lease_s=3600.0 if gentle else rng.choice((1.0, 3.0, 10.0)),
            thinking_s=rng.choice((0.05, 0.5, 2.0)),
            storm_s=rng.uniform(3.0, 20.0),
            gentle=gentle,
        )

    @property
    def has_workers(self) -> bool:
        """Whether several share the optimizer."""
        return self.kind not in ("client", "delta")

    @property
    def consistency(self) -> Any:
        """How they share it."""
        if self.kind == "async":
            return optserve.Async(lease_s=self.lease_s)
        if self.kind == "bounded":
            return optserve.Bounded(staleness=self.staleness, lease_s=self.lease_s)
        if self.kind == "sync":
            return optserve.Sync(workers=self.needed, lease_s=self.lease_s)
        return None
