"""No step waits for a compilation, and no other call: what steps will need is compiled without the optimizer's lock."""

import threading
from collections.abc import Callable

import numpy as np
import pytest

from optserve_server.domain.config import ServerConfig
from optserve_server.domain.errors import OptserveError
from optserve_server.engine.addition import NewParameters, addition
from optserve_server.engine.durability import InMemory
from optserve_server.engine.optimizer import Optimizer
from optserve_server.engine.registry import Optimizers
from optserve_server.engine.transaction import StepRequest
from optserve_server.numerics.backends.base import DecayPlace, HostedKernel, Kernel
from optserve_server.numerics.backends.numpy import NumpyBackend
from optserve_server.numerics.layout import Layout, Operand, Parameter
from optserve_server.numerics.rules import Rule, Sgd
from optserve_server.numerics.schedule import Cosine
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.state import State
from optserve_server.numerics.step_settings import Change, StepOptions, StepSettings
from optserve_server.numerics.weight_decay import DecayKind

F4, F8 = np.dtype("f4"), np.dtype("f8")
SGD = Settings(Sgd(0.5), hosted=True)
Compiled = tuple[np.dtype, DecayPlace | None]


class WatchedBackend(NumpyBackend):
    """A backend that tells what it compiles, and asks whether others can call meanwhile.

    Attributes:
        compiled: What it has compiled.
        ask: Called during each compilation.
    """

    def __init__(self) -> None:
        super().__init__(threads=1)
        self.compiled: list[Compiled] = []
        self.ask: Callable[[], object] = lambda: None

    def compile(self, rule: type[Rule], dtype: np.dtype) -> Kernel:
        self.ask()
        return super().compile(rule, dtype)

    def compile_hosted(self, rule: type[Rule], dtype: np.dtype, place: DecayPlace) -> HostedKernel:
        self.compiled.append((dtype, place))
        self.ask()
        return super().compile_hosted(rule, dtype, place)


@pytest.fixture
def backend() -> WatchedBackend:
    return WatchedBackend()


@pytest.fixture
def optimizers(backend):
    return Optimizers(backend, InMemory(), ServerConfig())


def create(optimizers: Optimizers, backend: WatchedBackend, settings: Settings) -> Optimizer:
    """An optimizer of one float32 parameter; from now on every compilation asks for its last step."""
    item = optimizers.create("a", Layout((Parameter("x", (2,), F4),)), settings)
    upload = item.steps.begin_placement("upload")
    upload.stage(0, 0, np.ones(2, F4).tobytes(), Operand.PARAMETER)
    upload.commit()
    upload.close()

    def ask() -> None:
        # Another call, which needs the lock.
        other = threading.Thread(target=item.steps.last)
        other.start()
        other.join(10)
        assert not other.is_alive(), "the lock was held during a compilation"

    backend.compiled.clear()
    backend.ask = ask
    return item


def step(item: Optimizer, *changes: Change) -> None:
    options = StepOptions(StepSettings(changes)) if changes else StepOptions()
    under_way = item.steps.begin(StepRequest(f"s{item.steps.step}", options=options))
    try:
        under_way.stage(0, 0, np.zeros(2, F4).tobytes())
        under_way.commit()
    finally:
        under_way.close()


def test_a_step_that_brings_the_first_weight_decay(optimizers, backend):
    item = create(optimizers, backend, SGD)
    step(item)
    assert not backend.compiled
    step(item, Change(None, {}, 0.5))
    assert (F4, DecayPlace.PARAMETERS) in backend.compiled
    assert item.state.parameters[F4].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("kind", DecayKind)
def test_a_step_that_ends_the_decay_and_one_whose_learning_rate_does(optimizers, backend, kind):
    item = create(optimizers, backend, Settings(Sgd(0.5), hosted=True, weight_decay=0.5, decay_kind=kind))
    step(item, Change(None, {}, 0.0))
    step(item, Change(None, {"learning_rate": 0.0}))
    assert {place for _, place in backend.compiled} <= {DecayPlace.NOWHERE}


def test_a_schedule_that_ends_at_0(optimizers, backend):
    settings = Settings(
        Sgd(0.5), Cosine(period_steps=2), hosted=True, weight_decay=0.5, decay_kind=DecayKind.TIMES_LEARNING_RATE
    )
    item = create(optimizers, backend, settings)
    for _ in range(4):
        step(item)
    assert not backend.compiled


@pytest.mark.parametrize("kind", DecayKind)
def test_an_update_that_brings_weight_decay(optimizers, backend, kind):
    item = create(optimizers, backend, SGD)
    after = Settings(Sgd(0.5), hosted=True, weight_decay=0.25, decay_kind=kind)
    optimizers.update("a", lambda _settings, _layout: after)
    assert backend.compiled
    backend.compiled.clear()
    step(item)
    assert not backend.compiled


def test_an_addition_of_another_dtype(optimizers, backend):
    item = create(optimizers, backend, Settings(Sgd(0.5), hosted=True, weight_decay=0.5))
    new = NewParameters(Layout((Parameter("y", (2,), F8),)), (), "addition")
    with addition(optimizers, item, new, lambda _layout, _settings: None) as under_way:
        assert backend.compiled == [(F8, DecayPlace.PARAMETERS)]
        under_way.stage(0, 0, np.ones(2).tobytes(), Operand.PARAMETER)
        under_way.commit()
    assert backend.compiled == [(F8, DecayPlace.PARAMETERS)]


def test_settings_that_cannot_be_compiled_change_nothing(backend):
    state = State(Layout((Parameter("x", (2,), F4),)), SGD, backend)
    limits = dict(state.limits)

    def fail() -> None:
        raise MemoryError

    backend.ask = fail
    with pytest.raises(MemoryError):
        state.set(Settings(Sgd(0.25), hosted=True, weight_decay=0.5))
    assert (state.settings, state.limits, state.constants_for(None).settings) == (SGD, limits, SGD)


def test_what_is_refused_is_not_compiled(optimizers, backend):
    create(optimizers, backend, SGD)
    with pytest.raises(OptserveError, match="must lie in"):
        optimizers.update("a", lambda _settings, _layout: Settings(Sgd(0.5), hosted=True, weight_decay=2.0))
    assert not backend.compiled
