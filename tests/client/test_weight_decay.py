"""Weight decay in delta mode, where it is added to the gradient by the client."""

import numpy as np
import pytest
import torch

import optserve

SHAPES = {"w": (20, 3), "b": (3,)}


@pytest.mark.parametrize(
    ("algorithm", "peer"),
    [
        (optserve.Adadelta(rho=0.9, eps=1e-6), lambda p: torch.optim.Adadelta(p, rho=0.9, eps=1e-6, weight_decay=0.1)),
        (optserve.Sgd(learning_rate=0.1), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1)),
    ],
    ids=["adadelta", "sgd"],
)
def test_a_run_with_it_is_torchs(client, name, algorithm, peer):
    rng = np.random.default_rng(5)
    params = {key: rng.standard_normal(shape) for key, shape in SHAPES.items()}
    theirs = {key: torch.nn.Parameter(torch.tensor(param)) for key, param in params.items()}
    optimizer, reference = client.create_optimizer(name, algorithm, params), peer(theirs.values())
    for _ in range(50):
        grads = {key: rng.standard_normal(shape) for key, shape in SHAPES.items()}
        for key, update in optimizer.step(optserve.with_weight_decay(grads, params, 0.1)).items():
            params[key] += update
            theirs[key].grad = torch.tensor(grads[key])
        reference.step()
    for key, param in params.items():
        np.testing.assert_allclose(param, theirs[key].detach().numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gradients_keep_their_dtype_and_are_not_changed(dtype):
    grads, params = {"w": np.ones(4, dtype)}, {"w": np.full(4, 2, dtype)}
    decayed = optserve.with_weight_decay(grads, params, 0.5)["w"]
    assert decayed.dtype == dtype
    assert decayed.tolist() == [2] * 4
    assert grads["w"].tolist() == [1] * 4


def test_only_the_parameters_named_decay():
    grads = {"w": np.ones(2), "b": np.ones(1)}
    decayed = optserve.with_weight_decay(grads, {"w": np.ones(2), "b": np.ones(1)}, {"w": 0.25, "b": 0})
    assert decayed["w"].tolist() == [1.25, 1.25]
    assert decayed["b"] is grads["b"]


@pytest.mark.parametrize(
    ("params", "weight_decay", "message"),
    [
        ({"w": np.ones(2)}, -0.1, "finite and not negative"),
        ({"w": np.ones(2)}, float("nan"), "finite and not negative"),
        ({"w": np.ones(2)}, {"v": 0.1}, "no parameter 'v'"),
        ({}, 0.1, "no parameter 'w'"),
        ({"w": np.ones(1)}, 0.1, r"float64\[2\], the parameter float64\[1\]"),
        ({"w": np.ones(2, np.float32)}, 0.1, r"the parameter float32"),
    ],
)
def test_what_cannot_be_decayed_is_refused(params, weight_decay, message):
    grads = {"w": np.ones(2)}
    with pytest.raises(optserve.InvalidArgumentError, match=message):
        optserve.with_weight_decay(grads, params, weight_decay)
