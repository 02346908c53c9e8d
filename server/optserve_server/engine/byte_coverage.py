"""Which bytes of a step have arrived: a set of disjoint intervals that refuses overlaps."""

from __future__ import annotations

from bisect import bisect_right

MAX_FRAGMENTS = 1 << 14
"""Most disjoint intervals of one step. Bytes that arrive in order need one."""


class Overlap(ValueError):
    """The interval covers a byte that had arrived before; `position` is the first such byte."""

    def __init__(self, position: int) -> None:
        super().__init__(f"byte {position} arrived twice")
        self.position = position


class TooManyFragments(ValueError):
    """More than MAX_FRAGMENTS disjoint intervals."""


class Coverage:
    """A union of half-open intervals, kept sorted and merged."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []

    def add(self, begin: int, end: int) -> None:
        """Add [begin, end).

        Raises:
            Overlap: Some of these bytes had arrived before. Nothing is added.
            TooManyFragments: The interval would be one fragment too many. Nothing is added.
        """
        if begin == end:
            return
        if not self._begins:
            self._begins, self._ends = [begin], [end]
            return
        after = bisect_right(self._begins, begin)
        if after and self._ends[after - 1] > begin:
            raise Overlap(begin)
        if after < len(self._begins) and self._begins[after] < end:
            raise Overlap(self._begins[after])
        joins_left = after > 0 and self._ends[after - 1] == begin
        joins_right = after < len(self._begins) and self._begins[after] == end
        if joins_left and joins_right:
            self._ends[after - 1] = self._ends.pop(after)
            self._begins.pop(after)
        elif joins_left:
            self._ends[after - 1] = end
        elif joins_right:
            self._begins[after] = begin
        elif len(self._begins) >= MAX_FRAGMENTS:
            raise TooManyFragments(f"more than {MAX_FRAGMENTS} disjoint pieces")
        else:
            self._begins.insert(after, begin)
            self._ends.insert(after, end)

    def first_gap(self, total: int) -> int | None:
        """The first position in [0, total) that is missing; None if no position is."""
        covered = self._ends[0] if self._begins and self._begins[0] == 0 else 0
        return covered if covered < total else None
