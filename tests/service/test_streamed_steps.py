"""StreamSteps: steps of any size, errors that end a step and not the stream, and clients that vanish."""

import grpc
import numpy as np
import pytest

from optserve.v1 import service_pb2, steps_pb2
from optserve_server.domain.config import ConfigError, ServerConfig
from service.wire_client import Request, begin, chunk, commit, create, details, gradients, refused, stream

SHAPES = {"w": (4, 3), "b": (3,), "scalar": ()}
PAYLOAD = b"".join(value.tobytes() for value in gradients(SHAPES).values())


@pytest.fixture
def optimizer(stub, name) -> str:
    return create(stub, name, SHAPES).name


def current_step(stub, resource: str) -> int:
    return stub.GetOptimizer(service_pb2.GetOptimizerRequest(name=resource)).optimizer.step


def whole_step(**options) -> Request:
    request = begin(**options)
    request.MergeFrom(chunk(0, 0, PAYLOAD))
    request.MergeFrom(commit())
    return request


def test_opened_tells_the_step_the_last_request_and_the_limits(stub, optimizer):
    with stream(stub, optimizer) as first:
        first.send(whole_step(request_id="one"))
        first.reply()
    with stream(stub) as second:
        opened = second.open(optimizer)
    assert (opened.step, opened.last_request_id) == (1, "one")
    assert opened.limits.max_chunk_bytes == 4 << 20
    assert opened.etag


def test_a_small_step_is_one_message_each_way(stub, optimizer):
    with stream(stub, optimizer) as steps:
        steps.send(whole_step())
        response = steps.receive()
    assert response.result.step == 1
    assert len(response.data) == len(PAYLOAD)


def test_many_steps_on_one_stream(stub, optimizer):
    with stream(stub, optimizer) as steps:
        for expected in range(5):
            steps.send(begin(expected_step=expected), chunk(0, 0, PAYLOAD[:20]), chunk(0, 20, PAYLOAD[20:]), commit())
            assert steps.reply()[1].step == expected + 1


def test_a_stream_and_a_unary_call_give_the_same_bits(stub, optimizer, name):
    create(stub, f"{name}-unary", SHAPES)
    with stream(stub, optimizer) as steps:
        steps.send(whole_step())
        streamed, _ = steps.reply()
    tensors = [steps_pb2.Tensor(name=key, data=value.tobytes()) for key, value in gradients(SHAPES).items()]
    request = steps_pb2.ApplyGradientsRequest(name=f"optimizers/{name}-unary", request_id="a", gradients=tensors)
    assert b"".join(update.data for update in stub.ApplyGradients(request).updates) == streamed


def test_the_reply_comes_in_chunks_of_the_size_asked_for(stub, name):
    resource = create(stub, name, {"x": (1000,)}).name
    values = np.ones(1000, np.float32).tobytes()
    with stream(stub, resource, max_chunk_bytes=1030) as steps:
        steps.send(begin(), chunk(0, 0, values), commit())
        sizes, offsets = [], []
        while not sizes or sum(sizes) < len(values):
            response = steps.receive()
            sizes.append(len(response.data))
            offsets.append(response.chunk.offset)
    assert sizes == [1028, 1028, 1028, 916]
    assert offsets == [0, 1028, 2056, 3084]


def test_a_step_of_some_parameters(stub, optimizer):
    with stream(stub, optimizer) as steps:
        steps.send(begin(tensors=[2, 1]), chunk(2, 0, bytes(4)), chunk(1, 0, bytes(12)), commit())
        payload, result = steps.reply()
    assert (len(payload), result.step) == (16, 1)


def test_a_retry_on_another_stream_gets_the_same_bytes(stub, optimizer):
    with stream(stub, optimizer) as steps:
        steps.send(whole_step(request_id="one"))
        first, _ = steps.reply()
    with stream(stub, optimizer) as steps:
        steps.send(begin("one", expected_step=0), commit())
        again, result = steps.reply()
    assert result.replayed
    assert again == first
    assert current_step(stub, optimizer) == 1


# --- what is refused, and how the stream goes on


