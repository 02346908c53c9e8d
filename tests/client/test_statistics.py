"""Statistics of an optimizer: what they say, that they are of one step, and what cannot be asked."""

import subprocess
import sys
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest

import optserve
from optserve.v1 import statistics_pb2
from present import present
from service.wire_client import create, refused

SHAPES = {"w": ((30, 7), "float32"), "b": ((9,), "float64"), "none": ((0, 3), "float32")}


def gradients(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, (shape, dtype) in SHAPES.items()}


def stepped(client, name: str, algorithm: optserve.Algorithm, steps: int = 3, **options) -> optserve.Optimizer:
    opt = client.create_optimizer(name, algorithm, gradients(0), **options)
    for seed in range(steps):
        if algorithm.takes_curvature:
            opt.step(gradients(seed), curvature=gradients(100 + seed))
        else:
            opt.step(gradients(seed))
    return opt


def test_adadeltas_root_mean_squares_are_those_of_its_slots(client, name):
    opt = stepped(client, name, optserve.Adadelta(rho=0.9, eps=1e-4))
    found, slots = opt.statistics(quantiles=[0.0, 0.5, 1.0]), opt.export_state().slots
    assert found.step == 3
    assert list(found.parameters) == list(SHAPES)
    for parameter in ("w", "b"):
        item = found.parameters[parameter]
        square, delta = (slots[parameter][slot].astype(np.float64) for slot in ("square_avg", "acc_delta"))
        assert item.rms_gradient == pytest.approx(np.sqrt(square.mean() + 1e-4), rel=1e-12)
        assert item.rms_update == pytest.approx(np.sqrt(delta.mean() + 1e-4), rel=1e-12)
        assert list(item.rates) == [0.0, 0.5, 1.0]
    assert found.parameters["none"].rates == {}


@pytest.mark.parametrize("square", [1.7e308, 1e300, 4.0])
def test_a_mean_of_squares_whose_sum_is_beyond_float64_is_told(client, name, square):
    opt = client.create_optimizer(name, optserve.Adadelta(), {"w": np.zeros(1000)})
    state = opt.export_state()
    state.slots["w"]["square_avg"][:] = square
    opt.import_state(state)
    assert opt.statistics().parameters["w"].rms_gradient == pytest.approx(np.sqrt(square), rel=1e-6)


EXPECTED_RATES = {
    "sgd": (optserve.Sgd(learning_rate=0.25), lambda _s: 0.25),
    "momentum": (optserve.Momentum(learning_rate=0.25), lambda _s: 0.25),
    "adagrad": (optserve.Adagrad(learning_rate=0.25), lambda s: 0.25 / (np.sqrt(s["sum"]) + 1e-10)),
    "windowed_rms": (
        optserve.WindowedRms(learning_rate=0.25, outer_eps=1e-3),
        lambda s: 0.25 / (np.sqrt(s["square_avg"] + 1e-6) + 1e-3),
    ),
    # In the third step.
    "adam": (
        optserve.Adam(learning_rate=0.25, eps=1e-3),
        lambda s: 0.25 / (np.sqrt(s["square_avg"] / (1 - 0.999**3)) + 1e-3),
    ),
    "adamw": (
        optserve.AdamW(learning_rate=0.25, beta2=0.9),
        lambda s: 0.25 / (np.sqrt(s["square_avg"] / (1 - 0.9**3)) + 1e-8),
    ),
    "yogi": (optserve.Yogi(learning_rate=0.25), lambda s: 0.25 / (np.sqrt(s["square_avg"]) + 1e-3)),
    "fed_adam": (
        optserve.FedAdam(learning_rate=0.25, bias_correction=True),
        lambda s: 0.25 / (np.sqrt(s["square_avg"] / (1 - 0.99**3)) + 1e-3),
    ),
    "nadam": (
        optserve.Nadam(learning_rate=0.25),
        lambda s: 0.25 / (np.sqrt(s["square_avg"] / (1 - 0.999**3)) + 1e-8),
    ),
    "sgd_momentum": (optserve.SgdMomentum(learning_rate=0.25, nesterov=True), lambda _s: 0.25),
    "rmsprop": (
        optserve.Rmsprop(learning_rate=0.25, momentum=0.5),
        lambda s: 0.25 / (np.sqrt(s["square_avg"]) + 1e-8),
    ),
    "centered_rmsprop": (
        optserve.CenteredRmsprop(learning_rate=0.25),
        lambda s: 0.25 / (np.sqrt(s["square_avg"] - s["grad_avg"] ** 2) + 1e-8),
    ),
    "vsgd": (
        optserve.Vsgd(initial_steps=2),
        lambda s: s["grad_avg"] ** 2 / s["square_avg"] / (s["curvature_avg"] + 1e-2),
    ),
}


