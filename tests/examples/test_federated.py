"""`examples/federated.py`, as a program, against real servers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import federated
from trainer.test_data import write_idx

EXAMPLE = Path(federated.__file__)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Ten kinds of images that are easy to tell apart."""
    folder = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 6000), ("t10k", 500)):
        labels = rng.integers(0, 10, count)
        images = rng.integers(0, 100, (count, 5, 5))
        images.reshape(count, 25)[np.arange(count), 2 * labels] += 150
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels)
    return folder


@pytest.mark.parametrize("rate", ["constant", "flwr"])
def test_the_clients_train_one_network_together(server, client, name, small, tmp_path, rate):
    report = tmp_path / "report.json"
    options = ("--rounds", 12, "--rate", rate, "--name", name, "--data-dir", small, "--json", report)
    done = run("--target", server.target, *options)
    assert done.returncode == 0, done.stderr
    errors = json.loads(report.read_text())["test_errors"]
    assert len(errors) == 12
    assert errors[-1] < 0.05
    assert errors[-1] < errors[0] / 3
    assert done.stdout.endswith(f"round 12   test error {100 * errors[-1]:5.2f} %\n")
    assert name not in [found.name for found in client.list_optimizers()], "the name is free again"


def test_a_server_of_its_own_gives_the_same_run(small, tmp_path):
    reports = []
    for turn in range(2):
        path = tmp_path / f"{turn}.json"
        done = run("--rounds", 2, "--data-dir", small, "--json", path)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(path.read_text())["test_errors"])
    assert reports[0] == reports[1]


def test_each_image_has_one_client_and_most_clients_lack_digits():
    labels = np.repeat(np.arange(10), 600)
    shares = federated.split(labels, 20, 0.1, np.random.default_rng(0))
    assert sorted(np.concatenate(shares)) == list(range(6000))
    kinds = [len(np.unique(labels[share])) for share in shares]
    assert np.median(kinds) < 10
    assert min(map(len, shares)) >= federated.BATCH


def test_too_few_images_are_said():
    with pytest.raises(ValueError, match=r"pass a larger alpha than 0\.1"):
        federated.split(np.repeat(np.arange(2), 330), 20, 0.1, np.random.default_rng(0))


@pytest.mark.mnist
@pytest.mark.timeout(400)
@pytest.mark.xdist_group("mnist")
def test_the_real_mnist_is_learned_as_the_docstring_says(tmp_path):
    report = tmp_path / "report.json"
    done = run("--json", report)
    assert done.returncode == 0, done.stderr
    assert json.loads(report.read_text())["test_errors"][-1] == pytest.approx(0.03, abs=0.004)
