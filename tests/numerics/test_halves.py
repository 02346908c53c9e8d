"""float16 and bfloat16 on the wire: rounded as torch rounds, the same on every backend, and checked on the way in."""

import numpy as np
import pytest
import torch

from optserve._common import half_floats

F4, F8 = np.dtype("f4"), np.dtype("f8")


def patterns() -> np.ndarray:
    """float32 of every exponent and sign, with bits around the places where rounding turns."""
    upper = np.arange(0, 1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x2000], np.uint32)
    return (upper[:, None] | lower).ravel().view(np.float32)


def torch_half(values: np.ndarray, kind: torch.dtype) -> np.ndarray:
    return torch.from_numpy(values).to(kind).view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize(
    ("wire", "kind"), [(half_floats.BFLOAT16, torch.bfloat16), (half_floats.FLOAT16, torch.float16)], ids=str
)
def test_rounding_is_torchs(backend, wire, kind):
    values = patterns()
    numbers = ~np.isnan(values)
    expected = torch_half(values, kind)
    here = np.empty(values.size, wire)
    half_floats.convert(values, here)
    for actual in (here, backend.to_wire(values.copy(), wire)):
        assert np.array_equal(actual.view(np.uint16)[numbers], expected[numbers])
        back = np.empty(values.size, np.float32)
        half_floats.convert(actual, back)
        assert np.array_equal(np.isnan(back), ~numbers)
        # And every half comes back exactly.
        again = np.empty(values.size, wire)
        half_floats.convert(back, again)
        assert np.array_equal(again.view(np.uint16)[numbers], actual.view(np.uint16)[numbers])


@pytest.mark.parametrize("dtype", [F4, F8], ids=str)
@pytest.mark.parametrize("wire", [F4, F8, half_floats.FLOAT16, half_floats.BFLOAT16], ids=half_floats.name_of)
@pytest.mark.parametrize("aligned", [True, False])
def test_what_comes_in_is_converted_and_checked(backend, dtype, wire, aligned):
    rng = np.random.default_rng(0)
    values = rng.standard_normal(1000).astype(dtype)
    sent = np.empty(1000, wire)
    half_floats.convert(values, sent)
    raw = b"x" + sent.tobytes()
    sent = np.frombuffer(memoryview(raw)[1:] if not aligned else sent.tobytes(), wire)
    expected, staged = np.empty(1000, dtype), np.empty(1000, dtype)
    half_floats.convert(sent, expected)
    assert backend.receive(staged, sent) == np.abs(expected).max()
    assert np.array_equal(staged, expected)
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = sent.copy()
        half_floats.convert(np.array([bad]), spoilt[777:778])
        assert half_floats.value(spoilt[777:778]) == bad or np.isnan(bad)
        assert not backend.receive(staged, spoilt) <= np.finfo(dtype).max


@pytest.mark.parametrize("dtype", [F4, F8], ids=str)
@pytest.mark.parametrize("size", [0, 1, 1000, 300_000])
def test_the_largest_magnitude_is_exact(backend, dtype, size):
    staged = -np.random.default_rng(2).random(size).astype(dtype)
    for place in {0, size // 2, size - 1} if size else ():
        for top in (3.5, -3.5, np.finfo(dtype).max, -np.finfo(dtype).max, np.inf, -np.inf):
            staged[place] = top
            assert backend.largest(staged) == backend.receive_large(staged.copy(), staged) == abs(dtype.type(top))
        staged[place] = np.nan
        assert np.isnan(backend.largest(staged))
        assert np.isnan(backend.receive_large(staged.copy(), staged))
        staged[place] = 0
    assert backend.largest(staged) == (np.abs(staged).max() if size else 0)


@pytest.mark.parametrize("wire", [F4, F8, half_floats.FLOAT16, half_floats.BFLOAT16], ids=half_floats.name_of)
def test_the_largest_number_of_a_wire_is_the_last_that_is_finite(wire):
    largest, element = half_floats.largest(wire), np.empty(1, wire)
    half_floats.convert(np.array([largest]), element)
    assert half_floats.value(element) == largest
    bits = element.view(f"u{wire.itemsize}")
    bits += 1
    assert half_floats.value(element) == np.inf
