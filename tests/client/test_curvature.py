"""Methods that take the diagonal of the Hessian with each gradient, by every way that a step can travel."""

import os
import signal

import grpc
import numpy as np
import pytest

import optserve
import oracle
from backend_under_test import BACKEND
from optserve.v1 import algorithms_pb2, optimizer_pb2, service_pb2, steps_pb2
from service.wire_client import Request, begin, chunk, commit, details, refused, stream

SHAPES = {"w": ((40, 21), "float32"), "b": ((33,), "float64"), "odd": ((3,), "float32"), "none": ((0, 2), "float32")}
VSGD = optserve.Vsgd(initial_steps=3, initial_overestimate=5.0)


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), dtype) for name, (shape, dtype) in SHAPES.items()}


def operands(step: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    return arrays(2 * step), arrays(2 * step + 1)


def bits(updates: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: update.tobytes() for name, update in updates.items()}


def steps(opt: optserve.Optimizer, count: int, start: int = 0) -> list[dict[str, bytes]]:
    done = []
    for step in range(start, start + count):
        gradient, curvature = operands(step)
        done.append(bits(opt.step(gradient, curvature=curvature)))
    return done


def test_the_updates_are_those_of_the_equation(client, name):
    opt = client.create_optimizer(name, VSGD, arrays(0))
    total = np.zeros(33)
    for step in range(10):
        gradient, curvature = operands(step)
        total += opt.step(gradient, curvature=curvature)["b"]
    given = [operands(step) for step in range(10)]
    expected = oracle.vsgd([g["b"] for g, _ in given], [h["b"] for _, h in given], 1e-2, 5.0, 3)
    np.testing.assert_allclose(total, expected, rtol=1e-12)


@pytest.mark.parametrize("chunk_bytes", [0, 1024])
def test_every_way_gives_the_same_bits(server, client, name, chunk_bytes):
    client.create_optimizer(f"{name}-reference", VSGD, arrays(0))
    expected = steps(client.optimizer(f"{name}-reference", transport="grpc"), 8)
    config = optserve.ClientConfig(max_chunk_bytes=chunk_bytes)
    with optserve.connect(server.target, config) as other:
        for transport in ("shm", "grpc"):
            other.create_optimizer(f"{name}-{transport}", VSGD, arrays(0))
            opt = other.optimizer(f"{name}-{transport}", transport=transport)
            assert steps(opt, 6) == expected[:6]
            for turn in (6, 7):
                gradient, curvature = operands(turn)
                with opt.begin_step() as step:
                    for key in ("odd", "w", "none", "b"):
                        step.send(key, gradient[key], curvature[key])
                assert bits(step.updates) == expected[turn]


def test_some_parameters_may_be_left_out(client, name):
    opt = client.create_optimizer(name, optserve.DiagonalHessian(mu=2.0), arrays(0))
    gradient, curvature = operands(0)
    updates = opt.step({"b": gradient["b"]}, curvature=curvature, partial=True)
    np.testing.assert_allclose(updates["b"], -gradient["b"] / (np.abs(curvature["b"]) + 2))


def test_they_survive_a_crash_bit_for_bit(tmp_path, client, name):
    client.create_optimizer(name, VSGD, arrays(0))
    expected = steps(client.optimizer(name), 9)
    with optserve.local_server(tmp_path, backend=BACKEND) as server, optserve.connect(server.target) as before:
        for transport in ("shm", "grpc"):
            before.create_optimizer(transport, VSGD, arrays(0))
            assert steps(before.optimizer(transport, transport=transport), 6) == expected[:6]
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    with optserve.local_server(tmp_path, backend=BACKEND) as server, optserve.connect(server.target) as after:
        for transport in ("shm", "grpc"):
            opt = after.optimizer(transport, transport=transport)
            assert opt.current_step == 6
            assert bits(opt.replay()) == expected[5]
            assert steps(opt, 3, start=6) == expected[6:]


def test_halves_on_the_wire_hold_for_the_curvature_too(client, name):
    client.create_optimizer(name, optserve.DiagonalHessian(), {"x": np.zeros(100, np.float32)})
    opt = client.optimizer(name, wire_dtype="bfloat16")
    gradient, curvature = np.linspace(-1, 1, 100, dtype="f4"), np.linspace(5, -5, 100, dtype="f4")
    update = opt.step({"x": gradient}, curvature={"x": curvature})["x"]
    np.testing.assert_allclose(update, -gradient / (np.abs(curvature) + 3), rtol=2e-2, atol=1e-6)


def test_curvature_of_either_sign_or_zero_gives_finite_updates(client, name):
    opt = client.create_optimizer(name, optserve.DiagonalHessian(mu=0.5), {"x": np.zeros(3)})
    update = opt.step({"x": np.ones(3)}, curvature={"x": np.array([-2.0, 0.0, 2.0])})["x"]
    np.testing.assert_array_equal(update, [-1 / 2.5, -1 / 0.5, -1 / 2.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: None, "takes the diagonal of the Hessian: pass `curvature`"),
        (lambda h: {"w": h["w"]}, "There is no curvature for 'b'"),
        (lambda h: h | {"w": h["w"].T}, r"The curvature of 'w' has shape \[21, 40\], not \[40, 21\]"),
        (lambda h: h | {"w": h["w"].astype("f8")}, "The curvature of 'w' is float64, not float32"),
        (lambda h: h | {"b": np.full(33, np.nan)}, "The curvature of 'b' is nan at flat index 0"),
    ],
)
@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_bad_curvature_is_refused_and_nothing_changes(client, name, transport, change, message):
    client.create_optimizer(name, VSGD, arrays(0))
    client.create_optimizer(f"{name}-reference", VSGD, arrays(0))
    opt, reference = client.optimizer(name, transport=transport), client.optimizer(f"{name}-reference")
    gradient, curvature = operands(0)
    with pytest.raises(optserve.InvalidArgumentError, match=message):
        opt.step(gradient, curvature=change(curvature))
    assert steps(opt, 5) == steps(reference, 5)


