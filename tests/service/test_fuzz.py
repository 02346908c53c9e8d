"""Malformed frames of every kind: each a typed error, and the state as it was."""

import os
import random
import uuid

import numpy as np
import pytest

from optserve.v1 import steps_pb2
from optserve_server.domain.config import ServerConfig
from optserve_server.domain.errors import OptserveError
from optserve_server.edge.gate.drain_gate import DrainGate
from optserve_server.edge.gate.upload_limiter import UploadLimiter
from optserve_server.edge.status import to_status
from optserve_server.edge.step_stream import StepStream
from optserve_server.engine.durability import InMemory
from optserve_server.engine.registry import Optimizers
from optserve_server.numerics import backends
from optserve_server.numerics.layout import Layout, Parameter
from optserve_server.numerics.rules import Adadelta
from optserve_server.numerics.settings import Settings

INPUTS = int(os.environ.get("OPTSERVE_FUZZ", "100000"))
SHARDS = 4
PARAMETERS = (
    Parameter("w", (3, 5), np.dtype("f4")),
    Parameter("d", (4,), np.dtype("f8")),
    Parameter("none", (0,), np.dtype("f4")),
    Parameter("s", (), np.dtype("f4")),
)
Request = steps_pb2.StreamStepsRequest
OPEN = Request(open=steps_pb2.Open(name="optimizers/a")).SerializeToString()


class Target:
    """A server without its network, and what its state is known to be."""

    def __init__(self) -> None:
        self.config = ServerConfig(max_chunk_bytes=1024, preferred_chunk_bytes=1024)
        self.optimizers = Optimizers(backends.load("numpy"), InMemory(), self.config)
        self.item = self.optimizers.create("a", Layout(PARAMETERS), Settings(Adadelta()))
        self.stream = self.fresh()
        self.known = self.state()
        self.applied = self.refused = 0

    def fresh(self) -> StepStream:
        def status(error: Exception):
            if not isinstance(error, OptserveError):
                raise error  # a fault of ours, which would be INTERNAL
            return to_status(error)

        return StepStream(self.optimizers, DrainGate(), UploadLimiter(), self.config, status)

    def state(self) -> tuple:
        slots = [slot.tobytes() for arena in self.item.state.slots.values() for slot in arena]
        return self.item.steps.step, slots

    def feed(self, raw: bytes) -> None:
        """Handle one message, as the servicer does, and compare the state with what it was."""
        applied = False
        try:
            for answer in self.stream.handle(raw):
                response = steps_pb2.StreamStepsResponse.FromString(answer)
                applied |= response.HasField("result") and not response.result.replayed
                self.refused += response.HasField("error")
        except OptserveError:
            self.refused += 1
            self.stream.close()
            self.stream = self.fresh()
            if self.refused % 8:
                # Mostly an open one, beyond whose first message there is more to be found.
                assert list(self.stream.handle(OPEN))
        if applied:
            self.applied += 1
            assert self.item.steps.step == self.known[0] + 1
            assert all(np.isfinite(slot).all() for arena in self.item.state.slots.values() for slot in arena)
            self.known = self.state()
        else:
            assert self.state() == self.known


def some(rng: random.Random, *values):
    return rng.choice(values)


def gradient_bytes(rng: random.Random) -> bytes:
    size = some(rng, 60, 60, 60, 32, 4, 0, 8, 3, 96, 96, 1024, 1028, 2000)
    if rng.random() < 0.1:
        return rng.randbytes(size)
    return np.full(size // 4 + 1, some(rng, 0.5, -2.0, 0.0, np.nan, np.inf, 3e38, 1e-45), "f4").tobytes()[:size]


def message(rng: random.Random, step: int) -> bytes:
    """A message that is nearly right."""
    request = Request()
    if rng.random() < 0.15:
        request.open.name = some(rng, *["optimizers/a"] * 6, "optimizers/b", "", "../a", "optimizers/a/b", "x" * 300)
        request.open.wire_type = some(rng, 0, 0, 0, 1, 2, 3, 4, 77)
        request.open.transport = some(rng, 0, 0, 0, 1, 9)
        request.open.max_chunk_bytes = some(rng, 0, 0, 1024, 5, 2**32 - 1)
        request.open.etag = some(rng, "", "", "", "old")
    if rng.random() < 0.6:
        request.begin.request_id = some(rng, *[str(uuid.UUID(int=rng.getrandbits(128)))] * 8, "", "same", "ü", "x" * 65)
        if rng.random() < 0.5:
            request.begin.expected_step = some(rng, step, step, step, step + 1, 2**64 - 1)
        request.begin.tensors.extend(some(rng, (), (), (), (0,), (1, 3), (3, 1), (2,), (9,), (0, 0), (2**32 - 1,)))
        request.begin.reply = some(rng, *[0] * 9, 2, 99)
        request.begin.with_curvature = rng.random() < 0.02
        request.begin.shared_memory_nonce = some(rng, *[b""] * 9, b"guess")
    if rng.random() < 0.8:
        request.chunk.tensor = some(rng, 0, 0, 0, 0, 1, 2, 3, 7, 2**32 - 1)
        request.chunk.offset = some(rng, 0, 0, 0, 0, 4, 8, 1, 60, 2**40, 2**64 - 1)
        request.chunk.operand = some(rng, *[0] * 9, 1, 2, 5)
        request.chunk.SetInParent()
        request.data = gradient_bytes(rng)
    elif rng.random() < 0.1:
        request.data = b"out of place"
    if rng.random() < 0.6:
        request.commit.SetInParent()
    if rng.random() < 0.1:
        request.abort.SetInParent()
    return request.SerializeToString()


def right(rng: random.Random) -> bytes:
    """A whole step that is right."""
    request = Request(begin=steps_pb2.Begin(request_id=str(uuid.UUID(int=rng.getrandbits(128)))))
    request.chunk.SetInParent()
    request.data = bytes(15 * 4) + np.full(4, 0.25).tobytes() + np.full(1, 0.5, "f4").tobytes()
    request.commit.SetInParent()
    return request.SerializeToString()


def mutated(rng: random.Random, raw: bytes) -> bytes:
    """Bits flipped, bytes cut out, repeated or put in."""
    content = bytearray(raw)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(5):
            case 0 if content:
                content[at % len(content)] ^= 1 << rng.randrange(8)
            case 1:
                del content[at : at + rng.randrange(1, 9)]
            case 2:
                content[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 3:
                content[at:at] = content[at : at + rng.randrange(1, 40)]
            case _:
                del content[at:]
    return bytes(content)


@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.timeout(60 + INPUTS // 200)
def test_malformed_frames_are_refused_and_change_nothing(shard):
    rng = random.Random(1212_5701 + shard)
    target = Target()
    for _ in range(INPUTS // SHARDS):
        kind = rng.random()
        if kind < 0.45:
            raw = message(rng, target.item.steps.step)
        elif kind < 0.85:
            raw = mutated(rng, message(rng, target.item.steps.step) if rng.random() < 0.7 else right(rng))
        elif kind < 0.9:
            raw = rng.randbytes(rng.randrange(0, 60))
        else:
            raw = right(rng) if kind < 0.98 else OPEN
        target.feed(raw)
    # Otherwise most of it has not been reached.
    assert target.applied > INPUTS // SHARDS // 100
    assert target.refused > INPUTS // SHARDS // 10
