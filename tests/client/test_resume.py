"""A step is applied exactly once, whatever happens to the connection."""

import gc
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager

import grpc
import numpy as np
import pytest

import optserve
from client.proxy import proxy

SIZE = 200_000  # 800 kB each way, several chunks
CONFIG = optserve.ClientConfig(
    initial_backoff_s=0.01, max_backoff_s=0.05, step_timeout_s=30, max_chunk_bytes=1 << 17, transport="grpc"
)


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


@contextmanager
def losing_the_reply(wire, client, name, opt, step: int):
    """Within the block, the reply to `step` never arrives, and the call is cancelled once the server has applied it."""

    def watch() -> None:
        other = client.optimizer(name)
        while other.current_step < step:
            other.refresh()
        opt.cancel()

    wire.cut_after("down", 1000)
    wire.refuse = True
    watcher = threading.Thread(target=watch)
    watcher.start()
    yield
    watcher.join(10)
    assert not watcher.is_alive()
    wire.refuse = False


def test_a_cancelled_step_that_was_applied_is_said_and_replayed(server, client, name):
    with proxy(server.target) as wire, optserve.connect(wire.target, CONFIG) as shaky:
        opt = shaky.create_optimizer(name, optserve.Sgd(learning_rate=1.0), gradient(0))
        opt.step(gradient(0))
        with losing_the_reply(wire, client, name, opt, 2), pytest.raises(optserve.StepCancelledError):
            opt.step(gradient(1))
        with pytest.raises(optserve.StepInDoubtError, match="was applied"):
            opt.step(gradient(2))
        assert np.array_equal(opt.replay()["x"], -gradient(1)["x"])
        assert opt.current_step == 2
        assert np.array_equal(opt.step(gradient(2))["x"], -gradient(2)["x"])


@pytest.mark.parametrize("size", [SIZE, 10 * SIZE])
def test_a_reply_that_ends_in_the_middle_leaves_out_untouched_or_its_first_elements_right(server, client, name, size):
    """Of replies of up to 1 MiB nothing is written before all is there."""
    with proxy(server.target) as wire, optserve.connect(wire.target, CONFIG) as shaky:
        g = {"x": np.arange(1, size + 1, dtype=np.float32)}
        opt = shaky.create_optimizer(name, optserve.Sgd(learning_rate=1.0), g)
        out = {"x": np.full(size, 7, np.float32)}
        wire.cut_after("down", 3 * size)
        wire.refuse = True
        with pytest.raises(optserve.OptserveError):
            opt.step(g, out=out, timeout_s=1)
        written = int((out["x"] < 0).sum())
        assert written == 0 if size == SIZE else written < size
        assert np.array_equal(out["x"][:written], -g["x"][:written])
        assert (out["x"][written:] == 7).all()
        wire.refuse = False
        assert np.array_equal(opt.replay()["x"] if client.optimizer(name).current_step else -g["x"], -g["x"])


def test_a_cancelled_step_can_be_gone_on_from_without_its_updates(server, client, name):
    with proxy(server.target) as wire, optserve.connect(wire.target, CONFIG) as shaky:
        opt = shaky.create_optimizer(name, optserve.Sgd(), gradient(0))
        with losing_the_reply(wire, client, name, opt, 1), pytest.raises(optserve.StepCancelledError):
            opt.step(gradient(0))
        opt.refresh()
        opt.step(gradient(1))
        assert opt.current_step == 2


def test_an_interrupted_step_that_somebody_else_has_stepped_over_stays_in_doubt(server, client, name):
    with proxy(server.target) as wire, optserve.connect(wire.target, CONFIG) as shaky:
        opt = shaky.create_optimizer(name, optserve.Sgd(), gradient(0))
        with losing_the_reply(wire, client, name, opt, 1), pytest.raises(optserve.StepCancelledError):
            opt.step(gradient(0))
        client.optimizer(name).step(gradient(1))
        with pytest.raises(optserve.StepInDoubtError, match="another client steps it"):
            opt.step(gradient(2))
        with pytest.raises(optserve.FailedPreconditionError, match="is not the interrupted one"):
            opt.replay()


def test_an_interrupted_step_that_was_not_applied_leaves_no_trace(server, client, name):
    with proxy(server.target) as wire, optserve.connect(wire.target, CONFIG) as shaky:
        opt = shaky.create_optimizer(name, optserve.Sgd(learning_rate=1.0), gradient(0))
        opt.step(gradient(0))
        wire.stall()
        with pytest.raises(optserve.DeadlineExceededError):
            opt.step(gradient(1), timeout_s=0.3)
        wire.flow()
        with pytest.raises(optserve.FailedPreconditionError, match="is not the interrupted one"):
            opt.replay()
        assert np.array_equal(opt.step(gradient(2))["x"], -gradient(2)["x"])
        assert opt.current_step == 2


