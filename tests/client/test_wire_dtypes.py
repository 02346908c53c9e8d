"""Gradients and updates in half the bytes: what is rounded, and what is not."""

import numpy as np
import pytest

import optserve
from optserve._common import half_floats

WIRES = {"float16": half_floats.FLOAT16, "bfloat16": half_floats.BFLOAT16}
SHAPES = {"w": (300, 700), "b": (33,), "scale": (), "none": (0,)}


def gradients(seed: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


def rounded(arrays: dict[str, np.ndarray], wire: np.dtype) -> dict[str, np.ndarray]:
    result = {}
    for name, array in arrays.items():
        sent, back = np.empty(array.size, wire), np.empty(array.size, array.dtype)
        half_floats.convert(array.reshape(-1), sent)
        half_floats.convert(sent, back)
        result[name] = back.reshape(array.shape)
    return result


@pytest.mark.parametrize("wire_dtype", WIRES)
@pytest.mark.parametrize("chunk_bytes", [0, 1026])
def test_gradients_and_updates_are_rounded_once_and_the_state_not_at_all(server, name, wire_dtype, chunk_bytes):
    wire = WIRES[wire_dtype]
    with optserve.connect(server.target, optserve.ClientConfig(max_chunk_bytes=chunk_bytes)) as client:
        reference = client.create_optimizer(name, optserve.Adadelta(), gradients(0))
        client.create_optimizer(f"{name}-half", optserve.Adadelta(), gradients(0))
        half = client.optimizer(f"{name}-half", wire_dtype=wire_dtype)
        actual: dict[str, np.ndarray] = {}
        for seed in range(3):
            expected = rounded(reference.step(rounded(gradients(seed), wire)), wire)
            actual = half.step(gradients(seed))
            for key, update in expected.items():
                assert actual[key].dtype == np.float32
                assert np.array_equal(actual[key], update)
        kept, expected = half.export_state().slots, reference.export_state().slots
        for key, slots in expected.items():
            for slot, array in slots.items():
                assert np.array_equal(kept[key][slot], array)
        replayed = half.replay()
        assert all(np.array_equal(replayed[key], actual[key]) for key in actual)


def test_a_float64_state_may_travel_in_any_dtype(client, name):
    client.create_optimizer(name, optserve.Sgd(learning_rate=1.0), gradients(0, "float64"))
    for wire_dtype in ("float32", "float64", "float16", "bfloat16"):
        updates = client.optimizer(name, wire_dtype=wire_dtype).step(gradients(1, "float64"))
        for key, g in gradients(1, "float64").items():
            assert updates[key].dtype == np.float64
            np.testing.assert_allclose(updates[key], -g, rtol=0.01, atol=1e-4)


def test_a_gradient_that_is_too_large_for_the_wire_is_named(client, name):
    client.create_optimizer(name, optserve.Adadelta(), gradients(0))
    large = gradients(0)
    large["w"][2, 3] = 70_000
    with pytest.raises(optserve.InvalidArgumentError, match="'w' is inf at flat index 1403, as float16 on the wire"):
        client.optimizer(name, wire_dtype="float16").step(large)
    client.optimizer(name, wire_dtype="bfloat16").step(large)


def test_error_feedback_is_the_same_where_updates_take_the_gradients_place(client, name):
    first = {"x": np.linspace(-1, 1, 1001, dtype=np.float32)}
    updates = []
    for which in ("apart", "in-place"):
        client.create_optimizer(f"{name}-{which}", optserve.Sgd(), first)
        opt = client.optimizer(f"{name}-{which}", wire_dtype="bfloat16", error_feedback=True)
        for _ in range(3):
            gradient = {"x": first["x"].copy()}
            out = gradient if which == "in-place" else None
            updates.append(opt.step(gradient, out=out)["x"].tobytes())
    assert updates[:3] == updates[3:]


def test_error_feedback_loses_nothing_over_many_steps(client, name):
    """Plain gradient descent of rate 1: the updates sum up to what was sent."""
    client.create_optimizer(name, optserve.Sgd(learning_rate=1.0), {"x": optserve.TensorSpec((1000,))})
    tiny = {"x": np.full(1000, 1.0 + 2.0**-10, np.float32)}  # a quarter of bfloat16's last place above 1
    plain = client.optimizer(name, wire_dtype="bfloat16")
    lost = sum(plain.step(tiny)["x"][0] for _ in range(256))
    assert lost == -256.0
    plain.close()
    careful = client.optimizer(name, wire_dtype="bfloat16", error_feedback=True)
    kept = sum(careful.step(tiny)["x"][0] for _ in range(256))
    assert kept == pytest.approx(-256 * (1 + 2.0**-10), abs=2.0**-7)
    # A refused step keeps its error to itself.
    with pytest.raises(optserve.InvalidArgumentError):
        careful.step({"x": np.full(1000, np.nan, np.float32)})
    assert np.isfinite(careful.step(tiny)["x"]).all()
