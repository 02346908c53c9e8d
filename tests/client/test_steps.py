"""Optimizer.step as users see it."""

import numpy as np
import pytest

import optserve
from present import present

PARAMS = {
    "w": np.zeros((50, 30), np.float32),
    "b": np.zeros(30, np.float64),
    "scalar": np.zeros((), np.float32),
    "empty": np.zeros((3, 0), np.float32),
}


def grads(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(param.shape), param.dtype) for name, param in PARAMS.items()}


@pytest.fixture(params=["shm", "grpc"])
def opt(request, client, name):
    client.create_optimizer(name, optserve.Adadelta(), PARAMS)
    return client.optimizer(name, transport=request.param)


def test_updates_have_the_shapes_and_dtypes_of_the_parameters(opt):
    updates = opt.step(grads())
    assert {name: (update.shape, update.dtype) for name, update in updates.items()} == {
        name: (param.shape, param.dtype) for name, param in PARAMS.items()
    }
    assert opt.current_step == 1
    # The first step of ADADELTA.
    g = grads()["b"]
    np.testing.assert_allclose(updates["b"], -np.sqrt(1e-6) / np.sqrt(0.05 * g**2 + 1e-6) * g, rtol=1e-12)


def test_updates_can_go_into_arrays_of_the_caller(client, name, opt):
    out = {key: np.full_like(param, np.nan) for key, param in PARAMS.items()}
    returned = opt.step(grads(), out=out)
    assert all(returned[key] is out[key] for key in PARAMS)
    other = client.create_optimizer(f"{name}-2", optserve.Adadelta(), PARAMS)
    assert all(np.array_equal(update, out[key]) for key, update in other.step(grads()).items())


@pytest.mark.parametrize("chunk_bytes", [1024, 1032, 4096])
def test_any_chunk_size_gives_the_same_bits(server, opt, name, chunk_bytes):
    config = optserve.ClientConfig(max_chunk_bytes=chunk_bytes, transport="grpc")
    with optserve.connect(server.target, config) as client:
        chunked = client.create_optimizer(f"{name}-chunked", optserve.Adadelta(), PARAMS)
        for seed in range(3):
            whole, pieces = opt.step(grads(seed)), chunked.step(grads(seed))
            assert all(whole[key].tobytes() == pieces[key].tobytes() for key in PARAMS)


def test_views_transposed_and_strided_gradients_are_taken_as_they_look(client, name):
    opt = client.create_optimizer(name, optserve.Sgd(learning_rate=1.0), {"w": optserve.TensorSpec((30, 50))})
    values = np.arange(1500, dtype=np.float32).reshape(50, 30)
    assert np.array_equal(opt.step({"w": values.T})["w"], -values.T)
    wide = np.arange(3000, dtype=np.float32).reshape(30, 100)
    assert np.array_equal(opt.step({"w": wide[:, ::2]})["w"], -wide[:, ::2])


def test_partial_steps_move_only_what_they_name(opt):
    updates = opt.step({"b": grads()["b"]}, partial=True)
    assert list(updates) == ["b"]
    with pytest.raises(optserve.InvalidArgumentError, match="no gradient for 'w'"):
        opt.step({"b": grads()["b"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros(3, np.float32)}, "no parameter 'x'"),
        ({"w": np.zeros((30, 50), np.float32)}, r"shape \[30, 50\], not \[50, 30\]"),
        ({"w": np.zeros((50, 30), np.float64)}, "float64, not float32"),
        ({"w": np.full((50, 30), np.nan, np.float32)}, "'w' is nan at flat index 0"),
    ],
)
def test_bad_gradients_raise_name_the_parameter_and_change_nothing(opt, change, message):
    with pytest.raises(optserve.InvalidArgumentError, match=message) as caught:
        opt.step(grads() | change)
    assert caught.value.metadata["parameter"] == next(iter(change))
    assert isinstance(caught.value, ValueError)
    opt.step(grads())
    assert opt.current_step == 1


@pytest.mark.parametrize(
    "bad", [{}, {"w": np.zeros((30, 50), np.float32).T}, {"w": np.broadcast_to(np.float32(0), (50, 30))}]
)
def test_bad_output_arrays_are_refused(opt, bad):
    out = {name: np.empty_like(param) for name, param in PARAMS.items()} | bad
    if not bad:
        del out["w"]
    with pytest.raises(optserve.InvalidArgumentError, match="'w'"):
        opt.step(grads(), out=out)


@pytest.mark.parametrize("wire_dtype", ["float32", "float64"])
def test_one_wire_dtype_for_all_parameters(client, name, opt, wire_dtype):
    opt.close()
    wired = client.optimizer(name, wire_dtype=wire_dtype)
    native = client.create_optimizer(f"{name}-native", optserve.Adadelta(), PARAMS)
    for seed in range(2):
        values = {key: np.asarray(value.astype(np.float32), value.dtype) for key, value in grads(seed).items()}
        updates, expected = wired.step(values), native.step(values)
        for key, param in PARAMS.items():
            assert updates[key].dtype == param.dtype
            np.testing.assert_allclose(updates[key], expected[key], rtol=1e-7 if wire_dtype == "float32" else 0)


