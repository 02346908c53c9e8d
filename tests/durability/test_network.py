"""A network that cuts connections, in front of a server with a journal: every step once, every bit the same."""

import numpy as np

import optserve
from client.proxy import proxy

SIZE = 20_000
STEPS, CUTS = 500, 100
CONFIG = optserve.ClientConfig(
    initial_backoff_s=0.005, max_backoff_s=0.02, step_timeout_s=60, max_chunk_bytes=1 << 14, transport="grpc"
)


def test_five_hundred_steps_through_a_hundred_cuts(client, name, tmp_path):
    undisturbed = client.create_optimizer(name, optserve.Adadelta(), {"x": np.zeros(SIZE, np.float32)})
    rng = np.random.default_rng(11)
    with (
        optserve.local_server(tmp_path) as server,
        proxy(server.target) as wire,
        optserve.connect(wire.target, CONFIG) as shaky,
    ):
        opt = shaky.create_optimizer("a", optserve.Adadelta(), {"x": np.zeros(SIZE, np.float32)})
        for step in range(STEPS):
            g = {"x": rng.standard_normal(SIZE).astype(np.float32)}
            if wire.cuts < CUTS and step % 4 == 0:
                wire.cut_after("up" if step % 8 else "down", int(rng.integers(0, 4 * SIZE)))
            assert opt.step(g)["x"].tobytes() == undisturbed.step(g)["x"].tobytes(), f"step {step}"
        assert opt.current_step == STEPS
        assert wire.cuts >= CUTS
