"""How everything here is measured: interleaved rounds, medians, spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds per call over all rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p10(self) -> float:
        return statistics.quantiles(self.seconds, n=10)[0]

    @property
    def p99(self) -> float:
        return statistics.quantiles(self.seconds, n=100)[98]

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


@dataclass(frozen=True)
class Candidate:
    """What is timed, and what is done before each time without being timed."""

    call: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def interleaved(candidates: dict[str, Candidate], rounds: int) -> dict[str, Timing]:
    """Time every candidate once per round, so that what disturbs the machine disturbs them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, candidate in candidates.items():
            candidate.prepare()
            start = time.perf_counter()
            candidate.call()
            # The first turn warms up.
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}
