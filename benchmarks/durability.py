"""One ADADELTA step through a server with a journal, beside the same step through one that keeps state in memory."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack

import numpy as np

import optserve
from benchmarks.measure import Candidate, Timing, interleaved

PEER = "in memory"


def measure(size: int, rounds: int) -> dict[str, Timing]:
    """Timings by name for `size` float32 parameters. The journal is in the folder for temporary files."""
    gradient = {"x": np.random.default_rng(0).standard_normal(size).astype(np.float32)}
    out = {"x": np.empty(size, np.float32)}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        candidates: dict[str, Candidate] = {}
        for name, data_dir in ((PEER, None), ("with a journal", folder)):
            server = stack.enter_context(optserve.local_server(data_dir))
            client = stack.enter_context(optserve.connect(server.target))
            optimizer = client.create_optimizer("bench", optserve.Adadelta(), gradient)
            candidates[name] = Candidate(lambda step=optimizer.step: step(gradient, out=out))
        return interleaved(candidates, rounds)