@pytest.mark.parametrize(
    ("requests", "code", "reason"),
    [
        ([begin(expected_step=3), chunk(0, 0, PAYLOAD), commit()], grpc.StatusCode.ABORTED, "WRONG_STEP"),
        ([begin(), chunk(0, 0, PAYLOAD[:-4]), commit()], grpc.StatusCode.INVALID_ARGUMENT, "MISSING_CHUNK"),
        ([begin(), commit()], grpc.StatusCode.INVALID_ARGUMENT, "MISSING_CHUNK"),
        (
            [begin(), chunk(0, 0, PAYLOAD), chunk(0, 0, PAYLOAD[:4]), commit()],
            grpc.StatusCode.INVALID_ARGUMENT,
            "OVERLAPPING_CHUNK",
        ),
        ([begin(), chunk(0, 0, PAYLOAD + bytes(4)), commit()], grpc.StatusCode.INVALID_ARGUMENT, "CHUNK_OUT_OF_BOUNDS"),
        ([begin(), chunk(0, 1, PAYLOAD[:4]), commit()], grpc.StatusCode.INVALID_ARGUMENT, "CHUNK_OUT_OF_BOUNDS"),
        ([begin(), chunk(3, 0, PAYLOAD), commit()], grpc.StatusCode.INVALID_ARGUMENT, "UNKNOWN_PARAMETER"),
        ([begin(tensors=[7]), commit()], grpc.StatusCode.INVALID_ARGUMENT, "UNKNOWN_PARAMETER"),
        ([begin(tensors=[1, 1]), commit()], grpc.StatusCode.INVALID_ARGUMENT, "DUPLICATE_PARAMETER"),
        (
            [begin(), chunk(0, 0, np.full(16, np.nan, "<f4").tobytes()), commit()],
            grpc.StatusCode.INVALID_ARGUMENT,
            "NON_FINITE_VALUE",
        ),
        (
            [begin(), chunk(0, 0, bytes((4 << 20) + 4)), commit()],
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "MESSAGE_TOO_LARGE",
        ),
        ([begin("\n"), chunk(0, 0, PAYLOAD), commit()], grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        ([begin(with_curvature=True), commit()], grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        ([begin(reply=steps_pb2.REPLY_PARAMETERS), commit()], grpc.StatusCode.FAILED_PRECONDITION, "NOT_HOSTED"),
        ([begin(), Request(data=bytes(4)), commit()], grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        (
            [begin(), Request(chunk=steps_pb2.Chunk(operand=9), data=bytes(4)), commit()],  # pyright: ignore[reportArgumentType]
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_FIELD",
        ),
        ([begin(reply=9), commit()], grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        ([commit()], grpc.StatusCode.FAILED_PRECONDITION, "NO_STEP"),
        ([chunk(0, 0, PAYLOAD), commit()], grpc.StatusCode.FAILED_PRECONDITION, "NO_STEP"),
        ([begin(), begin(), commit()], grpc.StatusCode.FAILED_PRECONDITION, "STEP_NOT_ENDED"),
        (
            [begin(), chunk(0, 0, PAYLOAD), begin(), chunk(0, 0, PAYLOAD), commit()],
            grpc.StatusCode.FAILED_PRECONDITION,
            "STEP_NOT_ENDED",
        ),
    ],
)
def test_an_error_ends_the_step_once_and_the_stream_lives_on(stub, optimizer, requests, code, reason):
    with stream(stub, optimizer) as steps:
        steps.send(*requests)
        status = steps.error()
        assert (status.code, details(status)[0]) == (code.value[0], reason)
        assert current_step(stub, optimizer) == 0
        # The next message is the next step's: the failed one was answered once.
        steps.send(whole_step(expected_step=0))
        assert steps.reply()[1].step == 1


def test_what_follows_of_a_failed_step_is_ignored_data_without_a_chunk_too(stub, optimizer):
    with stream(stub, optimizer) as steps:
        steps.send(begin(), chunk(99, 0, PAYLOAD), Request(data=PAYLOAD), chunk(0, 0, PAYLOAD), commit(), whole_step())
        assert details(steps.error())[0] == "UNKNOWN_PARAMETER"
        assert steps.reply()[1].step == 1


def test_an_aborted_step_is_discarded_without_an_answer(stub, optimizer):
    with stream(stub, optimizer) as steps:
        steps.send(begin(), chunk(0, 0, PAYLOAD), Request(abort=steps_pb2.Abort()), whole_step(expected_step=0))
        assert steps.reply()[1].step == 1


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (begin("\n"), "begin.request_id"),
        (begin(tensors=[9]), "begin.tensors"),
        (begin(reply=9), "begin.reply"),
        (Request(begin=begin().begin, chunk=steps_pb2.Chunk(tensor=9), data=bytes(4)), "chunk.tensor"),
        (Request(begin=begin().begin, chunk=steps_pb2.Chunk(offset=1), data=bytes(4)), "chunk.offset"),
        (Request(begin=begin().begin, chunk=steps_pb2.Chunk(), data=np.full(1, np.inf, "<f4").tobytes()), "data"),
        (Request(begin=begin().begin, data=bytes(4)), "chunk"),
    ],
)
def test_an_error_names_the_field_by_its_path_in_the_message(stub, optimizer, request_, field):
    with stream(stub, optimizer) as steps:
        steps.send(request_)
        assert details(steps.error())[2] == field


def test_an_error_carries_the_request_id_of_its_step(stub, optimizer):
    with stream(stub, optimizer) as steps:
        steps.send(begin("mine", expected_step=9))
        assert steps.receive().error.request_id == "mine"


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        ({"name": "optimizers/nobody"}, grpc.StatusCode.NOT_FOUND, "OPTIMIZER_NOT_FOUND"),
        ({"name": "nobody"}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        ({"etag": "stale"}, grpc.StatusCode.ABORTED, "ETAG_MISMATCH"),
        ({"transport": 9}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        ({"worker": "w1"}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        ({"max_chunk_bytes": 3}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
    ],
)
def test_a_stream_that_cannot_be_opened_ends(stub, optimizer, options, code, reason):
    with refused(code, reason), stream(stub) as steps:
        steps.open(**{"name": optimizer} | options)


def test_a_stream_must_begin_with_open(stub):
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "NOT_OPEN"), stream(stub) as steps:
        steps.send(begin())
        steps.receive()


def test_a_second_open_ends_the_stream(stub, optimizer):
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "ALREADY_OPEN"), stream(stub, optimizer) as steps:
        steps.open(optimizer)


def test_bytes_that_are_no_message_end_the_stream(server, optimizer):
    with grpc.insecure_channel(server.target) as channel:
        call = channel.stream_stream("/optserve.v1.OptimizerService/StreamSteps", bytes, bytes)(iter([b"\xff\xff\xff"]))
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"):
            next(iter(call))


# --- the end of a stream is never a commit


def test_a_half_close_commits_nothing(stub, optimizer):
    with stream(stub, optimizer) as steps:
        steps.send(begin(), chunk(0, 0, PAYLOAD))
        steps.half_close()
        assert list(steps.call) == []
    assert current_step(stub, optimizer) == 0


def test_a_client_iterator_that_raises_commits_nothing(stub, optimizer):
    def requests():
        yield Request(open=steps_pb2.Open(name=optimizer))
        yield begin()
        yield chunk(0, 0, PAYLOAD)
        raise RuntimeError("the client's own fault")

    # gRPC shows this to the server as a cancellation, or, now and then, as a clean half-close (grpc#33038).
    for _ in range(20):
        call = stub.StreamSteps(requests())
        with pytest.raises(grpc.RpcError):
            for _ in call:
                pass
    assert current_step(stub, optimizer) == 0


def test_a_client_that_disappears_in_the_middle_of_a_step_frees_the_optimizer(server, stub, optimizer):
    with grpc.insecure_channel(server.target) as channel:
        from optserve.v1 import service_pb2_grpc

        with stream(service_pb2_grpc.OptimizerServiceStub(channel), optimizer) as steps:
            steps.send(begin(), chunk(0, 0, PAYLOAD[:8]), begin())
            # The answer to the second begin shows that the server has seen the first.
            assert details(steps.error())[0] == "STEP_NOT_ENDED"
            steps.send(commit(), begin("held"), chunk(0, 0, PAYLOAD[:8]), chunk(0, 0, PAYLOAD[:8]))
            assert details(steps.error())[0] == "OVERLAPPING_CHUNK"
            steps.send(commit(), begin("held"), chunk(0, 0, PAYLOAD[:8]))
            _wait_until_held(stub, optimizer)
    with stream(stub, optimizer) as steps:
        _step_when_free(steps)
    assert current_step(stub, optimizer) == 1


def test_a_retry_takes_a_step_over_from_a_connection_that_hangs(stub, optimizer):
    with stream(stub, optimizer) as hanging:
        hanging.send(begin("mine"), chunk(0, 0, PAYLOAD[:8]))
        _wait_until_held(stub, optimizer)
        with stream(stub, optimizer) as retry:
            retry.send(whole_step(request_id="mine"))
            assert retry.reply()[1].step == 1
        hanging.send(chunk(0, 8, PAYLOAD[8:]), commit())
        assert details(hanging.error())[0] == "STEP_TAKEN_OVER"
    assert current_step(stub, optimizer) == 1


def _wait_until_held(stub, resource: str) -> None:
    """Return when a step is under way on the optimizer, as seen by being refused one."""
    with stream(stub, resource) as probe:
        for _ in range(1000):
            probe.send(begin())
            probe.send(Request(abort=steps_pb2.Abort()), begin(expected_step=1 << 40))
            status = probe.error()
            if details(status)[0] == "STEP_IN_PROGRESS":
                assert details(status)[3], "it says when to try again"
                return
            probe.send(commit())
    raise AssertionError("no step came under way")


def _step_when_free(steps) -> None:
    """Step as soon as the server has noticed that the holder is gone."""
    for _ in range(1000):
        steps.send(whole_step(request_id="other"))
        response = steps.receive()
        if response.HasField("result"):
            return
        assert details(response.error.status)[0] == "STEP_IN_PROGRESS"
    raise AssertionError("the optimizer was not freed")


def test_chunks_are_advised_to_be_no_larger_than_is_accepted():
    assert ServerConfig().preferred_chunk_bytes == 2 << 20
    assert ServerConfig(max_chunk_bytes=1 << 20).preferred_chunk_bytes == 1 << 20
    with pytest.raises(ConfigError, match="preferred_chunk_bytes"):
        ServerConfig(max_chunk_bytes=1 << 20, preferred_chunk_bytes=2 << 20)
