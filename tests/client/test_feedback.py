"""Error feedback: what was applied stays within one rounding of the sum of its gradients, whatever happens."""

import threading

import numpy as np
import pytest

import optserve
from client.proxy import proxy
from optserve.optimizer import WireDtype

SIZE = 3000
HALF_ULP = {"bfloat16": 2.0**-8 + 2.0**-24, "float16": 2.0**-11}
"""Of numbers in [1, 2): the most that one rounding leaves out of gradients that are there with what is owed to them;
to bfloat16 it goes by way of float32."""

CONFIG = optserve.ClientConfig(initial_backoff_s=0.01, max_backoff_s=0.05, step_timeout_s=30, max_chunk_bytes=2050)

wires = pytest.mark.parametrize("wire_dtype", HALF_ULP)


class Ledger:
    """An optimizer of rate 1 whose server holds x: -x is the sum of what was applied. And what should have been."""

    def __init__(self, client: optserve.Client, opt: optserve.Optimizer, wire_dtype: str) -> None:
        self.opt = opt
        self._client = client
        self._bound = HALF_ULP[wire_dtype]
        self._random = np.random.default_rng(5)
        self._given = np.zeros(SIZE)

    def gradient(self) -> np.ndarray:
        return 1.25 + 0.5 * self._random.random(SIZE)

    def note(self, *gradients: np.ndarray) -> None:
        """These were applied."""
        for gradient in gradients:
            self._given += gradient

    def check(self) -> None:
        x = self._client.optimizer(self.opt.name).pull_parameters().arrays["x"]
        assert abs(x + self._given).max() <= self._bound

    def roll_back(self, given: np.ndarray) -> None:
        self._given = given

    @property
    def given(self) -> np.ndarray:
        return self._given.copy()


def ledger(client: optserve.Client, through: optserve.Client, name: str, wire_dtype: WireDtype) -> Ledger:
    client.create_optimizer(name, optserve.Sgd(learning_rate=1.0), {"x": np.zeros(SIZE)}, hosted=True)
    return Ledger(client, through.optimizer(name, wire_dtype=wire_dtype, error_feedback=True), wire_dtype)


@wires
def test_several_threads_lose_nothing(client, name, wire_dtype):
    book = ledger(client, client, name, wire_dtype)
    gradients = [[book.gradient() for _ in range(40)] for _ in range(4)]

    def work(mine: list[np.ndarray]) -> None:
        for count, g in enumerate(mine):
            if count % 3:
                book.opt.step({"x": g})
            else:
                with book.opt.begin_step() as step:
                    step.send("x", g)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in gradients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert book.opt.current_step == 160
    book.note(*(g for mine in gradients for g in mine))
    book.check()


@wires
@pytest.mark.parametrize("then", ["replay", "refresh", "step and replay"])
def test_an_interrupted_step_that_was_applied_counts_once(server, client, name, wire_dtype, then):
    with proxy(server.target) as wire, optserve.connect(wire.target, CONFIG) as shaky:
        book = ledger(client, shaky, name, wire_dtype)
        other = client.optimizer(name)

        def cancel_when_applied(step: int) -> None:
            while other.current_step < step:
                other.refresh()
            book.opt.cancel()

        for turn in range(6):
            lost = book.gradient()
            # No byte of the reply gets through; the call is cancelled when the server has applied the step.
            assert book.opt.transport[0] == "grpc"
            wire.cut_after("down", 0)
            wire.refuse = True
            watcher = threading.Thread(target=cancel_when_applied, args=(book.opt.current_step + 1,))
            watcher.start()
            with pytest.raises(optserve.StepCancelledError):
                book.opt.step({"x": lost})
            watcher.join()
            wire.refuse = False
            if then == "step and replay":
                with pytest.raises(optserve.StepInDoubtError):
                    book.opt.step({"x": book.gradient()})
            book.opt.refresh() if then == "refresh" else book.opt.replay()
            kept = book.gradient()
            book.opt.step({"x": kept})
            book.note(lost, kept)
            assert book.opt.current_step == 2 * turn + 2
            book.check()


@wires
def test_steps_that_are_interrupted_at_any_time_lose_nothing(client, name, wire_dtype):
    book = ledger(client, client, name, wire_dtype)
    random = np.random.default_rng(11)
    interrupted: list[np.ndarray] = []
    for turn in range(200):
        g = book.gradient()
        try:
            book.opt.step({"x": g}, timeout_s=random.choice([30.0, 0.004 * random.random()]))
        except (optserve.DeadlineExceededError, optserve.UnavailableError):
            interrupted.append(g)
        except optserve.StepInDoubtError:
            # Which one it was shows in the updates: all gradients differ by more than one rounding.
            update = book.opt.replay()["x"]
            book.note(min(interrupted, key=lambda one: abs(one + update).max()))
            interrupted.clear()
        else:
            book.note(g)
            interrupted.clear()
        if turn % 5 == 0 and not interrupted:
            book.check()
    book.opt.close()


@wires
def test_what_was_owed_before_a_restore_is_not_paid_after_it(client, name, wire_dtype):
    book = ledger(client, client, name, wire_dtype)
    g = book.gradient()
    book.opt.step({"x": g})
    book.note(g)
    book.opt.save_checkpoint("early")
    at_checkpoint = client.optimizer(name).pull_parameters().arrays["x"]
    for restored_by in (book.opt, client.optimizer(name)):
        for _ in range(5):
            book.opt.step({"x": book.gradient()})
        restored_by.restore_checkpoint("early")
        book.roll_back(-at_checkpoint)
        if restored_by is not book.opt:
            with pytest.raises(optserve.StateReplacedError):
                book.opt.step({"x": g})
            book.opt.refresh()
        for _ in range(5):
            g = book.gradient()
            book.opt.step({"x": g})
            book.note(g)
            book.check()
    state = client.optimizer(name).export_state()
    book.opt.import_state(state)
    book.roll_back(-client.optimizer(name).pull_parameters().arrays["x"])
    book.opt.step({"x": g})
    book.note(g)
    book.check()


@wires
def test_refused_steps_and_steps_of_some_parameters_owe_nothing(client, name, wire_dtype):
    shapes = {"a": np.zeros(SIZE), "b": np.zeros(SIZE)}
    client.create_optimizer(name, optserve.Sgd(learning_rate=1.0), shapes)
    opt = client.optimizer(name, wire_dtype=wire_dtype, error_feedback=True)
    moved, given, random = dict(shapes), dict(shapes), np.random.default_rng(1)
    for turn in range(60):
        part = [["a"], ["b"], ["b", "a"]][turn % 3]
        grads = {key: 1.25 + 0.5 * random.random(SIZE) for key in part}
        if turn % 4 == 0:
            bad = {key: g.copy() for key, g in grads.items()}
            bad[part[-1]][-1] = np.nan if turn % 8 else np.inf
            with pytest.raises(optserve.InvalidArgumentError):
                opt.step(bad, partial=True)
        if turn % 5 == 0:
            with pytest.raises(ZeroDivisionError), opt.begin_step(part) as step:  # noqa: PT012
                step.send(part[0], grads[part[0]])
                raise ZeroDivisionError
        with opt.begin_step(part) as step:
            for key in part:
                step.send(key, grads[key])
        for key in part:
            moved[key] = moved[key] + step.updates[key]
            given[key] = given[key] + grads[key]
    for key in shapes:
        assert abs(moved[key] + given[key]).max() <= HALF_ULP[wire_dtype]