def test_cancelling_hits_the_step_under_way_and_no_other(client, name):
    opt = client.create_optimizer(name, optserve.Sgd(), gradient(0))
    opt.cancel()  # there is none
    cancelled = opt._connection.patience(None)
    cancelled.cancel()
    with pytest.raises(optserve.StepCancelledError):
        opt._step(cancelled, gradient(0))
    opt.step(gradient(0))
    assert opt.current_step == 1


def test_no_server_is_an_error_that_says_what_to_do():
    config = optserve.ClientConfig(connect_timeout_s=0.3)
    with pytest.raises(optserve.UnavailableError, match="optserve serve"):
        optserve.connect("127.0.0.1:1", config)


@pytest.mark.parametrize("host", ["refuses", "is mute"])
def test_a_server_that_is_gone_is_an_error_within_the_deadline(name, host):
    with ExitStack() as stack:
        server = stack.enter_context(optserve.local_server(backend="numpy"))
        client = optserve.connect(server.target, CONFIG)
        opt = client.create_optimizer(name, optserve.Sgd(), {"x": optserve.TensorSpec((3,))})
        g = {"x": np.ones(3, np.float32)}
        opt.step(g)
        server.process.kill()
        server.process.wait()
        if host == "is mute":
            address, port = server.target.rsplit(":", 1)
            stack.enter_context(socket.create_server((address, int(port))))
        # Whether the deadline falls into a try or into the pause between two.
        for timeout_s in (0.3, 0.5, 1.0):
            with pytest.raises(optserve.UnreachableError, match=rf"within {timeout_s:g} s"):
                opt.step(g, timeout_s=timeout_s)
            with pytest.raises(optserve.UnreachableError, match=rf"within {timeout_s:g} s"):
                client.server_info(timeout_s=timeout_s)
        client.close()


def test_a_server_that_comes_back_with_less_state_is_said_with_both_steps(name):
    g = {"x": np.ones(3, np.float32)}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = ["--port", str(listener.getsockname()[1])]
    with optserve.local_server(backend="numpy", options=port) as server:
        client = optserve.connect(server.target, CONFIG)
        opt = client.create_optimizer(name, optserve.Sgd(), g)
        for _ in range(3):
            opt.step(g)
    with optserve.local_server(backend="numpy", options=port):
        with pytest.raises(optserve.StepsLostError, match=r"seen step 3 of .* at step 0"):
            opt.step(g)
        client.create_optimizer(name, optserve.Sgd(), g).step(g)
        with pytest.raises(optserve.StateReplacedError, match="deleted and created anew; it is at step 1"):
            opt.step(g)
        opt.refresh()
        opt.step(g)
        assert opt.current_step == 2
        client.close()


@pytest.mark.parametrize("stepped", [False, True])
def test_a_closed_client_says_so(server, name, stepped):
    with optserve.connect(server.target) as client:
        opt = client.create_optimizer(name, optserve.Sgd(), {"x": optserve.TensorSpec((3,))})
        if stepped:
            opt.step({"x": np.ones(3, np.float32)})
    with pytest.raises(optserve.ClientUseError, match="closed"):
        opt.step({"x": np.ones(3, np.float32)})


def resumed_after_s(opt, answers_again) -> float:
    """Seconds between the return of a server and that of a step that has been waiting for it."""
    done = []

    def step() -> None:
        opt.step(gradient(0), timeout_s=60)
        done.append(time.monotonic())

    waiting = threading.Thread(target=step)
    waiting.start()
    # Long enough for pauses that double to have grown far beyond the promise.
    waiting.join(2.5)
    assert waiting.is_alive()
    returned = answers_again()
    waiting.join(30)
    return done[0] - returned


def test_a_step_goes_on_at_once_when_the_server_is_back(server, client, name):
    """With the settings that a client has by itself."""
    with proxy(server.target) as wire, optserve.connect(wire.target) as waiting:
        opt = waiting.create_optimizer(name, optserve.Sgd(), gradient(0))
        opt = waiting.optimizer(name, transport="grpc")
        opt.step(gradient(0))
        took_s = []
        for _ in range(3):
            wire.close()
            took_s.append(resumed_after_s(opt, wire.reopen))
    # A busy machine may be late once.
    assert min(took_s) < 0.3, took_s
    assert sorted(took_s)[1] < 0.6, took_s


def test_a_step_goes_on_at_once_when_a_server_that_was_killed_is_started_again(tmp_path):
    data_dir = tmp_path / "data"
    with optserve.local_server(data_dir, backend="numpy") as server:
        port = server.target.rpartition(":")[2]
        with optserve.connect(server.target) as client:
            opt = client.create_optimizer("a", optserve.Sgd(), gradient(0))
            opt.step(gradient(0))
            server.process.kill()
            server.process.wait()
            again = optserve.local_server(data_dir, backend="numpy", options=["--port", port])

            def restart() -> float:
                assert again.__enter__().target == server.target
                return time.monotonic()

            try:
                assert resumed_after_s(opt, restart) < 1
            finally:
                again.__exit__(None, None, None)
            assert opt.current_step == 2


