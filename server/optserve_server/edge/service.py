"""The methods of OptimizerService. They turn messages into calls of the engine, and answers into messages."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from optserve._common.clock import SYSTEM, Clock
from optserve.v1 import additions_pb2, checkpoints_pb2, replicas_pb2, statistics_pb2, steps_pb2
from optserve.v1 import service_pb2 as pb
from optserve_server.domain.config import ServerConfig
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.edge import (
    addition_stream,
    features,
    messages,
    parameter_stream,
    settings_messages,
    state_stream,
    unary_step,
)
from optserve_server.edge.gate.drain_gate import DrainGate
from optserve_server.edge.gate.upload_limiter import UploadLimiter
from optserve_server.edge.status import to_status
from optserve_server.edge.step_stream import StepStream
from optserve_server.engine.optimizer import Optimizer
from optserve_server.engine.parameter_copies import Copies
from optserve_server.engine.registry import Optimizers
from optserve_server.engine.statistics import QUANTILES, Query, statistics
from optserve_server.numerics.backends import Choice
from optserve_server.numerics.layout import Layout
from optserve_server.numerics.rules import RULES
from optserve_server.numerics.settings import Settings
from optserve_server.persistence.checkpoints import Checkpoints

SERVICE = pb.DESCRIPTOR.services_by_name["OptimizerService"]

ALL_OPTIMIZERS = "optimizers/-"
"""The parent in ListCheckpoints that stands for all optimizers."""

PAGE_MARGIN_BYTES = 256
"""Bytes of a page that are reserved for its token."""

ENTRY_BYTES = 8
"""Most bytes that an entry of a page takes beside its own bytes."""


class Servicer:
    """One method per call of the contract; `handlers` registers them."""

    def __init__(
        self,
        optimizers: Optimizers,
        checkpoints: Checkpoints,
        drain_gate: DrainGate,
        choice: Choice,
        config: ServerConfig,
        clock: Clock = SYSTEM,
    ) -> None:
        self._clock = clock
        self._optimizers = optimizers
        self._checkpoints = checkpoints
        self._drain_gate = drain_gate
        self._upload_limiter = UploadLimiter(clock=clock)
        self._choice = choice
        self._config = config
        self._copies = Copies(config.max_pull_bytes, clock)
        self._instance_id = uuid.uuid4().hex
        self._start_time = clock.now()

    def get_server_info(self, _request: pb.GetServerInfoRequest) -> pb.GetServerInfoResponse:
        """The version, the backend, the features and the limits of this server."""
        response = pb.GetServerInfoResponse(
            version=version("optserve"),
            instance_id=self._instance_id,
            backend=self._choice.backend.name,
            backend_reason=self._choice.reason,
            device=self._choice.backend.device,
            durability=self._config.durability,
            limits=messages.limits(self._config, self._config.preferred_chunk_bytes),
            features=features.statuses(),
            methods=list(RULES),
            optimizer_count=len(self._optimizers),
            host_id=features.host_id(),
            durability_problem=self._optimizers.durability_problem,
        )
        response.start_time.FromDatetime(self._start_time)
        return response

    def create_optimizer(self, request: pb.CreateOptimizerRequest) -> pb.CreateOptimizerResponse:
        """Create an optimizer."""
        messages.check_known(request.optimizer, "mode", "optimizer")
        self._optimizers.capacity.check_count(len(request.optimizer.parameters))
        layout = messages.layout(request.optimizer.parameters)
        settings = settings_messages.settings(request.optimizer, layout)
        messages.check_showable(layout, settings, self._config.max_message_bytes)
        item = self._optimizers.create(request.optimizer_id, layout, settings, request.request_id)
        return pb.CreateOptimizerResponse(optimizer=messages.optimizer(item))

    def get_optimizer(self, request: pb.GetOptimizerRequest) -> pb.GetOptimizerResponse:
        """Read an optimizer."""
        return pb.GetOptimizerResponse(optimizer=messages.optimizer(self._find(request.name)))

    def list_optimizers(self, request: pb.ListOptimizersRequest) -> pb.ListOptimizersResponse:
        """Read a page of optimizers."""
        size = messages.page_size(request.page_size)
        items, more = self._optimizers.page(size, messages.last_id(request.page_token))
        response = pb.ListOptimizersResponse()
        left = self._config.max_message_bytes - PAGE_MARGIN_BYTES
        for position, item in enumerate(items):
            shown = messages.optimizer(item, with_parameters=False)
            left -= shown.ByteSize() + ENTRY_BYTES
            if left < 0 and position:
                # One optimizer alone always fits, see `messages.check_showable`.
                items, more = items[:position], True
                break
            response.optimizers.append(shown)
        if more:
            response.next_page_token = messages.page_token(items[-1].id)
        return response

    def update_optimizer(self, request: pb.UpdateOptimizerRequest) -> pb.UpdateOptimizerResponse:
        """Change hyper-parameters and other settings."""
        optimizer_id = messages.optimizer_id(request.optimizer.name, "optimizer.name")
        paths = list(request.update_mask.paths)

        def change(present: Settings, layout: Layout) -> Settings:
            changed = settings_messages.updated_settings(present, layout, request.optimizer, paths)
            messages.check_showable(layout, changed, self._config.max_message_bytes)
            return changed

        item = self._optimizers.update(optimizer_id, change, request.optimizer.etag)
        return pb.UpdateOptimizerResponse(optimizer=messages.optimizer(item))

    def add_parameters(
        self, requests: Iterator[addition_stream.AddFrame], context: grpc.ServicerContext
    ) -> additions_pb2.AddParametersResponse:
        """Add parameters to a live optimizer."""
        with self._drain_gate.step():
            item = addition_stream.add_parameters(
                self._optimizers, requests, self._config.max_message_bytes, context.time_remaining
            )
        return additions_pb2.AddParametersResponse(optimizer=messages.optimizer(item))

    def delete_optimizer(self, request: pb.DeleteOptimizerRequest) -> pb.DeleteOptimizerResponse:
        """Delete an optimizer."""
        try:
            self._optimizers.delete(messages.optimizer_id(request.name), request.etag)
        except OptserveError as error:
            if not (request.allow_missing and error.reason is Reason.OPTIMIZER_NOT_FOUND):
                raise
        return pb.DeleteOptimizerResponse()

    def apply_gradients(self, request: steps_pb2.ApplyGradientsRequest) -> steps_pb2.ApplyGradientsResponse:
        """Make one step, in one message."""
        item = self._find(request.name)
        try:
            return unary_step.apply(item, request, self._drain_gate, self._config.max_message_bytes)
        except OptserveError as error:
            raise self._optimizers.certain(error) from None

    def stream_steps(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Make any number of steps of any size."""
        stream = StepStream(
            self._optimizers, self._drain_gate, self._upload_limiter, self._config, to_status, self._clock
        )
        context.add_callback(stream.interrupt)
        try:
            # A half-close ends the loop and commits nothing.
            for raw in requests:
                yield from stream.handle(raw)
        finally:
            stream.close()

    def save_checkpoint(self, request: checkpoints_pb2.SaveCheckpointRequest) -> checkpoints_pb2.SaveCheckpointResponse:
        """Take a checkpoint."""
        saved = self._checkpoints.save(
            messages.optimizer_id(request.parent, "parent"),
            request.tag,
            overwrite=request.overwrite,
            request_id=request.request_id,
        )
        return checkpoints_pb2.SaveCheckpointResponse(checkpoint=messages.checkpoint(saved))

    def list_checkpoints(
        self, request: checkpoints_pb2.ListCheckpointsRequest
    ) -> checkpoints_pb2.ListCheckpointsResponse:
        """Read a page of checkpoints."""
        size, after = messages.page_size(request.page_size), messages.last_id(request.page_token)
        if request.parent == ALL_OPTIMIZERS:
            items, last = self._checkpoints.page_of_all(size, after)
        else:
            items, last = self._checkpoints.page(messages.optimizer_id(request.parent, "parent"), size, after)
        return checkpoints_pb2.ListCheckpointsResponse(
            checkpoints=[messages.checkpoint(item) for item in items],
            next_page_token=messages.page_token(last) if last else "",
        )

    def restore_checkpoint(
        self, request: checkpoints_pb2.RestoreCheckpointRequest
    ) -> checkpoints_pb2.RestoreCheckpointResponse:
        """Replace the state of an optimizer by that of a checkpoint."""
        optimizer_id, tag = messages.checkpoint_id(request.name)
        item = self._checkpoints.restore(optimizer_id, tag, etag=request.etag, request_id=request.request_id)
        return checkpoints_pb2.RestoreCheckpointResponse(optimizer=messages.optimizer(item))

    def delete_checkpoint(
        self, request: checkpoints_pb2.DeleteCheckpointRequest
    ) -> checkpoints_pb2.DeleteCheckpointResponse:
        """Delete a checkpoint."""
        try:
            self._checkpoints.delete(*messages.checkpoint_id(request.name))
        except OptserveError as error:
            if not (request.allow_missing and error.reason is Reason.CHECKPOINT_NOT_FOUND):
                raise
        return checkpoints_pb2.DeleteCheckpointResponse()

    def export_state(self, request: checkpoints_pb2.ExportStateRequest) -> Iterator[bytes]:
        """Send an optimizer's whole state."""
        return state_stream.export_messages(self._checkpoints, self._find(request.name), self._config.sent_chunk_bytes)

    def import_state(self, requests: Iterator[state_stream.ImportFrame]) -> checkpoints_pb2.ImportStateResponse:
        """Replace an optimizer's whole state."""
        item = state_stream.import_state(self._optimizers, self._checkpoints, requests)
        return checkpoints_pb2.ImportStateResponse(optimizer=messages.optimizer(item))

    def push_parameters(self, requests: Iterator[parameter_stream.PushFrame]) -> replicas_pb2.PushParametersResponse:
        """Upload the hosted parameters."""
        with self._drain_gate.step():
            return replicas_pb2.PushParametersResponse(step=parameter_stream.push(self._optimizers, requests).step)

    def pull_parameters(self, request: replicas_pb2.PullParametersRequest) -> Iterator[bytes]:
        """Send hosted parameters, all of one step."""
        item = self._find(request.name)
        return parameter_stream.pull(item, self._copies, request, self._config.sent_chunk_bytes)

    def report_worker(self, request: replicas_pb2.ReportWorkerRequest) -> replicas_pb2.ReportWorkerResponse:
        """Register a worker, renew its lease, or end its life."""
        messages.check_known(request, "state", "request")
        messages.check_worker(request.worker)
        messages.check_life(request.life, "life")
        steps = self._find(request.name).steps
        leaving = request.state == replicas_pb2.WORKER_STATE_LEAVING
        answer = steps.workers.report(request.worker, leaving=leaving, life=request.life)
        response = replicas_pb2.ReportWorkerResponse(
            live_workers=answer.live_workers,
            step=steps.step,
            last_request_id=answer.last_request_id,
            life=answer.life,
        )
        response.lease.FromNanoseconds(int(answer.lease_s * 1e9))
        return response

    def get_statistics(self, request: statistics_pb2.GetStatisticsRequest) -> statistics_pb2.GetStatisticsResponse:
        """Compute statistics of an optimizer between two steps."""
        query = Query(
            request.tensors, request.quantiles or QUANTILES, request.indices, request.random_indices, request.seed
        )
        step, tensors = statistics(self._find(request.name), query)
        return statistics_pb2.GetStatisticsResponse(step=step, tensors=map(messages.statistics, tensors))

    def _find(self, name: str, field: str = "name") -> Optimizer:
        return self._optimizers.get(messages.optimizer_id(name, field))


