"""Writes a rule's formula down as CUDA C, by running it once on symbols.

Kept apart from the CuPy backend, and free of it, so that the generated code can be compiled and checked on any
machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from optserve_server.numerics.rules import Rule

_FLOAT32 = np.dtype("<f4")


class _Trace:
    """The statements written so far, one operation each: `const T t3 = t1 * t2;`."""

    def __init__(self) -> None:
        self.statements: list[str] = []

    def emit(self, expression: str) -> _Symbol:
        name = f"t{len(self.statements)}"
        self.statements.append(f"const T {name} = {expression};")
        return _Symbol(self, name)

    def sqrt(self, operand: _Symbol) -> _Symbol:
        return self.emit(f"sqrt({operand.name})")


class _Symbol:
    """A value of the formula, known by name."""

    def __init__(self, trace: _Trace, name: str) -> None:
        self.trace = trace
        self.name = name

    def __add__(self, other: _Symbol) -> _Symbol:
        return self.trace.emit(f"{self.name} + {other.name}")

    def __sub__(self, other: _Symbol) -> _Symbol:
        return self.trace.emit(f"{self.name} - {other.name}")

    def __mul__(self, other: _Symbol) -> _Symbol:
        return self.trace.emit(f"{self.name} * {other.name}")

    def __truediv__(self, other: _Symbol) -> _Symbol:
        return self.trace.emit(f"{self.name} / {other.name}")

    def __abs__(self) -> _Symbol:
        return self.trace.emit(f"fabs({self.name})")

    def __neg__(self) -> _Symbol:
        return self.trace.emit(f"-{self.name}")


def operands(rule: type[Rule]) -> tuple[list[str], list[str]]:
    """Names of the arrays (staged, the curvature if it takes one, the slots) and of the scalars in the source."""
    inputs = ["curvature"] if rule.takes_curvature else []
    arrays = ["staged", *inputs, *(f"slot{i}" for i in range(len(rule.slots)))]
    return arrays, [f"scalar{i}" for i in range(len(rule().constants(_FLOAT32, 1)))]


def source(rule: type[Rule]) -> str:
    """The body of an element-wise kernel for type T, which reads and assigns the arrays of `operands`."""
    arrays, scalars = operands(rule)
    trace = _Trace()
    results: Any = rule.update(trace.sqrt, *(_Symbol(trace, name) for name in [*arrays, *scalars]))
    assigned = results if rule.slots else (results,)
    changing = [array for array in arrays if array != "curvature"]
    return "\n".join(
        [*trace.statements, *(f"{array} = {value.name};" for array, value in zip(changing, assigned, strict=True))]
    )
