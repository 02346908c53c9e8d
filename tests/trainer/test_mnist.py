"""`optserve mnist`, as a program, against real servers."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from optserve import DiagonalHessian, Sgd, local_server
from optserve.algorithms import ALGORITHMS
from optserve.cli.mnist_options import ActivationName
from optserve_demo.mnist.data import load
from optserve_demo.mnist.train import BATCH, Plateau, Report, Task, new_network, train
from present import present
from trainer.test_data import write_idx


def optserve(*arguments: object, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from optserve.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Two kinds of images that are easy to tell apart."""
    folder = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 2000), ("t10k", 500)):
        labels = rng.integers(0, 2, count)
        images = rng.integers(0, 100, (count, 5, 5)) + 100 * labels[:, None, None]
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels)
    return folder


@pytest.mark.mnist
@pytest.mark.timeout(400)
@pytest.mark.xdist_group("mnist")
def test_the_papers_network_reaches_the_papers_error_on_the_real_mnist(tmp_path):
    """Section 4.1: tanh, rho 0.95, eps 1e-6, 6 epochs: 2.00 %."""
    report, plot = tmp_path / "report.json", tmp_path / "plot.png"
    done = optserve(
        "mnist", "--algorithm", "adadelta", "--rho", "0.95", "--eps", "1e-6", "--activation", "tanh", "--epochs", "6",
        "--json", report, "--plot", plot, timeout=390,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(report.read_text())
    assert 0.017 <= result["test_error"] <= 0.024
    assert result["steps"] == 3600
    assert result["server"]["backend"] == "numba"
    assert len(result["epochs"]) == 6
    assert result["epochs"][-1]["loss"] < result["epochs"][0]["loss"] / 4
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"Test error {100 * result['test_error']:.2f} % after 6 epochs: 3,600 steps" in done.stdout


@pytest.mark.mnist
@pytest.mark.timeout(400)
@pytest.mark.xdist_group("mnist")
@pytest.mark.parametrize("algorithm", ["vsgd", "diagonal_hessian"])
def test_the_methods_that_take_curvature_train_the_real_mnist_without_a_tuned_rate(tmp_path, algorithm):
    report = tmp_path / "report.json"
    done = optserve("mnist", "--algorithm", algorithm, "--epochs", "6", "--json", report, timeout=390)
    assert done.returncode == 0, done.stderr
    assert json.loads(report.read_text())["test_error"] < 0.04


@pytest.mark.mnist
@pytest.mark.timeout(400)
@pytest.mark.xdist_group("mnist")
@pytest.mark.parametrize(("replicas", "activation"), [(100, "logistic"), (200, "relu")])
def test_adadelta_converges_with_as_many_asynchronous_replicas_as_in_the_paper(tmp_path, replicas, activation):
    """Figures 3 and 4, the first of their 40 epochs: 22 and 18 % after 6, where unscaled updates stay at 90 %."""
    report = tmp_path / "report.json"
    options = ("--replicas", replicas, "--activation", activation, "--epochs", 6)
    done = optserve("mnist", *options, "--json", report, timeout=390)
    assert done.returncode == 0, done.stderr
    result = json.loads(report.read_text())
    assert result["test_error"] < 0.45
    assert result["test_error"] < result["epochs"][0]["test_error"]
    assert result["settings"]["mean_staleness"] > 0.9 * replicas


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_method_learns(server, small, tmp_path, algorithm):
    report = tmp_path / "report.json"
    done = optserve("mnist", "--target", server.target, "--algorithm", algorithm, "--data-dir", small, "--json", report)
    assert done.returncode == 0, done.stderr
    result = json.loads(report.read_text())
    assert result["test_error"] < 0.05
    assert result["settings"]["algorithm"]["name"] == algorithm
    assert result["server"]["target"] == server.target


def test_the_same_seed_gives_the_same_run(server, small, tmp_path):
    reports = []
    for turn, seed in enumerate((3, 3, 4)):
        path = tmp_path / f"{turn}.json"
        done = optserve(
            "mnist", "--target", server.target, "--seed", seed, "--epochs", 2, "--data-dir", small, "--json", path
        )
        assert done.returncode == 0, done.stderr
        reports.append([epoch["loss"] for epoch in json.loads(path.read_text())["epochs"]])
    assert reports[0] == reports[1]
    assert reports[0] != reports[2]


@pytest.mark.parametrize("method", [Sgd(learning_rate=0.5), DiagonalHessian(mu=2.0)], ids=["sgd", "diagonal_hessian"])
def test_weight_decay_acts_on_the_weights_and_not_on_the_biases(client, name, small, method):
    dataset = load(small, lambda _line: None)
    dataset = replace(dataset, train_images=dataset.train_images[:BATCH], train_labels=dataset.train_labels[:BATCH])
    network, alike = (new_network(dataset, "tanh", seed=0) for _ in range(2))
    optimizer = client.create_optimizer(name, method, network.params)
    report = Report({})
    train(Task(network, dataset, report, epochs=1), optimizer, lambda _: None, weight_decay=0.25)
    assert report.steps == 1
    alike.loss_and_gradients(dataset.train_images, dataset.train_labels, with_curvature=True)
    for key, param in alike.params.items():
        decay = 0.25 if key.startswith("w") else 0.0
        curvature = np.abs(alike.curvature[key] + decay)
        rate = 0.5 if method.name == "sgd" else 1 / (curvature + 2)
        expected = param - rate * (alike.grads[key] + decay * param)
        np.testing.assert_allclose(network.params[key], expected, rtol=1e-4, atol=1e-6)


def test_weight_decay_is_an_option_and_in_the_report(server, small, tmp_path):
    losses = {}
    for decay in (0, 0.01):
        path = tmp_path / "report.json"
        done = optserve(
            "mnist", "--target", server.target, "--weight-decay", decay, "--data-dir", small, "--json", path
        )
        assert done.returncode == 0, done.stderr
        report = json.loads(path.read_text())
        assert report["settings"]["weight_decay"] == decay
        losses[decay] = report["epochs"][-1]["loss"]
    assert losses[0.01] > losses[0]


def test_the_learning_rate_falls_on_a_plateau_of_the_held_out_error(client, name, small):
    dataset, report = load(small, lambda _line: None), Report({})
    network = new_network(dataset, "tanh", seed=0)
    optimizer = client.create_optimizer(name, Sgd(learning_rate=1e-30), network.params)
    # Nothing is learned at this rate, so the error never falls.
    plateau = Plateau(factor=0.5, patience_epochs=2, held_out=100)
    train(Task(network, dataset, report, epochs=5), optimizer, lambda _: None, plateau=plateau)
    rates = [(change["after_epoch"], change["learning_rate"]) for change in report.settings["annealed"]]
    assert rates == [(3, 5e-31), (5, 2.5e-31)]
    assert optimizer.algorithm.learning_rate == 2.5e-31
    assert report.steps == 5 * -(-(len(dataset.train_labels) - 100) // BATCH)


def test_the_command_anneals_where_it_is_told_to(server, tmp_path):
    rng = np.random.default_rng(0)
    # One batch more than the 5,000 images that are held out.
    for prefix, count in (("train", 5000 + BATCH), ("t10k", 10)):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", rng.integers(0, 256, (count, 5, 5)))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", rng.integers(0, 2, count))
    report = tmp_path / "report.json"
    # Nothing is learned at this rate, so the error never falls.
    done = optserve(
        "mnist", "--target", server.target, "--data-dir", tmp_path, "--algorithm", "sgd", "--learning-rate", "1e-30",
        "--anneal", "plateau", "--patience", "1", "--epochs", "3", "--json", report,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    annealed = json.loads(report.read_text())["settings"]["annealed"]
    assert [(change["after_epoch"], change["learning_rate"]) for change in annealed] == [(2, 5e-31), (3, 2.5e-31)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--algorithm", "vsgd"), "vsgd has no learning rate that could be annealed"),
        (("--replicas", "2"), "--anneal is for a single trainer"),
        (("--data-dir", "small"), "5000 cannot be held out"),
    ],
)
def test_what_cannot_be_annealed_is_said(server, small, options, message):
    given = [small if option == "small" else option for option in options]
    done = optserve("mnist", "--target", server.target, "--anneal", "plateau", *given)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())


