"""The CUDA source of every rule, compiled as C: the formula that the GPU gets, checked where there is no GPU."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest

from optserve_server.numerics import backends
from optserve_server.numerics.backends import cuda_source
from optserve_server.numerics.rules import RULES

C_TYPES = {"f4": "float", "f8": "double"}

# -ffp-contract=off is what --fmad=false is to nvcc.
COMPILER_OPTIONS = ["-O2", "-shared", "-fPIC", "-ffp-contract=off"]


def compile_as_c(rule, code: str, folder):
    arrays, scalars = cuda_source.operands(rule)
    parameters = [*(f"T *{name}_" for name in arrays), *(f"T {name}" for name in scalars)]
    body = cuda_source.source(rule).replace("sqrt(", "sqrtf(" if code == "f4" else "sqrt(")
    body = "\n".join(
        [
            "#include <math.h>",
            f"typedef {C_TYPES[code]} T;",
            f"void loop(long size, {', '.join(parameters)}) {{",
            "for (long i = 0; i < size; i++) {",
            *(f"#define {name} {name}_[i]" for name in arrays),
            body,
            "}}",
        ]
    )
    source, library = folder / "kernel.c", folder / "kernel.so"
    source.write_text(body)
    subprocess.run([shutil.which("cc") or "gcc", *COMPILER_OPTIONS, source, "-o", library, "-lm"], check=True)
    loop = ctypes.CDLL(str(library)).loop
    scalar = ctypes.c_float if code == "f4" else ctypes.c_double
    loop.argtypes = [ctypes.c_long, *(ctypes.c_void_p for _ in arrays), *(scalar for _ in scalars)]
    return loop


@pytest.mark.parametrize("code", C_TYPES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_generated_source_computes_the_rule_bit_for_bit(rule, code, tmp_path):
    loop = compile_as_c(rule, code, tmp_path)
    dtype = np.dtype(code)
    scalars = rule().constants(dtype, 1)
    reference = backends.load("numpy").kernel(rule, dtype)
    rng = np.random.default_rng(3)
    slots, reference_slots = ([np.zeros(1001, dtype) for _ in rule.slots] for _ in range(2))
    for _ in range(20):
        staged, curvature = rng.standard_normal((2, 1001)).astype(dtype)
        inputs = [curvature] if rule.takes_curvature else []
        expected = staged.copy()
        reference(expected, reference_slots, scalars, *inputs)
        arrays = [staged, *inputs, *slots]
        loop(staged.size, *(array.ctypes.data for array in arrays), *(scalar.item() for scalar in scalars))
        assert staged.tobytes() == expected.tobytes()
    assert [slot.tobytes() for slot in slots] == [slot.tobytes() for slot in reference_slots]
