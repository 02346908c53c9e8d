"""float16 and bfloat16 on the wire: conversions in NumPy, block by block, so that temporaries stay in the cache.

NumPy has no bfloat16. Here it is BFLOAT16, unsigned integers of two bytes that hold the upper half of a float32.
"""

from __future__ import annotations

import numpy as np

FLOAT16 = np.dtype("<f2")
BFLOAT16 = np.dtype("<u2")
"""The dtype that stands for bfloat16. Integers are never sent."""

_FLOAT32 = np.dtype("<f4")
_BITS32 = np.dtype("<u4")
BLOCK = 1 << 17
"""Elements of one block. Few enough that temporaries stay in the cache, and enough that NumPy seldom releases the
interpreter lock, which gRPC's threads would take."""
_QUIET_NAN = np.uint16(0x7FC0)


def name_of(dtype: np.dtype) -> str:
    """A wire dtype's name for people."""
    return "bfloat16" if dtype == BFLOAT16 else dtype.name


def largest(dtype: np.dtype) -> float:
    """The largest finite number of a wire dtype."""
    # bfloat16: all bits of the exponent except the last, and all bits of the fraction.
    return 2.0**127 * (2 - 2.0**-7) if dtype == BFLOAT16 else float(np.finfo(dtype).max)


def convert(source: np.ndarray, target: np.ndarray) -> None:
    """Copy elements into an array of another dtype, rounding to nearest, ties to even.

    float64 goes to bfloat16 by way of float32. What is too large becomes infinite; NaN stays NaN.

    Args:
        source: One-dimensional and contiguous: float64, float32, FLOAT16 or BFLOAT16.
        target: Likewise, of the same size.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if BFLOAT16 not in (source.dtype, target.dtype):
            np.copyto(target, source, casting="same_kind")
            return
        scratch = np.empty(min(source.size, BLOCK), _BITS32)
        for start in range(0, source.size, BLOCK):
            block = slice(start, start + BLOCK)
            if source.dtype == BFLOAT16:
                _widen(source[block], target[block])
            else:
                _narrow(source[block], target[block], scratch)


def _narrow(source: np.ndarray, target: np.ndarray, scratch: np.ndarray) -> None:
    """float32 or float64 to bfloat16."""
    if source.dtype != _FLOAT32:
        source = source.astype(_FLOAT32)
    bits, rounded = source.view(_BITS32), scratch[: source.size]
    # To nearest, ties to even: add just under half of the last place kept, and one more if that place is odd.
    np.right_shift(bits, 16, out=rounded)
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    # Two passes, because NumPy is slower if it shifts and converts in one.
    rounded >>= 16
    np.copyto(target, rounded, casting="unsafe")
    # NaN wins every max.
    if np.isnan(source.max(initial=0)):
        target[np.isnan(source)] = _QUIET_NAN


def _widen(source: np.ndarray, target: np.ndarray) -> None:
    """bfloat16 to float32 or float64, exactly."""
    if target.dtype == _FLOAT32:
        bits = target.view(_BITS32)
        np.copyto(bits, source)
        bits <<= 16
    else:
        target[...] = (source.astype(_BITS32) << 16).view(_FLOAT32)


def value(element: np.ndarray) -> float:
    """The number in an array of one element of any of these dtypes."""
    wide = np.empty(1)
    convert(element, wide)
    return float(wide[0])
