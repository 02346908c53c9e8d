"""An optimizer that got no name is deleted at the server, also if nobody closes it."""

import gc
import os
import signal
import subprocess
import sys
import time
import weakref

import pytest

import optserve
import optserve.torch
from optserve.torch import RemoteOptimizer
from pytorch.networks import loop, network

BEGIN = """
import gc, os, signal, sys
import torch
import optserve, optserve.torch
def made(server):
    model = torch.nn.Linear(3, 2)
    optimizer = optserve.torch.RemoteOptimizer(model.parameters(), server, optserve.Adam())
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    print(optimizer.remote.name, flush=True)
    return optimizer
target = sys.argv[-1]
"""
ENDS = {
    "end": "optimizer = made(target)",
    "error": "optimizer = made(target)\nraise KeyError('mine')",
    "exit": "optimizer = made(target)\nsys.exit(3)",
    "client": "optimizer = made(optserve.connect(target))",
    "closed client": "with optserve.connect(target) as client:\n    optimizer = made(client)",
    "collected": "made(target)\ngc.collect()",
    "scheduler": "scheduler = torch.optim.lr_scheduler.StepLR(made(target), 1)",
    "interrupted": "optimizer = made(target)\nraise KeyboardInterrupt",
    "thread": (
        "import threading\noptimizer = made(target)\n"
        "def forever():\n    while True:\n        optimizer.step()\n"
        "threading.Thread(target=forever, daemon=True).start()"
    ),
}


def script(text: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN + text, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def names(client: optserve.Client) -> set[str]:
    return {found.name for found in client.list_optimizers()}


@pytest.mark.parametrize("end", ENDS)
def test_a_program_that_ends_without_close_leaves_no_optimizer(server, client, end):
    ended = script(ENDS[end], server.target)
    out, errors = ended.communicate(timeout=60)
    assert out.startswith("torch-"), errors
    assert out.strip() not in names(client)
    assert "may stay" not in errors


def test_one_that_nobody_has_any_more_is_deleted_when_the_next_is_made(server, client):
    """As in a notebook, where a cell runs twice."""
    model = network()
    optimizer = RemoteOptimizer(model.parameters(), server.target, optserve.Adam())
    loop(model, optimizer, range(2))
    name, gone = optimizer.remote.name, weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    with RemoteOptimizer(model.parameters(), client, optserve.Adam()) as another:
        assert name not in names(client)
        assert another.remote.name in names(client)


def test_a_forked_process_deletes_nothing_of_its_parent(server, client):
    ended = script(
        """
optimizer = made(target)
if os.fork() == 0:
    with optimizer:
        pass
    del optimizer
    gc.collect()
    sys.exit()  # runs what is to run at exit
os.wait()
optimizer.step()
print(optimizer.remote.name in [found.name for found in optserve.connect(target).list_optimizers()])
""",
        server.target,
    )
    out, errors = ended.communicate(timeout=60)
    name, there = out.split()
    assert there == "True", errors
    assert name not in names(client)


@pytest.mark.parametrize("kill", ["kill()", "send_signal(signal.SIGSTOP)"], ids=["dead", "stopped"])
def test_a_server_that_does_not_answer_delays_the_end_by_seconds_only(kill):
    """It is killed, or it hangs."""
    ended = script(
        f"""
server = optserve.LocalServer.start()
optimizers = [made(server.target) for _ in range(5)]
server.process.{kill}
print("end", server.process.pid, flush=True)
"""
    )
    assert ended.stdout is not None
    while (line := ended.stdout.readline()).startswith("torch-"):
        pass
    began = time.monotonic()
    _, errors = ended.communicate(timeout=60)
    assert line.startswith("end"), errors
    if "SIGSTOP" in kill:
        os.kill(int(line.split()[1]), signal.SIGKILL)
    assert time.monotonic() - began < 8
    assert errors.count("may stay at the server") == 5


def test_the_next_one_is_not_kept_from_being_made_by_a_server_that_is_gone(client):
    model = network()
    with optserve.local_server() as server:
        optimizer = RemoteOptimizer(model.parameters(), server.target, optserve.Adam())
        server.process.kill()
        server.process.wait()
        del optimizer
        gc.collect()
        began = time.monotonic()
        with pytest.warns(RuntimeWarning, match=r"'torch-\w+' may stay at the server"):
            another = RemoteOptimizer(model.parameters(), client, optserve.Adam())
        assert time.monotonic() - began < 8
        with another:
            loop(model, another, range(1))