@pytest.mark.parametrize("method", EXPECTED_RATES)
def test_the_rates_of_every_method_are_the_factors_on_the_gradient(client, name, method):
    algorithm, expected = EXPECTED_RATES[method]
    opt = stepped(client, name, algorithm)
    elements = opt.statistics(["b"], indices=[0, 8, 3]).parameters["b"].elements
    slots = {slot: array[[0, 8, 3]] for slot, array in opt.export_state().slots["b"].items()}
    assert elements.indices.tolist() == [0, 8, 3]
    assert elements.rates is not None
    np.testing.assert_allclose(elements.rates, np.broadcast_to(expected(slots), 3), rtol=1e-9)
    for slot, array in slots.items():
        np.testing.assert_array_equal(elements.slots[slot], array)


def test_the_rate_of_the_diagonal_hessian_depends_on_the_curvature_and_is_absent(client, name):
    item = stepped(client, name, optserve.DiagonalHessian()).statistics(indices=[1], names=["w"]).parameters["w"]
    assert (item.rates, item.elements.rates, item.rms_gradient) == ({}, None, None)
    assert item.elements.updates is not None


def test_lion_moves_by_its_rate_and_has_no_factor_on_the_gradient(client, name):
    item = stepped(client, name, optserve.Lion(learning_rate=0.5)).statistics(indices=[1], names=["b"]).parameters["b"]
    assert (item.rates, item.elements.rates) == ({}, None)
    assert abs(present(item.elements.updates)).tolist() == [0.5]


def test_rates_follow_schedules_and_groups(client, name):
    opt = stepped(
        client, name, optserve.Sgd(learning_rate=1.0), schedule=optserve.InverseTime(decay=1.0),
        groups=[optserve.Group(["b"], {"learning_rate": 8.0})],
    )  # fmt: skip
    found = opt.statistics(quantiles=[0.5]).parameters
    # Those of the last step, before which two had been applied.
    assert found["w"].rates == {0.5: pytest.approx(1 / 3)}
    assert found["b"].rates == {0.5: pytest.approx(8 / 3)}
    opt.update(optserve.Sgd(learning_rate=5.0), schedule=None, groups=[])
    after = opt.statistics(quantiles=[0.5]).parameters
    assert [after[parameter].rates for parameter in "wb"] == [found[parameter].rates for parameter in "wb"]


@pytest.mark.parametrize(
    "algorithm", [optserve.Adadelta(rho=0.9, eps=1e-4, learning_rate=0.3), optserve.Adadelta(rho=0)]
)
@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_a_rate_of_adadelta_is_the_factor_between_the_last_gradient_and_its_update(client, name, algorithm, transport):
    client.create_optimizer(name, algorithm, gradients(0))
    opt = client.optimizer(name, transport=transport)
    updates = {}
    for seed in range(4):
        updates = opt.step(gradients(seed))
    found = opt.statistics(indices=[0, 8], quantiles=[0.0, 0.5, 1.0], names=["w", "b"]).parameters
    for parameter, precision in (("w", 2e-6), ("b", 1e-12)):
        item, rates = found[parameter], -updates[parameter].astype(np.float64) / gradients(3)[parameter]
        assert not item.rates_count_last_update
        np.testing.assert_allclose(list(item.rates.values()), np.quantile(rates, [0, 0.5, 1]), rtol=precision)
        np.testing.assert_allclose(item.elements.rates, rates.reshape(-1)[[0, 8]], rtol=precision)


def test_without_the_last_update_rates_count_it_and_say_so(client, name):
    client.create_optimizer(name, optserve.Adadelta(eps=1e-4), gradients(0))
    opt = client.optimizer(name, transport="grpc")
    opt.step(gradients(0))
    opt.step({"b": gradients(1)["b"]}, partial=True)
    found, slots = opt.statistics(names=["w", "b"], indices=[0]).parameters, opt.export_state().slots["w"]
    assert found["w"].rates_count_last_update
    assert not found["b"].rates_count_last_update
    expected = np.sqrt((slots["acc_delta"][0, 0] + 1e-4) / (slots["square_avg"][0, 0] + 1e-4))
    np.testing.assert_allclose(found["w"].elements.rates, [expected], rtol=1e-6)


def test_the_memory_that_a_client_has_begun_to_overwrite_is_no_last_update(client, name):
    client.create_optimizer(name, optserve.Adadelta(), gradients(0))
    opt = client.optimizer(name, transport="shm")
    opt.step(gradients(0))
    assert opt.statistics(["w"], indices=[0]).parameters["w"].elements.updates is not None
    opt.buffers()["w"][...] = 7.0
    item = opt.statistics(["w"], indices=[0]).parameters["w"]
    assert item.elements.updates is None
    assert item.rates_count_last_update


