"""Records what a client of an older commit exchanges with a server of its day: record_client.py NAME makes NAME.json.

It was run once, with the packages of the older commit first on the path (`git archive COMMIT client/python server`,
then PYTHONPATH=client/python:server); what it made is committed, and today's server must go on answering it. Record
another one, under another name, when clients begin to send something new, and keep the old ones.
"""

import base64
import json
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np

import optserve

HERE = Path(__file__).parent
PARAMS = {
    "w": np.zeros((3, 2), np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "b": np.zeros(5, np.float64),
    "x": np.zeros(700, np.float32),
}
"""`x` is larger than a chunk, and the others share one."""


class Recorder(grpc.GenericRpcHandler):
    """A server that passes every call on to `target` and keeps the bytes of its messages.

    Attributes:
        calls: Of each call its method, its messages, each with its number among those of all calls, and how it ended.
    """

    def __init__(self, target: str) -> None:
        self.calls: list[dict[str, Any]] = []
        self._count = 0
        self._lock = threading.Lock()
        self._channel = grpc.insecure_channel(target)
        self._server = grpc.server(ThreadPoolExecutor(8))
        self._server.add_generic_rpc_handlers([self])
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()
        self._channel.close()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Every method takes and gives streams here: a unary call is one of a single message each way."""
        return grpc.stream_stream_rpc_method_handler(
            lambda requests, context: self._pass_on(str(handler_call_details.method), requests, context)
        )

    def _pass_on(self, method: str, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        call: dict[str, Any] = {"method": method, "messages": [], "code": "OK", "status": ""}
        with self._lock:
            self.calls.append(call)

        def kept(kind: str, messages: Iterator[bytes]) -> Iterator[bytes]:
            for message in messages:
                with self._lock:
                    call["messages"].append([self._count, kind, base64.b64encode(message).decode()])
                    self._count += 1
                yield message

        try:
            received = self._channel.stream_stream(method, bytes, bytes)(kept("sent", requests))
            yield from kept("received", iter(received))
        except grpc.RpcError as error:
            if not context.is_active():
                # The client has ended its stream.
                return
            found: Any = error
            trailers = {key: value for key, value in found.trailing_metadata() or () if not key.startswith("grpc-enc")}
            status = trailers.get("grpc-status-details-bin", b"")
            call["code"], call["status"] = found.code().name, base64.b64encode(status).decode()
            context.set_trailing_metadata(tuple(trailers.items()))
            context.abort(found.code(), found.details())


def gradients(seed: int, *names: str) -> dict[str, np.ndarray]:
    """Moderate numbers with few digits."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.integers(-64, 65, PARAMS[name].shape) / 32).astype(PARAMS[name].dtype) for name in names or PARAMS
    }


def refused(call) -> None:
    """Make a call that the server is to refuse."""
    try:
        call()
    except optserve.OptserveError as error:
        print("refused, as it should be:", error)
    else:
        raise SystemExit("A call went through that should have been refused.")


def tell(target: str) -> None:
    """All that the older client can do: unary calls, and steps in a stream."""
    with optserve.connect(target, optserve.ClientConfig(max_chunk_bytes=1024)) as client:
        opt = client.create_optimizer("adadelta", optserve.Adadelta(rho=0.9, eps=1e-5), PARAMS)
        refused(lambda: client.create_optimizer("adadelta", optserve.Sgd(), PARAMS))
        refused(lambda: client.optimizer("none"))
        for seed in range(3):
            opt.step(gradients(seed))
        opt.step(gradients(3, "w", "b"), partial=True)
        opt.replay()
        refused(lambda: opt.step({**gradients(4), "b": np.full(5, np.nan)}))
        other = client.optimizer("adadelta")
        other.step(gradients(5))
        refused(lambda: opt.step(gradients(6)))
        opt.refresh()
        opt.update(optserve.Adadelta(rho=0.8, eps=1e-4, learning_rate=0.5))
        opt.step(gradients(7))
        for name, method in {
            "adagrad": optserve.Adagrad(learning_rate=0.1),
            "momentum": optserve.Momentum(learning_rate=0.05, rho=0.8),
            "sgd": optserve.Sgd(learning_rate=0.03),
            "windowed-rms": optserve.WindowedRms(learning_rate=0.01, rho=0.95),
        }.items():
            small = {key: PARAMS[key] for key in ("w", "b")}
            made = client.create_optimizer(name, method, small)
            for seed in range(2):
                made.step(gradients(seed, *small))
        list(client.list_optimizers())
        client.delete_optimizer("adadelta")
        refused(lambda: client.delete_optimizer("adadelta"))


def main(name: str) -> None:
    with optserve.local_server(backend="numpy") as server:
        recorder = Recorder(server.target)
        try:
            tell(recorder.target)
        finally:
            recorder.stop()
    (HERE / f"{name}.json").write_text(json.dumps(recorder.calls, indent=0) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
