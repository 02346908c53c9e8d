"""Writes the kernel of a rule as CUDA C: its formula, by running it once on symbols, and the loop around it.

Kept apart from the CuPy backend, and free of it, so that the generated code can be compiled and run on any machine.

One launch makes a step of up to some tens of stretches of the arenas of one dtype. Its argument holds the addresses of
the arenas, and for each stretch where it lies and its constants, so a step needs no table in the device's memory. Each
thread processes one vector of 16 bytes of each arena. Vectors are counted from the beginning of the arenas, so one may
belong to two stretches. Then each of them processes its own elements one by one.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from optserve_server.numerics.backends.base import DecayPlace
from optserve_server.numerics.rules import Rule

THREADS = 256
"""Threads of a block."""

VECTOR_BYTES = 16
"""Bytes of each arena that a thread reads and writes at once."""

ARGUMENT_BYTES = 4096
"""The largest argument of a kernel."""

OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")
"""The compiler's options under which the arithmetic gives the bits of a CPU: no operation is contracted with another,
numbers with few digits stay, quotients and roots are rounded correctly."""

PLACE = struct.Struct("=qqii")
"""What a kernel knows of a stretch beside its constants: its first element, its end, its first block of threads, and
where weight decay is taken off."""

CUDA = """
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)
#define ARGUMENT(T) const __grid_constant__ T launch
#define INLINE static __device__ __forceinline__
#define VECTOR struct __align__(16) Vector
"""
"""What the kernel needs of CUDA, to be put before its source. A compiler for a CPU needs other definitions."""

_KERNEL = """
typedef {element} T;
#define THREADS {threads}
#define WIDTH {width}
VECTOR {{ T of[WIDTH]; }};
typedef struct Vector Vector;
typedef struct {{ long long start, stop; int first_block, place; T factor, scalars[{scalars}]; }} Stretch;
typedef struct {{ T {pointers}; int stretches, is_aligned; Stretch stretch[{capacity}]; }} Launch;

INLINE void change(const Stretch *stretch, {parameters}) {{
T g = *staged;
{decayed}
{formula}
{advanced}
}}

KERNEL {name}(ARGUMENT(Launch)) {{
// The last stretch that begins at this block or before it.
int low = 0, high = launch.stretches;
while (high - low > 1) {{
    const int middle = (low + high) / 2;
    if (launch.stretch[middle].first_block <= (int)blockIdx.x) low = middle; else high = middle;
}}
const Stretch *stretch = &launch.stretch[low];
const long long start = stretch->start, stop = stretch->stop;
const long long block = (int)blockIdx.x - stretch->first_block;
const long long first = (start / WIDTH + block * THREADS + threadIdx.x) * WIDTH;
if (first >= stop) return;
if (launch.is_aligned && first >= start && first + WIDTH <= stop) {{
{loads}
    #pragma unroll
    for (int k = 0; k < WIDTH; k++) change(stretch, {vector_elements});
{stores}
}} else {{
    const long long end = first + WIDTH < stop ? first + WIDTH : stop;
    #pragma unroll 1
    for (long long i = first < start ? start : first; i < end; i++) change(stretch, {elements});
}}
}}
"""


class _Trace:
    """The statements written so far, one operation each: `const T t3 = t1 * t2;`."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.statements: list[str] = []

    def emit(self, expression: str) -> _Symbol:
        name = f"t{len(self.statements)}"
        self.statements.append(f"const T {name} = {expression};")
        return _Symbol(self, name)

    def sqrt(self, operand: _Symbol) -> _Symbol:
        return self.emit(f"{self.root}({operand.name})")


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


