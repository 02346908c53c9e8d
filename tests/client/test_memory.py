"""What a client and a server need beyond the arrays themselves, and that it does not grow."""

import json
import subprocess
import sys

import pytest

import optserve

MIB = 1 << 20

LARGE_STEPS = """
import json, sys
from pathlib import Path
import numpy as np
import optserve

def most_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

target, options, size = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
with optserve.connect(target) as client:
    def step(name, size, times):
        client.create_optimizer(name, optserve.Adadelta(), {"x": optserve.TensorSpec((size,))})
        opt = client.optimizer(name, **options)
        gradient, out = {"x": np.ones(size, np.float32)}, {"x": np.ones(size, np.float32)}
        before = most_memory()
        for _ in range(times):
            opt.step(gradient, out=out)
        return most_memory() - before

    # What does not depend on the size happens once before.
    step("warm", 1 << 20, 4)
    print(step("large", size, 4))
"""

MANY_STEPS = """
import sys
import numpy as np
import psutil
import optserve

target, server, transport, count = sys.argv[1], psutil.Process(int(sys.argv[2])), sys.argv[3], int(sys.argv[4])
with optserve.connect(target) as client:
    client.create_optimizer("small", optserve.Adadelta(), {"x": optserve.TensorSpec((256,))})
    opt = client.optimizer("small", transport=transport)
    gradient = {"x": np.ones(256, np.float32)}
    held = []
    for step in range(count):
        if step in (count // 10, count - 1):
            held.append([psutil.Process().memory_info().rss, server.memory_info().rss])
        opt.step(gradient)
print(*(late - early for early, late in zip(*held)))
"""


@pytest.mark.parametrize(
    ("options", "times_parameters"),
    [
        ({"transport": "grpc"}, 0),
        # The segment.
        ({"transport": "shm"}, 1),
        ({"wire_dtype": "bfloat16"}, 0),
        # What is carried over to the next step, and this step's gradients with it.
        ({"wire_dtype": "bfloat16", "error_feedback": True}, 2),
    ],
)
def test_a_client_needs_little_beyond_the_arrays_that_it_is_given(options, times_parameters):
    size = 96_000_000
    with optserve.local_server() as server:
        command = [sys.executable, "-c", LARGE_STEPS, server.target, json.dumps(options), str(size)]
        used = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # Freed memory that is kept, and the messages on their way.
    constant = 96 * MIB
    assert used <= times_parameters * 4 * size + constant <= 2.3 * 4 * size, f"{used / MIB:.0f} MiB"


@pytest.mark.parametrize("transport", ["grpc", "shm"])
@pytest.mark.timeout(600)
def test_a_hundred_thousand_steps_leave_no_growth(transport):
    with optserve.local_server() as server:
        arguments = [server.target, str(server.process.pid), transport, "100000"]
        run = subprocess.run([sys.executable, "-c", MANY_STEPS, *arguments], capture_output=True, text=True, check=True)
    client, server_growth = (int(growth) for growth in run.stdout.split())
    assert client < MIB, f"{client / 1024:.0f} KiB"
    assert server_growth < MIB, f"{server_growth / 1024:.0f} KiB"