def test_other_methods_take_no_curvature(client, name):
    opt = client.create_optimizer(name, optserve.Adadelta(), arrays(0))
    with pytest.raises(optserve.InvalidArgumentError, match="takes no curvature"):
        opt.step(arrays(0), curvature=arrays(1))


def test_hyperparameters_have_ranges(client, name):
    for algorithm in (
        optserve.DiagonalHessian(mu=0.0),
        optserve.DiagonalHessian(mu=-1.0),
        optserve.Vsgd(eps=0.0),
        optserve.Vsgd(initial_overestimate=0.5),
        optserve.Vsgd(initial_steps=1),
    ):
        with pytest.raises(optserve.InvalidArgumentError, match="must lie in"):
            client.create_optimizer(name, algorithm, arrays(0))


# --- The contract


@pytest.fixture
def resource(stub, name) -> str:
    optimizer = optimizer_pb2.Optimizer(
        algorithm=algorithms_pb2.Algorithm(diagonal_hessian=algorithms_pb2.DiagonalHessian(mu=1.0)),
        parameters=[optimizer_pb2.Parameter(name="x", shape=[2])],
    )
    request = service_pb2.CreateOptimizerRequest(optimizer_id=name, optimizer=optimizer)
    return stub.CreateOptimizer(request).optimizer.name


def curvature_chunk(offset: int, data: bytes) -> Request:
    message = chunk(0, offset, data)
    message.chunk.operand = steps_pb2.OPERAND_CURVATURE
    return message


ONE, THREE = np.array([1, 1], np.float32).tobytes(), np.array([3, 3], np.float32).tobytes()


def test_both_operands_may_come_in_any_order(stub, resource):
    with stream(stub, resource) as open_stream:
        open_stream.send(begin(with_curvature=True), curvature_chunk(4, THREE[4:]), chunk(0, 0, ONE))
        open_stream.send(curvature_chunk(0, THREE[:4]), commit())
        payload, _ = open_stream.reply()
        assert np.frombuffer(payload, "f4").tolist() == [-0.25, -0.25]


@pytest.mark.parametrize(
    ("requests", "reason", "field"),
    [
        ([begin()], "INVALID_FIELD", "begin.with_curvature"),
        ([begin(with_curvature=True), chunk(0, 0, ONE), commit()], "MISSING_CHUNK", "chunk"),
        (
            [begin(with_curvature=True), curvature_chunk(0, ONE), curvature_chunk(4, ONE[4:])],
            "OVERLAPPING_CHUNK",
            "chunk.offset",
        ),
        ([begin(with_curvature=True), curvature_chunk(4, ONE)], "CHUNK_OUT_OF_BOUNDS", "chunk.offset"),
    ],
)
def test_a_stream_says_what_is_wrong_with_the_curvature(stub, resource, requests, reason, field):
    with stream(stub, resource) as open_stream:
        open_stream.send(*requests)
        assert details(open_stream.error())[::2] == (reason, field)


def test_a_unary_step_takes_it_with_its_tensor(stub, resource):
    def apply(**tensor):
        gradient = steps_pb2.Tensor(name="x", data=ONE, **tensor)
        return stub.ApplyGradients(
            steps_pb2.ApplyGradientsRequest(name=resource, request_id=str(tensor), gradients=[gradient])
        )

    assert np.frombuffer(apply(curvature=THREE).updates[0].data, "f4").tolist() == [-0.25, -0.25]
    for wrong in (b"", THREE[:4], THREE + THREE):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "WRONG_BYTE_COUNT", "gradients[0].curvature"):
            apply(curvature=wrong)
