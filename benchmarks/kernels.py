"""One ADADELTA step on arrays in this process: our backends beside torch.optim.Adadelta and a plain copy."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.measure import Candidate, Timing, interleaved
from optserve_server.numerics import backends
from optserve_server.numerics.rules import Adadelta

PEER = "torch.optim.Adadelta"


def backend_step(name: str, gradient: np.ndarray) -> Candidate:
    """A step of one of our kernels."""
    backend, rule, dtype = backends.load(name), Adadelta(), gradient.dtype
    kernel = backend.kernel(Adadelta, dtype)
    scalars = [dtype.type(scalar) for scalar in rule.scalars(1)]
    slots = [backend.zeros(gradient.size, dtype) for _ in rule.slots]
    staged = backend.staging(gradient.nbytes).view(dtype)
    # The update overwrites the gradient, which torch keeps; through a server, it arrives anew for every step.
    return Candidate(lambda: kernel(staged, slots, scalars), prepare=lambda: np.copyto(staged, gradient))


def torch_step(gradient: np.ndarray) -> Candidate:
    """A step of torch's optimizer."""
    parameter = torch.nn.Parameter(torch.zeros(gradient.size))
    parameter.grad = torch.from_numpy(gradient.copy())
    return Candidate(torch.optim.Adadelta([parameter], lr=1.0, rho=0.95, eps=1e-6).step)


def measure(size: int, rounds: int) -> dict[str, Timing]:
    """Timings by name for `size` float32 parameters."""
    gradient = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    target = np.empty_like(gradient)
    return interleaved(
        {
            PEER: torch_step(gradient),
            "optserve numba": backend_step("numba", gradient),
            "optserve numpy": backend_step("numpy", gradient),
            "copy of the gradient": Candidate(lambda: np.copyto(target, gradient)),
        },
        rounds,
    )
