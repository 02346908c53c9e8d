"""torch's own tables of optimizer settings: RemoteOptimizer beside torch's class, and what it refuses."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import optserve
import optserve.torch
from present import present

STEPS = 100
METHODS: dict[type[torch.optim.Optimizer], Callable[[dict[str, Any]], optserve.Algorithm]] = {
    torch.optim.Adadelta: lambda _: optserve.Adadelta(rho=0.9),
    torch.optim.Adagrad: lambda _: optserve.Adagrad(),
    torch.optim.Adam: lambda _: optserve.Adam(),
    torch.optim.AdamW: lambda _: optserve.AdamW(),
    torch.optim.NAdam: lambda _: optserve.Nadam(learning_rate=2e-3),
    torch.optim.RMSprop: lambda given: optserve.CenteredRmsprop() if given.get("centered") else optserve.Rmsprop(),
    torch.optim.SGD: lambda _: optserve.SgdMomentum(learning_rate=1e-3, momentum=0.0),
}
"""The method of the service with the defaults of each class of torch."""

REFUSED = {
    ("Adagrad", "lr_decay"): "LambdaLR",
    ("Adam", "amsgrad"): "maximum",
    ("AdamW", "amsgrad"): "maximum",
    # A graph of a device cannot contain a call to another process.
    **{(name, "capturable"): "graph" for name in ("Adadelta", "Adam", "AdamW", "NAdam", "RMSprop")},
}
"""What of torch's inputs is refused, by class and setting, with a word of the reason that the error gives."""

ACCEPTED = {
    "lr as Tensor doesn't work with foreach & not capturable": "foreach says how torch computes, and rates are numbers",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": "likewise",
    "betas must be either both floats or both Tensors": "betas are numbers here, from wherever they come",
}
"""torch's error inputs that are no errors here, and why."""

INFOS = {info.optim_cls: info for info in optim_db if info.optim_cls in METHODS}
INPUTS = [
    pytest.param(kind, each.kwargs, id=f"{kind.__name__}-{each.desc}")
    for kind, info in INFOS.items()
    for each in info.optim_inputs_func(device="cpu")
]
CUDA_INPUTS = [
    pytest.param(kind, each.kwargs, id=f"{kind.__name__}-{each.desc}")
    for kind, info in INFOS.items()
    for each in info.optim_inputs_func(device="cuda")
    if each.kwargs.get("capturable")
]
ERRORS = [
    pytest.param(kind, each, id=f"{kind.__name__}-{each.optimizer_error_input.desc}")
    for kind, info in INFOS.items()
    for each in present(info.optim_error_inputs_func)(device="cpu", dtype=torch.float32)
]


def test_the_tables_have_every_method_that_both_have():
    assert set(INFOS) == set(METHODS)
    assert len(INPUTS) > 45
    assert len(ERRORS) > 45


class Problem:
    """A small network whose loss is not convex, and its optimizer."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.w, self.b, self.scale = (torch.nn.Parameter(draw(*shape)) for shape in ((4, 3), (4,), ()))
        self.x, self.y = draw(16, 3), draw(16, 4)
        self.parameters = [self.w, self.b, self.scale]

    def train(self, optimizer: torch.optim.Optimizer, gradients: list[list[torch.Tensor]] | None = None):
        """The parameters after all steps, and the gradients of each step; from others if they are given."""
        taken = []
        for step in range(STEPS):
            optimizer.zero_grad()
            if gradients is None:
                out = torch.tanh(self.x @ self.w.T + self.b) * self.scale
                # Bounded, so that it can be maximized too.
                torch.sin(out - self.y).mean().backward()
            else:
                for parameter, gradient in zip(self.parameters, gradients[step], strict=True):
                    parameter.grad = gradient.clone()
            taken.append([present(parameter.grad).clone() for parameter in self.parameters])
            optimizer.step()
        return [parameter.detach() for parameter in self.parameters], taken


@pytest.fixture
def dtype(request):
    """torch's default dtype as well, in which its NAdam keeps a product."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], indirect=True)
@pytest.mark.parametrize(("kind", "given"), INPUTS)
def test_every_input_of_torch_gives_torchs_result(client, kind, given, dtype):
    refused = [word for (name, setting), word in REFUSED.items() if name == kind.__name__ and given.get(setting)]
    ours = Problem(dtype)
    if refused:
        with pytest.raises(optserve.InvalidArgumentError, match=refused[0]):
            optserve.torch.RemoteOptimizer(ours.parameters, client, METHODS[kind](given), **given)
        return
    theirs = Problem(dtype)
    expected, gradients = theirs.train(kind(theirs.parameters, **given))
    with optserve.torch.RemoteOptimizer(ours.parameters, client, METHODS[kind](given), **given) as optimizer:
        # With a loss of its own, a difference of one rounding grows in float32 where gradients vanish.
        actual, _ = ours.train(optimizer, None if dtype is torch.float64 else gradients)
        assert optimizer.remote.current_step == STEPS
    tolerance: dict[str, Any] = (
        {"rtol": 5e-6, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    )
    torch.testing.assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize(("kind", "given"), CUDA_INPUTS)
def test_inputs_for_graphs_of_a_device_are_refused(client, kind, given):
    word = REFUSED[kind.__name__, "capturable"]
    with pytest.raises(optserve.InvalidArgumentError, match=f"{word}|maximum"):
        optserve.torch.RemoteOptimizer(Problem(torch.float32).parameters, client, METHODS[kind](given), **given)


@pytest.mark.parametrize(("kind", "error"), ERRORS)
def test_every_error_input_of_torch_is_an_error_here(client, kind, error):
    given = error.optimizer_error_input
    assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    params = Problem(torch.float32).parameters if given.params is None else given.params
    if given.desc in ACCEPTED:
        optserve.torch.RemoteOptimizer(params, client, METHODS[kind](given.kwargs), **given.kwargs).close()
        return
    before = [found.name for found in client.list_optimizers()]
    with warnings.catch_warnings():
        # A parameter that is twice in a group is a warning for torch, and an error here.
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises((ValueError, TypeError)):
            optserve.torch.RemoteOptimizer(params, client, METHODS[kind](given.kwargs), **given.kwargs)
    assert [found.name for found in client.list_optimizers()] == before