def test_rates_are_the_same_after_a_restart_and_those_of_the_settings_after_a_restore(tmp_path):
    schedule = optserve.Exponential(rate=0.5)
    with optserve.local_server(tmp_path) as server, optserve.connect(server.target) as client:
        opt = client.create_optimizer("kept", optserve.Adadelta(), gradients(0), schedule=schedule)
        for seed in range(3):
            opt.step(gradients(seed))
        opt.save_checkpoint("three")
        before = opt.statistics(indices=[0, 3], names=["w", "b"])
    with optserve.local_server(tmp_path) as server, optserve.connect(server.target) as client:
        opt = client.optimizer("kept")
        after = opt.statistics(indices=[0, 3], names=["w", "b"])
        for parameter, item in before.parameters.items():
            assert after.parameters[parameter].rates == item.rates
            assert (
                present(present(after.parameters[parameter].elements).updates).tolist()
                == present(present(item.elements).updates).tolist()
            )
        opt.step(gradients(9))
        opt.restore_checkpoint("three")
        restored = opt.statistics(names=["b"], indices=[0]).parameters["b"]
        slots = opt.export_state().slots["b"]
        assert restored.rates_count_last_update
        # A quarter is the factor of the third step.
        expected = 0.25 * np.sqrt((slots["acc_delta"][0] + 1e-6) / (slots["square_avg"][0] + 1e-6))
        assert restored.elements.rates is not None
        np.testing.assert_allclose(restored.elements.rates, [expected], rtol=1e-12)


def test_elements_have_the_last_update_as_long_as_it_is_retained(client, name):
    client.create_optimizer(name, optserve.Adadelta(), gradients(0))
    opt = client.optimizer(name, transport="grpc")
    assert opt.statistics(indices=[0], names=["w"]).parameters["w"].elements.rates is None
    updates = opt.step(gradients(0))
    elements = opt.statistics(["w"], random_indices=10, seed=7).parameters["w"].elements
    np.testing.assert_array_equal(elements.updates, updates["w"].reshape(-1)[elements.indices])
    opt.step({"b": gradients(1)["b"]}, partial=True)
    assert opt.statistics(["w"], indices=[0]).parameters["w"].elements.updates is None
    assert opt.statistics(["b"], indices=[0]).parameters["b"].elements.updates is not None


def test_a_draw_depends_on_its_seed_alone(client, name):
    opt = stepped(client, name, optserve.Adadelta())

    def drawn(seed: int) -> list[list[int]]:
        found = opt.statistics(random_indices=20, seed=seed).parameters
        return [item.elements.indices.tolist() for item in found.values()]

    first = drawn(1)
    assert [len(indices) for indices in first] == [20, 9, 0]
    assert all(indices == sorted(set(indices)) for indices in first)
    assert first == drawn(1) != drawn(2)


def test_all_of_it_is_of_one_step_while_steps_go_on(client, name):
    """With rho 0 both parameters' averages are the square of their last gradient, which is the same for both."""
    ones = {name: np.ones(50_000, np.float32) for name in ("a", "b")}
    client.create_optimizer(name, optserve.Adadelta(rho=0.0, eps=1e-30), ones)
    opt, looking = client.optimizer(name), client.optimizer(name)
    ended = threading.Event()

    def step() -> None:
        for turn in range(1, 400):
            opt.step({key: turn * array for key, array in ones.items()})
        ended.set()

    thread = threading.Thread(target=step)
    thread.start()
    looks = []
    while not ended.is_set():
        found = looking.statistics(indices=[3])
        looks.append(found.step)
        squares = [item.elements.slots["square_avg"][0] for item in found.parameters.values()]
        assert squares == [found.step**2] * 2
    thread.join()
    assert opt.current_step == 399
    assert len(set(looks)) > 3


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"names": ["x"]}, "has no parameter 'x'"),
        ({"indices": [9], "names": ["b"]}, "'b' has 9 elements, so there is no index 9"),
        ({"quantiles": [1.5]}, r"A quantile must lie in \[0, 1\], not at 1.5"),
        ({"quantiles": [float("nan")]}, "not at nan"),
        ({"indices": [0], "random_indices": 3, "names": ["b"]}, "not both"),
        ({"random_indices": 1 << 30}, "at most 100000"),
        ({"indices": [0] * 60_000, "names": ["w", "b"]}, "at most 100000"),
    ],
)
def test_questions_that_make_no_sense_are_refused(client, name, question, message):
    opt = client.create_optimizer(name, optserve.Adadelta(), gradients(0))
    with pytest.raises(optserve.InvalidArgumentError, match=message):
        opt.statistics(**question)


def test_a_parameter_that_is_not_there_is_named(stub, name):
    resource = create(stub, name, {"x": (2,)}).name
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "UNKNOWN_PARAMETER", "tensors"):
        stub.GetStatistics(statistics_pb2.GetStatisticsRequest(name=resource, tensors=[1]))


def test_the_command_line_shows_them(server, client, name):
    stepped(client, name, optserve.Adadelta())
    command = [Path(sys.executable).with_name("optserve"), "optimizers", "statistics", name, "--target", server.target]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"COLUMNS": "120"})
    assert done.returncode == 0, done.stderr
    assert "at step 3" in done.stdout
    assert "RMS[g]" in done.stdout
