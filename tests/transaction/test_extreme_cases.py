"""Twenty thousand random optimizers and what they make of gradients of every finite size.

Each step is either applied, with the bits of the plain formula, all of them finite and its reply too; or it is refused
whole, and then only if the plain formula would not have been finite.
"""

from contextlib import closing
from dataclasses import fields, replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from extremes import F4, F8, Case, any_case, any_rule, any_values, is_possible, pick
from optserve._common import half_floats
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.durability import InMemory
from optserve_server.engine.records import UpdateRecord
from optserve_server.engine.steps import Steps
from optserve_server.engine.transaction import Reply, Step, StepRequest
from optserve_server.numerics import backends
from optserve_server.numerics.layout import Operand, Payload, Selection
from optserve_server.numerics.settings import PARAMETER
from optserve_server.numerics.state import State
from optserve_server.numerics.step_settings import Change, StepOptions, StepSettings
from optserve_server.numerics.weight_decay import DecayKind
from optserve_server.persistence.state_import import StateImport
from simulated_device import SimulatedBackend

CASES = 20_000
CHUNKS = 20
REFERENCE = backends.load("numpy", 1)
REFUSALS = {Reason.GRADIENT_OVERFLOW, Reason.REPLY_OVERFLOW}

Arrays = dict[str, dict[np.dtype, np.ndarray]]
Operands = list[dict[np.dtype, np.ndarray]]


def arrays_of(state: State) -> Arrays:
    """All arrays of a state, by name; copies."""
    found: Arrays = {
        name: {dtype: state.backend.to_host(slots[position]).copy() for dtype, slots in state.slots.items()}
        for position, name in enumerate(state.rule.slots)
    }
    if state.settings.hosted:
        found[PARAMETER] = {dtype: arena.copy() for dtype, arena in state.parameters.items()}
    return found


def digest(steps: Steps) -> tuple[Any, ...]:
    """Everything that a step can change, but for the reply that is kept until the next gradient comes."""
    found = [
        (name, dtype.name, arena.tobytes())
        for name, arenas in arrays_of(steps._state).items()
        for dtype, arena in arenas.items()
    ]
    return steps.step, steps.main.last_request_id, steps.lsn, found


def counters_of(state: State) -> list[int]:
    """The step counter that each parameter has in the next step."""
    counted = state.parameter_steps if state.parameter_steps.size else np.zeros(len(state.layout.parameters), np.int64)
    return (counted + 1).tolist()


def plain(  # noqa: PLR0913 - all that the formulas depend on
    state: State,
    before: Arrays,
    counters: list[int],
    operands: Operands,
    tensors: tuple[int, ...],
    step: int,
    staleness: int = 0,
    own: StepSettings | None = None,
) -> tuple[Arrays, dict[np.dtype, np.ndarray]]:
    """(arrays, updates) after a step by the formulas alone, element by element, whatever becomes of them."""
    settings, layout = state.settings, state.layout
    after = {name: {dtype: arena.copy() for dtype, arena in arenas.items()} for name, arenas in before.items()}
    updates = {dtype: np.zeros(size, dtype) for dtype, size in layout.sizes.items()}
    payload = Payload(layout, Selection(tensors))
    given = [{dtype: arena.copy() for dtype, arena in operand.items()} for operand in operands]
    if settings.clipping is not None:
        clip = settings.clipping.measure(payload, payload.parts(given[0]))
        for turn, part in enumerate(payload.parts(given[0])):
            clip.apply(turn, 0, part)
    rules, decays = settings.rules(), settings.decays()
    if own is not None:
        rules, decays = own.rules(rules), own.decays(decays)
    for index in tensors:
        parameter, start = layout.parameters[index], layout.starts[index]
        if not parameter.size:
            continue
        dtype, part = parameter.dtype, slice(start, start + parameter.size)
        group = 1 if settings.groups and index in settings.groups[0].parameters else 0
        rule: Any = settings.at(rules[group], step, staleness)
        scalars = rule.constants(dtype, counters[index])
        slots = [after[name][dtype][part] for name in rule.slots]
        decay = decays[group] / (1 + staleness)
        if settings.decay_kind is DecayKind.TIMES_LEARNING_RATE:
            decay = rule.learning_rate * decays[group]
        with np.errstate(all="ignore"):
            if settings.decay_kind is DecayKind.L2:
                if factor := dtype.type(decays[group]):
                    given[0][dtype][part] += after[PARAMETER][dtype][part] * factor
                decay = 0.0
            made = rule.update(np.sqrt, *(operand[dtype][part] for operand in given), *slots, *scalars)
            update, *rest = made if rule.slots else (made,)
            updates[dtype][part] = update
            for slot, value in zip(slots, rest, strict=True):
                slot[...] = value
            if settings.hosted:
                # As every backend does.
                REFERENCE.advance(after[PARAMETER][dtype][part], update, dtype.type(decay))
    return after, updates


