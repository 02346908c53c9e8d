"""The CUDA source of every kernel, compiled for GPUs by the compilers of CUDA 12 and 13, without a GPU."""

import ctypes
import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution

import numpy as np
import pytest

from optserve_server.numerics.backends.cuda_source import CUDA, OPTIONS, KernelSource
from optserve_server.numerics.rules import RULES

COMPILERS = {12: "nvidia-cuda-nvrtc-cu12", 13: "nvidia-cuda-nvrtc"}


def _are_there() -> bool:
    try:
        return all(map(distribution, COMPILERS.values()))
    except PackageNotFoundError:
        return False


# requirements/dev.txt has them; an environment with a GPU needs only the one of its CuPy.
pytestmark = pytest.mark.skipif(not _are_there(), reason=f"{' or '.join(COMPILERS.values())} is not installed")


@cache
def compiler(version: int) -> ctypes.CDLL:
    files = distribution(COMPILERS[version]).files or []
    (library,) = [file for file in files if file.name == f"libnvrtc.so.{version}"]
    return ctypes.CDLL(str(library.locate()))


def compiled(version: int, source: str, *options: str) -> tuple[str, bytes]:
    """The assembly text and the machine code of a source."""
    nvrtc, program = compiler(version), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(given), given)
    assert not failed, _content(nvrtc, program, "ProgramLog").decode()
    return _content(nvrtc, program, "PTX").decode(), _content(nvrtc, program, "CUBIN")


def _content(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    assert not nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size))
    content = ctypes.create_string_buffer(size.value)
    assert not nvrtc[f"nvrtcGet{what}"](program, content)
    return content.raw


def kernels(rule) -> Iterator[KernelSource]:
    for dtype in (np.dtype("f4"), np.dtype("f8")):
        for hosted in (False, True):
            yield KernelSource(rule, dtype, hosted=hosted)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("version", COMPILERS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_kernel_compiles_and_rounds_each_operation_as_a_cpu_does(rule, version, architecture):
    for kernel in kernels(rule):
        assembly, machine_code = compiled(version, CUDA + kernel.text, *OPTIONS, f"--gpu-architecture={architecture}")
        assert len(machine_code) > 1000
        arithmetic = set(re.findall(r"\b(?:add|sub|mul|div|sqrt|fma|mad|rcp|rsqrt|abs|neg)\S*\.f(?:32|64)\b", assembly))
        assert arithmetic
        assert {name for name in arithmetic if "rn" not in name.split(".")} <= {
            "abs.f32",
            "abs.f64",
            "neg.f32",
            "neg.f64",
        }
        assert not re.search(r"fma|\bmad\S*\.f|\.ftz|approx", assembly)
        # Each arena is read and written by 16 bytes a thread, and the argument is read where it is.
        assert assembly.count("st.global.v") == len(kernel.arrays) - ("curvature" in kernel.arrays)
        assert not re.search(r"(?:ld|st)\.local", assembly)


def test_the_options_make_the_difference():
    """With the options that CuPy uses, numbers with few digits become 0."""
    kernel = KernelSource(RULES["lion"], np.dtype("f4"), hosted=False)
    assembly, _ = compiled(12, CUDA + kernel.text, "--ftz=true", "--gpu-architecture=sm_80")
    assert ".ftz" in assembly
    assert "fma" in assembly