def test_replay_gets_the_last_updates_again(opt):
    with pytest.raises(optserve.FailedPreconditionError, match="nothing to replay"):
        opt.replay()
    updates = opt.step(grads())
    assert all(np.array_equal(again, updates[name]) for name, again in opt.replay().items())
    partial = opt.step({"b": grads()["b"]}, partial=True)
    again = opt.replay()
    assert list(again) == ["b"]
    assert np.array_equal(again["b"], partial["b"])
    assert opt.current_step == 2


def test_a_second_client_that_steps_is_noticed(client, name, opt):
    other = client.optimizer(name, transport="grpc")
    other.step(grads())
    with pytest.raises(optserve.WrongStepError) as caught:
        opt.step(grads())
    assert caught.value.current_step == 1
    opt.refresh()
    opt.step(grads())
    assert opt.current_step == 2


def test_hyperparameters_change_on_a_live_optimizer(client, name):
    opt = client.create_optimizer(name, optserve.Sgd(learning_rate=1.0), {"x": optserve.TensorSpec((2,))})
    g = {"x": np.array([1, 2], np.float32)}
    assert opt.step(g)["x"].tolist() == [-1, -2]
    opt.update(optserve.Sgd(learning_rate=0.5))
    assert opt.algorithm == optserve.Sgd(learning_rate=0.5)
    assert opt.step(g)["x"].tolist() == [-0.5, -1]
    with pytest.raises(optserve.InvalidArgumentError, match="fixed at creation"):
        opt.update(optserve.Adadelta())


def test_optimizers_are_listed_and_deleted(client, name, opt):
    opt.step(grads())
    (listed,) = [item for item in client.list_optimizers() if item.name == name]
    assert listed.step == 1
    client.delete_optimizer(name)
    with pytest.raises(optserve.NotFoundError, match=name):
        opt.step(grads())
    with pytest.raises(optserve.NotFoundError):
        client.delete_optimizer(name)
    client.delete_optimizer(name, missing_ok=True)


def test_parameters_may_be_tensors_of_another_library(client, name):
    import torch

    model = torch.nn.Linear(3, 2)
    opt = client.create_optimizer(name, optserve.Adadelta(), dict(model.named_parameters()))
    model(torch.ones(3)).sum().backward()
    updates = opt.step({key: present(param.grad).numpy() for key, param in model.named_parameters()})
    assert updates["weight"].shape == (2, 3)


def test_errors_of_creation(client, name, opt):
    with pytest.raises(optserve.AlreadyExistsError):
        client.create_optimizer(name, optserve.Adadelta(), PARAMS)
    with pytest.raises(optserve.InvalidArgumentError) as caught:
        client.create_optimizer(f"{name}-2", optserve.Adadelta(rho=1.0), PARAMS)
    assert caught.value.field == "optimizer.algorithm.adadelta.rho"
    assert caught.value.reason == "HYPERPARAMETER_OUT_OF_RANGE"
    with pytest.raises(optserve.InvalidArgumentError, match="'w' is int64"):
        client.create_optimizer(f"{name}-2", optserve.Adadelta(), {"w": np.zeros(3, np.int64)})


def test_dtypes_and_transports_that_do_not_exist_are_refused(client, name, opt):
    with pytest.raises(optserve.InvalidArgumentError, match="int8"):
        client.optimizer(name, wire_dtype="int8")
    with pytest.raises(optserve.InvalidArgumentError, match="not converted"):
        client.optimizer(name, transport="shm", wire_dtype="bfloat16")


@pytest.mark.parametrize("stream", ["open", "closed"])
@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_an_old_handle_says_that_its_optimizer_was_made_anew(client, name, transport, stream):
    params = {"x": np.zeros(3)}
    client.create_optimizer(name, optserve.Sgd(1.0), params)
    old = client.optimizer(name, transport=transport)
    for _ in range(2):
        old.step({"x": np.ones(3)})
    if stream == "closed":
        old.close()
    client.delete_optimizer(name)
    with pytest.raises(optserve.NotFoundError if stream == "open" else optserve.OptserveError):
        old.step({"x": np.ones(3)})
    new = client.create_optimizer(name, optserve.Sgd(1.0), params)
    for _ in range(2):
        with pytest.raises(optserve.StateReplacedError) as caught:
            old.step({"x": np.ones(3)})
        assert caught.value.reason == "STATE_REPLACED"
    new.refresh()
    assert new.current_step == 0
    old.refresh()
    old.step({"x": np.ones(3)})
    assert old.current_step == 1


def test_an_object_that_was_closed_for_good_interrupts_its_step_and_makes_no_other(client, name):
    params = {"x": np.ones(3, np.float32)}
    opt = client.create_optimizer(name, optserve.Sgd(), params)
    # The second where the step has not begun yet.
    with pytest.raises((optserve.StepCancelledError, optserve.ClientUseError)), opt.begin_step():
        opt.close(for_good=True)
    with pytest.raises(optserve.ClientUseError, match="was closed for good"):
        opt.step(params)
    client.optimizer(name).step(params)
    assert client.optimizer(name).current_step == 1
