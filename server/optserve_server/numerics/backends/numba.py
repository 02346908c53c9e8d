"""Numba: the rule's formula compiled into one fused loop, so that each operand is read and written once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numba
import numpy as np

from optserve._common import half_floats
from optserve_server.numerics.backends import numba_loops
from optserve_server.numerics.backends.base import DecayPlace, HostedKernel, Kernel
from optserve_server.numerics.backends.numpy import NumpyBackend
from optserve_server.numerics.backends.slices import KERNEL
from optserve_server.numerics.rules import Rule

# A loop over a tuple of slots is about 40 % slower than one that names them, so the loop is written out for the
# rule's own slots.
_LOOP = """
def loop({arguments}):
    for i in range(staged.size):
        {results} = update(sqrt, {elements}{scalars})
"""

# One pass over all arrays, where a second one for x would read the updates once more: 1.5 times as fast for large ones.
_HOSTED_LOOP = """
def loop({arguments}, parameters, factor):
    for i in range(staged.size):
        x = parameters[i]
        {results} = update(sqrt, {elements}{scalars})
        parameters[i] = x + {change}
"""

_GRADIENT = {DecayPlace.GRADIENT: "staged[i] + x * factor"}
_CHANGE = {DecayPlace.PARAMETERS: "(staged[i] - x * factor)"}
"""What is different where there is weight decay."""


class NumbaBackend(NumpyBackend):
    """The fast CPU backend. Its arrays are NumPy's."""

    name = "numba"

    def receive(self, staged: np.ndarray, elements: np.ndarray) -> float:
        """Copy and look in one pass; see Backend."""
        if elements.dtype == staged.dtype:
            return numba_loops.receive(staged, elements)
        if elements.dtype == half_floats.BFLOAT16 and staged.dtype == np.dtype("<f4"):
            return numba_loops.receive_bfloat16(staged, elements)
        return super().receive(staged, elements)

    def _largest(self, staged: np.ndarray) -> float:
        return numba_loops.largest(staged)

    def to_wire(self, staged: np.ndarray, wire: np.dtype) -> np.ndarray:
        """Convert in one pass; see Backend."""
        if wire == half_floats.BFLOAT16 and staged.dtype == np.dtype("<f4"):
            return numba_loops.to_bfloat16(staged)
        return super().to_wire(staged, wire)

    def compile(self, rule: type[Rule], dtype: np.dtype) -> Kernel:
        """Compile the fused loop, in about half a second."""
        loop, alone_to = _compiled(_LOOP, rule, dtype), self._slices.alone_to(KERNEL)

        def kernel(
            staged: np.ndarray, slots: Sequence[np.ndarray], scalars: Sequence[np.generic], *inputs: np.ndarray
        ) -> None:
            arrays = (staged, *inputs, *slots)
            if staged.size <= alone_to:
                loop(*arrays, *scalars)
                return

            def work(start: int, stop: int) -> None:
                loop(*(array[start:stop] for array in arrays), *scalars)

            self._slices.run(staged.size, work, alone_to)

        return kernel

    def compile_hosted(self, rule: type[Rule], dtype: np.dtype, place: DecayPlace) -> HostedKernel:
        """Compile the fused loop, in about half a second."""
        loop, alone_to = _compiled(_HOSTED_LOOP, rule, dtype, place), self._slices.alone_to(KERNEL)

        def hosted(
            staged: np.ndarray,
            slots: Sequence[np.ndarray],
            scalars: Sequence[np.generic],
            parameters: np.ndarray,
            factor: np.floating,
            *inputs: np.ndarray,
        ) -> None:
            arrays = (staged, *inputs, *slots)
            if staged.size <= alone_to:
                loop(*arrays, *scalars, parameters, factor)
                return

            def work(start: int, stop: int) -> None:
                loop(*(array[start:stop] for array in arrays), *scalars, parameters[start:stop], factor)

            self._slices.run(staged.size, work, alone_to)

        return hosted


def _compiled(template: str, rule: type[Rule], dtype: np.dtype, place: DecayPlace | None = None) -> Callable[..., None]:
    """The loop of a template for a rule and a dtype; with a place also for x and the factor of its decay."""
    slot_names = [f"slot{i}" for i in range(len(rule.slots))]
    names = ["staged", *(["curvature"] if rule.takes_curvature else []), *slot_names]
    constants = [f"scalar{i}" for i in range(len(rule().constants(dtype, 1)))]
    gradient = _GRADIENT.get(place, "staged[i]") if place else "staged[i]"
    source = template.format(
        arguments=", ".join([*names, *constants]),
        scalars="".join(f", {constant}" for constant in constants),
        elements=", ".join([gradient, *(f"{name}[i]" for name in names[1:])]),
        results=", ".join(f"{name}[i]" for name in ("staged", *slot_names)),
        change=_CHANGE.get(place, "staged[i]") if place else "",
    )
    # Without the numpy error model a division is guarded by a branch, and the loop is not vectorised.
    namespace = {"update": numba.njit(error_model="numpy")(rule.update), "sqrt": np.sqrt}
    exec(source, namespace)  # noqa: S102 - the text is the template above, filled from a rule's own counts
    element = numba.from_dtype(dtype)
    hosted = (element[::1], element) if place else ()
    signature = numba.void(*(element[::1] for _ in names), *(element for _ in constants), *hosted)
    return numba.njit(signature, nogil=True, error_model="numpy")(namespace["loop"])
