"""`examples/char_transformer.py`: whoever is killed, the run ends with the same bits."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from durability.test_kill import Supervisor

EXAMPLE = Path(__file__).parents[2] / "examples/char_transformer.py"
STEPS = 40


def command(target: str, name: str) -> list[str]:
    return [sys.executable, str(EXAMPLE), "--target", target, "--name", name, "--steps", str(STEPS)]


def ended(target: str, name: str) -> str:
    """Run the example to its end; returns what it printed."""
    done = subprocess.run(command(target, name), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def weights_in(output: str) -> str:
    """The digest of the weights."""
    found = re.search(r"^SHA-256 of the weights: ([0-9a-f]{64})$", output, re.MULTILINE)
    assert found, output
    return found[1]


@pytest.fixture(scope="module")
def undisturbed(server) -> str:
    return ended(server.target, "char-transformer-undisturbed")


def test_it_learns_and_writes(undisturbed):
    lines = re.findall(r"^step +\d+ of 40   loss (\S+)   learning rate (\S+)$", undisturbed, re.MULTILINE)
    losses, rates = ([float(number) for number in column] for column in zip(*lines, strict=True))
    assert len(losses) == STEPS // 10
    assert list(rates) == sorted(rates, reverse=True), "after a warm-up of 4 steps the rates fall"
    assert losses[-1] < losses[0] < 3.5, "of 103 letters each is as likely at first: log 103 = 4.6"
    assert len(undisturbed.split("The ", 1)[1]) > 250


@pytest.mark.timeout(300)
def test_kills_of_the_server_leave_the_same_bits(undisturbed, tmp_path):
    """Five servers, one after another, die within their calls to the disk; the client goes on by itself."""
    supervisor = Supervisor(tmp_path, kills=5, seed=7, max_calls=30)
    try:
        output = ended(f"127.0.0.1:{supervisor.port}", "model")
    finally:
        supervisor.stop()
    assert not supervisor.failure
    assert supervisor.killed == 5
    assert weights_in(output) == weights_in(undisturbed)


@pytest.mark.timeout(300)
def test_kills_of_the_client_leave_the_same_bits(undisturbed, server, name):
    """The same command goes on where it was killed, here after the next tenth step."""
    seen = []
    for _ in range(3):
        with subprocess.Popen(command(server.target, name), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            found = re.match(r"step +(\d+) of 40", process.stdout.readline())
            process.kill()
        assert found
        seen.append(int(found[1]))
    assert seen == sorted(set(seen)), "no run begins anew"
    assert weights_in(ended(server.target, name)) == weights_in(undisturbed)