class KernelSource:
    """The source of the kernel of a rule for one dtype, and how its argument is laid out.

    Args:
        rule: The method.
        dtype: Of the arenas.
        hosted: Whether the kernel changes x as well.

    Attributes:
        name: The name of the kernel.
        arrays: Names of the arenas: `staged`, `curvature` if the rule takes it, the slots, `parameters` if hosted.
        width: Elements of a vector.
        capacity: The largest number of stretches of one launch.
        header: The addresses of the arenas, the number of stretches, whether all addresses are multiples of 16.
        constants: The factor of the weight decay, and the rule's constants.
        stretch_bytes: Bytes of a stretch: `PLACE`, then `constants`.
        argument_bytes: Bytes of the argument: `header`, then as many stretches as fit.
        text: The source, without `CUDA`.
    """

    def __init__(self, rule: type[Rule], dtype: np.dtype, *, hosted: bool) -> None:
        self.name = f"optserve_{rule.name}_{dtype.name}" + ("_hosted" if hosted else "")
        inputs = ["curvature"] if rule.takes_curvature else []
        slots = [f"slot{i}" for i in range(len(rule.slots))]
        self.arrays = ["staged", *inputs, *slots, *(["parameters"] if hosted else [])]
        self.width = VECTOR_BYTES // dtype.itemsize
        self._element, self._root = {4: ("float", "sqrtf"), 8: ("double", "sqrt")}[dtype.itemsize]
        self._scalars = len(rule().constants(dtype, 1))
        self.header = struct.Struct(f"={len(self.arrays)}Qii")
        self.constants = struct.Struct(f"={1 + self._scalars}{dtype.char}")
        # As C does, up to the next multiple of 8 bytes.
        self.stretch_bytes = -(-(PLACE.size + self.constants.size) // 8) * 8
        self.capacity = (ARGUMENT_BYTES - self.header.size) // self.stretch_bytes
        self.argument_bytes = self.header.size + self.capacity * self.stretch_bytes
        self.text = self._write(rule, slots, hosted=hosted)

    def _write(self, rule: type[Rule], slots: list[str], *, hosted: bool) -> str:
        reads_only = {"curvature"}
        return _KERNEL.format(
            element=self._element,
            threads=THREADS,
            width=self.width,
            scalars=self._scalars,
            pointers=", ".join(f"*{array}" for array in self.arrays),
            capacity=self.capacity,
            parameters=", ".join(f"{'const ' if array in reads_only else ''}T *{array}" for array in self.arrays),
            decayed=_DECAYED if hosted else "",
            formula=self._formula(rule, slots),
            advanced=_ADVANCED if hosted else "",
            name=self.name,
            loads="\n".join(
                f"    Vector v_{array} = *(const Vector *)(launch.{array} + first);" for array in self.arrays
            ),
            stores="\n".join(
                f"    *(Vector *)(launch.{array} + first) = v_{array};"
                for array in self.arrays
                if array not in reads_only
            ),
            vector_elements=", ".join(f"&v_{array}.of[k]" for array in self.arrays),
            elements=", ".join(f"&launch.{array}[i]" for array in self.arrays),
        )

    def _formula(self, rule: type[Rule], slots: list[str]) -> str:
        """Statements that read g, the curvature, the slots and the constants, and assign the update and the slots."""
        trace = _Trace(self._root)
        operands = ["g", *(["*curvature"] if rule.takes_curvature else []), *(f"*{slot}" for slot in slots)]
        operands += [f"stretch->scalars[{i}]" for i in range(self._scalars)]
        results: Any = rule.update(trace.sqrt, *(_Symbol(trace, f"({operand})") for operand in operands))
        results = results if rule.slots else (results,)
        # All results are there before the first array changes, because a result may be one of the operands.
        last = [f"const T r{i} = {result.name};" for i, result in enumerate(results)]
        stores = [f"*{array} = r{i};" for i, array in enumerate(["staged", *slots])]
        return "\n".join([*trace.statements, *last, *stores])


_DECAYED = f"if (stretch->place == {DecayPlace.GRADIENT.value}) g = g + *parameters * stretch->factor;"
_ADVANCED = f"""T d = r0;
if (stretch->place == {DecayPlace.PARAMETERS.value}) d = d - *parameters * stretch->factor;
*parameters = *parameters + d;"""
