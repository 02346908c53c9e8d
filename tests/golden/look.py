"""What can be seen of a server from outside, as JSON: what is written beside a golden folder, and compared with it."""

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

import grpc
import numpy as np
from google.protobuf.json_format import MessageToDict
from google.rpc import error_details_pb2

import optserve
from optserve.v1 import replicas_pb2, service_pb2, service_pb2_grpc, steps_pb2

CONFIG = optserve.ClientConfig(transport="grpc")
SHARED = ("async", "bounded", "sync")
WORKERS = ("alice", "bob")
LARGE_BYTES = 4096
"""From this size on, an array is kept as a digest."""

INFO: Any = error_details_pb2.ErrorInfo.DESCRIPTOR

Arrays = Mapping[str, np.ndarray]


def written(array: np.ndarray) -> str:
    """An array's bits, as text."""
    data = np.ascontiguousarray(array).tobytes()
    if len(data) >= LARGE_BYTES:
        return f"{array.dtype} sha256 {hashlib.sha256(data).hexdigest()}"
    return f"{array.dtype} {base64.b64encode(data).decode()}"


def read(text: str) -> np.ndarray:
    """The reverse of `written`, flat, for small arrays."""
    dtype, data = text.split(" ")
    return np.frombuffer(base64.b64decode(data), dtype)


def all_written(arrays: Arrays) -> dict[str, str]:
    return {name: written(array) for name, array in arrays.items()}


def state(opt: optserve.Optimizer) -> dict[str, Any]:
    """The step and all slots."""
    found = opt.export_state()
    slots = {f"{name}.{slot}": array for name, slots in found.slots.items() for slot, array in slots.items()}
    return {"step": found.step, "slots": all_written(slots)}


def gradients(params: Arrays, seed: int) -> dict[str, np.ndarray]:
    """Moderate numbers; few different ones where there are many, so that the folder can be compressed."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, param in params.items():
        values = rng.standard_normal(min(param.size, 512)).astype(param.dtype)
        made[name] = np.resize(values, param.shape) if param.size else np.zeros(param.shape, param.dtype)
    return made


def step(opt: optserve.Optimizer, params: Arrays, seed: int, names: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """A step with numbers that follow from the seed, of some of the parameters or all."""
    chosen = {name: params[name] for name in names or params}
    curvature = {name: array + 2 for name, array in gradients(chosen, seed + 1000).items()}
    return opt.step(gradients(chosen, seed), curvature=curvature if opt.takes_curvature else None, partial=bool(names))


def look(target: str) -> dict[str, Any]:
    """Settings, states, last replies, workers and checkpoints; nothing is changed."""
    with optserve.connect(target, CONFIG) as client, grpc.insecure_channel(target) as channel:
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        names = [item.name.removeprefix("optimizers/") for item in client.list_optimizers()]
        return {
            "optimizers": {name: _optimizer(client, stub, name) for name in names},
            "checkpoints": {
                name: [[item.tag, item.step, item.create_time] for item in client.list_checkpoints(name)]
                for name in (*names, "gone")
            },
        }


def _optimizer(client: optserve.Client, stub: service_pb2_grpc.OptimizerServiceStub, name: str) -> dict[str, Any]:
    opt = client.optimizer(name)
    request = service_pb2.GetOptimizerRequest(name=f"optimizers/{name}")
    message = MessageToDict(stub.GetOptimizer(request).optimizer, preserving_proto_field_name=True)
    # What it counts may change.
    message.pop("memory_bytes", None)
    seen = {"message": message, **state(opt)}
    if name in SHARED:
        return seen | {"workers": {worker: _worker(stub, name, worker) for worker in WORKERS}}
    if opt.hosted:
        seen["pulled"] = _reply(lambda: opt.pull_parameters().arrays)
        seen["replayed parameters"] = _reply(lambda: opt.replay(reply="parameters"))
    seen["replayed"] = _reply(opt.replay)
    return seen


def _reply(read) -> dict[str, str]:
    """Arrays, or why they are not to be had."""
    try:
        return all_written(read())
    except optserve.OptserveError as error:
        return {"error": error.reason or type(error).__name__}


def _worker(stub: service_pb2_grpc.OptimizerServiceStub, name: str, worker: str) -> dict[str, Any]:
    """What a worker that comes back is told: its last request, and whether its reply is still there."""
    stub.ReportWorker(replicas_pb2.ReportWorkerRequest(name=f"optimizers/{name}", worker=worker))
    open_request = steps_pb2.Open(name=f"optimizers/{name}", worker=worker)
    (first,) = list(stub.StreamSteps(iter([steps_pb2.StreamStepsRequest(open=open_request)])))
    opened = first.opened
    again = [
        steps_pb2.StreamStepsRequest(open=open_request),
        steps_pb2.StreamStepsRequest(
            begin=steps_pb2.Begin(request_id=opened.last_request_id, parameters_step=opened.step),
            commit=steps_pb2.Commit(),
        ),
    ]
    _, *replies = stub.StreamSteps(iter(again))
    return {
        "step": opened.step,
        "last_request_id": opened.last_request_id,
        "lineage": opened.lineage,
        "replay": _reason(replies[-1]),
    }


def _reason(reply: steps_pb2.StreamStepsResponse) -> str:
    if not reply.HasField("error"):
        return "replayed"
    infos = [detail for detail in reply.error.status.details if detail.Is(INFO)]
    found = error_details_pb2.ErrorInfo()
    infos[0].Unpack(found)
    return found.reason
