"""The network's gradients are those of its loss."""

import numpy as np
import pytest
import torch

from optserve_demo.mnist.network import ACTIVATIONS, Network
from present import present

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
            hidden = getattr(torch, "sigmoid" if activation == "logistic" else activation)(hidden)
    expected = torch.nn.functional.cross_entropy(hidden, torch.tensor(labels))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for name, param in params.items():
        np.testing.assert_allclose(network.grads[name], present(param.grad).numpy(), rtol=1e-4, atol=1e-6)


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


def widened(network: Network) -> Network:
    """The network in float64, in which second differences can be taken."""
    for arrays in (network.params, network.grads, network.curvature):
        arrays.update({name: array.astype(np.float64) for name, array in arrays.items()})
    return network


def second_difference(network: Network, name: str, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The diagonal of the Hessian with respect to one parameter, by finite differences of the loss."""
    h, param = 1e-4, network.params[name]
    diagonal = np.empty_like(param)
    for place in np.ndindex(param.shape):
        before = param[place]
        losses = []
        for shift in (-h, 0.0, h):
            param[place] = before + shift
            losses.append(network.loss_and_gradients(images, labels))
        param[place] = before
        diagonal[place] = (losses[0] - 2 * losses[1] + losses[2]) / h**2
    return diagonal


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_curvature_of_the_last_layer_is_the_diagonal_of_the_hessian(activation):
    rng = np.random.default_rng(1)
    network = widened(Network(SIZES, activation, rng))
    images, labels = rng.standard_normal((6, 7)), rng.integers(0, 3, 6)
    network.loss_and_gradients(images, labels, with_curvature=True)
    curvature = {name: array.copy() for name, array in network.curvature.items()}
    for name in ("w3", "b3"):
        np.testing.assert_allclose(curvature[name], second_difference(network, name, images, labels), atol=2e-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_curvature_is_that_of_the_hessian_where_no_two_ways_lead_through_a_layer(activation):
    """Each unit feeds one unit of the next layer, so that what the propagation neglects is 0."""
    rng = np.random.default_rng(2)
    network = widened(Network((4, 6, 3, 3), activation, rng))
    for name, width in (("w2", 3), ("w3", 3)):
        weights = network.params[name]
        weights *= np.arange(weights.shape[0])[:, None] % width == np.arange(width)
        weights *= 3
    for bias in ("b1", "b2", "b3"):
        # A unit whose inputs are all 0 would lie on the kink of the rectifier.
        network.params[bias] += rng.uniform(0.1, 0.2, network.params[bias].shape)
    images, labels = rng.standard_normal((5, 4)), rng.integers(0, 3, 5)
    network.loss_and_gradients(images, labels, with_curvature=True)
    curvature = {name: array.copy() for name, array in network.curvature.items()}
    if activation == "tanh":
        assert min(array.min() for array in curvature.values()) < -1e-3  # the part of the second derivative
    for name in ("w1", "b1", "w2", "b2"):
        kept = network.params[name] != 0 if name == "w2" else np.ones(network.params[name].shape, bool)
        expected = second_difference(network, name, images, labels)
        np.testing.assert_allclose(curvature[name][kept], expected[kept], atol=2e-7)