def holds(wire: np.dtype | None, values: np.ndarray) -> bool:
    """Whether a wire holds numbers."""
    if wire is None:
        return True
    rounded = np.empty(values.size, wire)
    half_floats.convert(np.ascontiguousarray(values), rounded)
    back = np.empty(values.size)
    half_floats.convert(rounded, back)
    return bool(np.isfinite(back).all())


def finite(arrays: Arrays) -> bool:
    return all(np.isfinite(arena).all() for arenas in arrays.values() for arena in arenas.values())


def sent(values: np.ndarray, wire: np.dtype | None) -> tuple[bytes, np.ndarray]:
    """(what goes over the wire, what arrives)."""
    if wire is None:
        return values.tobytes(), values
    on_wire, arrived = np.empty(values.size, wire), np.empty(values.size, values.dtype)
    half_floats.convert(values, on_wire)
    half_floats.convert(on_wire, arrived)
    return on_wire.tobytes(), arrived


class Play:
    """One case, step by step; `own_settings` is how often a step has settings of its own."""

    def __init__(self, case: Case, backend: backends.Backend, own_settings: float = 0.0) -> None:
        self.own_settings = own_settings
        self.case, self.rng, self.layout = case, case.rng, case.layout
        self.state = State(case.layout, case.settings, backend)
        self.steps = Steps("test", self.state, InMemory())
        self.applied = self.refused = 0
        if case.settings.hosted:
            with closing(self.steps.begin_placement("upload")) as upload:
                for index, parameter in enumerate(case.layout.parameters):
                    x = any_values(self.rng, parameter.dtype, parameter.size)
                    upload.stage(index, 0, x.tobytes(), Operand.PARAMETER)
                upload.commit()

    def run(self, steps: int) -> None:
        for number in range(steps):
            if self.rng.random() < 0.15:
                self.change()
            self.step(f"r{number}")
        self.export()

    def change(self) -> None:
        """Other hyper-parameters."""
        settings = self.state.settings
        other = any_rule(self.rng, type(settings.rule), {p.dtype for p in self.layout.parameters})
        changed = replace(settings, rule=other)
        if is_possible(changed):
            self.steps.update(UpdateRecord("test", changed, "", datetime.now(UTC)))

    def settings_of_step(self) -> StepSettings | None:
        """Other hyper-parameters, or a learning rate alone, of all parameters or by group."""
        if not self.own_settings or self.rng.random() > self.own_settings:
            return None
        settings = self.state.settings
        groups = (None,) if self.rng.random() < 0.5 else range(len(settings.groups) + 1)
        changes = []
        for group in groups:
            other = any_rule(self.rng, type(settings.rule), {p.dtype for p in self.layout.parameters})
            names = [item.name for item in fields(other)]
            if "learning_rate" in names and self.rng.random() < 0.6:
                names = ["learning_rate"]
            decay = pick(self.rng, (None, 0.0, 0.3)) if settings.hosted else None
            changes.append(Change(group, {name: getattr(other, name) for name in names}, decay))
        own = StepSettings(tuple(changes))
        try:
            self.state.constants_for(own)
        except OptserveError:
            # Not together with the rest of a group's.
            return None
        return own

    def step(self, request_id: str) -> None:
        count = len(self.layout.parameters)
        tensors = tuple(range(count)) if self.rng.random() < 0.7 else (int(self.rng.integers(count)),)
        wire = pick(self.rng, (None, None, half_floats.FLOAT16, half_floats.BFLOAT16, F4, F8))
        reply = pick(self.rng, tuple(Reply)) if self.state.settings.hosted else Reply.UPDATES
        operands: Operands = [
            {dtype: np.zeros(size, dtype) for dtype, size in self.layout.sizes.items()}
            for _ in self.state.operand_kinds
        ]
        before, was, counters = arrays_of(self.state), digest(self.steps), counters_of(self.state)
        refusal, got, own = None, b"", self.settings_of_step()
        request = StepRequest(
            request_id, selection=Selection(tensors), wire=wire, reply=reply, options=StepOptions(own)
        )  # fmt: skip
        with closing(self.steps.begin(request)) as step:
            try:
                for operand, arenas in zip(self.state.operand_kinds, operands, strict=True):
                    for index in tensors:
                        parameter, start = self.layout.parameters[index], self.layout.starts[index]
                        values = any_values(self.rng, parameter.dtype, parameter.size, wire)
                        data, arrived = sent(values, wire)
                        arenas[parameter.dtype][start : start + parameter.size] = arrived
                        step.stage(index, 0, data, operand)
                step.commit()
            except OptserveError as error:
                refusal = error
            else:
                got = self.read(step)
        after, updates = plain(self.state, before, counters, operands, tensors, was[0], own=own)
        replied = {Reply.UPDATES: updates, Reply.PARAMETERS: after.get(PARAMETER, {}), Reply.NOTHING: {}}[reply]
        parts = [
            replied[p.dtype][start : start + p.size]
            for p, start in ((self.layout.parameters[i], self.layout.starts[i]) for i in tensors)
            if replied
        ]
        good = finite(after) and all(np.isfinite(arena).all() for arena in updates.values())
        carried = all(holds(wire, part) for part in parts)
        if refusal is not None:
            self.refused += 1
            assert refusal.reason in REFUSALS, refusal
            assert digest(self.steps) == was
            parameter = self.layout.parameters[self.layout.indices[refusal.metadata["parameter"]]]
            assert int(refusal.metadata["index"]) < parameter.size
            assert not (good and carried) or self.too_large(operands), refusal
            assert refusal.reason is Reason.GRADIENT_OVERFLOW or not carried
            return
        self.applied += 1
        assert good
        assert carried
        found = arrays_of(self.state)
        assert all(found[name][d].tobytes() == after[name][d].tobytes() for name in after for d in after[name])
        assert got == b"".join(sent(part, wire)[0] for part in parts)
        assert np.isfinite(np.concatenate([np.zeros(0), *(sent(part, wire)[1] for part in parts)])).all()
        self.replay(request_id, reply, parts)

    def too_large(self, operands: Operands) -> bool:
        """Whether an operand is larger than what may arrive: its square alone would not be finite."""
        return any(
            np.abs(arena).max(initial=0) > self.state.limits[operand, dtype]
            for operand, arenas in zip(self.state.operand_kinds, operands, strict=True)
            for dtype, arena in arenas.items()
            if arena.size
        )

    def read(self, step: Step) -> bytes:
        return b"".join(step.reply(1 << 20, lambda piece: bytes(piece.data)))

    def replay(self, request_id: str, reply: Reply, parts: list[np.ndarray]) -> None:
        """The reply once more, perhaps by another wire."""
        wire = pick(self.rng, (None, half_floats.FLOAT16, half_floats.BFLOAT16, F4))
        was = digest(self.steps)
        with closing(self.steps.begin(StepRequest(request_id, wire=wire, reply=reply))) as step:
            if all(holds(wire, part) for part in parts):
                assert step.commit().replayed
                assert self.read(step) == b"".join(sent(part, wire)[0] for part in parts)
            else:
                with pytest.raises(OptserveError, check=lambda error: error.reason is Reason.REPLY_OVERFLOW):
                    step.commit()
        assert digest(self.steps) == was

    def export(self) -> None:
        """Whatever the state is now, it can be imported."""
        optimizer: Any = SimpleNamespace(settings=self.state.settings, rule=self.state.rule, layout=self.layout, id="o")
        nowhere: Any = SimpleNamespace(write=lambda *_: None)
        entry = StateImport(nowhere, optimizer, nowhere, lambda settings, _: settings)
        for array in range(len(self.state.settings.arrays)):
            for index, parameter in enumerate(self.layout.parameters):
                start = self.layout.starts[index]
                values = (
                    self.state.read(parameter.dtype, array, start, start + parameter.size)
                    if parameter.size
                    else np.empty(0)
                )
                entry.stage(index, array, 0, values.tobytes())


