"""`examples/federated.py` beside Flower's own FedAdam, which has an environment of its own, `.venv/federated`."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import federated
from optserve_demo.mnist import data

ROOT = Path(__file__).parents[2]
ROUNDS = 20


@pytest.fixture(scope="module")
def python() -> Path:
    """Of the environment with Flower."""
    path = ROOT / ".venv/federated/bin/python"
    if not path.exists():
        pytest.fail("There is no .venv/federated; `make test-integrations` makes it.")
    return path


@pytest.mark.timeout(600)
def test_every_update_equals_that_of_flowers_fedadam_up_to_rounding_and_so_does_the_test_error(
    python, client, name, tmp_path
):
    """20 rounds of the real MNIST in float64, each of them trained on both sides: no run knows of the other's state."""
    dataset, log, theirs_file = data.load(), tmp_path / "flwr.log", tmp_path / "flwr.npz"
    task, x = federated.prepared(dataset, rounds=ROUNDS, flwr_rates=True)
    x = {key: array.astype(np.float64) for key, array in x.items()}
    ours = {0: x}
    command = [python, Path(__file__).with_name("flwr_federated.py"), "--rounds", str(ROUNDS), "--out", theirs_file]
    path = os.environ | {"PYTHONPATH": str(ROOT / "examples")}
    with log.open("w") as output, subprocess.Popen(command, env=path, stdout=output, stderr=output) as flower:
        with threadpool_limits(1):
            federated.train(client, name, x, task, ours.__setitem__)
        flower.wait()
    assert flower.returncode == 0, log.read_text()
    with np.load(theirs_file) as found:
        theirs = [{key: found[f"{round_} {key}"] for key in x} for round_ in range(ROUNDS + 1)]
    for round_ in range(1, ROUNDS + 1):
        for key in x:
            our_update = ours[round_][key] - ours[round_ - 1][key]
            their_update = theirs[round_][key] - theirs[round_ - 1][key]
            np.testing.assert_allclose(our_update, their_update, rtol=1e-10, atol=1e-14, err_msg=f"{key} in {round_}")
    assert task.error(ours[ROUNDS]) == pytest.approx(task.error(theirs[ROUNDS]), abs=2e-4)
    assert task.error(ours[ROUNDS]) < 0.05