def test_a_server_that_is_not_there_is_asked_for_at_a_bounded_rate(server, name):
    with proxy(server.target) as wire, optserve.connect(wire.target) as waiting:
        opt = waiting.create_optimizer(name, optserve.Sgd(), gradient(0))
        wire.refuse = True
        wire.cut()
        before, started = wire.accepted, time.monotonic()
        # Whether the deadline falls into a try or into the pause between two.
        with pytest.raises(optserve.DeadlineExceededError):
            opt.step(gradient(0), timeout_s=2)
        assert wire.accepted - before <= 15 * (time.monotonic() - started) + 3


class Stuck:
    """A channel that never ends, like one whose call was interrupted at a wrong moment; the test lets it go on."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self.go_on = threading.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(self._channel, name)

    def close(self) -> None:
        self.go_on.wait(60)
        self._channel.close()


def test_a_client_closes_though_its_channel_does_not(server, name, monkeypatch, caplog):
    make, made = grpc.insecure_channel, []

    def stuck(*arguments, **options) -> Stuck:
        made.append(Stuck(make(*arguments, **options)))
        return made[-1]

    monkeypatch.setattr(grpc, "insecure_channel", stuck)
    client = optserve.connect(server.target, CONFIG)
    opt = client.create_optimizer(name, optserve.Sgd(), gradient(0))
    opt.step(gradient(0))
    began = time.monotonic()
    client.close()
    assert time.monotonic() - began < 30
    assert "has not ended" in caplog.text
    # The stream of its steps has, nevertheless.
    with pytest.raises(optserve.ClientUseError):
        opt.step(gradient(1))
    made[0].go_on.set()


def test_a_client_inherited_by_fork_says_so(server, name):
    """A real fork, in a process of its own, with a stream open."""
    script = f"""
import os
import sys, warnings, numpy as np, optserve
warnings.simplefilter("ignore")
client = optserve.connect({server.target!r})
g = {{"x": np.ones(3, np.float32)}}
opt = client.create_optimizer({name!r}, optserve.Sgd(), g)
opt.step(g)
child = os.fork()
if child == 0:
    caught = 0
    for call in (client.server_info, lambda: opt.step(g), opt.replay, lambda: optserve.connect({server.target!r})):
        try:
            call()
        except optserve.ClientUseError as error:
            caught += "forked" in str(error)
    os._exit(caught)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert status == 4, status
opt.step(g)
client.close()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_an_optimizer_that_nobody_uses_any_more_gives_its_stream_back(tmp_path):
    config = tmp_path / "optserve.toml"
    config.write_text("max_streams = 3\n")
    g = {"x": np.ones(3, np.float32)}
    with optserve.local_server(backend="numpy", options=["--config", str(config)]) as server:
        client = optserve.connect(server.target)
        for index in range(12):
            client.create_optimizer(f"o{index}", optserve.Sgd(), g).step(g, timeout_s=10)
        threads = threading.active_count()
        for _ in range(20):
            opt = client.create_optimizer("gone", optserve.Sgd(), g)
            client.delete_optimizer("gone")
            # The stream that is opened for it is refused.
            with pytest.raises(optserve.NotFoundError):
                opt.step(g)
        assert threading.active_count() <= threads + 5
        client.close()


def test_a_client_that_nobody_uses_any_more_leaves_no_thread(server, name):
    before = set(threading.enumerate())
    client = optserve.connect(server.target)
    g = {"x": np.ones(3, np.float32)}
    client.create_optimizer(name, optserve.Sgd(), g).step(g)
    del client
    gc.collect()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive(), thread


def test_a_stream_that_finds_no_place_is_tried_again(tmp_path):
    config = tmp_path / "optserve.toml"
    config.write_text("max_streams = 1\n")
    g = {"x": np.ones(3, np.float32)}
    with optserve.local_server(backend="numpy", options=["--config", str(config)]) as server:
        client = optserve.connect(server.target)
        first, second = (client.create_optimizer(f"o{index}", optserve.Sgd(), g) for index in range(2))
        first.step(g)
        with pytest.raises(optserve.ResourceExhaustedError):
            second.step(g, timeout_s=0.3)
        threading.Timer(0.2, first.close).start()
        second.step(g, timeout_s=20)
        assert second.current_step == 1
        client.close()


def test_a_failure_while_messages_are_made_reaches_the_caller(server, name, monkeypatch):
    from optserve._steps import stream

    client = optserve.connect(server.target, CONFIG)
    opt = client.create_optimizer(name, optserve.Sgd(), gradient(0))

    def broken(self, begin, max_chunk_bytes, **options):
        yield from list(real(self, begin, max_chunk_bytes, **options))[:1]
        raise MemoryError("no room for a message")

    real = stream.Gradients.messages
    with monkeypatch.context() as patch:
        patch.setattr(stream.Gradients, "messages", broken)
        with pytest.raises(optserve.InternalError, match="no room for a message"):
            opt.step(gradient(0))
    opt.step(gradient(0))
    assert opt.current_step == 1
    client.close()