@pytest.mark.parametrize("scaled", [True, False])
def test_replicas_scale_by_staleness_unless_told_otherwise(server, small, tmp_path, scaled):
    path = tmp_path / "report.json"
    options = () if scaled else ("--no-scale-by-staleness",)
    done = optserve(
        "mnist",
        "--target",
        server.target,
        "--replicas",
        2,
        "--epochs",
        1,
        "--data-dir",
        small,
        "--json",
        path,
        *options,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(path.read_text())["settings"]["scale_by_staleness"] == scaled


@pytest.mark.parametrize("consistency", ["async", "bounded:1", "sync", "sync:2"])
def test_replicas_share_the_weights_and_learn(server, client, small, tmp_path, consistency):
    path = tmp_path / "report.json"
    options = ("--replicas", 7, "--consistency", consistency, "--epochs", 4, "--data-dir", small, "--json", path)
    options += ("--no-scale-by-staleness",)
    done = optserve("mnist", "--target", server.target, "--algorithm", "momentum", *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert report["test_error"] < 0.05
    assert len(report["epochs"]) == 4
    # 286 or 285 images are 3 batches.
    assert report["steps"] >= 4 * 7 * 3 - (2 * 4 * 3 if consistency == "sync:2" else 0)
    assert (report["settings"]["stalest"] == 0) == consistency.startswith("sync")
    assert not [item.name for item in client.list_optimizers() if "mnist" in item.name]


def test_replicas_may_push_and_fetch_less_often(server, small, tmp_path):
    path = tmp_path / "report.json"
    options = ("--replicas", 4, "--epochs", 6, "--data-dir", small, "--json", path, "--algorithm", "momentum")
    periods = ("--push-every", 2, "--fetch-every", 3)
    done = optserve("mnist", "--target", server.target, *options, *periods)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert report["test_error"] < 0.08
    # 500 images are 5 batches, and 30 batches of each replica 15 steps.
    assert report["steps"] == 4 * 30
    assert report["epochs"][-1]["steps"] == 4 * 15
    assert report["settings"]["mean_staleness"] > 1


def test_replicas_in_sync_give_the_same_bits_each_time(server, small, tmp_path):
    losses = []
    for turn in range(2):
        path = tmp_path / f"{turn}.json"
        options = ("--replicas", 4, "--consistency", "sync", "--epochs", 1, "--data-dir", small, "--json", path)
        assert optserve("mnist", "--target", server.target, *options).returncode == 0
        losses.append(json.loads(path.read_text())["epochs"][0]["test_error"])
    assert losses[0] == losses[1]


def test_nothing_is_left_behind_on_the_server(server, client, small):
    assert optserve("mnist", "--target", server.target, "--epochs", 1, "--data-dir", small).returncode == 0
    assert not [item.name for item in client.list_optimizers() if "mnist" in item.name]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_ends_the_training_in_order_with_a_report_of_what_was_done(small, tmp_path, number):
    report = tmp_path / "report.json"
    # Where the tests run in the background, SIGINT is ignored, and children inherit that. Not a preexec_fn, for which
    # this process would have to fork: that does not go with gRPC in it.
    program = (
        "import signal; from optserve_command import main; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "main()"
    )
    command = [sys.executable, "-u", "-c", program, "mnist", "--epochs", "10000"]
    command += ["--data-dir", str(small), "--json", str(report), "--backend", "numpy"]
    # A process group of its own gets the signal, as from a terminal: also what it has started.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    for line in iter(present(process.stdout).readline, ""):
        if line.startswith("epoch"):
            break
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 130, errors
    assert "Stopped after" in output
    assert "Traceback" not in errors
    assert json.loads(report.read_text())["epochs"]


def test_the_trainer_says_that_it_waits_for_its_server_and_goes_on(small, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    options = ["--port", str(port), "--log-level", "warning"]
    program = "from optserve_command import main; main()"
    command = [sys.executable, "-u", "-c", program, "mnist", "--target", f"127.0.0.1:{port}", "--data-dir", str(small)]
    with local_server(tmp_path / "data", backend="numpy", options=options) as server:
        process = subprocess.Popen([*command, "--epochs", "10000"], stdout=subprocess.PIPE, text=True)
        lines = iter(present(process.stdout).readline, "")
        next(line for line in lines if line.startswith("epoch   1 "))
        server.process.kill()
        server.process.wait()
    said: list[str] = []
    while not said or not said[-1].startswith("Waiting"):
        said.append(next(lines))
    assert re.match(rf"No step for \d+ s: 127.0.0.1:{port} does not answer: Connection refused", said[-2])
    assert said[-1] == f"Waiting for 127.0.0.1:{port}, for up to 300 s.\n"
    with local_server(tmp_path / "data", backend="numpy", options=options):
        back = re.compile(rf"127.0.0.1:{port} answers again after \d+ s")
        after: list[str] = []
        while not (any(map(back.match, after)) and any(line.startswith("epoch") for line in after)):
            after.append(next(lines))
        process.send_signal(signal.SIGTERM)
        assert "Stopped after" in process.communicate(timeout=60)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "127.0.0.1:1"], "No optserve server answers at 127.0.0.1:1"),
        (["--algorithm", "sgd", "--rho", "0.5"], "sgd has no rho; it has learning_rate"),
        (["--algorithm", "adamax"], "adamax"),
        (["--rho", "2"], "adadelta.rho is 2.0, but must lie in [0, 1)"),
        (["--data-dir", "/nonexistent"], "is not a folder"),
        (["--json", "/nonexistent/report.json"], "There is no folder /nonexistent"),
        (["--plot", "plot.bmp"], "--plot draws .png, .svg or .pdf"),
        (["--epochs", "0"], "--epochs"),
        (["--weight-decay", "-1"], "--weight-decay"),
        (["--replicas", "2", "--consistency", "often"], "'often' is no consistency: async, bounded:S, sync or sync:B"),
        (["--replicas", "2", "--consistency", "sync:2"], "B backup workers of 2 replicas"),
        (["--replicas", "2", "--consistency", "sync", "--push-every", "2"], "In sync every batch is a step of all"),
        (["--replicas", "21"], "21 replicas need at least 2100 images; there are 2000"),
        (["--replicas", "2", "--algorithm", "vsgd"], "vsgd takes curvature, which replicas do not send"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line_before_anything_is_trained(small, arguments, message):
    folder = [] if "--data-dir" in arguments else ["--data-dir", small]
    done = optserve("mnist", "--backend", "numpy", *folder, *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_commands_of_a_server(server, client, name):
    import optserve as package

    client.create_optimizer(name, package.Adadelta(), {"x": package.TensorSpec((1000,))})
    health = optserve("health", "--target", server.target)
    assert (health.returncode, health.stdout) == (0, f"{server.target} is SERVING\n")
    info = optserve("info", "--target", server.target)
    assert "numba on CPU" in info.stdout
    assert "not in this version" not in info.stdout
    listed = optserve("optimizers", "list", "--target", server.target)
    assert name in listed.stdout
    assert "11.7 KiB" in listed.stdout
    assert "square_avg" in optserve("optimizers", "show", name, "--target", server.target).stdout
    assert optserve("optimizers", "delete", name, "--yes", "--target", server.target).returncode == 0
    assert name not in optserve("optimizers", "list", "--target", server.target).stdout
    missing = optserve("optimizers", "delete", name, "--yes", "--target", server.target)
    assert missing.returncode == 1
    assert "There is no optimizer" in missing.stderr


def test_health_of_nobody_is_an_error():
    done = optserve("health", "--target", "127.0.0.1:1", "--timeout-s", "0.5")
    assert done.returncode == 1
    assert "does not answer" in done.stderr


@pytest.mark.parametrize(
    "command", [[], ["mnist"], ["serve"], ["journal"], ["config"], ["health"], ["info"], ["optimizers"]]
)
def test_every_command_has_a_help_text(command):
    done = optserve(*command, "--help")
    assert done.returncode == 0
    assert "Usage:" in done.stdout


def test_the_choices_of_the_command_line_are_those_of_the_package():
    from optserve_demo.mnist.network import ACTIVATIONS

    assert set(ActivationName.__args__) == set(ACTIVATIONS)
