"""Random optimizers with settings and gradients of every size that their dtypes have."""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from optserve._common import half_floats
from optserve_server.domain.errors import OptserveError
from optserve_server.numerics.clipping import Clipping
from optserve_server.numerics.layout import Layout, Parameter
from optserve_server.numerics.rules import RULES, Rule
from optserve_server.numerics.schedule import AtSteps, Constant, Cosine, Exponential, InverseTime
from optserve_server.numerics.settings import Group, Settings
from optserve_server.numerics.weight_decay import DecayKind

F4, F8 = np.dtype("f4"), np.dtype("f8")

VALUES: dict[str, tuple[Any, ...]] = {
    "learning_rate": (0.0, 1e-45, 1e-10, 0.01, 0.5, 1.0, 4.0, 1e3, 1e19, 3e38, 5e-324, 1e-200, 1e150, 1e290, 1.79e308),
    "rho": (0.0, 0.5, 0.9, 0.95, 1 - 1e-6, 1e-30),
    "eps": (1e-45, 1e-38, 1e-19, 1e-10, 1e-6, 0.01, 1.0, 1e20, 3e38, 5e-324, 1e-300, 1e-154, 1e-110, 1e200),
    "outer_eps": (0.0, 1e-45, 1e-8, 1.0, 3e38, 5e-324, 1e-154, 1e200),
    "mu": (1e-45, 1e-30, 1e-6, 3.0, 1e10, 3e38, 5e-324, 1e-154, 1e200),
    "beta1": (0.0, 0.5, 0.9, 1 - 1e-6, 1e-30),
    "beta2": (0.0, 0.5, 0.99, 0.999, 1 - 1e-6, 1e-30),
    "momentum": (0.0, 0.5, 0.9, 1 - 1e-6),
    "dampening": (0.0, 0.0, 0.3, 1.0),
    "nesterov": (False, True),
    "bias_correction": (False, True),
    "momentum_decay": (0.0, 1e-9, 0.004, 3.0, 1e30),
    "initial_overestimate": (1.0, 2.0, 100.0, 1e6),
    "initial_steps": (2, 3, 10),
}
"""Of hyper-parameters that many methods have, by name. Some are in range for float64 alone."""

SCALES = (0.0, 1e-45, 1e-38, 1e-19, 1e-6, 0.5, 1.0, 2.0, 10.0, 1e3, 1e19, 3e38)
"""Of others, as far as they are in range."""

SIZES = {
    F4: (
        0.0,
        1e-45,
        1e-38,
        1e-30,
        1e-19,
        1e-6,
        1.0,
        300.0,
        6e4,
        7e4,
        1e10,
        1.3e18,
        1.3e19,
        1.84e19,
        1e20,
        2e38,
        3.4e38,
    ),
    F8: (
        0.0,
        5e-324,
        1e-308,
        1e-154,
        8e-60,
        1e-30,
        1.0,
        300.0,
        6e4,
        7e4,
        1e10,
        1e38,
        1e39,
        1e153,
        1.3e154,
        1e200,
        1.79e308,
    ),
}
"""Of the elements of a gradient."""

SCHEDULES = (
    None,
    None,
    Constant(warmup_steps=3),
    InverseTime(decay=0.1),
    Exponential(rate=0.5, period_steps=2),
    AtSteps(rate=0.1, milestones=(1, 3)),
    Cosine(period_steps=4, floor=0.1),
)


DECAYS = {
    DecayKind.FIXED: (0.0, 0.0, 1e-6, 0.1, 0.99),
    DecayKind.TIMES_LEARNING_RATE: (0.0, 1e-6, 0.1, 0.99, 5.0),
    DecayKind.L2: (0.0, 1e-45, 1e-6, 0.1, 3.0, 1e10, 1e30),
}


def pick(rng: np.random.Generator, values: Any) -> Any:
    """One of a sequence."""
    return values[int(rng.integers(len(values)))]


def any_value(rng: np.random.Generator, kind: type[Rule], name: str) -> Any:
    """Of a hyper-parameter; it may be out of range for a dtype."""
    values = VALUES.get(name) or [
        type(getattr(kind(), name))(value) for value in SCALES if value in kind.range_of(name)
    ]
    return pick(rng, values)


def any_rule(rng: np.random.Generator, kind: type[Rule], dtypes: set[np.dtype]) -> Rule:
    """A method with hyper-parameters that are allowed."""
    while True:
        given = {item.name: any_value(rng, kind, item.name) for item in fields(kind) if rng.random() < 0.5}
        rule = kind(**given)
        try:
            for dtype in dtypes:
                rule.check(dtype)
        except OptserveError:
            continue
        return rule


def any_layout(rng: np.random.Generator) -> Layout:
    """One to three tensors."""
    dtypes = pick(rng, ((F4,), (F8,), (F4, F8)))
    return Layout(
        tuple(Parameter(f"p{i}", (int(rng.integers(0, 4)),), pick(rng, dtypes)) for i in range(rng.integers(1, 4)))
    )


def any_settings(rng: np.random.Generator, layout: Layout) -> Settings:
    """A method, and what goes with it."""
    dtypes = {parameter.dtype for parameter in layout.parameters}
    rule = any_rule(rng, pick(rng, tuple(RULES.values())), dtypes)
    hosted = rng.random() < 0.5
    kind = pick(rng, tuple(DecayKind)) if hosted else DecayKind.FIXED
    settings = Settings(rule, hosted=hosted, weight_decay=pick(rng, DECAYS[kind]) if hosted else 0.0, decay_kind=kind)
    if hasattr(rule, "learning_rate"):
        settings = replace(settings, schedule=pick(rng, SCHEDULES))
    if rng.random() < 0.4:
        bound = pick(rng, (1.5e-45, 1e-30, 1e-3, 1.0, 1e10, 1e19, 1e38, 1e300))
        settings = replace(settings, clipping=Clipping(pick(rng, ("value", "norm", "global_norm")), bound))
    if rng.random() < 0.3:
        other = any_rule(rng, type(rule), dtypes)
        overrides = {item.name: getattr(other, item.name) for item in fields(other)}
        decay = pick(rng, (None, 0.0, 0.5)) if hosted else None
        settings = replace(settings, groups=(Group((0,), overrides, decay),))
    return settings if is_possible(settings) else replace(settings, decay_kind=DecayKind.L2)


def is_possible(settings: Settings) -> bool:
    """Whether a server takes the weight decay with these learning rates."""
    try:
        settings.check()
    except OptserveError:
        return False
    return True


def any_values(rng: np.random.Generator, dtype: np.dtype, size: int, wire: np.dtype | None = None) -> np.ndarray:
    """Finite numbers of about one size, or of very different ones, that a wire holds."""
    sizes = SIZES[dtype]
    most = (
        min(half_floats.largest(wire), float(np.finfo(dtype).max)) if wire is not None else float(np.finfo(dtype).max)
    )
    chosen = rng.choice(sizes, size) if rng.random() < 0.3 else np.full(size, pick(rng, sizes))
    chosen = chosen * rng.uniform(0.5, 1.0, size) * rng.choice((-1.0, 1.0), size)
    return np.clip(chosen, -most, most).astype(dtype)


@dataclass(frozen=True)
class Case:
    """An optimizer, with a number that it is made of."""

    seed: int
    rng: np.random.Generator
    layout: Layout
    settings: Settings


def any_case(seed: int) -> Case:
    """The same for the same seed."""
    rng = np.random.default_rng(seed)
    layout = any_layout(rng)
    return Case(seed, rng, layout, any_settings(rng, layout))
