"""The network's gradients are those of its loss."""

import numpy as np
import pytest
import torch

from optserve.examples.mnist.network import ACTIVATIONS, Network

SIZES = (7, 5, 4, 3)


def batch(rng):
    return rng.standard_normal((6, 7)).astype(np.float32), rng.integers(0, 3, 6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_loss_and_gradients_agree_with_torch(activation):
    rng = np.random.default_rng(0)
    network = Network(SIZES, activation, rng)
    images, labels = batch(rng)
    loss = network.loss_and_gradients(images, labels)
    params = {name: torch.tensor(value, requires_grad=True) for name, value in network.params.items()}
    hidden = torch.tensor(images)
    for layer in (1, 2, 3):
        hidden = hidden @ params[f"w{layer}"] + params[f"b{layer}"]
        if layer < 3:
            hidden = getattr(torch, activation)(hidden)
    expected = torch.nn.functional.cross_entropy(hidden, torch.tensor(labels))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for name, param in params.items():
        np.testing.assert_allclose(network.grads[name], param.grad.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_initial_weights_depend_on_the_seed_alone_and_keep_the_signal(activation):
    one, again, other = (Network((784, 500, 300, 10), activation, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(one.params[name], again.params[name]) for name in one.params)
    assert not np.array_equal(one.params["w1"], other.params["w1"])
    assert sum(param.size for param in one.params.values()) == 545_810
    variance = 2 / (784 if activation == "relu" else 784 + 500)
    assert one.params["w1"].var() == pytest.approx(variance, rel=0.02)
    assert one.params["w3"].var() == pytest.approx(2 / 310, rel=0.1)


def test_the_error_is_the_share_of_wrong_answers():
    network = Network((2, 2), "tanh", np.random.default_rng(0))
    network.params["w1"][:] = np.eye(2)
    images = np.array([[1, 0], [0, 1], [2, 1], [1, 2]], np.float32)
    assert network.error(images, np.array([0, 1, 1, 1])) == 0.25