def play_all(backend: backends.Backend, seeds: range, steps: int = 0, own_settings: float = 0.0) -> None:
    """Play cases of so many steps, or of a few."""
    applied = refused = 0
    for seed in seeds:
        play = Play(any_case(seed), backend, own_settings)
        try:
            play.run(steps or int(play.rng.integers(2, 6)))
        except AssertionError as error:
            raise AssertionError(f"case {seed}: {play.state.settings}, {play.layout.parameters}") from error
        applied, refused = applied + play.applied, refused + play.refused
    # Neither must be rare, or little is shown.
    assert min(applied, refused) > (applied + refused) / 10


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_what_is_accepted_is_finite_and_what_is_refused_changes_nothing(chunk):
    play_all(REFERENCE, range(chunk * CASES // CHUNKS, (chunk + 1) * CASES // CHUNKS))


def test_so_with_compiled_kernels():
    play_all(backends.load("numba", 1), range(4_000_000, 4_000_600))


def test_so_on_a_device():
    play_all(SimulatedBackend(), range(8_000_000, 8_000_600))


@pytest.mark.parametrize("chunk", range(4))
def test_so_with_settings_of_single_steps(chunk):
    play_all(REFERENCE, range(6_000_000 + 1500 * chunk, 6_000_000 + 1500 * (chunk + 1)), own_settings=0.6)


def test_so_with_settings_of_single_steps_over_many_steps():
    play_all(REFERENCE, range(7_000_000, 7_000_040), steps=150, own_settings=0.6)


def test_so_over_many_steps():
    # Longer than bounds are followed without another look at the state.
    play_all(REFERENCE, range(5_000_000, 5_000_040), steps=150)
