"""One step on arrays in this process: our kernels beside torch.optim, DeepSpeed's CPU Adam and a plain copy."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Candidate, Timing, interleaved
from optserve_server.numerics import backends
from optserve_server.numerics.headroom import NATIVE
from optserve_server.numerics.layout import ALL, Layout, Operand, Parameter, Payload
from optserve_server.numerics.rules import Adadelta, AdamW
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.state import State

PEER = "torch.optim.Adadelta"
FUSED = "torch.optim.AdamW, fused"
HOSTED, DELTA = "optserve numba, hosted x", "optserve numba, updates"
RATE, DECAY = 1e-3, 1e-2


def backend_step(name: str, gradient: np.ndarray) -> Candidate:
    """A step of one of our kernels."""
    backend, rule, dtype = backends.load(name), Adadelta(), gradient.dtype
    kernel = backend.kernel(Adadelta, dtype)
    scalars = rule.constants(dtype, 1)
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


def state_step(name: str, gradient: np.ndarray, *, hosted: bool) -> Candidate:
    """A step of AdamW on a whole state, as a server makes it of gradients that have arrived."""
    layout = Layout((Parameter("x", (gradient.size,), gradient.dtype),))
    settings = Settings(AdamW(learning_rate=RATE), hosted=hosted, weight_decay=RATE * DECAY if hosted else 0.0)
    state, payload = State(layout, settings, backends.load(name)), Payload(layout, ALL)
    arenas = layout.arenas(state.backend.staging(gradient.nbytes))
    largest = {(Operand.GRADIENT, gradient.dtype): float(np.abs(gradient).max())}
    steps = iter(range(1 << 30))

    def step() -> None:
        prepared = state.prepare(payload, arenas, largest, NATIVE)
        state.apply({Operand.GRADIENT: arenas}, payload.runs, next(steps), prepared=prepared)
        state.count(ALL)

    return Candidate(step, prepare=lambda: np.copyto(arenas[gradient.dtype], gradient))


def torch_adamw(gradient: np.ndarray, *, fused: bool) -> Candidate:
    """A step of torch's AdamW, fused or of one operation after the other on all tensors."""
    parameter = torch.nn.Parameter(torch.zeros(gradient.size))
    parameter.grad = torch.from_numpy(gradient.copy())
    optimizer = torch.optim.AdamW([parameter], lr=RATE, weight_decay=DECAY, fused=fused, foreach=not fused)
    return Candidate(optimizer.step)


def deepspeed_adamw(gradient: np.ndarray) -> dict[str, Candidate]:
    """A step of DeepSpeed's CPU Adam, where it is installed; its first use compiles it."""
    if find_spec("deepspeed") is None:
        return {}
    # It is no part of the development environment, so nothing is known of its types there.
    adam: Any = import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
    parameter = torch.nn.Parameter(torch.zeros(gradient.size))
    parameter.grad = torch.from_numpy(gradient.copy())
    return {"DeepSpeedCPUAdam": Candidate(adam([parameter], lr=RATE, weight_decay=DECAY, adamw_mode=True).step)}


def adamw(size: int, rounds: int) -> dict[str, Timing]:
    """Timings by name of AdamW for `size` float32 parameters. Delta mode has no x to change."""
    gradient = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    return interleaved(
        {
            FUSED: torch_adamw(gradient, fused=True),
            "torch.optim.AdamW, foreach": torch_adamw(gradient, fused=False),
            HOSTED: state_step("numba", gradient, hosted=True),
            DELTA: state_step("numba", gradient, hosted=False),
            "optserve numpy, hosted x": state_step("numpy", gradient, hosted=True),
            **deepspeed_adamw(gradient),
        },
        rounds,
    )
