"""Steps whose gradients are sent one by one."""

import asyncio
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest

import optserve
import optserve.aio

SHAPES = {"a": (500, 700), "b": (3,), "c": (), "d": (0,), "e": (1000,)}


def gradients(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}


def bits(arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


@pytest.fixture
def reference(client, name):
    return client.create_optimizer(f"{name}-whole", optserve.Adadelta(), gradients(0))


@pytest.fixture(params=["grpc", "shm"])
def opt(request, client, name):
    client.create_optimizer(name, optserve.Adadelta(), gradients(0))
    return client.optimizer(name, transport=request.param)


@pytest.mark.parametrize("order", ["abcde", "edcba", "cabed"])
def test_any_order_gives_the_bits_of_a_whole_step(opt, reference, order):
    for seed in range(3):
        with opt.begin_step() as step:
            for key in order:
                step.send(key, gradients(seed)[key])
        assert bits(step.updates) == bits(reference.step(gradients(seed)))
    assert opt.current_step == 3


def test_some_parameters_only(opt, reference):
    some = {key: gradients(0)[key] for key in "eb"}
    with opt.begin_step("eb") as step:
        for key, g in some.items():
            step.send(key, g)
    assert bits(step.updates) == bits(reference.step(some, partial=True))


def test_gradients_travel_before_the_last_one_is_there(client, name, monkeypatch):
    from optserve._steps import stream

    client.create_optimizer(name, optserve.Sgd(), gradients(0))
    opt = client.optimizer(name, transport="grpc")
    sent, real = threading.Event(), stream.wire.encode

    def encode(header, *parts):
        if parts:
            sent.set()
        return real(header, *parts)

    monkeypatch.setattr(stream.wire, "encode", encode)
    with opt.begin_step() as step:
        step.send("a", gradients(0)["a"])
        assert sent.wait(timeout=10)
        for key in "bcde":
            step.send(key, gradients(0)[key])
    assert step.updates["e"].shape == (1000,)


def test_an_exception_gives_the_step_up_and_nothing_changes(opt, reference):
    with pytest.raises(ZeroDivisionError), opt.begin_step() as step:  # noqa: PT012
        step.send("a", gradients(0)["a"])
        raise ZeroDivisionError
    assert opt.step(gradients(1))["e"].tobytes() == reference.step(gradients(1))["e"].tobytes()
    assert opt.current_step == 1


def test_what_cannot_be_used_is_refused_at_once(opt, reference):
    for spoil, message in (
        (lambda step: step.send("x", gradients(0)["a"]), "no parameter 'x'"),
        (lambda step: step.send("a", gradients(0)["b"]), "has shape"),
        (lambda step: step.send("b", gradients(0)["b"]), "has been sent already"),
        (lambda step: None, "no gradient for 'a'"),
    ):
        with pytest.raises(optserve.InvalidArgumentError, match=message), opt.begin_step() as step:  # noqa: PT012
            step.send("b", gradients(0)["b"])
            spoil(step)
    with pytest.raises(optserve.InvalidArgumentError, match="takes no part"), opt.begin_step(["b"]) as step:
        step.send("a", gradients(0)["a"])
    bad = gradients(0)
    bad["e"][5] = np.nan
    message = "'e' is nan at flat index 5"
    with pytest.raises(optserve.InvalidArgumentError, match=message), opt.begin_step() as step:  # noqa: PT012
        for key, g in bad.items():
            step.send(key, g)
    assert bits(opt.step(gradients(2))) == bits(reference.step(gradients(2)))


def test_a_lost_connection_is_resumed(server, client, name, reference):
    from client.proxy import proxy

    config = optserve.ClientConfig(initial_backoff_s=0.01, max_backoff_s=0.05, transport="grpc")
    with proxy(server.target) as wire, optserve.connect(wire.target, config) as shaky:
        opt = shaky.create_optimizer(name, optserve.Adadelta(), gradients(0))
        for seed in range(4):
            wire.cut_after("up" if seed % 2 else "down", 300_000 * seed)
            with opt.begin_step() as step:
                for key, g in gradients(seed).items():
                    step.send(key, g)
            assert bits(step.updates) == bits(reference.step(gradients(seed)))


def test_the_same_from_asyncio(server, name, reference):
    async def run() -> None:
        async with optserve.aio.connect(server.target) as client:
            opt = await client.create_optimizer(name, optserve.Adadelta(), gradients(0))
            async with opt.begin_step() as step:
                for key, g in gradients(0).items():
                    step.send(key, g)
            assert bits(step.updates) == bits(reference.step(gradients(0)))
            with pytest.raises(ZeroDivisionError):  # noqa: PT012
                async with opt.begin_step() as step:
                    step.send("b", gradients(0)["b"])
                    raise ZeroDivisionError
            assert (await opt.step(gradients(1)))["e"].tobytes() == reference.step(gradients(1))["e"].tobytes()

    asyncio.run(run())


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """A shell starts what it puts into the background with Ctrl-C ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_the_block_is_left_ends_the_step_and_nothing_is_lost(server, name):
    from client.proxy import proxy

    main = threading.main_thread().ident
    assert main is not None
    with proxy(server.target) as wire, optserve.connect(wire.target, optserve.ClientConfig(transport="grpc")) as client:
        opt = client.create_optimizer(name, optserve.Sgd(learning_rate=1.0), gradients(0))
        opt.step(gradients(0))
        wire.stall()
        hit = threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt), opt.begin_step() as step:  # noqa: PT012
            for key, g in gradients(1).items():
                step.send(key, g)
            hit.start()
        hit.join()
        # Its thread has ended, and holds no turn.
        assert step._ended.done()
        wire.flow()
        try:
            updates = opt.step(gradients(1))
        except optserve.StepInDoubtError:
            updates = opt.replay()
        assert bits(updates) == bits({key: -g for key, g in gradients(1).items()})
        assert opt.current_step == 2
