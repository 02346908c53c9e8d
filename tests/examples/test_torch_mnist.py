"""`examples/torch_mnist.py`: three new lines, and the training of torch.optim.AdamW."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from optserve_demo.mnist import data

EXAMPLE = Path(__file__).parents[2] / "examples/torch_mnist.py"
SOURCE = EXAMPLE.read_text()
NEW = re.findall(r"^.*  # optserve$", SOURCE, re.MULTILINE)


def without_optserve() -> str:
    """The program that trains alone: without the new lines, with torch's own optimizer."""
    imported, made, closed = NEW
    own = "optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)"
    return SOURCE.replace(imported, "").replace(made, own).replace(closed, "")


def test_the_program_is_as_short_as_is_said():
    assert len(NEW) == 3
    assert "optserve." not in without_optserve().split('"""', 2)[2]
    code = [line for line in SOURCE.split('"""', 2)[2].splitlines() if line.strip()]
    assert len(code) <= 30


def test_it_trains_as_torchs_own_optimizer_does(server, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 2500).astype(np.uint8)
    images = rng.normal(size=(2500, 25)).astype(np.float32)
    images[np.arange(2500), 2 * labels] += 3
    small = data.Dataset(images[:2000], labels[:2000], images[2000:], labels[2000:], "made up")
    monkeypatch.setattr(data, "load", lambda: small)
    monkeypatch.setattr(sys, "argv", ["torch_mnist.py", server.target])
    weights, errors = [], []
    for program in (SOURCE, without_optserve()):
        left: dict = {}
        exec(compile(program, EXAMPLE, "exec"), left)  # noqa: S102
        weights.append(left["model"].state_dict())
        errors.append([float(error) for error in re.findall(r"test error (\S+) %", capsys.readouterr().out)])
    assert errors[0] == pytest.approx(errors[1], abs=0.5)
    assert errors[0][-1] < errors[0][0]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.mnist
@pytest.mark.timeout(400)
@pytest.mark.xdist_group("mnist")
def test_the_real_mnist_is_learned_as_the_docstring_says(server):
    # Where others compute too, threads that wait for one another take ten times as long.
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLE, server.target]
    done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=390, check=False)
    assert done.returncode == 0, done.stderr
    errors = re.findall(r"test error (\S+) %", done.stdout)
    assert len(errors) == 3
    assert float(errors[-1]) == pytest.approx(2.2, abs=0.3)