def handlers(servicer: Servicer) -> grpc.GenericRpcHandler:
    """The handlers of the servicer's methods, for gRPC. Methods that stream tensors take and return raw bytes."""

    def unary(method: str) -> grpc.RpcMethodHandler:
        descriptor = SERVICE.methods_by_name[method]
        answer: Callable[[Any], Message] = getattr(servicer, _snake(method))
        return grpc.unary_unary_rpc_method_handler(
            lambda request, _context: answer(request),
            GetMessageClass(descriptor.input_type).FromString,
            GetMessageClass(descriptor.output_type).SerializeToString,
        )

    methods = {
        "StreamSteps": grpc.stream_stream_rpc_method_handler(servicer.stream_steps),
        "ExportState": grpc.unary_stream_rpc_method_handler(
            lambda request, _context: servicer.export_state(request),
            checkpoints_pb2.ExportStateRequest.FromString,
        ),
        "ImportState": grpc.stream_unary_rpc_method_handler(
            lambda requests, _context: servicer.import_state(
                messages.decode(state_stream.decode_import, raw) for raw in requests
            ),
            None,
            checkpoints_pb2.ImportStateResponse.SerializeToString,
        ),
        "AddParameters": grpc.stream_unary_rpc_method_handler(
            lambda requests, context: servicer.add_parameters(
                (messages.decode(addition_stream.decode_add, raw) for raw in requests), context
            ),
            None,
            additions_pb2.AddParametersResponse.SerializeToString,
        ),
        "PullParameters": grpc.unary_stream_rpc_method_handler(
            lambda request, _context: servicer.pull_parameters(request),
            replicas_pb2.PullParametersRequest.FromString,
        ),
        "PushParameters": grpc.stream_unary_rpc_method_handler(
            lambda requests, _context: servicer.push_parameters(
                messages.decode(parameter_stream.decode_push, raw) for raw in requests
            ),
            None,
            replicas_pb2.PushParametersResponse.SerializeToString,
        ),
    }
    for method in SERVICE.methods_by_name:
        if method not in methods:
            methods[method] = unary(method)
    return grpc.method_handlers_generic_handler(SERVICE.full_name, methods)


def _snake(method: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in method).lstrip("_")
