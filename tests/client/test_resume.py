"""A step is applied exactly once, whatever happens to the connection."""

import os
import threading
import time

import numpy as np
import pytest

import optserve
from client.proxy import proxy
from optserve._transport import Backoff

SIZE = 200_000  # 800 kB each way, several chunks
CONFIG = optserve.ClientConfig(initial_backoff_s=0.01, max_backoff_s=0.05, step_timeout_s=30, max_chunk_bytes=1 << 17)


def gradient(step: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(step).standard_normal(SIZE).astype(np.float32)}


def test_steps_through_cut_connections_give_the_bits_of_an_undisturbed_run(server, client, name):
    steps = 24
    undisturbed = client.create_optimizer(f"{name}-calm", optserve.Adadelta(), gradient(0))
    with proxy(server.target) as wire, optserve.connect(wire.target, CONFIG) as shaky:
        opt = shaky.create_optimizer(name, optserve.Adadelta(), gradient(0))
        rng = np.random.default_rng(7)
        for step in range(steps):
            # Cuts fall anywhere: before, within and after the gradients, and within the reply.
            wire.cut_after("up" if step % 2 else "down", int(rng.integers(0, 4 * SIZE)))
            update = opt.step(gradient(step))["x"]
            assert update.tobytes() == undisturbed.step(gradient(step))["x"].tobytes()
        assert opt.current_step == steps
        assert wire.cuts >= steps // 2
    assert client.optimizer(name).current_step == steps


def test_a_reply_that_is_lost_is_replayed_and_not_computed_again(server, client, name):
    with proxy(server.target) as wire, optserve.connect(wire.target, CONFIG) as shaky:
        opt = shaky.create_optimizer(name, optserve.Momentum(learning_rate=1.0), gradient(0))
        opt.step(gradient(0))
        wire.cut_after("down", SIZE)  # in the middle of the reply
        opt.step(gradient(1))
        assert opt.current_step == 2
    # Momentum would show a step that was applied twice.
    g0, g1 = gradient(0)["x"], gradient(1)["x"]
    expected = np.float32(0.9) * -g0 - g1
    assert np.array_equal(client.optimizer(name).replay()["x"], expected)


def test_no_answer_raises_at_the_deadline_and_the_step_is_not_lost(server, client, name):
    with proxy(server.target) as wire, optserve.connect(wire.target, CONFIG) as shaky:
        opt = shaky.create_optimizer(name, optserve.Sgd(), gradient(0))
        opt.step(gradient(0))
        wire.stall()
        start = time.monotonic()
        with pytest.raises(optserve.DeadlineExceededError, match="may or may not"):
            opt.step(gradient(1), timeout_s=0.5)
        assert 0.4 < time.monotonic() - start < 5


def test_an_interrupted_step_that_was_applied_is_said_and_replayed(server, client, name):
    with proxy(server.target) as wire, optserve.connect(wire.target, CONFIG) as shaky:
        opt = shaky.create_optimizer(name, optserve.Sgd(learning_rate=1.0), gradient(0))
        expected = opt.step(gradient(0))
        # The answer to the second step never arrives, though the server has applied it.
        applied = threading.Event()

        def watch() -> None:
            other = client.optimizer(name)
            while other.current_step < 2:
                other.refresh()
            applied.set()
            opt.cancel()

        watcher = threading.Thread(target=watch)
        wire.cut_after("down", 1000)
        with pytest.MonkeyPatch.context() as patch:
            # A client that gives up at the first loss of its connection.
            def give_up(self, error, closed):
                raise error

            patch.setattr(Backoff, "pause", give_up)
            watcher.start()
            with pytest.raises(optserve.UnavailableError):
                opt.step(gradient(1))
        watcher.join(10)
        assert applied.is_set()
        with pytest.raises(optserve.StepInDoubtError, match="replay"):
            opt.step(gradient(2))
        assert np.array_equal(opt.replay()["x"], -gradient(1)["x"])
        assert opt.current_step == 2
        assert np.array_equal(opt.step(gradient(2))["x"], -gradient(2)["x"])
        assert np.array_equal(expected["x"], -gradient(0)["x"])


def test_no_server_is_an_error_that_says_what_to_do():
    config = optserve.ClientConfig(connect_timeout_s=0.3)
    with pytest.raises(optserve.UnavailableError, match="optserve serve"):
        optserve.connect("127.0.0.1:1", config)


def test_a_server_that_is_gone_is_an_error_within_the_deadline(name):
    with optserve.local_server(backend="numpy") as server:
        client = optserve.connect(server.target, CONFIG)
        opt = client.create_optimizer(name, optserve.Sgd(), {"x": optserve.TensorSpec((3,))})
        g = {"x": np.ones(3, np.float32)}
        opt.step(g)
        server.process.kill()
        server.process.wait()
        with pytest.raises((optserve.UnavailableError, optserve.DeadlineExceededError)):
            opt.step(g, timeout_s=0.5)
        client.close()


def test_a_closed_client_says_so(server, name):
    with optserve.connect(server.target) as client:
        opt = client.create_optimizer(name, optserve.Sgd(), {"x": optserve.TensorSpec((3,))})
    with pytest.raises(optserve.ClientUseError, match="closed"):
        opt.step({"x": np.ones(3, np.float32)})


def test_a_client_inherited_by_fork_says_so(client, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(optserve.ClientUseError, match="forked"):
        client.server_info()


def test_a_failure_while_frames_are_made_reaches_the_caller(server, name, monkeypatch):
    from optserve import _stream

    client = optserve.connect(server.target, CONFIG)
    opt = client.create_optimizer(name, optserve.Sgd(), gradient(0))

    def broken(self, begin, max_chunk_bytes):
        yield from list(real(self, begin, max_chunk_bytes))[:1]
        raise MemoryError("no room for a frame")

    real = _stream.Gradients.frames
    with monkeypatch.context() as patch:
        patch.setattr(_stream.Gradients, "frames", broken)
        with pytest.raises(optserve.InternalError, match="no room for a frame"):
            opt.step(gradient(0))
    opt.step(gradient(0))
    assert opt.current_step == 1
    client.close()
